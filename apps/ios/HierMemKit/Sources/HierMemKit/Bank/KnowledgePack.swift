/// A subtree of a bank as its owner sees it: what it is about, and how much of it is on this device.
public struct KnowledgePack: Identifiable, Equatable, Sendable {
  /// The top of the subtree.
  public let node: NodePath
  public let label: String
  /// Bytes of all its blocks.
  public let byteCount: Int
  /// Bytes of those that came with the app and stay.
  public let bundledBytes: Int
  /// Bytes of those that were downloaded.
  public let downloadedBytes: Int

  public var id: NodePath { node }
  /// What a download would bring.
  public var missingBytes: Int { byteCount - bundledBytes - downloadedBytes }
}

extension MemoryBank {
  /// The subtrees below the nodes of a level that have blocks, in order.
  public func packs(level: Int = 1) -> [KnowledgePack] {
    let tops = Set(manifest.blocks.keys.compactMap { path in path.prefixes.first { $0.level == level } })
    return tops.sorted().map { node in
      let blocks = blocks(within: node)
      func bytes(_ chosen: [BlockEntry]) -> Int { chosen.reduce(0) { $0 + $1.file.bytes } }
      let bundled = blocks.filter { isBundled($0.path) }
      let here = blocks.filter { file(of: $0.path) != nil }
      return KnowledgePack(
        node: node, label: manifest.label(of: node), byteCount: bytes(blocks), bundledBytes: bytes(bundled),
        downloadedBytes: bytes(here) - bytes(bundled))
    }
  }

  /// The blocks of a subtree that are not on this device, to be given to a ``BlockDownloader``.
  public func missingBlocks(within node: NodePath) -> [BlockEntry] {
    blocks(within: node).filter { file(of: $0.path) == nil }
  }
}
