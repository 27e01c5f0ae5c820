/// Where a turn of a conversation goes. The rule and its settings are mlx_hiermem/router.py's.
///
/// A turn that names its subject is decided: it is much nearer to one child of a node than to the next, compared
/// with the turn that chose the present path; in a bank with sources it is near to a passage instead. It leads to a
/// path of its own. A follow-up such as "and its symbol?"
/// stays on the path: it is like the question that led there, and the two asked together are no farther from the
/// path than the question alone. What has nothing to do with the conversation gets no memory, and the path is kept
/// for the turns after it.

/// A turn and its embedding.
public struct EmbeddedText: Equatable, Sendable {
  public let text: String
  public let vector: [Float]

  public init(_ text: String, _ vector: [Float]) {
    self.text = text
    self.vector = vector
  }
}

/// What a conversation is about: its path, and how decided the turns were that put it there.
public struct ChatTopic: Equatable, Sendable {
  public let path: NodePath
  public let decided: Double
  /// The turn that led there; `nil` where that is not known.
  public let question: EmbeddedText?
  /// The last turn, where it had nothing to do with the conversation.
  public let aside: [Float]?
  /// How many turns there were since the path was taken; 0 where that is not known.
  public let turns: Int

  /// How decided a turn has to be to leave, as a share of the turns that chose the path.
  public static let hysteresis = 0.5
  /// How far from the nearest passage a turn leads, as a share of the bank's reach from passages.
  public static let near: Float = 0.9
  /// How much a turn that does not lead has to belong to the conversation to stay on its path.
  public static let belongs = 0.02
  /// How much a distance from the path counts in that, beside a cosine.
  static let pull = 2.5

  public init(
    path: NodePath, decided: Double, question: EmbeddedText? = nil, aside: [Float]? = nil, turns: Int = 0
  ) {
    self.path = path
    self.decided = decided
    self.question = question
    self.aside = aside
    self.turns = turns
  }

  /// The topic after a turn that goes so alone; `nil` where the turn does not lead anywhere.
  ///
  /// It leads where it is decided enough, or, with `near`, where it is no farther than that from a passage.
  static func following(
    _ topic: ChatTopic?, alone: MemoryRoute, decided: Double, question: EmbeddedText, near: Float?
  ) -> ChatTopic? {
    let path = alone.path
    guard let topic else { return ChatTopic(path: path, decided: decided, question: question, turns: 1) }
    var leads = decided > hysteresis * topic.decided
    if let near, let passage = alone.passage { leads = passage <= near }
    if path == .root || !leads { return nil }
    if path != topic.path { return ChatTopic(path: path, decided: decided, question: question, turns: 1) }
    let most = max(decided, topic.decided)
    return ChatTopic(path: path, decided: most, question: question, turns: topic.turnsAfter)
  }

  /// The same after a turn that did not lead.
  func after(aside: [Float]?) -> ChatTopic {
    ChatTopic(path: path, decided: decided, question: question, aside: aside, turns: turnsAfter)
  }

  private var turnsAfter: Int { turns > 0 ? turns + 1 : 0 }
}

/// One routed turn.
public struct ChatTurn: Equatable, Sendable {
  /// Where the text goes if nothing holds it.
  public let alone: MemoryRoute
  /// Where it goes: alone, along the conversation's path, or nowhere.
  public let route: MemoryRoute
  /// Whether it was held on the conversation's path.
  public let stayed: Bool
  /// By what share the text is nearer to the nearest child than to the second, summed over the path's levels.
  public let decided: Double
  /// What it takes to leave the path that the conversation was on; 0 where it was on none.
  public let needed: Double
  /// How much a turn that does not lead belongs to the conversation, where the bank has a reach.
  public let belongs: Double?
  /// The conversation's from here on.
  public let topic: ChatTopic

  public var path: NodePath { route.path }
}

/// What the router needs of an embedder.
public protocol TextEmbedder: Sendable {
  /// A text as a vector of length 1.
  func embed(_ text: String) async throws -> [Float]
  /// The token ids of a text that belong to rare words; `nil` where that is not known.
  func rarePieces(_ text: String) -> Set<Int>?
}

extension TextEmbedder {
  public func rarePieces(_ text: String) -> Set<Int>? { nil }
}

/// Text → path. Keeps to `policy`: nodes that it blocks are never entered. With `sources`, the nearest of their
/// passages says which leaf a text goes to.
public struct MemoryRouter: Sendable {
  public let tree: ClusterTree
  public let embedder: any TextEmbedder
  public let policy: BankPolicy
  public let sources: BankSources?

  public init(
    tree: ClusterTree, embedder: any TextEmbedder, policy: BankPolicy = .open, sources: BankSources? = nil
  ) {
    self.tree = tree
    self.embedder = embedder
    self.policy = policy
    self.sources = sources
  }

  /// Routes one turn. A topic whose path is blocked is left at once.
  ///
  /// A bank whose reach has no end has memory for every text: there each turn that does not lead stays.
  ///
  /// - Parameter blocked: nodes that are closed to this turn beside those of the policy.
  public func turn(_ text: String, topic: ChatTopic?, blocked: Set<NodePath> = []) async throws -> ChatTurn {
    let policy = policy.blocking(blocked)
    let said = EmbeddedText(text, try await embedder.embed(text))
    let alone = try route(said, under: policy)
    let topic = topic.flatMap { $0.path != .root && policy.blocker(of: $0.path) == nil ? $0 : nil }
    let decided = tree.decidedness(of: said.vector, on: alone.path)
    let needed = ChatTopic.hysteresis * (topic?.decided ?? 0)
    func turn(_ route: MemoryRoute, stayed: Bool = false, belongs: Double? = nil, _ topic: ChatTopic) -> ChatTurn {
      ChatTurn(
        alone: alone, route: route, stayed: stayed, decided: decided, needed: needed, belongs: belongs, topic: topic)
    }
    let near = sources != nil && policy.passageReach.isFinite ? ChatTopic.near * policy.passageReach : nil
    let after = ChatTopic.following(topic, alone: alone, decided: decided, question: said, near: near)
    if let after { return turn(alone, after) }
    guard let topic else { preconditionFailure("a first turn leads") }
    let belongs = policy.hasReach ? try await belonging(said, topic) : nil
    if let belongs, belongs <= ChatTopic.belongs {
      if near != nil && alone.path != .root {  // another subject that passages know
        let topic = ChatTopic(path: alone.path, decided: decided, question: said, turns: 1)
        return turn(alone, belongs: belongs, topic)
      }
      let nowhere = MemoryRoute(path: .root, distances: [], avoided: alone.avoided, isFar: true)
      return turn(nowhere, belongs: belongs, topic.after(aside: said.vector))
    }
    let held = MemoryRoute(
      path: topic.path, distances: tree.distances(from: said.vector, along: topic.path), avoided: alone.avoided,
      passage: alone.passage)
    return turn(held, stayed: topic.path != alone.path, belongs: belongs, topic.after(aside: nil))
  }

  /// Looks through the bank's sources; `nil` where it has none.
  public var search: SourceSearch? {
    sources.map { SourceSearch(sources: $0, embedder: embedder) }
  }

  /// Where a text goes if no conversation holds it.
  private func route(_ said: EmbeddedText, under policy: BankPolicy) throws -> MemoryRoute {
    let descent = try tree.route(said.vector, policy: policy)
    guard let sources else { return descent }
    return try tree.route(
      said.vector, byPassagesOf: sources, policy: policy, descent: descent, asking: said.text, with: embedder)
  }

  /// How much a turn belongs to a conversation: near to the question that chose the path, nearer than to an aside
  /// just before it; and asked behind that question it does not pull it away from the path.
  private func belonging(_ said: EmbeddedText, _ topic: ChatTopic) async throws -> Double {
    guard let question = topic.question else { return .infinity }
    let together = try await embedder.embed("\(question.text) \(said.text)")
    let away = topic.aside.map { max(0, dot(said.vector, $0)) } ?? 0
    let pull =
      tree.distances(from: together, along: topic.path).last!
      - tree.distances(from: question.vector, along: topic.path).last!
    return dot(said.vector, question.vector) - away - ChatTopic.pull * Double(pull)
  }
}

func dot(_ a: [Float], _ b: [Float]) -> Double {
  Double(zip(a, b).reduce(Float(0)) { $0 + $1.0 * $1.1 })
}

extension ClusterTree {
  /// From an embedding to each node of a path, level 1 first.
  func distances(from embedding: [Float], along path: NodePath) -> [Float] {
    path.children.indices.map { level in
      distances(from: embedding, toChildrenOf: NodePath(path.children[..<level]))[path.children[level]]
    }
  }

  /// By what share an embedding is nearer to the nearest child than to the second, summed over a path's levels.
  func decidedness(of embedding: [Float], on path: NodePath) -> Double {
    path.children.indices.reduce(0) { total, level in
      let node = NodePath(path.children[..<level])
      let sorted = distances(from: embedding, toChildrenOf: node).sorted()
      // An only child decides nothing.
      return sorted[1] > 0 && sorted[1].isFinite ? total + Double(1 - sorted[0] / sorted[1]) : total
    }
  }
}
