import Foundation
import Testing

@testable import HierMemKit

@Suite(.serialized) struct DownloadTests {
  private let folder = Fixtures.temporaryFolder()
  private let server: LocalServer
  private let bank: MemoryBank

  init() throws {
    server = try LocalServer(serving: Fixtures.url("bank"))
    bank = try Fixtures.tinyBank(downloads: folder)
  }

  private func downloader() -> BlockDownloader {
    BlockDownloader(remote: server.url, folder: folder)
  }

  private func entry(_ path: String) throws -> BlockEntry {
    try #require(bank.manifest.blocks[try NodePath(path)])
  }

  private func file(_ path: String) throws -> URL {
    folder.appendingPathComponent(Parcel(try entry(path)).kept)
  }

  @Test func bringsASubtree() async throws {
    defer { server.stop() }
    let blocks = bank.blocks(within: try NodePath("1"))
    let last = Mutex(0)
    try await downloader().download(blocks) { received in last.set(received) }
    #expect(last.value == blocks.reduce(0) { $0 + $1.file.bytes })
    for block in blocks {
      #expect(try fileDigest(file(block.path.description)) == block.file.sha256)
    }
    let asked = server.requests.count
    try await downloader().download(blocks)  // all there
    #expect(server.requests.count == asked)
  }

  @Test func resumesWhereItBroke() async throws {
    defer { server.stop() }
    server.breakAfter(500, 700)
    try await downloader().download([entry("0")])
    #expect(server.requests.map(\.range) == [nil, "bytes=500-", "bytes=1200-"])
    #expect(try fileDigest(file("0")) == entry("0").file.sha256)
  }

  @Test func keepsWhatCameForTheNextTime() async throws {
    defer { server.stop() }
    server.breakAfter(100, 100, 100)
    let block = try entry("0")
    let error = await hierMemError { try await downloader().download([block]) }
    #expect(error?.kind == .download)
    #expect(bank.file(of: block.path) == Fixtures.url("bank/blocks/0.safetensors"))  // not the partial one
    try await downloader().download([block])
    #expect(server.requests.last?.range == "bytes=300-")
    #expect(try fileDigest(file("0")) == block.file.sha256)
  }

  @Test func takesTheWholeFileFromAServerWithoutRanges() async throws {
    defer { server.stop() }
    server.breakAfter(600)
    server.ignoreRanges()
    try await downloader().download([entry("0")])
    #expect(try fileDigest(file("0")) == entry("0").file.sha256)
  }

  @Test func refusesOtherBytes() async throws {
    defer { server.stop() }
    let block = try entry("1.1")
    let other = BlockEntry(
      path: block.path, file: ManifestFile(bytes: block.file.bytes, sha256: String(repeating: "0", count: 64)),
      label: "")
    #expect(await hierMemError { try await downloader().download([other]) }?.kind == .download)
    #expect(try FileManager.default.contentsOfDirectory(atPath: folder.path + "/blocks/1") == [])
  }

  @Test func refusesMoreBytesThanSaid() async throws {
    defer { server.stop() }
    server.append(Data(count: 100_000))
    let block = try entry("1.1")
    let error = await hierMemError { try await downloader().download([block]) }
    #expect(error?.what.contains("longer than") == true)
    #expect(server.requests.count == 1)
  }

  @Test func saysWhatTheServerAnswers() async throws {
    defer { server.stop() }
    let absent = BlockEntry(
      path: try NodePath("7"), file: ManifestFile(bytes: 10, sha256: ""), label: "")
    let error = await hierMemError { try await downloader().download([absent]) }
    #expect(error?.what.contains("404") == true)
    #expect(server.requests.count == 1)
  }

  @Test func saysThatNobodyAnswers() async throws {
    server.stop()
    let block = try entry("0")
    let nobody = BlockDownloader(remote: URL(string: "http://127.0.0.1:9/")!, folder: folder)
    #expect(await hierMemError { try await nobody.download([block]) }?.kind == .download)
  }

  @Test func twoCallsBringABlockOnce() async throws {
    defer { server.stop() }
    let block = try entry("0")
    async let one: Void = downloader().download([block])
    async let other: Void = downloader().download([block])
    _ = try await (one, other)
    #expect(server.requests.count == 1)
    #expect(try fileDigest(file("0")) == block.file.sha256)
  }

  @Test func anotherCallGoesOnWhereOneIsCancelled() async throws {
    defer { server.stop() }
    let block = try entry("0")
    server.hold()
    let first = Task { [downloader = downloader()] in try await downloader.download([block]) }
    while server.requests.isEmpty { try await Task.sleep(for: .milliseconds(1)) }
    let second = Task { [downloader = downloader()] in try await downloader.download([block]) }
    first.cancel()
    await #expect(throws: CancellationError.self) { try await first.value }
    server.release()
    try await second.value
    #expect(try fileDigest(file("0")) == block.file.sha256)
  }

  @Test func blocksOfAnotherVersionAreNotTakenAndGo() throws {
    defer { server.stop() }
    let (right, other) = (try entry("1.1"), try entry("1.0"))
    let old = BlockEntry(
      path: right.path, file: ManifestFile(bytes: 1, sha256: String(repeating: "a", count: 64)), label: "")
    func put(_ name: String) throws -> URL {
      let url = folder.appendingPathComponent(name)
      try FileManager.default.createDirectory(at: url.deletingLastPathComponent(), withIntermediateDirectories: true)
      try Data(contentsOf: Fixtures.url("bank/" + MemoryBank.blockName(other.path))).write(to: url)
      return url
    }
    let outdated = try [Parcel(old).kept, Parcel(old).kept + ".partial", MemoryBank.blockName(right.path)].map(put)
    let wanted = try [Parcel(other).kept, Parcel(right).kept + ".partial", "blocks/notes.txt"].map(put)
    #expect(bank.file(of: right.path) == Fixtures.url("bank/blocks/1/1.safetensors"))
    bank.removeOutdatedDownloads()
    #expect(outdated.allSatisfy { !FileManager.default.fileExists(atPath: $0.path) })
    #expect(wanted.allSatisfy { FileManager.default.fileExists(atPath: $0.path) })
  }

  @Test func cancellingKeepsThePartialFile() async throws {
    defer { server.stop() }
    let block = try entry("0")
    let partial = try file("0").appendingPathExtension("partial")
    try FileManager.default.createDirectory(
      at: partial.deletingLastPathComponent(), withIntermediateDirectories: true)
    try Data(contentsOf: Fixtures.url("bank/blocks/0.safetensors")).prefix(100).write(to: partial)
    let task = Task { [downloader = downloader()] in
      try? await Task.sleep(for: .seconds(60))  // until it is cancelled
      try await downloader.download([block])
    }
    task.cancel()
    await #expect(throws: CancellationError.self) { try await task.value }
    try await downloader().download([block])
    #expect(server.requests.map(\.range) == ["bytes=100-"])
    #expect(try fileDigest(file("0")) == block.file.sha256)
  }
}

struct DigestTests {
  /// FIPS 180-4's examples, and lengths around the block size.
  @Test(arguments: [
    ("", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ("abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    (
      "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
      "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
    ),
    (String(repeating: "a", count: 1_000_000), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
  ])
  func knownDigests(_ text: String, _ digest: String) throws {
    let url = Fixtures.temporaryFolder().appendingPathComponent("x")
    try Data(text.utf8).write(to: url)
    #expect(try fileDigest(url) == digest)
  }
}

/// A value that several threads may set.
final class Mutex<Value: Sendable>: @unchecked Sendable {  // guarded by the lock
  private let lock = NSLock()
  private var stored: Value

  init(_ value: Value) { stored = value }

  var value: Value { lock.withLock { stored } }

  func set(_ value: Value) { lock.withLock { stored = value } }
}
