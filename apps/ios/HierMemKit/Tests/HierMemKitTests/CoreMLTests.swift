// On Linux the module is the stand-in in Tests/CoreMLStandIn, which runs closures; on Apple's systems these
// tests would need packages, so they are for Linux.
#if os(Linux)
  import CoreML
  import Foundation
  import Testing

  @testable import HierMemKit

  struct CoreMLTests {
    /// Fills up calls, writes the memory once a swap, and reads logits that are spread over padded arrays.
    @Test(arguments: TinyExport.Memory.allCases)
    func theAnchorComputesAsWithoutCoreML(_ memory: TinyExport.Memory) async throws {
      let export = try TinyExport(memory: memory)
      let program = try TinyProgram(export, memory: memory)
      let model = try await ChatModel.load(try export.open(), compiled: program.compiled)
      let plain = TinyAnchor(vocabulary: 400, hidden: 32, context: 320)
      let blocks = try #require(model.blocks)
      let tokens = (0..<21).map { $0 * 37 % 400 }
      for path in ["", "0.1", "1.2", "", "0.1"] {
        let fetched = try await blocks.fetch(NodePath(path)).memory
        try await model.anchor.attach(fetched)
        await plain.attach(fetched)
        for (range, position) in [(0..<21, 0), (5..<6, 5), (6..<9, 6)] {
          let found = try await model.anchor.logits(after: Array(tokens[range]), at: position)
          let wanted = try await plain.logits(after: Array(tokens[range]), at: position)
          #expect(found.count == 400)
          #expect(zip(found, wanted).allSatisfy { abs($0 - $1) <= 2e-3 * max(1, abs($1)) })
        }
      }
      let once = ["prefill 8", "prefill 8", "prefill 8", "decode 1", "prefill 8"]
      let swap = memory == .loadBlock ? ["load_block"] : []
      let trial = ["decode 1"]
      let swaps: [String] = (0..<5).flatMap { _ in swap + once }
      #expect(program.calls == trial + swaps)
    }

    /// A whole conversation through the folder, the retriever and the anchor's functions.
    @Test(arguments: TinyExport.Memory.allCases)
    func aConversationGoesAsInPython(_ memory: TinyExport.Memory) async throws {
      let golden = try SessionGolden.read()
      let expected = try #require(golden.sessions["fetched"])
      let export = try TinyExport(memory: memory, context: golden.context)
      let program = try TinyProgram(export, memory: memory, logits: .float32, vectors: golden.vectors)
      let model = try await ChatModel.load(try export.open(), compiled: program.compiled)
      let session = ChatSession(
        model: model, options: ChatOptions(system: expected.system, maxTokens: golden.maxTokens))
      for turn in expected.turns {
        var reply = ""
        for try await event in session.ask(turn.text) {
          if case .text(let piece, _) = event { reply += piece }
        }
        #expect(Array(reply.utf8) == Array(turn.reply.utf8))
        #expect(await session.topic?.path.description == turn.path)
      }
    }

    @Test func nothingReachesBeyondTheContext() async throws {
      let export = try TinyExport(context: 20)
      let program = try TinyProgram(export)
      let model = try await ChatModel.load(try export.open(), compiled: program.compiled)
      _ = try await model.anchor.logits(after: [Int](repeating: 3, count: 20), at: 0)
      #expect(
        program.calls == ["decode 1", "prefill 8", "prefill 8"] + [String](repeating: "decode 1", count: 4))
      let error = await hierMemError { _ = try await model.anchor.logits(after: [1, 2], at: 19) }
      #expect(error?.kind == .usage)
    }

    @Test func refusesAMemoryOfAnotherShape() async throws {
      let export = try TinyExport()
      let model = try await ChatModel.load(try export.open(), compiled: TinyProgram(export).compiled)
      let text = """
        {"kind": "ffn", "branching": 3, "block_sizes": [4], "layers": [1, 3], "hidden": 32, "dtype": "float16"}
        """
      let config = try JSONDecoder().decode(MemoryConfig.self, from: Data(text.utf8))
      let block = try MemoryBlock(contentsOf: Fixtures.url("bank/blocks/0.safetensors"), config: config, level: 1)
      let short = try FetchedMemory(config: config, blocks: [(0, block)])
      let error = await hierMemError { try await model.anchor.attach(short) }
      #expect(error?.what.contains("[2, 4, 32], the anchor takes [2, 6, 32]") == true)
    }

    /// Where the GPU fails the CPU computes, and the next start begins there.
    @Test func triesTheCPULast() async throws {
      let export = try TinyExport(memory: .input)
      let program = try TinyProgram(export, memory: .input, refuses: [.cpuAndGPU])
      _ = try await ChatModel.load(try export.open(), compiled: program.compiled)
      #expect(MLModel.units(at: program.anchor) == [.cpuAndGPU, .cpuOnly, .cpuOnly])
      _ = try await ChatModel.load(try export.open(), compiled: program.compiled)
      #expect(MLModel.units(at: program.anchor).suffix(2) == [.cpuOnly, .cpuOnly])
      _ = try await ChatModel.load(try export.open(), compiled: program.compiled, units: .all)  // of the caller
      #expect(MLModel.units(at: program.anchor).suffix(2) == [.all, .all])
      let broken = try TinyProgram(export, memory: .input, refuses: [.cpuAndGPU, .cpuOnly])
      let error = await hierMemError {
        _ = try await ChatModel.load(try export.open(), compiled: broken.compiled, units: .all)
      }
      #expect(error?.kind == nil)  // with .all it loads
      #expect(MLModel.units(at: broken.anchor) == [.all, .all])
    }

    /// Another program with the same weights is another package.
    @Test func thePackageIsWhatIsCompiled() throws {
      let manifest = try TinyExport().open().manifest
      let digest = manifest.digest(ofPackage: "anchor.mlpackage")
      #expect(digest.count == 64)
      #expect(digest != manifest.digest(ofPackage: "retriever.mlpackage"))
      #expect(digest != TinyExport.digest)
    }

    /// A model that was compiled is used again; an export with other weights is compiled anew.
    @Test func compilesOncePerExport() async throws {
      let cache = CompiledModels(cache: Fixtures.temporaryFolder())
      let package = Fixtures.temporaryFolder().appendingPathComponent("anchor.mlpackage")
      try FileManager.default.createDirectory(at: package, withIntermediateDirectories: true)
      let first = try await cache.url(for: package, digest: "aaaa")
      try Data("kept".utf8).write(to: first.appendingPathComponent("mark"))
      #expect(try await cache.url(for: package, digest: "aaaa") == first)
      #expect(FileManager.default.fileExists(atPath: first.appendingPathComponent("mark").path))
      let second = try await cache.url(for: package, digest: "bbbb")
      #expect(try FileManager.default.contentsOfDirectory(atPath: cache.cache.path) == [second.lastPathComponent])
      let absent = package.deletingLastPathComponent().appendingPathComponent("other.mlpackage")
      #expect(await hierMemError { _ = try await cache.url(for: absent, digest: "") }?.kind == .model)
    }
  }
#endif
