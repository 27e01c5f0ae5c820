import Foundation

/// Where downloaded blocks are put, once they are whole and what bank.json says.
struct BlockFiles {
  let remote: URL
  let folder: URL

  func url(_ parcel: Parcel) -> URL { folder.appendingPathComponent(parcel.kept) }

  /// Makes the folder that a block goes into.
  func prepare(_ parcel: Parcel) throws(HierMemError) {
    do {
      try FileManager.default.createDirectory(
        at: url(parcel).deletingLastPathComponent(), withIntermediateDirectories: true)
      try keepOutOfBackups(folder)
    } catch {
      throw HierMemError(.download, "cannot write to \(folder.path): \(error.localizedDescription)")
    }
  }

  /// Moves a file to its place; one that is not right is removed.
  func keep(_ arrived: URL, as parcel: Parcel) throws(HierMemError) {
    let digest = try? fileDigest(arrived)
    guard digest == parcel.sha256 else {
      try? FileManager.default.removeItem(at: arrived)
      throw HierMemError(
        .download, "\(parcel.name) from \(remote.absoluteString) is not what bank.json says",
        hint: "The bank was published anew: update the app.")
    }
    try prepare(parcel)
    do {
      try? FileManager.default.removeItem(at: url(parcel))
      try FileManager.default.moveItem(at: arrived, to: url(parcel))
    } catch {
      throw HierMemError(.download, "cannot keep \(url(parcel).path): \(error.localizedDescription)")
    }
  }
}
