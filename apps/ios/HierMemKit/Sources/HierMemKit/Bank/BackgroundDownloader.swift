import Foundation

#if canImport(FoundationNetworking)
  import FoundationNetworking
#endif

/// Brings blocks that go on coming while the app is in the background, or after the system has ended it.
///
/// Each block is a download task. On Apple's systems the tasks are those of a background session: another process
/// does the work, waits for a network and goes on where it broke. Elsewhere Foundation has no such sessions, and
/// the tasks run in this process. What a cancelled task has brought is lost; ``BlockDownloader`` goes on at the
/// byte, but only while the app runs.
///
/// There may be one of these for each identifier at a time.
public final class BackgroundDownloader: Sendable {
  /// The folder that names are relative to; ends with a slash.
  public let remote: URL
  /// Where files are kept, usually ``MemoryBank/downloads``.
  public let folder: URL
  private let arrivals: Arrivals
  private let session: URLSession

  /// Opens the session, and takes what has come since the app ran last.
  ///
  /// - Parameter identifier: of the session: the same at every start of the app, and nobody else's.
  public convenience init(remote: URL, folder: URL, identifier: String) {
    #if canImport(Darwin)
      let configuration = URLSessionConfiguration.background(withIdentifier: identifier)
    #else
      let configuration = URLSessionConfiguration.default
    #endif
    self.init(remote: remote, folder: folder, configuration: configuration)
  }

  init(remote: URL, folder: URL, configuration: URLSessionConfiguration) {
    self.remote = remote
    self.folder = folder
    arrivals = Arrivals(remote: remote, folder: folder)
    session = URLSession(configuration: configuration, delegate: arrivals, delegateQueue: nil)
  }

  deinit { session.finishTasksAndInvalidate() }  // a session holds its delegate until then

  /// Brings the blocks of a bank that are not here, all at once. One that fails stops none of the others.
  ///
  /// Cancelling stops those that no other call waits for.
  ///
  /// - Throws: ``HierMemError`` of kind `download` for the first that failed, or `CancellationError`.
  public func download(_ blocks: [BlockEntry], progress: BlockDownloader.Progress? = nil) async throws {
    try Task.checkCancellation()
    let parcels = blocks.map(Parcel.init)
    let order = Order(parcels, progress: progress)
    arrivals.expect(order)
    let running = Set(await tasks().filter { $0.state != .canceling }.compactMap { Parcel(of: $0)?.kept })
    try await withTaskCancellationHandler {
      try await withCheckedThrowingContinuation { continuation in
        arrivals.wait(for: order, continuation)
        for parcel in parcels where !Task.isCancelled {
          if parcel.isHere(folder) {
            arrivals.end(parcel.kept, received: parcel.bytes, problem: nil)
          } else if !running.contains(parcel.kept) {
            parcel.start(in: session, from: remote)
          }
        }
      }
    } onCancel: {
      cancelTasks(of: arrivals.cancel(order))
    }
  }

  /// Waits until the system has handed over what came while the app did not run.
  ///
  /// To be called where the system starts the app for that: in SwiftUI's `backgroundTask(.urlSession(identifier))`.
  public func receive() async {
    #if canImport(Darwin)
      await arrivals.receive()
    #endif
  }

  private func tasks() async -> [URLSessionTask] {
    await withCheckedContinuation { continuation in
      session.getAllTasks { continuation.resume(returning: $0) }
    }
  }

  /// Those that nobody waits for.
  private func cancelTasks(of names: Set<String>) {
    session.getAllTasks { [arrivals] tasks in
      for task in tasks {
        if let name = Parcel(of: task)?.kept, names.contains(name), !arrivals.expects(name) { task.cancel() }
      }
    }
  }
}
