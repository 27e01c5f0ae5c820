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
      let parcel = Parcel(block)
      try await RunningDownloads.shared.one(folder.appendingPathComponent(parcel.kept).path) {
        try await self.download(parcel) { progress?(start + $0) }
      }
      done += block.file.bytes
      progress?(done)
    }
  }

  private func download(_ parcel: Parcel, progress: @escaping Progress) async throws {
    if parcel.isHere(folder) { return }
    let files = BlockFiles(remote: remote, folder: folder)
    try files.prepare(parcel)
    let partial = files.url(parcel).appendingPathExtension("partial")
    do {
      if !FileManager.default.fileExists(atPath: partial.path) { try Data().write(to: partial) }
    } catch {
      throw HierMemError(.download, "cannot write to \(folder.path): \(error.localizedDescription)")
    }
    try await receive(parcel, into: partial, progress: progress)
    try files.keep(partial, as: parcel)
  }

  /// Appends to the partial file until it has all bytes.
  private func receive(_ parcel: Parcel, into partial: URL, progress: @escaping Progress) async throws {
    var problem = "the server sent too little"
    for _ in 0..<attempts {
      let transfer = try Transfer(partial: partial, limit: parcel.bytes, progress: progress)
      if transfer.received == parcel.bytes { return }
      switch try await transfer.run(configuration, from: remote.appendingPathComponent(parcel.name)) {
      case .complete: return
      case .broken(let what): problem = what
      case .refused(let what):
        throw HierMemError(.download, "\(parcel.name) cannot be had from \(remote.absoluteString): \(what)")
      }
    }
    throw HierMemError(
      .download, "\(parcel.name) did not come from \(remote.absoluteString): \(problem)",
      hint: "Try again when the network is better; what has come is kept.")
  }
}

/// What is being downloaded in this process, by the file it becomes: two at once would write the same bytes twice,
/// into a file that is in use by then.
private actor RunningDownloads {
  static let shared = RunningDownloads()
  private var running: Set<String> = []

  /// Downloads a file, or waits until another call has. Where that one was cancelled, this one begins.
  func one(_ path: String, _ download: @Sendable () async throws -> Void) async throws {
    while running.contains(path) { try await Task.sleep(for: .milliseconds(50)) }  // which ends when it is cancelled
    running.insert(path)
    defer { running.remove(path) }
    try await download()
  }
}
