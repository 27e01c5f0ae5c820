import Foundation
import Testing

@testable import HierMemKit

/// What a leaf has learnt: found, shown and put into a prompt as Python does it.
struct SourcesTests {
  private let golden: SessionGolden
  private let search: SourceSearch

  init() throws {
    golden = try SessionGolden.read()
    let bank = try Fixtures.tinyBank()
    search = SourceSearch(
      sources: try BankSources(folder: bank.folder, tree: bank.tree), embedder: KnownEmbedder(vectors: golden.worded))
  }

  @Test func findsWhatPythonFinds() async throws {
    #expect(golden.found.filter { !$0.sources.isEmpty }.count >= 5)
    for asked in golden.found {
      let found = try await search.find(in: NodePath(asked.leaf), question: asked.question, answer: asked.answer)
      #expect(found.count == asked.sources.count, "\(asked.question)")
      for (source, expected) in zip(found, asked.sources) {
        #expect(source.sentence == expected.sentence)
        #expect(source.document == expected.document)
        #expect(source.title == expected.title)
        #expect(source.place == expected.place)
        #expect(source.name == expected.name)
        #expect(abs(source.score - expected.score) < 2e-4)
      }
    }
  }

  @Test func aPassageIsAskedAboutInPythonsWords() async throws {
    for (asked, prompt) in zip(golden.found, golden.prompts) {
      let passage = try await search.passage(for: asked.question, in: NodePath(asked.leaf))
      #expect((passage == nil) == (prompt == [asked.question]))
      let said = [ChatMessage(.user, asked.question), ChatMessage(.assistant, "…")].with(passage)
      #expect(said.map { Array($0.content.utf8) } == (prompt + ["…"]).map { Array($0.utf8) })
    }
    #expect(try await search.passage(for: golden.found[0].question, in: .root) == nil)
  }

  @Test func sentencesEndWherePythonsDo() {
    for text in golden.sentences { #expect(Sentences.of(text.text) == text.sentences) }
    #expect(Sentences.plain == Set(golden.plain))
    #expect(Sentences.words("Boxes_1 glasses bus's ½ Äpfel") == ["boxes_1", "glass", "bus", "s", "½", "äpfel"])
  }

  @Test func refusesTextsThatAreNotTheIndexs() async throws {
    let folder = try Fixtures.copy("bank")
    let file = folder.appendingPathComponent("sources/windows.jsonl")
    let tree = try Fixtures.tinyBank().tree
    let text = try String(contentsOf: file, encoding: .utf8)
    try text.replacingOccurrences(of: "{\"leaf\": \"0.2\"", with: "}\"leaf\": \"0.2\"")
      .write(to: file, atomically: true, encoding: .utf8)
    let sources = try BankSources(folder: folder, tree: tree)
    let error = await hierMemError { _ = try sources.windows(of: NodePath("0.2")) }
    #expect(error?.what.contains("windows of 0.2") == true)
    #expect(try sources.windows(of: NodePath("0.1"))?.count == 3)
    #expect(try sources.windows(of: NodePath("1.0")) == nil)
    try Data("short".utf8).write(to: file)
    #expect(await hierMemError { _ = try sources.windows(of: NodePath("2.2")) }?.kind == .bank)
  }
}
