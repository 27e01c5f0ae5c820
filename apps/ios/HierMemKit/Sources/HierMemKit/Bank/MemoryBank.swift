import Foundation

/// A bank on this device: the files that came with the app, and those downloaded since.
public struct MemoryBank: Sendable {
  /// The bank's folder in the app's bundle, which is read only.
  public let folder: URL
  /// Where downloaded blocks are kept, by the same names with their digests.
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
    [download(of: node), folder.appendingPathComponent(Self.blockName(node))]
      .compactMap(\.self)
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
      guard let url = download(of: block.path), FileManager.default.fileExists(atPath: url.path) else { continue }
      do {
        try FileManager.default.removeItem(at: url)
      } catch {
        throw HierMemError(.bank, "cannot delete \(url.path): \(error.localizedDescription)")
      }
    }
  }

  /// Deletes downloaded blocks of other versions of this bank, which an update of the app has left.
  ///
  /// Errors are passed over: what stays only takes room.
  func removeOutdatedDownloads() {
    let folder = downloads.appendingPathComponent("blocks")
    let wanted = Set(manifest.blocks.values.map { downloads.appendingPathComponent(Parcel($0).kept).lastPathComponent })
    guard let files = FileManager.default.enumerator(at: folder, includingPropertiesForKeys: nil) else { return }
    for case let file as URL in files where !file.hasDirectoryPath {
      let name = file.pathExtension == "partial" ? file.deletingPathExtension() : file
      guard "." + name.pathExtension == Parcel.ending, !wanted.contains(name.lastPathComponent) else { continue }
      try? FileManager.default.removeItem(at: file)
    }
  }

  private func download(of node: NodePath) -> URL? {
    manifest.blocks[node].map { downloads.appendingPathComponent(Parcel($0).kept) }
  }

  /// The file below a bank's folder: 10.7 gives blocks/10/7.safetensors.
  public static func blockName(_ node: NodePath) -> String {
    if node == .generic { return genericName }
    return "blocks/" + node.children.map(String.init).joined(separator: "/") + ".safetensors"
  }
}
