import Foundation

/// A bank on this device: the files that came with the app, and those downloaded since.
public struct MemoryBank: Sendable {
  /// The bank's folder in the app's bundle, which is read only.
  public let folder: URL
  /// Where downloaded blocks are kept, by the same names.
  public let downloads: URL
  public let manifest: BankManifest
  public let tree: ClusterTree
  public let policy: BankPolicy
  /// What its leaves have learnt; `nil` for a bank that was made or exported without.
  public let sources: BankSources?

  static let genericName = "generic.safetensors"

  /// Opens a bank.
  ///
  /// - Throws: ``HierMemError`` of kind `bank` where bank.json, the tree, the policy or the sources are
  ///   missing or damaged.
  public init(folder: URL, downloads: URL) throws {
    self.folder = folder
    self.downloads = downloads
    manifest = try BankManifest(contentsOf: folder.appendingPathComponent("bank.json"))
    tree = try ClusterTree(contentsOf: folder.appendingPathComponent("tree.safetensors"))
    policy = try BankPolicy(contentsOf: folder.appendingPathComponent("policy.json"))
    guard tree.branching == manifest.memory.branching, tree.depth == manifest.memory.depth else {
      throw HierMemError(
        .bank, "the tree in \(folder.path) has \(tree.depth) levels of \(tree.branching) children, "
          + "bank.json says \(manifest.memory.depth) of \(manifest.memory.branching)",
        hint: "Export the model again.")
    }
    sources = manifest.sources == nil ? nil : try BankSources(folder: folder, tree: tree)
  }

  /// The nodes on a path that have a block, level 1 first.
  public func nodes(on path: NodePath) -> [NodePath] {
    path.prefixes.filter { manifest.blocks[$0] != nil }
  }

  /// The blocks of a subtree, its top included, in the order of their paths.
  public func blocks(within node: NodePath) -> [BlockEntry] {
    manifest.blocks.values.filter { $0.path.isWithin(node) }.sorted { $0.path < $1.path }
  }

  /// A block's file, or `nil` where it has not been downloaded. The root stands for the generic block.
  public func file(of node: NodePath) -> URL? {
    let name = Self.blockName(node)
    return [downloads, folder].lazy
      .map { $0.appendingPathComponent(name) }
      .first { FileManager.default.fileExists(atPath: $0.path) }
  }

  /// Whether a block came with the app, so that it can't be removed.
  public func isBundled(_ node: NodePath) -> Bool {
    FileManager.default.fileExists(atPath: folder.appendingPathComponent(Self.blockName(node)).path)
  }

  /// Reads a block; that of `NodePath.generic` is the generic one.
  ///
  /// - Throws: ``HierMemError`` of kind `bank` where it is not here, or damaged.
  public func read(_ node: NodePath) throws -> MemoryBlock {
    guard let url = file(of: node) else {
      let name = node == .generic ? "generic block" : "block \(node)"
      throw HierMemError(.bank, "the \(name) is not on this device", hint: "Download it first.")
    }
    return try MemoryBlock(contentsOf: url, config: manifest.memory, level: node.level)
  }

  /// Deletes the downloaded blocks of a subtree; those that came with the app stay.
  ///
  /// - Throws: ``HierMemError`` of kind `bank` where one can't be deleted.
  public func removeDownloads(within node: NodePath) throws {
    for block in blocks(within: node) {
      let url = downloads.appendingPathComponent(Self.blockName(block.path))
      guard FileManager.default.fileExists(atPath: url.path) else { continue }
      do {
        try FileManager.default.removeItem(at: url)
      } catch {
        throw HierMemError(.bank, "cannot delete \(url.path): \(error.localizedDescription)")
      }
    }
  }

  /// The file below a bank's folder: 10.7 gives blocks/10/7.safetensors.
  public static func blockName(_ node: NodePath) -> String {
    if node == .generic { return genericName }
    return "blocks/" + node.children.map(String.init).joined(separator: "/") + ".safetensors"
  }
}
