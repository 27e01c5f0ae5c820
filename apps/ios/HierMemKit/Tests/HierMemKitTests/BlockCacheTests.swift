import Foundation
import Testing

@testable import HierMemKit

struct BlockCacheTests {
  // float16 blocks of 2 layers · 32 values: level 1 has 4 units, level 2 has 2
  private static let level1 = 3 * 2 * 4 * 32 * 2
  private static let level2 = level1 / 2

  private func path(_ text: String) throws -> NodePath { try NodePath(text) }

  @Test func countsHitsAndMisses() async throws {
    let cache = BlockCache(bank: try Fixtures.tinyBank())
    let first = try await cache.fetch(path("0.1"))
    #expect(first.nodes.map(\.description) == ["0", "0.1"])
    #expect((first.hits, first.missing) == (0, []))
    let second = try await cache.fetch(path("0.2"))
    #expect(second.hits == 1)
    let statistics = await cache.statistics
    #expect(statistics == .init(hits: 1, misses: 3, evictions: 0, bytesRead: Self.level1 + 2 * Self.level2))
    #expect(await cache.byteCount == Self.level1 + 2 * Self.level2)
  }

  @Test func leavesOutNodesWithoutABlock() async throws {
    let cache = BlockCache(bank: try Fixtures.tinyBank())
    #expect(try await cache.fetch(path("2.2")).nodes.map(\.description) == ["2"])
    #expect(try await cache.fetch(.root).memory == nil)
    #expect(try await cache.fetchGeneric().nodes == [.generic])
  }

  @Test func evictsTheLeastRecentlyUsedAndPinnedLevelsLast() async throws {
    let budget = 2 * Self.level1 + 2 * Self.level2
    let cache = BlockCache(bank: try Fixtures.tinyBank(), budget: budget)
    for text in ["0.0", "1.0", "0.0", "0.1"] { _ = try await cache.fetch(path(text)) }
    #expect(await cache.nodes == Set(try ["0", "1", "0.0", "0.1"].map(path)))  // 1.0 was used longest ago
    _ = try await cache.fetch(path("2.1"))
    #expect(await cache.nodes == Set(try ["0", "2", "2.1"].map(path)))
    #expect(await cache.byteCount <= budget)
  }

  @Test func keepsWhatAPathNeedsBeyondTheBudget() async throws {
    let cache = BlockCache(bank: try Fixtures.tinyBank(), budget: 1)
    #expect(try await cache.fetch(path("0.1")).memory != nil)
    #expect(await cache.nodes.count == 2)
  }

  @Test func givesMemoryBackUnderPressure() async throws {
    let budget = 2 * (Self.level1 + 3 * Self.level2)
    let cache = BlockCache(bank: try Fixtures.tinyBank(), budget: budget)
    for text in ["0.0", "0.1", "0.2", "1.0"] { _ = try await cache.fetch(path(text)) }
    await cache.relieve(.warning)
    #expect(await cache.byteCount <= budget / 2)
    #expect(await cache.nodes.isSuperset(of: [try path("0"), try path("1")]))
    await cache.relieve(.critical)
    #expect(await cache.byteCount == 0)
    #expect(try await cache.fetch(path("0.0")).memory != nil)
  }

  @Test func prefetchMakesHits() async throws {
    let cache = BlockCache(bank: try Fixtures.tinyBank())
    await cache.prefetch([try path("1"), try path("1.1"), try path("2.2")])
    #expect(try await cache.fetch(path("1.1")).hits == 2)
  }

  @Test func readsABlockOnceForManyWhoWait() async throws {
    let cache = BlockCache(bank: try Fixtures.tinyBank())
    let node = try path("1.1")
    try await withThrowingTaskGroup(of: Int?.self) { group in
      for _ in 0..<20 { group.addTask { try await cache.fetch(node).memory?.units } }
      for try await units in group { #expect(units == 6) }
    }
    #expect(await cache.statistics.misses == 2)
  }

  @Test func damageShowsAtFetchAndIsForgotten() async throws {
    let folder = try Fixtures.copy("bank")
    let cache = BlockCache(bank: try MemoryBank(folder: folder, downloads: folder))
    let url = folder.appendingPathComponent("blocks/1.safetensors")
    let whole = try Data(contentsOf: url)
    try whole.prefix(100).write(to: url)
    let node = try path("1")
    await cache.prefetch([node])
    #expect(await hierMemError { _ = try await cache.fetch(node) }?.kind == .bank)
    try whole.write(to: url)
    #expect(try await cache.fetch(node).memory != nil)
  }

  @Test func missingBlocksAreNamedAndForgottenOnesReadAgain() async throws {
    let folder = try Fixtures.copy("bank")
    let downloads = Fixtures.temporaryFolder()
    let bundled = folder.appendingPathComponent("blocks/0/1.safetensors")
    let entry = try #require(Fixtures.tinyBank().manifest.blocks[try path("0.1")])
    let downloaded = downloads.appendingPathComponent(Parcel(entry).kept)
    try FileManager.default.createDirectory(
      at: downloaded.deletingLastPathComponent(), withIntermediateDirectories: true)
    try FileManager.default.moveItem(at: bundled, to: downloaded)
    let bank = try MemoryBank(folder: folder, downloads: downloads)
    let cache = BlockCache(bank: bank)
    let node = try path("0.1")
    #expect(try await cache.fetch(node).missing == [])
    try bank.removeDownloads(within: try path("0"))
    #expect(!FileManager.default.fileExists(atPath: downloaded.path))
    #expect(bank.file(of: try path("0")) != nil)  // it came with the app
    await cache.forget(within: try path("0"))
    let fetch = try await cache.fetch(node)
    #expect(fetch.missing == [node])
    #expect(fetch.nodes.map(\.description) == ["0"])
  }
}
