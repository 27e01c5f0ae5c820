import Foundation

#if canImport(FoundationNetworking)
  import FoundationNetworking
#endif

/// Brings files of a bank from where it is published, with digests, and resumes what was broken off.
///
/// It works while the app runs; ``BackgroundDownloader`` goes on without it.
///
/// A file appears under its name only once it is whole and its digest is right; what has come so far
/// lies beside it with the ending `.partial`.
public actor BlockDownloader {
  /// The folder that names are relative to; ends with a slash.
  public nonisolated let remote: URL
  /// Where files are kept, usually ``MemoryBank/downloads``.
  public nonisolated let folder: URL
  /// How often a file is asked for before giving up, while the connection breaks.
  private let attempts: Int
  private let configuration: URLSessionConfiguration

  /// Hears how many bytes of the files asked for have come.
  public typealias Progress = @Sendable (_ received: Int) -> Void

  public init(
    remote: URL, folder: URL, attempts: Int = 3, configuration: URLSessionConfiguration = .default
  ) {
    self.remote = remote
    self.folder = folder
    self.attempts = attempts
    self.configuration = configuration
  }

  /// Brings the blocks of a bank that are not here, one after another.
  ///
  /// Cancelling keeps what has come for the next time.
  ///
  /// - Throws: ``HierMemError`` of kind `download`, or `CancellationError`.
  public func download(_ blocks: [BlockEntry], progress: Progress? = nil) async throws {
    var done = 0
    for block in blocks {
      let start = done
      try await download(MemoryBank.blockName(block.path), block.file) { progress?(start + $0) }
      done += block.file.bytes
      progress?(done)
    }
  }

  private func download(_ name: String, _ entry: ManifestFile, progress: @escaping Progress) async throws {
    let files = BlockFiles(remote: remote, folder: folder)
    if FileManager.default.fileExists(atPath: files.url(name).path) { return }
    try files.prepare(name)
    let partial = files.url(name).appendingPathExtension("partial")
    do {
      if !FileManager.default.fileExists(atPath: partial.path) { try Data().write(to: partial) }
    } catch {
      throw HierMemError(.download, "cannot write to \(folder.path): \(error.localizedDescription)")
    }
    try await receive(name, entry, into: partial, progress: progress)
    try files.keep(partial, as: name, entry)
  }

  /// Appends to the partial file until it has all bytes.
  private func receive(
    _ name: String, _ entry: ManifestFile, into partial: URL, progress: @escaping Progress
  ) async throws {
    var problem = "the server sent too little"
    for _ in 0..<attempts {
      let transfer = try Transfer(partial: partial, limit: entry.bytes, progress: progress)
      if transfer.received == entry.bytes { return }
      switch try await transfer.run(configuration, from: remote.appendingPathComponent(name)) {
      case .complete: return
      case .broken(let what): problem = what
      case .refused(let what):
        throw HierMemError(.download, "\(name) cannot be had from \(remote.absoluteString): \(what)")
      }
    }
    throw HierMemError(
      .download, "\(name) did not come from \(remote.absoluteString): \(problem)",
      hint: "Try again when the network is better; what has come is kept.")
  }
}
