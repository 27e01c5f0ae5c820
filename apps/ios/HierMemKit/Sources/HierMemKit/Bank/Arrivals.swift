import Foundation

#if canImport(FoundationNetworking)
  import FoundationNetworking
#endif

/// The blocks that one call waits for, by the names they are kept under. What changes is guarded by the lock of
/// ``Arrivals``.
final class Order: @unchecked Sendable {
  fileprivate var missing: Set<String>
  fileprivate var received: [String: Int] = [:]
  fileprivate var problem: (any Error)?
  fileprivate var continuation: CheckedContinuation<Void, any Error>?
  fileprivate let progress: BlockDownloader.Progress?

  init(_ parcels: [Parcel], progress: BlockDownloader.Progress?) {
    missing = Set(parcels.map(\.kept))
    self.progress = progress
  }
}

/// Takes what the tasks of a ``BackgroundDownloader`` bring, also those that an earlier start of the app began.
///
/// Unchecked because what changes is guarded by the lock.
final class Arrivals: NSObject, URLSessionDownloadDelegate, @unchecked Sendable {
  private let remote: URL
  private let folder: URL
  private let lock = NSLock()
  private var orders: [Order] = []
  /// Of tasks that have brought something wrong, until they complete.
  private var problems: [Int: HierMemError] = [:]

  init(remote: URL, folder: URL) {
    self.remote = remote
    self.folder = folder
  }

  /// Notes an order, before its tasks are looked for: whatever ends from now on is told to it.
  func expect(_ order: Order) {
    lock.withLock { orders.append(order) }
  }

  /// Resumes at once where nothing is missing, or the order was cancelled.
  func wait(for order: Order, _ continuation: CheckedContinuation<Void, any Error>) {
    lock.withLock { order.continuation = continuation }
    close(order)
  }

  /// Ends an order. Returns the names that were missing.
  func cancel(_ order: Order) -> Set<String> {
    let names = lock.withLock {
      let names = order.missing
      (order.missing, order.problem) = ([], CancellationError())
      return names
    }
    close(order)
    return names
  }

  /// Whether an order waits for a block.
  func expects(_ name: String) -> Bool {
    lock.withLock { orders.contains { $0.missing.contains(name) } }
  }

  /// A block is here, or will not come.
  func end(_ name: String, received: Int, problem: (any Error)?) {
    if problem == nil { tell(name, received) }
    let waiting = lock.withLock {
      let waiting = orders.filter { $0.missing.contains(name) }
      for order in waiting {
        order.missing.remove(name)
        order.problem = order.problem ?? problem
      }
      return waiting
    }
    waiting.forEach(close)
  }

  /// Resumes whoever waits for an order of which nothing is missing.
  private func close(_ order: Order) {
    let (waiting, problem) = lock.withLock { () -> (CheckedContinuation<Void, any Error>?, (any Error)?) in
      guard order.missing.isEmpty, let continuation = order.continuation else { return (nil, nil) }
      order.continuation = nil
      orders.removeAll { $0 === order }
      return (continuation, order.problem)
    }
    if let problem { waiting?.resume(throwing: problem) } else { waiting?.resume() }
  }

  private func tell(_ name: String, _ received: Int) {
    let told = lock.withLock {
      orders.filter { $0.missing.contains(name) }.map { order in
        order.received[name] = received
        return (order.progress, order.received.values.reduce(0, +))
      }
    }
    for (progress, sum) in told { progress?(sum) }
  }

  func urlSession(
    _ session: URLSession, downloadTask: URLSessionDownloadTask, didWriteData bytesWritten: Int64,
    totalBytesWritten: Int64, totalBytesExpectedToWrite: Int64
  ) {
    if let parcel = Parcel(of: downloadTask) { tell(parcel.kept, min(Int(totalBytesWritten), parcel.bytes)) }
  }

  func urlSession(
    _ session: URLSession, downloadTask: URLSessionDownloadTask, didFinishDownloadingTo location: URL
  ) {
    guard let parcel = Parcel(of: downloadTask) else { return }
    do {
      try keep(parcel, location, downloadTask.response)
    } catch {
      lock.withLock { problems[downloadTask.taskIdentifier] = error }
    }
  }

  func urlSession(_ session: URLSession, task: URLSessionTask, didCompleteWithError error: (any Error)?) {
    guard let parcel = Parcel(of: task) else { return }
    let found = lock.withLock { problems.removeValue(forKey: task.taskIdentifier) }
    if let error, (error as NSError).code == NSURLErrorCancelled { return beginAgain(parcel, in: session) }
    end(parcel.kept, received: parcel.bytes, problem: found ?? failure(of: task, parcel, error))
  }

  /// After a task was cancelled because nobody waited for it: somebody may wait by now.
  private func beginAgain(_ parcel: Parcel, in session: URLSession) {
    session.getAllTasks { [self] tasks in
      let running = tasks.filter { $0.state == .running || $0.state == .suspended }
      let comes = running.contains { Parcel(of: $0)?.kept == parcel.kept }
      if expects(parcel.kept), !comes { parcel.start(in: session, from: remote) }
    }
  }

  /// What is wrong with a task that has brought no file.
  private func failure(of task: URLSessionTask, _ parcel: Parcel, _ error: (any Error)?) -> HierMemError? {
    if let error {
      return HierMemError(
        .download, "\(parcel.name) did not come from \(remote.absoluteString): \(error.localizedDescription)",
        hint: "Try again when the network is better.")
    }
    return parcel.isHere(folder) ? nil : refusal(parcel, task.response)
  }

  /// The system removes the file once the delegate returns.
  private func keep(_ parcel: Parcel, _ location: URL, _ response: URLResponse?) throws(HierMemError) {
    guard (response as? HTTPURLResponse)?.statusCode == 200 else { throw refusal(parcel, response) }
    try BlockFiles(remote: remote, folder: folder).keep(location, as: parcel)
  }

  private func refusal(_ parcel: Parcel, _ response: URLResponse?) -> HierMemError {
    let status = (response as? HTTPURLResponse)?.statusCode
    let said = status.map { "the server answers \($0)" } ?? "no HTTP server answers"
    return HierMemError(.download, "\(parcel.name) cannot be had from \(remote.absoluteString): \(said)")
  }

  #if canImport(Darwin)
    private var hasReceived = false
    private var receiver: CheckedContinuation<Void, Never>?

    func receive() async {
      await withCheckedContinuation { continuation in
        let isOver = lock.withLock {
          if !hasReceived { receiver = continuation }
          defer { hasReceived = false }
          return hasReceived
        }
        if isOver { continuation.resume() }
      }
    }

    func urlSessionDidFinishEvents(forBackgroundURLSession session: URLSession) {
      let waiting = lock.withLock {
        defer { receiver = nil }
        hasReceived = receiver == nil
        return receiver
      }
      waiting?.resume()
    }
  #endif
}
