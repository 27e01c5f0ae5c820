import Foundation

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// A web server on this machine that serves one folder, understands ranges, and can be made to misbehave.
///
/// Unchecked because everything that changes is guarded by the lock.
final class LocalServer: @unchecked Sendable {
  struct Request: Equatable {
    let path: String
    let range: String?
  }

  let url: URL
  private let folder: URL
  private let socket: Int32
  private let lock = NSLock()
  private var seen: [Request] = []
  private var breaks: [Int] = []
  private var ignoringRanges = false
  private var appended = Data()
  private var isHeld = false

  init(serving folder: URL) throws {
    self.folder = folder
    #if canImport(Glibc)
      socket = Glibc.socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
    #else
      socket = Darwin.socket(AF_INET, SOCK_STREAM, 0)
    #endif
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_addr.s_addr = in_addr_t(0x7F00_0001).bigEndian
    var length = socklen_t(MemoryLayout<sockaddr_in>.size)
    let bound = withUnsafeMutablePointer(to: &address) { [socket] pointer in
      pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        bind(socket, $0, length) == 0 && listen(socket, 16) == 0 && getsockname(socket, $0, &length) == 0
      }
    }
    guard bound else { throw CocoaError(.fileReadUnknown) }
    url = URL(string: "http://127.0.0.1:\(UInt16(bigEndian: address.sin_port))/")!
    Thread.detachNewThread { [self] in serve() }
  }

  /// The requests so far.
  var requests: [Request] { lock.withLock { seen } }

  /// The next answers end after so many bytes of their bodies.
  func breakAfter(_ bytes: Int...) { lock.withLock { breaks += bytes } }

  /// From now on whole files are sent, whatever is asked for.
  func ignoreRanges() { lock.withLock { ignoringRanges = true } }

  /// From now on every file has more behind it.
  func append(_ data: Data) { lock.withLock { appended = data } }

  /// From now on nothing is answered before `release`.
  func hold() { lock.withLock { isHeld = true } }

  func release() { lock.withLock { isHeld = false } }

  func stop() { shutdown(socket, Int32(SHUT_RDWR)) }

  private func serve() {
    while true {
      let connection = accept(socket, nil, nil)
      if connection < 0 { break }
      Thread.detachNewThread { [self] in
        answer(connection)
        close(connection)
      }
    }
    close(socket)
  }

  private func answer(_ connection: Int32) {
    var head = Data()
    var buffer = [UInt8](repeating: 0, count: 4096)
    while !head.contains(Data("\r\n\r\n".utf8)) {
      let count = recv(connection, &buffer, buffer.count, 0)
      if count <= 0 { return }
      head.append(contentsOf: buffer[..<count])
    }
    let lines = String(decoding: head, as: UTF8.self).components(separatedBy: "\r\n")
    let path = String(lines[0].split(separator: " ")[1].dropFirst())
    let range = lines.first { $0.lowercased().hasPrefix("range:") }?
      .dropFirst(6).trimmingCharacters(in: .whitespaces)
    let (header, body) = lock.withLock {
      seen.append(Request(path: path, range: range))
      return response(path, range)
    }
    while lock.withLock({ isHeld }) { usleep(1000) }
    send(connection, Data(header.utf8) + body)
  }

  private func response(_ path: String, _ range: String?) -> (String, Data) {
    guard let file = try? Data(contentsOf: folder.appendingPathComponent(path)) else {
      return ("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", Data())
    }
    let data = file + appended
    let start = ignoringRanges ? 0 : range.flatMap { Int($0.dropFirst("bytes=".count).dropLast()) } ?? 0
    let status = start > 0
      ? "206 Partial Content\r\nContent-Range: bytes \(start)-\(data.count - 1)/\(data.count)" : "200 OK"
    let body = data[start...]
    let header = "HTTP/1.1 \(status)\r\nContent-Length: \(body.count)\r\nConnection: close\r\n\r\n"
    return (header, Data(breaks.isEmpty ? body : body.prefix(breaks.removeFirst())))
  }

  private func send(_ connection: Int32, _ data: Data) {
    data.withUnsafeBytes { bytes in
      var sent = 0
      while sent < bytes.count {
        #if canImport(Glibc)
          let count = Glibc.send(connection, bytes.baseAddress! + sent, bytes.count - sent, Int32(MSG_NOSIGNAL))
        #else
          let count = Darwin.send(connection, bytes.baseAddress! + sent, bytes.count - sent, 0)
        #endif
        if count <= 0 { return }
        sent += count
      }
    }
  }
}

extension Data {
  fileprivate func contains(_ other: Data) -> Bool { range(of: other) != nil }
}
