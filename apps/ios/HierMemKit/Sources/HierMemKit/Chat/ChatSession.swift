/// A conversation: its messages, the path it is on, and the key/value cache that goes with that path.
///
/// Each question is routed, and held on the conversation's path unless it is decided enough (see
/// ``ChatTopic``). After a change of blocks the whole prompt is computed again; otherwise only what is
/// new. A conversation that outgrows the context loses its oldest turns. The rules are those of
/// mlx_hiermem/session.py.
public actor ChatSession {
  public let model: ChatModel
  public private(set) var options: ChatOptions
  /// The user's and the assistant's.
  public private(set) var messages: [ChatMessage] = []
  public private(set) var topic: ChatTopic?
  /// The first of the messages that the last question was shown with.
  public private(set) var firstShown = 0

  /// The first of the messages that there is room for.
  private var firstKept = 0
  private var sampler: TokenSampler
  private var cache = KeyValueCache()
  private var attached: [NodePath]?
  /// Where the last answer's sources are looked for.
  private var answered: (path: NodePath, asked: String, answer: String)?
  private var isAnswering = false
  private var waiting: [CheckedContinuation<Void, Never>] = []

  /// The share of the prompt's room that is filled after turns were dropped, so that not every turn
  /// drops another.
  private static let kept = 0.75

  /// Begins a conversation. The model's anchor must not be used by another at the same time.
  public init(model: ChatModel, options: ChatOptions) {
    self.model = model
    self.options = options
    sampler = TokenSampler(options.sampling, seed: options.seed)
  }

  /// Asks a question; the reply comes piece by piece.
  ///
  /// A reply that is broken off, by ending the iteration, keeps what was said so far; where nothing was
  /// said the question is forgotten. Throws ``HierMemError``, for example where the question alone is
  /// too long, or another is still being answered.
  public nonisolated func ask(_ text: String) -> AsyncThrowingStream<ChatEvent, any Error> {
    AsyncThrowingStream { continuation in
      let task = Task {
        do {
          try await answer(text) { continuation.yield($0) }
          continuation.finish()
        } catch {
          continuation.finish(throwing: error)
        }
      }
      continuation.onTermination = { _ in task.cancel() }
    }
  }

  /// Takes up a conversation that is kept elsewhere, so that the next question goes on with it.
  ///
  /// Its questions are routed again, one after another. Where it is the one that this session has, under the same
  /// memory, nothing is done again. The sampler begins anew with the options' seed.
  ///
  /// - Parameter messages: the user's and the assistant's; the options have the system message.
  /// - Throws: ``HierMemError`` of kind `usage` while a question is being answered.
  public func resume(_ messages: [ChatMessage], options: ChatOptions) async throws {
    try checkIsIdle()
    isAnswering = true
    defer { becomeIdle() }
    let isKnown = messages == self.messages && options.memory == self.options.memory
      && options.blocked == self.options.blocked
    self.options = options
    sampler = TokenSampler(options.sampling, seed: options.seed)
    if isKnown { return }
    (self.messages, topic, firstKept, firstShown, answered) = ([], nil, 0, 0, nil)
    var found: ChatTopic?
    if options.memory.isRouted, let router = model.router {
      for message in messages where message.role == .user {
        found = try await router.turn(message.content, topic: found, blocked: options.blocked).topic
      }
    }
    (self.messages, topic) = (messages, found)
  }

  /// Changes the memory of the turns to come; the first that is routed again is routed alone.
  ///
  /// - Throws: ``HierMemError`` of kind `usage` while a question is being answered.
  public func use(_ memory: MemoryChoice) throws {
    try checkIsIdle()
    options.memory = memory
    topic = nil
  }

  /// Waits until nothing is computed any more: a reply that is broken off ends its stream at once, and the token that
  /// is being computed comes to its end after that.
  public func settle() async {
    if isAnswering { await withCheckedContinuation { waiting.append($0) } }
  }

  /// Forgets the conversation; the options stay.
  ///
  /// - Throws: ``HierMemError`` of kind `usage` while a question is being answered.
  public func reset() throws {
    try checkIsIdle()
    messages = []
    topic = nil
    (firstKept, firstShown) = (0, 0)
    answered = nil
  }

  /// The sentences that say the last answer, best first: none of what its leaf has learnt may.
  ///
  /// `nil` where there is nothing to look through: no answer yet, one without a path, or a bank without sources.
  public func sources() async throws -> [SourceSentence]? {
    guard let answered, answered.path != .root, let search = model.router?.search else { return nil }
    return try await search.find(in: answered.path, question: answered.asked, answer: answered.answer)
  }

  /// Reads the blocks that a draft would be answered with, so that they are there when it is sent.
  public func prepare(for draft: String) async throws {
    let memory = options.memory
    guard memory.isRouted, memory != .source, let router = model.router, let blocks = model.blocks else { return }
    let turn = try await router.turn(draft, topic: topic, blocked: options.blocked)
    await blocks.prefetch(blocks.bank.nodes(on: turn.path))
  }

  /// Answers a question in the caller's own task; returns once nothing is computed any more.
  package func answer(_ text: String, emit: @Sendable (ChatEvent) async -> Void) async throws {
    try Task.checkCancellation()
    try checkIsIdle()
    isAnswering = true
    defer { becomeIdle() }
    let (asked, before) = (messages.count, topic)
    answered = nil
    messages.append(ChatMessage(.user, text))
    var reply = ""
    var complete = false
    var sought: (path: NodePath, asked: String)?
    defer {
      if let sought, complete || !reply.isEmpty { answered = (sought.path, sought.asked, reply) }
      if complete || !reply.isEmpty {
        messages.append(ChatMessage(.assistant, reply))
      } else {
        messages.removeSubrange(asked...)
        topic = before
      }
    }
    let (prompt, position, turn) = try await prepareAnswer(text, emit: emit)
    sought = (path(of: turn), messages.asked(stayed: turn?.stayed ?? false))
    var stream = TextStream(model.tokenizer)
    let room = min(options.maxTokens, model.anchor.context - prompt.count)
    var held = 0  // tokens whose text has not been given out
    try await decode(prompt, from: position, limit: room) { token in
      held += 1
      let piece = stream.append(token)
      reply += piece
      if piece.isEmpty { return }
      await emit(.text(piece, tokens: held))
      held = 0
    }
    let rest = stream.finish()
    reply += rest
    if !rest.isEmpty { await emit(.text(rest, tokens: held)) }
    complete = true
  }

  private func becomeIdle() {
    isAnswering = false
    waiting.forEach { $0.resume() }
    waiting = []
  }

  private func checkIsIdle() throws {
    guard !isAnswering else {
      throw HierMemError(.usage, "the last question is still being answered", hint: "Wait, or stop it.")
    }
  }

  /// Routes the question, attaches its memory and returns the prompt's tokens, and from where on they are to be
  /// computed.
  private func prepareAnswer(
    _ text: String, emit: @Sendable (ChatEvent) async -> Void
  ) async throws -> (prompt: [Int], position: Int, turn: ChatTurn?) {
    if options.memory.hasPassage && model.router?.sources == nil {
      throw HierMemError(
        .bank, "this model has no sources", hint: "Use memory fetched, or export it with --with-sources.")
    }
    let turn = options.memory.isRouted
      ? try await model.router?.turn(text, topic: topic, blocked: options.blocked) : nil
    let passage = try await passage(for: turn)
    let begin = max(firstKept, self.begin(of: turn))
    let (first, prompt) = try fit(from: begin, passage)
    let fetch = try await fetch(turn)
    try await attach(fetch)
    if first > begin { firstKept = first }
    firstShown = first
    topic = turn?.topic
    let position = cache.reuse(prompt, under: key)
    await emit(
      .started(
        ChatStart(
          turn: turn, nodes: fetch?.nodes ?? [], missing: fetch?.missing ?? [], passage: passage,
          promptTokens: prompt.count, cachedTokens: position)))
    return (prompt, position, turn)
  }

  /// The first message that a question sees, as `begin` of mlx_hiermem/prompt.py has it.
  private func begin(of turn: ChatTurn?) -> Int {
    guard options.history == .topic, options.memory != .source, let turn, turn.path != .root else { return 0 }
    let asks = messages.indices.filter { messages[$0].role == .user }
    let turns = turn.topic.turns
    return 0 < turns && turns < asks.count ? asks[asks.count - turns] : 0
  }

  /// What goes into the prompt, where that is wanted and the question's leaf has something.
  private func passage(for turn: ChatTurn?) async throws -> SourceWindow? {
    guard options.memory.hasPassage, let turn, let search = model.router?.search else { return nil }
    return try await search.passage(for: messages.asked(stayed: turn.stayed), in: turn.path)
  }

  /// Where the sources of an answer are.
  private func path(of turn: ChatTurn?) -> NodePath {
    if case .path(let path) = options.memory { return path }
    return turn?.path ?? .root
  }

  private func fetch(_ turn: ChatTurn?) async throws -> MemoryFetch? {
    if options.memory == .none || options.memory == .source { return nil }
    guard let blocks = model.blocks else {
      throw HierMemError(.usage, "this model has no bank", hint: "Use memory none.")
    }
    switch options.memory {
    case .none, .source: return nil
    case .generic: return try await blocks.fetchGeneric()
    case .fetched, .fetchedWithSource: return try await turn.asyncMap { try await blocks.fetch($0.path) }
    case .path(let path):
      try check(path, in: blocks.bank)
      return try await blocks.fetch(path)
    }
  }

  private func check(_ path: NodePath, in bank: MemoryBank) throws {
    guard bank.tree.has(path) else {
      throw HierMemError(.bank, "the bank's tree has no node \(path)")
    }
    if let closed = bank.policy.blocking(options.blocked).blocker(of: path) {
      throw HierMemError(
        .bank, "the memory \(path) is blocked (at \(closed))", hint: "Take another path, or unblock it.")
    }
  }

  /// Attaches a memory, unless its blocks are attached already.
  private func attach(_ fetch: MemoryFetch?) async throws {
    let nodes = fetch?.nodes ?? []
    if nodes == attached { return }
    attached = nil
    cache.clear()
    try await model.anchor.attach(fetch?.memory)
    attached = nodes
  }

  /// Of the keys and values that are computed now.
  private var key: MemoryKey {
    MemoryKey(choice: options.memory.hasPassage ? options.memory : nil, nodes: attached ?? [])
  }

  /// Computes what is not in the cache of a prompt and samples its continuation.
  private func decode(
    _ prompt: [Int], from start: Int, limit: Int, onToken: (Int) async -> Void
  ) async throws {
    var position = start
    var tokens = Array(prompt[position...])
    for _ in 0..<max(0, limit) {
      try Task.checkCancellation()
      let logits: [Float]
      do {
        logits = try await model.anchor.logits(after: tokens, at: position)
      } catch {
        cache.clear()  // what the anchor holds is not known, also where it was cancelled
        throw error
      }
      cache.append(tokens)
      position += tokens.count
      try Task.checkCancellation()  // nobody hears the next token
      let token = sampler.sample(logits)
      if model.eos.contains(token) { return }
      await onToken(token)
      tokens = [token]
    }
  }

  /// The newest turns that leave room for the reply, and their prompt.
  private func fit(from begin: Int, _ passage: SourceWindow?) throws -> (first: Int, prompt: [Int]) {
    let context = model.anchor.context
    let room = context - min(options.maxTokens, context / 2)
    var prompt = try self.prompt(from: begin, passage)
    if prompt.count <= room { return (begin, prompt) }
    // What is left has to be computed again as a whole, so make room for more than this turn.
    let starts = messages.indices.filter { $0 >= begin && messages[$0].role == .user }
    let goal = Int(Self.kept * Double(room))
    let start = try starts.dropFirst().first { try self.prompt(from: $0, passage).count <= goal } ?? starts.last!
    prompt = try self.prompt(from: start, passage)
    guard prompt.count <= room else {
      throw HierMemError(
        .context, "the question has \(prompt.count) tokens, system message included; the model has room "
          + "for \(room) beside its reply", hint: "Ask a shorter question, or allow a shorter reply.")
    }
    return (start, prompt)
  }

  private func prompt(from first: Int, _ passage: SourceWindow?) throws -> [Int] {
    let system = options.system.isEmpty ? [] : [ChatMessage(.system, options.system)]
    return try model.tokenizer.encode(model.format.parts(system + Array(messages[first...]).with(passage)))
  }
}

extension Optional {
  fileprivate func asyncMap<T>(_ transform: (Wrapped) async throws -> T) async rethrows -> T? {
    guard let self else { return nil }
    return try await transform(self)
  }
}
