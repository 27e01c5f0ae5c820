import Foundation
import Testing

@testable import HierMemKit

/// What tests/swift_goldens.py wrote, and what Swift makes its own of.
enum Fixtures {
  static let folder = Bundle.module.url(forResource: "Fixtures", withExtension: nil)!

  /// The top of the repository, for the bank of the elements.
  static let repository = (0..<6).reduce(URL(fileURLWithPath: #filePath)) { url, _ in
    url.deletingLastPathComponent()
  }.deletingLastPathComponent()

  static let elements = repository.appendingPathComponent("tests/elements/bank")

  /// What `make test-swift` makes beside the fixtures, because it is too large to be kept.
  static func made(_ name: String) -> URL { repository.appendingPathComponent("build/swift/\(name)") }

  static func isMade(_ name: String) -> Bool { FileManager.default.fileExists(atPath: made(name).path) }

  static func url(_ name: String) -> URL { folder.appendingPathComponent(name) }

  static func decode<Value: Decodable>(_ name: String, as type: Value.Type = Value.self) throws -> Value {
    try JSONDecoder().decode(type, from: Data(contentsOf: url(name)))
  }

  /// Float in [-1, 1), row by row: `uniform` in swift_goldens.py.
  static func uniform(_ seed: UInt64, _ rows: Int, _ columns: Int) -> [[Float]] {
    var random = SplitMix64(seed: seed)
    return (0..<rows).map { _ in
      (0..<columns).map { _ in Float(random.next() >> 40) / 8_388_608 - 1 }
    }
  }

  /// The tiny bank, with an empty folder for downloads.
  static func tinyBank(downloads: URL = temporaryFolder()) throws -> MemoryBank {
    try MemoryBank(folder: url("bank"), downloads: downloads)
  }

  /// A new folder that nobody else uses.
  static func temporaryFolder() -> URL {
    let url = FileManager.default.temporaryDirectory.appendingPathComponent("hiermem-\(UUID())")
    try! FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
    return url
  }

  /// A copy of a fixture's folder that may be changed.
  static func copy(_ name: String) throws -> URL {
    let target = temporaryFolder().appendingPathComponent(name)
    try FileManager.default.copyItem(at: url(name), to: target)
    return target
  }
}

extension NodePath {
  init(_ text: String) throws {
    self = text.isEmpty ? .root : try NodePath(parsing: text)
  }
}

/// The error that an expression throws on purpose; anything else fails the test.
func hierMemError(_ body: () async throws -> Void) async -> HierMemError? {
  do {
    try await body()
  } catch let error as HierMemError {
    return error
  } catch {
    Issue.record("threw \(error)")
  }
  return nil
}
