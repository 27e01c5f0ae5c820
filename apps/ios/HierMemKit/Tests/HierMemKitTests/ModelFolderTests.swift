import Foundation
import Testing

@testable import HierMemKit

struct ModelFolderTests {
  @Test(arguments: [
    (#""version": 1"#, #""version": 2"#, "version 2"),
    (#""format": "mlx-hiermem-coreml""#, #""format": "mlx-hiermem-bank""#, "'mlx-hiermem-bank'"),
    (#""units": 6"#, #""units": 7"#, "another memory"),
    (#""block_sizes": [4, 2]"#, #""block_sizes": [2, 4]"#, "another memory"),
    (#""decode": 1"#, #""decode": 2"#, "no function for one token"),
    (#""lengths": [8, 16, 32]"#, #""lengths": [16, 8, 32]"#, "not ascending"),
    (#""eos": [2],"#, "", "eos"),
    (#""tokenizer": "tokenizer/""#, #""tokenizer": "elsewhere/""#, "tokenizer.json"),
    (#""folder": "bank/""#, #""folder": "elsewhere/""#, "bank.json"),
    (#""bank": {"folder": "bank/", "remote": null, "download": {}},"#, "", "go together"),
  ])
  func refusesAManifestThatDoesNotFit(_ old: String, _ new: String, _ expected: String) async throws {
    let export = try TinyExport()
    try export.edit(old, new)
    let error = await hierMemError { _ = try export.open() }
    #expect(error?.errorDescription?.contains(expected) == true, "\(error?.errorDescription ?? "no error")")
  }

  @Test func refusesABlockThatIsNowhere() async throws {
    let export = try TinyExport()
    #expect(try export.open().makeDownloader() == nil)
    try FileManager.default.removeItem(at: export.folder.appendingPathComponent("bank/blocks/1/1.safetensors"))
    #expect(await hierMemError { _ = try export.open() }?.what.contains("the block 1.1 is neither in") == true)
    try export.edit(
      #""remote": null, "download": {}"#,
      #""remote": {"url": "https://example.org/bank/"}, "download": {"blocks/1/1.safetensors": {"bytes": 968, "sha256": ""}}"#)
    let folder = try export.open()
    #expect(folder.makeDownloader()?.remote.absoluteString == "https://example.org/bank/")
    #expect(folder.bank?.missingBlocks(within: try NodePath("1")).map(\.path.description) == ["1.1"])
  }

  @Test func verifyFindsAChangedFile() async throws {
    let export = try TinyExport()
    let error = await hierMemError { try export.open().verify() }
    #expect(error?.what.contains("weight.bin") == true)
  }

  @Test func packsTellWhatIsHere() async throws {
    let (folder, downloads) = (try Fixtures.copy("bank"), Fixtures.temporaryFolder())
    for name in ["1", "1/0", "1/1"] {
      try FileManager.default.removeItem(at: folder.appendingPathComponent("blocks/\(name).safetensors"))
    }
    let bank = try MemoryBank(folder: folder, downloads: downloads)
    #expect(bank.packs().map(\.node.description) == ["0", "1", "2"])
    #expect(bank.packs().map(\.label) == ["topic 0", "topic 1", "topic 2"])
    #expect(bank.packs()[0].missingBytes == 0)
    #expect(bank.packs()[1].missingBytes == 1744 + 2 * 968)
    let server = try LocalServer(serving: Fixtures.url("bank"))
    defer { server.stop() }
    let missing = bank.missingBlocks(within: try NodePath("1"))
    try await BlockDownloader(remote: server.url, folder: downloads).download(missing)
    #expect(bank.packs()[1].missingBytes == 0)
    #expect(bank.packs()[1].downloadedBytes == 1744 + 2 * 968)
    #expect(bank.packs()[1].bundledBytes == 968)
    try bank.removeDownloads(within: try NodePath("1"))
    #expect(bank.packs()[1].missingBytes == 1744 + 2 * 968)
    #expect(bank.packs(level: 2).count == 8)
  }
}
