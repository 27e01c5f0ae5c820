import Foundation

/// A folder that `hiermem export coreml` wrote, as it lies in the app's bundle.
public struct ModelFolder: Sendable {
  public let url: URL
  public let manifest: ExportManifest
  public let tokenizer: any TextTokenizer
  /// `nil` for an anchor without memories.
  public let bank: MemoryBank?

  /// Opens an exported folder; the models in it are not loaded yet. Downloaded blocks of another bank, which an update
  /// of the app has left, are deleted.
  ///
  /// - Parameters:
  ///   - downloads: where downloaded blocks are kept, for example in Application Support.
  ///   - tokenizer: one to use instead of the folder's tokenizer.json.
  /// - Throws: ``HierMemError`` where something is missing, damaged, or does not belong together.
  public init(at url: URL, downloads: URL, tokenizer: (any TextTokenizer)? = nil) throws {
    self.url = url
    let manifest = try readJSON(
      url.appendingPathComponent("manifest.json"), as: ExportManifest.self, kind: .model)
    self.manifest = manifest
    let file = url.appendingPathComponent(manifest.tokenizer).appendingPathComponent("tokenizer.json")
    self.tokenizer = try tokenizer ?? JSONTokenizer(contentsOf: file)
    bank = try manifest.bank.map {
      try MemoryBank(folder: url.appendingPathComponent($0.folder), downloads: downloads)
    }
    if let bank {
      try check(bank)
      bank.removeOutdatedDownloads()
    }
  }

  /// Brings blocks that are not in the bundle; `nil` where the bank has none elsewhere.
  public func makeDownloader() -> BlockDownloader? {
    guard let bank, let remote = manifest.bank?.remote else { return nil }
    return BlockDownloader(remote: remote.url, folder: bank.downloads)
  }

  /// The same, and it goes on while the app is in the background. Make one, and keep it as long as the app runs.
  ///
  /// - Parameter identifier: of the system's session: the same at every start of the app, and nobody else's.
  public func makeBackgroundDownloader(identifier: String) -> BackgroundDownloader? {
    guard let bank, let remote = manifest.bank?.remote else { return nil }
    return BackgroundDownloader(remote: remote.url, folder: bank.downloads, identifier: identifier)
  }

  /// Compares every bundled file with its digest, which takes a while.
  ///
  /// - Throws: ``HierMemError`` of kind `model` for the first that differs.
  public func verify() throws {
    for (name, entry) in manifest.files.sorted(by: { $0.key < $1.key }) {
      guard (try? fileDigest(url.appendingPathComponent(name))) == entry.sha256 else {
        throw HierMemError(
          .model, "\(name) in \(url.path) is not what manifest.json says",
          hint: "Copy the exported folder again.")
      }
    }
  }

  private func check(_ bank: MemoryBank) throws {
    let config = bank.manifest.memory
    guard let memory = manifest.memory, memory.blockSizes == config.blockSizes,
      memory.layers == config.layers, memory.hidden == config.hidden, memory.units == config.fetchedSize
    else {
      throw HierMemError(
        .model, "the anchor in \(url.path) was exported for another memory than its bank has",
        hint: "Export the model again.")
    }
    let elsewhere = manifest.bank?.download ?? [:]
    for node in bank.manifest.blocks.keys.sorted()
    where !bank.isBundled(node) && elsewhere[MemoryBank.blockName(node)] == nil {
      throw HierMemError(
        .bank, "the block \(node) is neither in \(bank.folder.path) nor to be downloaded",
        hint: "Export the model again.")
    }
  }
}
