import Foundation
import Testing

@testable import HierMemKit

struct ChatSessionTests {
  private let golden: SessionGolden
  private let anchor: TinyAnchor
  private let model: ChatModel
  /// The same with memory for what is near only.
  private let narrow: ChatModel
  /// The same with the bank's sources.
  private let learnt: ChatModel
  /// With the sources, and memory for what is near to a passage.
  private let near: ChatModel

  init() throws {
    golden = try SessionGolden.read()
    let bank = try Fixtures.tinyBank()
    anchor = TinyAnchor(vocabulary: 400, hidden: bank.manifest.memory.hidden, context: golden.context)
    let tokenizer = try JSONTokenizer(contentsOf: Fixtures.url("inputs/digits/tokenizer.json"))
    let (known, worded) = (KnownEmbedder(vectors: golden.vectors), KnownEmbedder(vectors: golden.worded))
    let (anchor, golden) = (anchor, golden)
    func model(_ router: MemoryRouter) -> ChatModel {
      ChatModel(
        anchor: anchor, tokenizer: tokenizer, format: golden.format, eos: Set(golden.eos), router: router,
        blocks: BlockCache(bank: bank))
    }
    self.model = model(MemoryRouter(tree: bank.tree, embedder: known))
    narrow = model(MemoryRouter(tree: bank.tree, embedder: known, policy: BankPolicy(reach: golden.reach)))
    let sources = try BankSources(folder: bank.folder, tree: bank.tree)
    learnt = model(MemoryRouter(tree: bank.tree, embedder: worded, sources: sources))
    let policy = BankPolicy(passageReach: golden.passageReach)
    near = model(MemoryRouter(tree: bank.tree, embedder: worded, policy: policy, sources: sources))
  }

  private func say(_ session: ChatSession, _ text: String) async throws -> (start: ChatStart?, reply: String) {
    var said: (start: ChatStart?, reply: String) = (nil, "")
    for try await event in session.ask(text) {
      switch event {
      case .started(let start): said.start = start
      case .text(let piece, _): said.reply += piece
      }
    }
    return said
  }

  @Test(arguments: ["fetched", "blocked", "generic", "path", "none", "reach", "source", "fetched+source", "whole", "near"])
  func goesAsInPython(_ name: String) async throws {
    let expected = try #require(golden.sessions[name])
    let options = ChatOptions(
      memory: try MemoryChoice(parsing: expected.memory), system: expected.system, maxTokens: golden.maxTokens,
      blocked: Set(try expected.blocked.map(NodePath.init(parsing:))), history: name == "whole" ? .all : .topic)
    let model = name == "reach" ? narrow : name == "near" ? near : options.memory.hasPassage ? learnt : model
    let session = ChatSession(model: model, options: options)
    for turn in expected.turns {
      await anchor.clearCalls()
      let (start, reply) = try await say(session, turn.text)
      #expect(Array(reply.utf8) == Array(turn.reply.utf8))
      #expect(await session.topic?.path.description ?? "" == turn.path)
      #expect(start?.turn?.stayed ?? false == turn.stayed)
      #expect(start?.turn?.route.isFar ?? false == turn.far)
      #expect(start?.nodes.map { $0 == .generic ? "generic" : $0.description } == turn.blocks)
      #expect(start?.passage?.title == turn.passage)
      let said = try await session.sources()
      #expect(said?.map { "\($0.name): \($0.sentence)" } == turn.sources)
      #expect(await session.firstShown == turn.shown)
      #expect(await anchor.calls.first == turn.prefilled)
    }
    let roles = await session.messages.map(\.role)
    #expect(roles == expected.turns.flatMap { _ in [ChatMessage.Role.user, .assistant] })
  }

  @Test func theTinyAnchorIsPythons() async throws {
    let blocks = try #require(model.blocks)
    let prompt = try golden.format.prompt([ChatMessage(.user, "What is the atomic number of neon?")])
    for expected in golden.logits {
      let fetch: MemoryFetch? = switch try MemoryChoice(parsing: expected.memory) {
      case .none, .fetched, .source, .fetchedWithSource: nil
      case .generic: try await blocks.fetchGeneric()
      case .path(let path): try await blocks.fetch(path)
      }
      await anchor.attach(fetch?.memory)
      let logits = try await anchor.logits(after: model.tokenizer.encode(prompt, markup: true), at: 0)
      for (found, wanted) in zip(logits, expected.logits) {
        #expect(abs(Double(found) - wanted) < 1e-4 * max(1, abs(wanted)))
      }
    }
  }

  @Test func aMemoryIsWrittenInOneWay() throws {
    for text in ["none", "generic", "fetched", "source", "fetched+source", "3.1"] {
      #expect(try MemoryChoice(parsing: text).description == text)
    }
    for earlier in ["auto", "on", "routed"] {
      #expect(try MemoryChoice(parsing: earlier) == .fetched)
    }
    #expect(try MemoryChoice(parsing: "off") == MemoryChoice.none)
    #expect(throws: HierMemError.self) { try MemoryChoice(parsing: "lots") }
  }

  @Test func equalSeedsGiveEqualReplies() async throws {
    func replies(_ seed: UInt64) async throws -> [String] {
      let options = ChatOptions(
        memory: .none, maxTokens: 12, sampling: .init(temperature: 1, topP: 0.9), seed: seed)
      let session = ChatSession(model: model, options: options)
      return [try await say(session, "Hi").reply, try await say(session, "And?").reply]
    }
    let first = try await replies(1)
    #expect(try await replies(1) == first)
    #expect(try await replies(2) != first)
  }

  @Test func aTooLongQuestionChangesNothing() async throws {
    let session = ChatSession(model: model, options: ChatOptions(memory: .none, maxTokens: golden.maxTokens))
    _ = try await say(session, "Hi")
    let error = await hierMemError { _ = try await say(session, String(repeating: "neon ", count: 400)) }
    #expect(error?.kind == .context)
    #expect(await session.messages.count == 2)
    #expect(await session.firstShown == 0)
  }

  @Test func aFailureLeavesAUsableConversation() async throws {
    let options = ChatOptions(maxTokens: 10)
    let (session, untroubled) = (ChatSession(model: model, options: options), ChatSession(model: model, options: options))
    let question = "What is the atomic number of neon?"
    await anchor.failAtCall(1)
    #expect(await hierMemError { _ = try await say(session, question) }?.kind == .model)
    #expect(await session.messages.isEmpty)
    #expect(await session.topic == nil)
    let reply = try await say(session, question).reply
    #expect(try await say(untroubled, question).reply == reply)
    await anchor.failAtCall(4)  // in the midst of the reply, which stays as far as it went
    #expect(await hierMemError { _ = try await say(session, "And its symbol?") }?.kind == .model)
    #expect(await session.messages.count == 4)
    #expect(try await !say(session, "Is it a metal?").reply.isEmpty)
  }

  @Test func aConversationFromElsewhereIsTakenUpAsAWhole() async throws {
    let turns = try #require(golden.sessions["fetched"]).turns
    let session = ChatSession(model: model, options: ChatOptions())
    let talk = [ChatMessage(.user, turns[0].text), ChatMessage(.assistant, turns[0].reply)]
    try await session.resume(talk, options: ChatOptions(maxTokens: golden.maxTokens))
    #expect(await session.messages == talk)
    #expect(await session.topic?.path.description == turns[0].path)
    let unknown = [ChatMessage(.user, turns[0].text), ChatMessage(.assistant, "?"), ChatMessage(.user, "no vector")]
    #expect(await hierMemError { try await session.resume(unknown, options: ChatOptions()) }?.kind == .usage)
    #expect(await session.messages.isEmpty)
    #expect(await session.topic == nil)
  }

  @Test func aPassageHasAKeyOfItsOwn() {
    var cache = KeyValueCache()
    let plain = MemoryKey(choice: nil, nodes: [])
    #expect(cache.reuse([1, 2, 3], under: plain) == 0)
    cache.append([1, 2, 3])
    #expect(cache.reuse([1, 2, 3], under: plain) == 2)
    #expect(cache.reuse([1, 2, 3], under: MemoryKey(choice: .source, nodes: [])) == 0)
    cache.append([1, 2, 3])
    #expect(cache.reuse([1, 2, 3], under: MemoryKey(choice: .fetchedWithSource, nodes: [])) == 0)
  }

  @Test func breakingOffKeepsWhatWasSaid() async throws {
    let session = ChatSession(model: model, options: ChatOptions(memory: .none, maxTokens: 200))
    var pieces = 0
    for try await event in session.ask("Hi") {
      if case .text = event { pieces += 1 }
      if pieces == 3 { break }
    }
    while await session.messages.count < 2 { try await Task.sleep(for: .milliseconds(1)) }
    #expect(await session.messages.last?.role == .assistant)
    #expect(try await !say(session, "And?").reply.isEmpty)
  }

  @Test func breakingOffBeforeTheFirstTokenForgetsTheQuestion() async throws {
    let session = ChatSession(model: model, options: ChatOptions(memory: .none, maxTokens: 10))
    await anchor.hold()
    let listener = Task { for try await _ in session.ask("Hi") {} }
    while await anchor.held == 0 { try await Task.sleep(for: .milliseconds(1)) }
    listener.cancel()
    _ = await listener.result
    async let settled: Void = session.settle()
    await anchor.release()
    await settled
    #expect(await session.messages.isEmpty)
    #expect(try await !say(session, "And?").reply.isEmpty)
  }

  @Test func oneQuestionAtATime() async throws {
    let session = ChatSession(model: model, options: ChatOptions(memory: .none, maxTokens: 10))
    await anchor.hold()
    var iterator = session.ask("Hi").makeAsyncIterator()
    _ = try await iterator.next()
    #expect(await hierMemError { _ = try await say(session, "And?") }?.kind == .usage)
    #expect(await hierMemError { try await session.reset() }?.kind == .usage)
    await anchor.release()
    while try await iterator.next() != nil {}
    try await session.reset()
    #expect(await session.messages.isEmpty)
  }

  @Test func preparingReadsAheadAndChangesNothing() async throws {
    let session = ChatSession(model: model, options: ChatOptions(maxTokens: 10))
    try await session.prepare(for: "What is the atomic number of neon?")
    #expect(await model.blocks?.statistics.misses == 2)
    #expect(await session.topic == nil)
    _ = try await say(session, "What is the atomic number of neon?")
    #expect(await model.blocks?.statistics.misses == 2)
  }

  @Test func refusesMemoriesThatThereAreNot() async throws {
    let bare = ChatModel(
      anchor: anchor, tokenizer: model.tokenizer, format: model.format, eos: model.eos)
    let session = ChatSession(model: bare, options: ChatOptions(memory: .generic))
    #expect(await hierMemError { _ = try await say(session, "Hi") }?.kind == .usage)
    let closed = ChatSession(
      model: model, options: ChatOptions(memory: .path(try NodePath("1.2")), blocked: [try NodePath("1")]))
    #expect(await hierMemError { _ = try await say(closed, "Hi") }?.what.contains("blocked (at 1)") == true)
    try await closed.use(.source)
    #expect(await hierMemError { _ = try await say(closed, "Hi") }?.hint.contains("--with-sources") == true)
    try await closed.use(.path(try NodePath("7")))
    #expect(await hierMemError { _ = try await say(closed, "Hi") }?.kind == .bank)
  }
}
