/// Which memory is wanted, in the words that Python, the server and the chat use too.
public enum MemoryChoice: Hashable, Sendable {
  /// The anchor alone.
  case none
  /// The control block, tied to no cluster.
  case generic
  /// Each text's own, found by the router.
  case fetched
  /// Retrieval: the best passage of the path's leaf in the prompt, and no block.
  case source
  /// Both.
  case fetchedWithSource
  /// The blocks on one path.
  case path(NodePath)

  /// Whether each text goes by a path of its own.
  public var isRouted: Bool { self == .fetched || hasPassage }

  /// Whether a passage goes into the prompt.
  public var hasPassage: Bool { self == .source || self == .fetchedWithSource }

  /// Reads `none`, `generic`, `fetched`, `source`, `fetched+source` or a path such as `3.1`, and the earlier words
  /// for them.
  ///
  /// - Throws: ``HierMemError`` of kind `usage` for anything else.
  public init(parsing text: String) throws {
    switch text {
    case "none", "off": self = .none
    case "generic": self = .generic
    case "fetched", "auto", "on", "routed": self = .fetched
    case "source": self = .source
    case "fetched+source": self = .fetchedWithSource
    default:
      guard let path = try? NodePath(parsing: text) else {
        throw HierMemError(
          .usage, "unknown memory '\(text)'",
          hint: "Use none, generic, fetched, source, fetched+source, or a path such as 10.7.")
      }
      self = .path(path)
    }
  }
}

extension MemoryChoice: CustomStringConvertible {
  public var description: String {
    switch self {
    case .none: "none"
    case .generic: "generic"
    case .fetched: "fetched"
    case .source: "source"
    case .fetchedWithSource: "fetched+source"
    case .path(let path): path.description
    }
  }
}
