import Foundation

/// Where downloaded blocks are put, once they are whole and what bank.json says.
struct BlockFiles {
  let remote: URL
  let folder: URL

  func url(_ name: String) -> URL { folder.appendingPathComponent(name) }

  /// Makes the folder that a block goes into.
  func prepare(_ name: String) throws(HierMemError) {
    do {
      try FileManager.default.createDirectory(
        at: url(name).deletingLastPathComponent(), withIntermediateDirectories: true)
      try keepOutOfBackups(folder)
    } catch {
      throw HierMemError(.download, "cannot write to \(folder.path): \(error.localizedDescription)")
    }
  }

  /// Moves a file to its place; one that is not right is removed.
  func keep(_ arrived: URL, as name: String, _ entry: ManifestFile) throws(HierMemError) {
    let digest = try? fileDigest(arrived)
    guard digest == entry.sha256 else {
      try? FileManager.default.removeItem(at: arrived)
      throw HierMemError(
        .download, "\(name) from \(remote.absoluteString) is not what bank.json says",
        hint: "The bank was published anew: update the app.")
    }
    try prepare(name)
    do {
      try? FileManager.default.removeItem(at: url(name))
      try FileManager.default.moveItem(at: arrived, to: url(name))
    } catch {
      throw HierMemError(.download, "cannot keep \(url(name).path): \(error.localizedDescription)")
    }
  }
}
