import Foundation
import Testing

@testable import HierMemKit

struct RoutingTests {
  private struct Golden: Decodable {
    let paths: [String]
    let avoided: [String]
    let distances: [[Float]]
    let blocked: [String]
    let onBlocked: BankPolicy.OnBlocked
    let reach: Float?
    let passageReach: Float?
    /// The leaves that a beam search finds.
    let beams: [String]?
    /// To the nearest passage, of a bank with sources.
    let passages: [Float?]?
    let far: [Bool]?

    enum CodingKeys: String, CodingKey {
      case paths, avoided, distances, blocked, reach, beams, passages, far
      case onBlocked = "on_blocked"
      case passageReach = "passage_reach"
    }

    var policy: BankPolicy {
      get throws {
        BankPolicy(
          blocked: Set(try blocked.map(NodePath.init(parsing:))), onBlocked: onBlocked, reach: reach ?? .infinity,
          passageReach: passageReach ?? .infinity)
      }
    }
  }

  /// A thousand vectors, where Python sends them.
  @Test(arguments: ["elements", "ragged", "sibling", "parent", "reach"])
  func routesAsPython(_ name: String) throws {
    let isElements = name == "elements"
    let file = isElements
      ? Fixtures.elements.appendingPathComponent("tree.safetensors") : Fixtures.url("ragged-tree.safetensors")
    let tree = try ClusterTree(contentsOf: file)
    let goldens: [String: Golden] = try Fixtures.decode("routes.json")
    let golden = try #require(goldens[name])
    let policy = try golden.policy
    let vectors = isElements
      ? Fixtures.uniform(1, 1000, 384).map { $0.map { $0 / 16 } } : Fixtures.uniform(2, 1000, 16)
    #expect(golden.paths.count == vectors.count)
    for (index, vector) in vectors.enumerated() {
      let route = try tree.route(vector, policy: policy)
      #expect(route.path.description == golden.paths[index])
      #expect(route.isFar == (name == "reach" && golden.paths[index].isEmpty))
      #expect(route.avoided.map(\.description).joined(separator: " ") == golden.avoided[index])
      if index < golden.distances.count {
        #expect(route.distances.count == golden.distances[index].count)
        for (a, b) in zip(route.distances, golden.distances[index]) { #expect(abs(a - b) < 1e-5) }
      }
    }
    for (vector, beam) in zip(vectors, golden.beams ?? []) {
      #expect(tree.beam(vector, width: 8).map(\.description).joined(separator: " ") == beam)
    }
  }

  /// In a bank with sources, under policies that block, reach and do neither.
  @Test(arguments: ["open", "passage reach", "reach", "both", "sibling", "parent", "closed"])
  func routesByPassagesAsPython(_ name: String) async throws {
    let bank = try Fixtures.tinyBank()
    let goldens: [String: Golden] = try Fixtures.decode("routes.json")
    let golden = try #require(goldens["passages, \(name)"])
    let (passages, far) = (try #require(golden.passages), try #require(golden.far))
    let vectors = Fixtures.uniform(5, golden.paths.count, bank.tree.dimension).map { vector in
      let length = vector.reduce(0) { $0 + $1 * $1 }.squareRoot()
      return vector.map { $0 / length }
    }
    let numbered = Dictionary(uniqueKeysWithValues: vectors.enumerated().map { ("\($0)", $1) })
    let router = MemoryRouter(
      tree: bank.tree, embedder: KnownEmbedder(vectors: numbered), policy: try golden.policy,
      sources: try BankSources(folder: bank.folder, tree: bank.tree))
    #expect(bank.sources == nil)  // its manifest names none
    for index in vectors.indices {
      let route = try await router.turn("\(index)", topic: nil).alone
      #expect(route.path.description == golden.paths[index])
      #expect(route.isFar == far[index])
      #expect(route.avoided.map(\.description).joined(separator: " ") == golden.avoided[index])
      #expect((route.passage == nil) == (passages[index] == nil))
      #expect(abs((route.passage ?? 0) - (passages[index] ?? 0)) < 1e-5)
      #expect(route.distances.count == golden.distances[index].count)
      for (a, b) in zip(route.distances, golden.distances[index]) { #expect(abs(a - b) < 1e-5) }
    }
  }

  /// Where a passage lacks a text's rare words, and where it has them.
  @Test func countsWordsAsPython() async throws {
    struct Words: Decodable {
      let texts: [String]
      let passage_reach: Float
      let vectors: [String: [Float]]
      let pieces: [String: Set<Int>]
      let paths: [String]
      let passages: [Float]
      let far: [Bool]
    }
    let (bank, golden): (MemoryBank, Words) = (try Fixtures.tinyBank(), try Fixtures.decode("words.json"))
    let router = MemoryRouter(
      tree: bank.tree, embedder: KnownEmbedder(vectors: golden.vectors, pieces: golden.pieces),
      policy: BankPolicy(passageReach: golden.passage_reach),
      sources: try BankSources(folder: bank.folder, tree: bank.tree))
    for (index, text) in golden.texts.enumerated() {
      let route = try await router.turn(text, topic: nil).alone
      #expect(route.path.description == golden.paths[index])
      #expect(route.isFar == golden.far[index])
      #expect(abs((route.passage ?? 0) - golden.passages[index]) < 1e-5)
    }
    #expect(Set(golden.far) == [true, false])
  }

  @Test func refusesSourcesOfAnotherBank() async throws {
    let folder = try Fixtures.copy("bank")
    let ragged = try ClusterTree(contentsOf: Fixtures.url("ragged-tree.safetensors"))
    let error = await hierMemError { _ = try BankSources(folder: folder, tree: ragged) }
    #expect(error?.what.contains("another tree") == true)
    let elements = try ClusterTree(contentsOf: Fixtures.elements.appendingPathComponent("tree.safetensors"))
    #expect(await hierMemError { _ = try BankSources(folder: folder, tree: elements) }?.kind == .bank)
    try FileManager.default.removeItem(at: folder.appendingPathComponent("sources"))
    let own = try MemoryBank(folder: folder, downloads: folder).tree
    #expect(await hierMemError { _ = try BankSources(folder: folder, tree: own) }?.kind == .bank)
  }

  private struct GoldenTalks: Decodable {
    let reach: Float
    let talks: [[GoldenTurn]]
  }

  private struct GoldenTurn: Decodable {
    let text: String
    let alone: String
    let path: String
    let topic: String
    let stayed: Bool
    let far: Bool
    let decided: Double
    let needed: Double
    let belongs: Double?
  }

  /// Real conversations with changes of subject, with embeddings of the real MiniLM.
  @Test func turnsGoWherePythonSendsThem() async throws {
    let file = try SafetensorsFile(contentsOf: Fixtures.url("inputs/conversations.safetensors"))
    let values = try file.withBytes(of: "vectors") { bytes in
      (0..<bytes.count / 2).map { StoredScalar.float16.load(bytes, $0) }
    }
    let texts: [String] = try Fixtures.decode("inputs/conversations.json")
    let vectors = Dictionary(
      uniqueKeysWithValues: texts.enumerated().map { ($1, Array(values[$0 * 384..<($0 + 1) * 384])) })
    let tree = try ClusterTree(contentsOf: Fixtures.elements.appendingPathComponent("tree.safetensors"))
    let golden: GoldenTalks = try Fixtures.decode("turns.json")
    let router = MemoryRouter(
      tree: tree, embedder: KnownEmbedder(vectors: vectors), policy: BankPolicy(reach: golden.reach))
    #expect(golden.talks.joined().contains { $0.stayed })
    #expect(golden.talks.joined().filter(\.far).count > 20)
    for talk in golden.talks {
      var topic: ChatTopic?
      for golden in talk {
        let turn = try await router.turn(golden.text, topic: topic)
        topic = turn.topic
        #expect(turn.alone.path.description == golden.alone)
        #expect(turn.path.description == golden.path, "\(golden.text)")
        #expect(turn.topic.path.description == golden.topic)
        #expect(turn.stayed == golden.stayed)
        #expect(turn.route.isFar == golden.far)
        #expect(abs(turn.decided - golden.decided) < 1e-5)
        #expect(abs(turn.needed - golden.needed) < 1e-5)
        #expect((turn.belongs == nil) == (golden.belongs == nil))
        #expect(abs((turn.belongs ?? 0) - (golden.belongs ?? 0)) < 1e-5)
      }
    }
  }

  @Test func aBlockedTopicIsLeft() async throws {
    let tree = try ClusterTree(contentsOf: Fixtures.url("ragged-tree.safetensors"))
    let vector = Fixtures.uniform(3, 1, 16)[0]
    let router = MemoryRouter(tree: tree, embedder: KnownEmbedder(vectors: ["": vector]))
    let alone = try tree.route(vector).path
    let other = try #require(tree.children(of: .root).first { !alone.isWithin($0) })
    let held = try await router.turn("", topic: ChatTopic(path: other, decided: 100))
    #expect(held.path == other)
    #expect(held.stayed)
    let freed = try await router.turn("", topic: ChatTopic(path: other, decided: 100), blocked: [other])
    #expect(freed.path == alone)
    #expect(!freed.stayed)
  }

  @Test func refusesWhatDoesNotFit() async throws {
    let tree = try ClusterTree(contentsOf: Fixtures.url("ragged-tree.safetensors"))
    let vector = [Float](repeating: 0, count: 16)
    #expect(await hierMemError { _ = try tree.route([1, 2]) }?.kind == .usage)
    let absent = BankPolicy(blocked: [try NodePath("9")])
    #expect(await hierMemError { _ = try tree.route(vector, policy: absent) }?.kind == .bank)
    #expect(!tree.has(try NodePath("4")))
    #expect(!tree.has(.root))
    #expect(!tree.has(try NodePath("0.0.0.0")))
    let block = Fixtures.url("bank/blocks/0.safetensors")
    #expect(await hierMemError { _ = try ClusterTree(contentsOf: block) }?.kind == .bank)
  }
}
