import Foundation
import Testing

#if canImport(FoundationNetworking)
  import FoundationNetworking
#endif

@testable import HierMemKit

/// Download tasks of a session in this process, against a server on this machine. What Apple's systems do with a
/// background session is not tested.
@Suite(.serialized) struct BackgroundDownloadTests {
  private let folder = Fixtures.temporaryFolder()
  private let server: LocalServer
  private let bank: MemoryBank
  private let downloader: BackgroundDownloader

  init() throws {
    server = try LocalServer(serving: Fixtures.url("bank"))
    bank = try Fixtures.tinyBank(downloads: folder)
    downloader = BackgroundDownloader(remote: server.url, folder: folder, configuration: .default)
  }

  private func entry(_ path: String) throws -> BlockEntry {
    try #require(bank.manifest.blocks[try NodePath(path)])
  }

  private func file(_ block: BlockEntry) -> URL { folder.appendingPathComponent(Parcel(block).kept) }

  private func isRight(_ block: BlockEntry) -> Bool { (try? fileDigest(file(block))) == block.file.sha256 }

  @Test func bringsASubtree() async throws {
    defer { server.stop() }
    let blocks = bank.blocks(within: try NodePath("1"))
    let most = Mutex(0)
    try await downloader.download(blocks) { received in most.set(max(most.value, received)) }
    #expect(most.value == blocks.reduce(0) { $0 + $1.file.bytes })
    #expect(blocks.allSatisfy(isRight))
    let asked = server.requests.count
    #expect(asked == blocks.count)
    try await downloader.download(blocks)  // all there
    #expect(server.requests.count == asked)
    try await downloader.download([])
  }

  @Test func oneThatFailsStopsNoOther() async throws {
    defer { server.stop() }
    let good = try entry("1.1")
    let absent = BlockEntry(path: try NodePath("7"), file: ManifestFile(bytes: 10, sha256: ""), label: "")
    let error = await hierMemError { try await downloader.download([absent, good]) }
    #expect(error?.kind == .download)
    #expect(error?.what.contains("404") == true, "\(error?.what ?? "no error")")
    #expect(isRight(good))
  }

  @Test func refusesOtherBytes() async throws {
    defer { server.stop() }
    let block = try entry("1.1")
    let other = BlockEntry(
      path: block.path, file: ManifestFile(bytes: block.file.bytes, sha256: String(repeating: "0", count: 64)),
      label: "")
    let error = await hierMemError { try await downloader.download([other]) }
    #expect(error?.what.contains("bank.json") == true)
    #expect(!FileManager.default.fileExists(atPath: file(other).path))
  }

  @Test func aBrokenConnectionIsToldAndTriedAgain() async throws {
    defer { server.stop() }
    let block = try entry("0")
    server.breakAfter(500)
    #expect(await hierMemError { try await downloader.download([block]) }?.kind == .download)
    #expect(!FileManager.default.fileExists(atPath: file(block).path))
    try await downloader.download([block])
    #expect(isRight(block))
  }

  @Test func twoCallsWaitForTheSameBlock() async throws {
    defer { server.stop() }
    let blocks = bank.blocks(within: try NodePath("0"))
    async let one: Void = downloader.download(blocks)
    async let other: Void = downloader.download(Array(blocks.prefix(2)))
    _ = try await (one, other)
    #expect(blocks.allSatisfy(isRight))
  }

  @Test func cancellingEndsTheWait() async throws {
    defer { server.stop() }
    let block = try entry("0")
    server.hold()
    let task = Task { [downloader] in try await downloader.download([block]) }
    while server.requests.isEmpty { try await Task.sleep(for: .milliseconds(1)) }
    task.cancel()
    await #expect(throws: CancellationError.self) { try await task.value }
    server.release()
    try await downloader.download([block])
    #expect(isRight(block))
  }

  @Test func aTaskSaysWhatItBrings() throws {
    let block = try entry("1.1")
    let parcel = Parcel(block)
    let read = try JSONDecoder().decode(Parcel.self, from: Data(parcel.json.utf8))
    #expect((read.name, read.bytes, read.sha256) == (parcel.name, block.file.bytes, block.file.sha256))
  }
}
