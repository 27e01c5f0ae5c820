/// Where a turn of a conversation goes: to the path that it takes alone, or to the one the talk is on.
///
/// A follow-up such as "and its symbol?" does not say what it is about: it is nearly as near to one
/// child of a node as to the next. So a turn leaves the current path only if it is decided enough,
/// compared with the turns that chose that path. The rule and its setting are mlx_hiermem/router.py's.

/// The path that a conversation is on, and how decided the turns were that put it there.
public struct Topic: Equatable, Sendable {
  public let path: NodePath
  public let decided: Double

  /// How decided a turn has to be to leave, as a share of the turns that chose the path.
  public static let hysteresis = 0.5

  public init(path: NodePath, decided: Double) {
    self.path = path
    self.decided = decided
  }

  /// The topic after a turn that alone takes `path`.
  static func following(_ topic: Topic?, path: NodePath, decided: Double) -> Topic {
    guard let topic, topic.path != .root else { return Topic(path: path, decided: decided) }
    if path == topic.path { return Topic(path: path, decided: max(decided, topic.decided)) }
    return decided > hysteresis * topic.decided ? Topic(path: path, decided: decided) : topic
  }
}

/// One routed turn.
public struct Turn: Equatable, Sendable {
  /// Where the text goes if nothing holds it.
  public let alone: Route
  /// By what share the text is nearer to the nearest child than to the second, summed over the path's levels.
  public let decided: Double
  /// What it takes to leave the path that the conversation was on; 0 where it was on none.
  public let needed: Double
  /// The conversation's from here on.
  public let topic: Topic

  public var path: NodePath { topic.path }

  /// Whether the turn was held on the path before.
  public var stayed: Bool { topic.path != alone.path }
}

/// What the router needs of an embedder.
public protocol TextEmbedder: Sendable {
  /// A text as a vector of length 1.
  func embed(_ text: String) async throws -> [Float]
}

/// Text → path. Keeps to `policy`: nodes that it blocks are never entered.
public struct Router: Sendable {
  public let tree: ClusterTree
  public let embedder: any TextEmbedder
  public let policy: BankPolicy

  public init(tree: ClusterTree, embedder: any TextEmbedder, policy: BankPolicy = .open) {
    self.tree = tree
    self.embedder = embedder
    self.policy = policy
  }

  /// Routes one turn. A topic whose path is blocked is left at once.
  ///
  /// - Parameter blocked: nodes that are closed to this turn beside those of the policy.
  public func turn(_ text: String, topic: Topic?, blocked: Set<NodePath> = []) async throws -> Turn {
    let policy = policy.blocking(blocked)
    let vector = try await embedder.embed(text)
    let route = try tree.route(vector, policy: policy)
    let topic = topic.flatMap { policy.blocker(of: $0.path) == nil ? $0 : nil }
    let decided = tree.decidedness(of: vector, on: route.path)
    return Turn(
      alone: route, decided: decided, needed: Topic.hysteresis * (topic?.decided ?? 0),
      topic: .following(topic, path: route.path, decided: decided))
  }
}

extension ClusterTree {
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
