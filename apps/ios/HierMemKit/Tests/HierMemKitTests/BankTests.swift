import Foundation
import Testing

@testable import HierMemKit

struct BankTests {
  @Test func pathsReadAndWrite() throws {
    let path = try NodePath(parsing: "10.7.15")
    #expect(path.children == [10, 7, 15])
    #expect(path.description == "10.7.15")
    #expect(path.prefixes.map(\.description) == ["10", "10.7", "10.7.15"])
    #expect(path.parent?.description == "10.7")
    #expect(path.isWithin(try NodePath(parsing: "10")))
    #expect(path.row(branching: 16) == (10 * 16 + 7) * 16 + 15)
    for text in ["", "1.", ".1", "1..2", "-1", "1.x", "+1", " 1", "1.99999999999999999999"] {
      #expect(throws: HierMemError.self) { try NodePath(parsing: text) }
    }
  }

  @Test func opensTheElementsBank() throws {
    let bank = try MemoryBank(folder: Fixtures.elements, downloads: Fixtures.temporaryFolder())
    #expect(bank.manifest.memory.blockSizes == [24, 8])
    #expect(bank.manifest.blocks.count == 20)
    #expect(bank.tree.dimension == 384)
    #expect(bank.policy == BankPolicy(reach: 1.2785))
    let node = try NodePath(parsing: "1.2")
    #expect(bank.nodes(on: node).map(\.description) == ["1", "1.2"])
    #expect(bank.blocks(within: try NodePath(parsing: "1")).count == 5)
    let block = try bank.read(node)
    #expect(block.units == 8)
    #expect(block.byteCount == 3 * 10 * 8 * 576 * 2)
    #expect(try bank.read(.generic).units == 32)
    for entry in bank.manifest.blocks.values {
      #expect(try fileDigest(bank.file(of: entry.path)!) == entry.file.sha256)
    }
  }

  @Test(arguments: [
    (#""version": 1"#, #""version": 2"#, "version 2"),
    (#""format": "mlx-hiermem-bank""#, #""format": "other""#, "'other'"),
    (#""kind": "ffn""#, #""kind": "kv""#, "kind 'kv'"),
    (#""kind": "ffn","#, #""kind": "ffn", "novel": 1,"#, "novel"),
    (#""hidden": 32,"#, "", "hidden"),
    (#""branching": 3"#, #""branching": "3""#, "branching"),
    (#""branching": 3"#, #""branching": 1"#, "branching 1"),
    (#""dtype": "float16""#, #""dtype": "int8""#, "dtype"),
    (#""path": "0""#, #""path": "zero""#, "'zero'"),
  ])
  func refusesADamagedManifest(_ old: String, _ new: String, _ expected: String) async throws {
    let folder = try Fixtures.copy("bank")
    let file = folder.appendingPathComponent("bank.json")
    let text = try String(contentsOf: file, encoding: .utf8)
    #expect(text.contains(old))
    try text.replacingOccurrences(of: old, with: new).write(to: file, atomically: true, encoding: .utf8)
    let error = await hierMemError { _ = try MemoryBank(folder: folder, downloads: folder) }
    #expect(error?.kind == .bank)
    let message = try #require(error?.errorDescription)
    #expect(message.contains(expected) && message.contains(file.path), "\(message)")
  }

  @Test func quantisationIsReadPerLevel() throws {
    func config(_ quantization: String) throws -> MemoryConfig {
      let text = """
        {"kind": "ffn", "branching": 4, "block_sizes": [8, 0, 4], "layers": [1], "hidden": 64,
         "quantization": \(quantization)}
        """
      return try JSONDecoder().decode(MemoryConfig.self, from: Data(text.utf8))
    }
    let four = #"{"bits": 4, "group_size": 32}"#
    let eight = #"{"bits": 8, "group_size": 64}"#
    let mixed = try config("[\(eight), null, \(four)]")
    #expect(mixed.quantization(level: 1)?.bits == 8)
    #expect(mixed.quantization(level: 2) == nil)
    #expect(mixed.quantization(level: 3)?.groupSize == 32)
    #expect(mixed.quantization(level: 0)?.bits == 8)  // the generic block is like the finest
    #expect(try config("[\(eight), null, null]").quantization(level: 0) == nil)
    #expect(mixed.firstUnit(level: 3) == 8)
    for bad in ["[\(four)]", #"[{"bits": 3, "group_size": 32}, null, null]"#,
      #"[{"bits": 4, "group_size": 128}, null, null]"#]
    {
      #expect(throws: HierMemError.self) { try config(bad) }
    }
  }

  @Test func policyClosesSubtrees() async throws {
    let (one, below, other) = (try NodePath("1"), try NodePath("1.2"), try NodePath("2.0"))
    let policy = BankPolicy(blocked: [below]).blocking([one, other])
    #expect(policy.blocked == [one, other])
    #expect(policy.blocker(of: try NodePath("1.1.0")) == one)
    #expect(policy.blocker(of: try NodePath("2.1")) == nil)
    let file = Fixtures.temporaryFolder().appendingPathComponent("policy.json")
    #expect(try BankPolicy(contentsOf: file) == .open)
    try Data(#"{"blocked": ["1.2"], "on_blocked": "parent"}"#.utf8).write(to: file)
    #expect(try BankPolicy(contentsOf: file) == BankPolicy(blocked: [below], onBlocked: .parent))
    try Data(#"{"blocked": [], "reach": 1.25, "passage_reach": 1.06}"#.utf8).write(to: file)
    let reaching = try BankPolicy(contentsOf: file)
    #expect(reaching == BankPolicy(reach: 1.25, passageReach: 1.06))
    #expect(reaching.blocking([one]) == BankPolicy(blocked: [one], reach: 1.25, passageReach: 1.06))
    #expect(BankPolicy(passageReach: 1.06).hasReach && !BankPolicy.open.hasReach)
    for damaged in ["{}", #"{"blocked": [], "reach": 0}"#, #"{"blocked": [], "passage_reach": 0}"#,
      #"{"blocked": "1"}"#, #"{"blocked": ["x"]}"#, #"{"blocked": [], "extra": 1}"#,
      #"{"blocked": [], "on_blocked": "maybe"}"#, "["]
    {
      try Data(damaged.utf8).write(to: file)
      #expect(await hierMemError { _ = try BankPolicy(contentsOf: file) }?.kind == .bank)
    }
  }

  @Test func blocksJoinAtTheirLevelsPlaces() throws {
    let bank = try Fixtures.tinyBank()
    let config = bank.manifest.memory
    let block = try bank.read(try NodePath("1.2"))
    let memory = try FetchedMemory(config: config, blocks: [(4, block)])
    #expect((memory.layers, memory.units, memory.hidden) == (2, 6, 32))
    let gate = try #require(memory.tensors["gate"])
    for layer in 0..<2 {
      let rows = (0..<6).map { unit in Array(gate[(layer * 6 + unit) * 32..<(layer * 6 + unit + 1) * 32]) }
      #expect(rows[..<4].allSatisfy { $0.allSatisfy { $0 == 0 } })
      #expect(Array(rows[4...].joined()) == Array(block.tensors["gate"]![layer * 64..<(layer + 1) * 64]))
    }
    #expect(throws: HierMemError.self) { try FetchedMemory(config: config, blocks: [(5, block)]) }
  }
}
