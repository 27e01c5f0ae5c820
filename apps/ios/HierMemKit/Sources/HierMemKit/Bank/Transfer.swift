import Foundation

#if canImport(FoundationNetworking)
  import FoundationNetworking
#endif

/// One request for the rest of a file, whose bytes go to disk as they come.
///
/// It is the delegate of a session of its own: outside Apple's systems, Foundation has no delegates for
/// single tasks. Unchecked because a session calls its delegate from one serial queue, and `run` reads
/// what it left only after the task's end.
final class Transfer: NSObject, URLSessionDataDelegate, @unchecked Sendable {
  enum Outcome {
    case complete
    /// The connection broke; what has come is of use.
    case broken(String)
    /// Asking again would not help.
    case refused(String)
  }

  /// Bytes of the file that are on disk.
  private(set) var received: Int
  private let file: FileHandle
  private let limit: Int
  private let progress: BlockDownloader.Progress
  private var refusal: String?
  private var continuation: CheckedContinuation<Outcome, any Error>?

  /// Opens a partial file; one that is too long is begun anew.
  init(partial: URL, limit: Int, progress: @escaping BlockDownloader.Progress) throws {
    self.limit = limit
    self.progress = progress
    do {
      file = try FileHandle(forUpdating: partial)
      received = Int(try file.seekToEnd())
      if received > limit {
        try file.truncate(atOffset: 0)
        received = 0
      }
    } catch {
      throw HierMemError(.download, "cannot write \(partial.path): \(error.localizedDescription)")
    }
  }

  deinit { try? file.close() }

  /// Asks for what is missing. Throws `CancellationError` when the surrounding task is cancelled.
  func run(_ configuration: URLSessionConfiguration, from url: URL) async throws -> Outcome {
    try Task.checkCancellation()
    let session = URLSession(configuration: configuration, delegate: self, delegateQueue: nil)
    defer { session.finishTasksAndInvalidate() }  // a session holds its delegate until then
    var request = URLRequest(url: url)
    request.setValue("identity", forHTTPHeaderField: "Accept-Encoding")
    if received > 0 { request.setValue("bytes=\(received)-", forHTTPHeaderField: "Range") }
    let task = session.dataTask(with: request)
    return try await withTaskCancellationHandler {
      try await withCheckedThrowingContinuation { continuation in
        self.continuation = continuation
        task.resume()
      }
    } onCancel: {
      task.cancel()
    }
  }

  func urlSession(
    _ session: URLSession, dataTask: URLSessionDataTask, didReceive response: URLResponse,
    completionHandler: @escaping (URLSession.ResponseDisposition) -> Void
  ) {
    let response = response as? HTTPURLResponse
    switch response?.statusCode {
    case 206 where response?.value(forHTTPHeaderField: "Content-Range")?
      .hasPrefix("bytes \(received)-") == true:
      completionHandler(.allow)
    case 200:  // the whole file, whatever was asked for
      do {
        try file.truncate(atOffset: 0)
        received = 0
        completionHandler(.allow)
      } catch {
        refuse(error.localizedDescription, completionHandler)
      }
    case .some(let status):
      refuse("the server answers \(status)", completionHandler)
    case nil:
      refuse("no HTTP server answers", completionHandler)
    }
  }

  func urlSession(_ session: URLSession, dataTask: URLSessionDataTask, didReceive data: Data) {
    guard refusal == nil else { return }
    do {
      guard received + data.count <= limit else {
        refusal = "it is longer than the \(limit) bytes that bank.json says"
        return dataTask.cancel()
      }
      try file.write(contentsOf: data)
      received += data.count
      progress(received)
    } catch {
      refusal = "it cannot be written: \(error.localizedDescription)"
      dataTask.cancel()
    }
  }

  func urlSession(_ session: URLSession, task: URLSessionTask, didCompleteWithError error: (any Error)?) {
    if let refusal {
      continuation?.resume(returning: .refused(refusal))
    } else if (error as? URLError)?.code == .cancelled {
      continuation?.resume(throwing: CancellationError())
    } else if received == limit {
      continuation?.resume(returning: .complete)
    } else {
      continuation?.resume(
        returning: .broken(error?.localizedDescription ?? "\(received) of \(limit) bytes came"))
    }
    continuation = nil
  }

  private func refuse(_ what: String, _ handler: (URLSession.ResponseDisposition) -> Void) {
    refusal = what
    handler(.cancel)
  }
}
