import Foundation
import Testing

@testable import HierMemKit

/// A folder that `hiermem export coreml` made, and what Python reads from it (tests/swift_export.py).
@Suite(.enabled(if: Fixtures.isMade("export.json"), "run by `make test-swift`"))
struct ExportTests {
  private struct Golden: Decodable {
    struct Text: Decodable {
      let text: String
      let ids: [Int]
    }

    struct Talk: Decodable {
      let messages: [ChatMessage]
      let prompt: String
      let ids: [Int]
    }

    struct ChatTurn: Decodable {
      let text: String
      let ids: [Int]
      let alone: String
      let path: String
      let stayed: Bool
    }

    struct Questions: Decodable {
      let talks: [[ChatTurn]]
      let vectors: [String: [Float]]
    }

    let texts: [Text]
    let talks: [Talk]
    let questions: Questions
    let sources: Bool
    let blocks: [String: [String: String]]
  }

  private let golden: Golden
  private let folder: ModelFolder

  init() throws {
    golden = try JSONDecoder().decode(Golden.self, from: Data(contentsOf: Fixtures.made("export.json")))
    folder = try ModelFolder(at: Fixtures.made("export"), downloads: Fixtures.temporaryFolder())
  }

  @Test func everyFileIsWhatTheManifestSays() throws {
    #expect(folder.manifest.files.count > 10)
    try folder.verify()
  }

  @Test func tokenizesAsPython() throws {
    for golden in golden.texts {
      #expect(try folder.tokenizer.encode(golden.text, markup: true) == golden.ids, "\(golden.text.debugDescription)")
    }
  }

  @Test func promptsAreTheChatTemplates() throws {
    let format = try #require(folder.manifest.chat)
    for talk in golden.talks {
      let prompt = try format.prompt(talk.messages)
      #expect(Array(prompt.utf8) == Array(talk.prompt.utf8))
      #expect(try folder.tokenizer.encode(format.parts(talk.messages)) == talk.ids)
    }
  }

  @Test func questionsGoWherePythonSendsThem() async throws {
    let (bank, retriever) = (try #require(folder.bank), try #require(folder.manifest.retriever))
    let tokenizer = try JSONTokenizer(contentsOf: folder.url.appendingPathComponent(retriever.tokenizer))
    let router = MemoryRouter(
      tree: bank.tree, embedder: KnownEmbedder(vectors: golden.questions.vectors), policy: bank.policy,
      sources: bank.sources)
    #expect((bank.sources != nil) == golden.sources)
    #expect(golden.questions.talks.joined().count > 30)
    for talk in golden.questions.talks {
      var topic: ChatTopic?
      for golden in talk {
        #expect(tokenizer.encodeFramed(golden.text, limit: retriever.lengths.last!) == golden.ids)
        let turn = try await router.turn(golden.text, topic: topic)
        topic = turn.topic
        #expect(turn.alone.path.description == golden.alone)
        #expect(turn.path.description == golden.path)
        #expect(turn.stayed == golden.stayed)
      }
    }
  }

  @Test func blocksHavePythonsBits() throws {
    let bank = try #require(folder.bank)
    let elsewhere = folder.manifest.bank?.download.count ?? 0
    #expect(golden.blocks.count + elsewhere == bank.manifest.blocks.count)
    for (path, digests) in golden.blocks {
      let block = try bank.read(NodePath(path))
      let file = Fixtures.temporaryFolder().appendingPathComponent("values")
      for (name, values) in block.tensors {
        try values.withUnsafeBytes { try Data($0).write(to: file) }
        #expect(try fileDigest(file) == digests[name])
      }
    }
  }
}
