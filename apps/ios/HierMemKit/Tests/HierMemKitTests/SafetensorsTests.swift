import Foundation
import Testing

@testable import HierMemKit

struct SafetensorsTests {
  private func write(_ header: String, data: [UInt8] = [], length: UInt64? = nil) throws -> URL {
    let url = Fixtures.temporaryFolder().appendingPathComponent("x.safetensors")
    let size = length ?? UInt64(header.utf8.count)
    let prefix = (0..<8).map { UInt8(truncatingIfNeeded: size >> (8 * $0)) }
    try Data(prefix + Array(header.utf8) + data).write(to: url)
    return url
  }

  @Test func readsTensors() throws {
    let header = #"{"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[1,2],"data_offsets":[1,9]}}"#
    let file = try SafetensorsFile(contentsOf: write(header, data: [9, 0, 0, 128, 63, 0, 0, 0, 192]))
    #expect(file.tensors.keys.sorted() == ["x"])
    let values = try file.withBytes(of: "x") { bytes in (0..<2).map { StoredScalar.float32.load(bytes, $0) } }
    #expect(values == [1, -2])
    #expect(throws: HierMemError.self) { try file.withBytes(of: "y") { _ in } }
  }

  @Test(arguments: [
    #"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,9]}}"#,  // longer than its shape
    #"{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#,  // beyond the file
    #"{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
    #"{"x":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}"#,
    #"{"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#,
    #"{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#,  // overflows
    #"{"x":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#,
    #"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0]}}"#,
    #"{"x":{"dtype":"F32","shape":[2]}}"#,
    "[]", "{", "",
  ])
  func refusesAFalseHeader(_ header: String) async throws {
    let url = try write(header, data: [UInt8](repeating: 0, count: 8))
    let error = await hierMemError { _ = try SafetensorsFile(contentsOf: url) }
    #expect(error?.kind == .bank)
    #expect(error?.what.contains(url.path) == true)
  }

  @Test func refusesAFalseLength() async throws {
    for length in [UInt64(3), 1 << 40, .max] {
      let url = try write("{}", length: length)
      #expect(await hierMemError { _ = try SafetensorsFile(contentsOf: url) }?.kind == .bank)
    }
    let short = Fixtures.temporaryFolder().appendingPathComponent("short")
    try Data([1, 2, 3]).write(to: short)
    #expect(throws: HierMemError.self) { try SafetensorsFile(contentsOf: short) }
    #expect(throws: HierMemError.self) { try SafetensorsFile(contentsOf: short.appendingPathExtension("no")) }
  }

  @Test func refusesATruncatedOrForeignBlock() async throws {
    let folder = try Fixtures.copy("bank")
    let bank = try MemoryBank(folder: folder, downloads: folder)
    let node = try NodePath("1")
    let url = try #require(bank.file(of: node))
    let data = try Data(contentsOf: url)
    try data.prefix(data.count - 1).write(to: url)
    #expect(await hierMemError { _ = try bank.read(node) }?.what.contains("damaged") == true)
    try FileManager.default.removeItem(at: url)
    try FileManager.default.copyItem(at: #require(bank.file(of: try NodePath("1.0"))), to: url)
    #expect(await hierMemError { _ = try bank.read(node) }?.what.contains("expected gate F16 [2, 4, 32]") == true)
  }
}
