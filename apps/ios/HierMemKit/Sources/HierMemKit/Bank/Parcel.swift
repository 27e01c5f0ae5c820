import Foundation

#if canImport(FoundationNetworking)
  import FoundationNetworking
#endif

/// A block that is to come, as its task carries it.
struct Parcel: Codable, Sendable {
  /// Below the folder where the bank is published.
  let name: String
  let bytes: Int
  let sha256: String

  init(_ block: BlockEntry) {
    (name, bytes, sha256) = (MemoryBank.blockName(block.path), block.file.bytes, block.file.sha256)
  }

  /// `nil` for a task that is none of ours.
  init?(of task: URLSessionTask) {
    let data = Data((task.taskDescription ?? "").utf8)
    guard let parcel = try? decodeJSON(Parcel.self, from: data) else { return nil }
    self = parcel
  }

  /// Below the folder for downloads: with the digest in its name, blocks/1/0-0123456789abcdef.safetensors.
  ///
  /// Downloads stay when an update of the app brings another bank, whose blocks have the same names.
  var kept: String {
    let digest = sha256.prefix(16).filter(\.isHexDigit)
    return "\(name.dropLast(Self.ending.count))-\(digest)\(Self.ending)"
  }

  var json: String {
    (try? JSONEncoder().encode(self)).map { String(decoding: $0, as: UTF8.self) } ?? ""
  }

  static let ending = ".safetensors"

  func start(in session: URLSession, from remote: URL) {
    let task = session.downloadTask(with: remote.appendingPathComponent(name))
    task.taskDescription = json  // it survives the app
    task.resume()
  }

  func isHere(_ folder: URL) -> Bool {
    FileManager.default.fileExists(atPath: folder.appendingPathComponent(kept).path)
  }
}
