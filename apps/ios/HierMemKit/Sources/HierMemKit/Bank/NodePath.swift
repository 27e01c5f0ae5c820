/// Child indices from the root of the clustering tree to a node, in text `10.7.15`.
///
/// Every prefix is a node.
public struct NodePath: Hashable, Sendable {
  public let children: [Int]

  /// The root: all clusters are below it, and a text that enters none stays there.
  public static let root = NodePath([])

  /// The generic block goes by the root, for it belongs to no cluster.
  public static let generic = root

  public init(_ children: [Int]) {
    self.children = children
  }

  /// Reads `"10.7.15"`.
  ///
  /// - Throws: ``HierMemError`` of kind `usage` for anything else.
  public init(parsing text: String) throws {
    let parts = text.split(separator: ".", omittingEmptySubsequences: false)
    children = parts.compactMap { part in
      part.utf8.allSatisfy { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) } ? Int(part) : nil
    }
    guard children.count == parts.count else {
      throw HierMemError(
        .usage, "'\(text)' is not a path", hint: "Write child indices with dots between: 10.7.15")
    }
  }

  /// 1 for the children of the root.
  public var level: Int { children.count }

  /// The node above; `nil` for the root.
  public var parent: NodePath? { children.isEmpty ? nil : NodePath(children.dropLast()) }

  /// The nodes on the way, level 1 first: 10.7 gives 10 and 10.7.
  public var prefixes: [NodePath] {
    children.indices.map { NodePath(Array(children[...$0])) }
  }

  /// Whether this node is `other` or lies below it.
  public func isWithin(_ other: NodePath) -> Bool {
    children.starts(with: other.children)
  }

  /// The path read as a base-k number: the row of its node in a level's dense tensor.
  func row(branching: Int) -> Int {
    children.reduce(0) { $0 * branching + $1 }
  }

  init(_ children: ArraySlice<Int>) {
    self.init(Array(children))
  }
}

extension NodePath: CustomStringConvertible {
  public var description: String { children.map(String.init).joined(separator: ".") }
}

extension NodePath: Comparable {
  /// A node comes before those below it, and those before its next sibling.
  public static func < (a: NodePath, b: NodePath) -> Bool {
    a.children.lexicographicallyPrecedes(b.children)
  }
}
