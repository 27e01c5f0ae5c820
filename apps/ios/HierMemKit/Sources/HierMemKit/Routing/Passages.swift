/// Routing by passages: the tree says where to look, and the nearest passage says which leaf it is.
///
/// Where a bank keeps the vectors of its passages, the leaves that a beam search finds are looked through, and the
/// leaf of the nearest passage is taken. A passage that has few of a text's rare words is farther than its vector
/// says. The rule is mlx_hiermem/bank/passages.py's.
extension ClusterTree {
  /// Leaves that are looked through.
  private static let probed = 8

  /// Of a text's rare pieces, how many are in a passage that it is about.
  private static let expected: Float = 0.5
  /// What is added to the distance of a passage that has none of them.
  private static let lacking: Float = 0.075

  private typealias Near = (distance: Float, node: NodePath)

  /// Where an embedding goes; `descent` is where the tree alone takes it, under the same policy.
  ///
  /// That stands where none of the leaves has a passage, or all are blocked. A blocked leaf is passed over for the
  /// nearest passage of an open one, or, where the policy says `parent`, the text stops above what is blocked.
  func route(
    _ embedding: [Float], byPassagesOf sources: BankSources, policy: BankPolicy, descent: MemoryRoute,
    asking text: String, with embedder: any TextEmbedder
  ) throws -> MemoryRoute {
    var near = try nearestPassages(to: embedding, in: sources)
    guard let (distance, leaf) = near.first else { return descent }
    let nearest = distance + lacking(text, in: sources, leaf, nearestTo: embedding, embedder)
    near[0].distance = nearest
    if nearest > policy.passageReach || (descent.isFar && policy.passageReach == .infinity) {
      return MemoryRoute(path: .root, distances: [], avoided: descent.avoided, isFar: true, passage: nearest)
    }
    var avoided: [NodePath] = []
    for (distance, leaf) in near {
      guard let closed = policy.blocker(of: leaf) else {
        return route(embedding, to: leaf, avoided, distance)
      }
      if !avoided.contains(closed) { avoided.append(closed) }
      if policy.onBlocked == .parent {
        return route(embedding, to: NodePath(closed.children.dropLast()), avoided, distance)
      }
    }
    return descent
  }

  /// The leaves that a beam search finds, nearest first: `width` at most.
  ///
  /// Of each level the `width` nearest nodes are looked into. A leaf is a node without children, at any level.
  func beam(_ embedding: [Float], width: Int) -> [NodePath] {
    var ended: [Near] = []
    var going: [Near] = [(0, .root)]
    while !going.isEmpty {
      var found: [Near] = []
      for (distance, node) in going {
        let all = node.level < depth ? distances(from: embedding, toChildrenOf: node) : []
        guard all.contains(where: { $0 != .infinity }) else {
          ended.append((distance, node))
          continue
        }
        for (child, distance) in all.enumerated() where distance < .infinity {
          found.append((distance, NodePath(node.children + [child])))
        }
      }
      going = nearest(found, width)
    }
    return nearest(ended, width).map(\.node).filter { $0 != .root }
  }

  /// The nearest passage of each leaf that is looked through, nearest first.
  private func nearestPassages(to embedding: [Float], in sources: BankSources) throws -> [Near] {
    let found: [Near] = try beam(embedding, width: Self.probed).compactMap { leaf in
      try sources.cosines(of: embedding, in: leaf)?.max().map { (distance: passageDistance($0), node: leaf) }
    }
    return nearest(found, found.count)
  }

  /// What is added to the distance of a leaf's nearest passage, for the rare words that it lacks; nothing where it
  /// cannot be read.
  private func lacking(
    _ text: String, in sources: BankSources, _ leaf: NodePath, nearestTo embedding: [Float],
    _ embedder: any TextEmbedder
  ) -> Float {
    guard let asked = embedder.rarePieces(text), !asked.isEmpty,
      let cosines = try? sources.cosines(of: embedding, in: leaf),
      let nearest = cosines.indices.max(by: { cosines[$0] < cosines[$1] }),  // an index, whatever the numbers are
      let window = try? sources.windows(of: leaf)?[nearest],
      let passage = embedder.rarePieces("\(window.title). \(window.text)")
    else { return 0 }
    let shared = Float(asked.intersection(passage).count) / Float(asked.count)
    return Self.lacking * max(0, Self.expected - shared) / Self.expected
  }

  /// By distance, and where that is equal by path.
  private func nearest(_ found: [Near], _ count: Int) -> [Near] {
    Array(found.sorted { ($0.distance, $0.node) < ($1.distance, $1.node) }.prefix(count))
  }

  private func route(
    _ embedding: [Float], to path: NodePath, _ avoided: [NodePath], _ passage: Float
  ) -> MemoryRoute {
    MemoryRoute(path: path, distances: distances(from: embedding, along: path), avoided: avoided, passage: passage)
  }
}

/// L2 between embeddings of length 1.
private func passageDistance(_ cosine: Float) -> Float {
  max(0, 2 - 2 * cosine).squareRoot()
}
