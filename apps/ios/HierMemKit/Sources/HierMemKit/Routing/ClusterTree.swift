import Foundation

/// Where a text went: the path, and the distance to the chosen centroid at each level.
public struct MemoryRoute: Equatable, Sendable {
  public let path: NodePath
  public let distances: [Float]
  /// The blocked nodes that it would have entered.
  public let avoided: [NodePath]
  /// Beyond the bank's reach: it is like nothing there, and has the empty path.
  public var isFar = false
  /// To the nearest passage, where the bank is routed by them.
  public var passage: Float?
}

/// The clustering tree: a matrix of k centroids for each node, and greedy descent among them.
///
/// Centroids stay memory-mapped; a route touches k · depth of them (arXiv:2510.02375, §2.1). A child
/// that is not present is never chosen, and a node without children ends the path.
public struct ClusterTree: Sendable {
  public let branching: Int
  public let depth: Int
  /// Values of an embedding.
  public let dimension: Int
  private let file: SafetensorsFile
  /// Per level [k^(l-1) · k], in row order.
  private let present: [[Bool]]

  /// Opens tree.safetensors: level{l}.centroids [k^(l-1), k, dim] and level{l}.present [k^(l-1), k].
  ///
  /// - Throws: ``HierMemError`` of kind `bank` where it is missing, damaged, or its levels do not belong
  ///   together.
  public init(contentsOf url: URL) throws {
    file = try SafetensorsFile(contentsOf: url)
    guard let first = file.tensors["level1.centroids"], first.shape.count == 3,
      first.shape[1] >= 2, first.shape[2] >= 1
    else { throw HierMemError(.bank, "\(url.path) has no level1.centroids [1, k, dim]") }
    branching = first.shape[1]
    dimension = first.shape[2]
    var present: [[Bool]] = []
    var nodes = 1
    while file.tensors["level\(present.count + 1).centroids"] != nil {
      let name = "level\(present.count + 1)"
      try file.require("\(name).centroids", "F32", [nodes, branching, dimension])
      if file.tensors["\(name).present"] == nil {
        present.append([Bool](repeating: true, count: nodes * branching))
      } else {
        try file.require("\(name).present", "BOOL", [nodes, branching])
        present.append(try file.withBytes(of: "\(name).present") { $0.map { $0 != 0 } })
      }
      nodes *= branching  // no more than the centroids in the file, which were checked
    }
    self.present = present
    depth = present.count
  }

  /// Whether the path is a node of this tree, its ancestors included.
  public func has(_ path: NodePath) -> Bool {
    (1...depth).contains(path.level) && path.children.allSatisfy((0..<branching).contains)
      && path.prefixes.allSatisfy { present[$0.level - 1][$0.row(branching: branching)] }
  }

  /// The children of a node, in order.
  public func children(of node: NodePath) -> [NodePath] {
    (0..<branching).map { NodePath(node.children + [$0]) }.filter(has)
  }

  /// Descends to the nearest child (L2; the lowest index wins a tie), level by level.
  ///
  /// A blocked node is never entered: with `sibling` the nearest open child is taken instead, with
  /// `parent`, and where no child is open, the path ends above. A text beyond the policy's reach gets the
  /// empty path.
  ///
  /// - Throws: ``HierMemError`` where the embedding has another dimension (kind `usage`) or the policy
  ///   names a node that the tree does not have (kind `bank`).
  public func route(_ embedding: [Float], policy: BankPolicy = .open) throws -> MemoryRoute {
    guard embedding.count == dimension else {
      throw HierMemError(
        .usage, "the embedding has \(embedding.count) values, the tree's centroids have \(dimension)",
        hint: "Use the embedder that the bank's manifest names.")
    }
    for node in policy.blocked where !has(node) {
      throw HierMemError(.bank, "the bank's tree has no node \(node)")
    }
    var path = NodePath.root
    var distances: [Float] = []
    var avoided: [NodePath] = []
    while path.level < depth {
      let all = self.distances(from: embedding, toChildrenOf: path)
      guard var child = nearest(all) else { break }
      if policy.blocked.contains(NodePath(path.children + [child])) {
        avoided.append(NodePath(path.children + [child]))
        let open = all.indices.map {
          policy.blocked.contains(NodePath(path.children + [$0])) ? .infinity : all[$0]
        }
        guard policy.onBlocked == .sibling, let other = nearest(open) else { break }
        child = other
      }
      path = NodePath(path.children + [child])
      distances.append(all[child])
    }
    if let last = distances.last, last > policy.reach {
      return MemoryRoute(path: .root, distances: [], avoided: avoided, isFar: true)
    }
    return MemoryRoute(path: path, distances: distances, avoided: avoided)
  }

  /// L2 distances from an embedding to the k children of a node, infinite where there is none.
  func distances(from embedding: [Float], toChildrenOf node: NodePath) -> [Float] {
    let row = node.row(branching: branching)
    // `init` has seen that the level is there.
    return try! file.withBytes(of: "level\(node.level + 1).centroids") { bytes in
      (0..<branching).map { child in
        guard present[node.level][row * branching + child] else { return .infinity }
        let start = (row * branching + child) * dimension
        var sum: Float = 0
        for index in 0..<dimension {
          let difference = StoredScalar.float32.load(bytes, start + index) - embedding[index]
          sum += difference * difference
        }
        return sum.squareRoot()
      }
    }
  }

  private func nearest(_ distances: [Float]) -> Int? {
    let best = distances.indices.min { distances[$0] < distances[$1] }
    return best.flatMap { distances[$0] < .infinity ? $0 : nil }
  }
}
