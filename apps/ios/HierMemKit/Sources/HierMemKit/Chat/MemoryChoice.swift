/// Which memory is wanted, in the words that Python, the server and the chat use too.
public enum MemoryChoice: Hashable, Sendable {
  /// The anchor alone.
  case none
  /// The control block, tied to no cluster.
  case generic
  /// Each text's own, found by the router.
  case fetched
  /// The blocks on one path.
  case path(NodePath)

  /// Reads `none`, `generic`, `fetched` or a path such as `3.1`, and the earlier words for them.
  ///
  /// - Throws: ``HierMemError`` of kind `usage` for anything else.
  public init(parsing text: String) throws {
    switch text {
    case "none", "off": self = .none
    case "generic": self = .generic
    case "fetched", "auto", "on", "routed": self = .fetched
    default:
      guard let path = try? NodePath(parsing: text) else {
        throw HierMemError(
          .usage, "unknown memory '\(text)'", hint: "Use none, generic, fetched, or a path such as 10.7.")
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
    case .path(let path): path.description
    }
  }
}
