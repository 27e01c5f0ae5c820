// On Linux the module is the stand-in in Tests/CoreAIStandIn, which runs closures.
#if os(Linux)
  import CoreAI
  import Foundation
  import Testing

  @testable import HierMemKit

  /// The tiny model as a Core AI asset with the functions `decode` and `prefill`. Its cache is the first value
  /// of each place in `k_cache`, as the states are the caller's.
  private func standIn() -> AIModel.StandIn {
    let model = TinyModel(vocabulary: 400, hidden: 32)
    return AIModel.StandIn { function, inputs, states in
      func values<T: BitwiseCopyable>(_ array: NDArray, _ type: T.Type) -> [T] {
        array.view(as: T.self).withUnsafePointer { pointer, shape, _ in
          (0..<shape.reduce(1, *)).map { pointer[$0] }
        }
      }
      let tokens = values(inputs["input_ids"]!, Int32.self).map(Int.init)
      guard tokens.count == ["decode": 1, "prefill": 8][function] else { throw CocoaError(.featureUnsupported) }
      let memory = Dictionary(
        uniqueKeysWithValues: MemoryConfig.tensorNames.map { ($0, values(inputs[$0]!, Float16.self)) })
      let first = Int(values(inputs["position"]!, Int32.self)[0])
      var cache = values(states["k_cache"]!, Float16.self)
      var logits: [Float16] = []
      for (row, token) in tokens.enumerated() {
        let place = first + row
        let before = place > 0 ? cache[(place - 1) * 32..<place * 32].map(Double.init) : nil
        let state = model.state(of: token, after: before, memory: memory, layers: 2)
        cache.replaceSubrange(place * 32..<(place + 1) * 32, with: state.map { Float16($0) })
        logits += model.logits(state).map(Float16.init)
      }
      states["k_cache"] = NDArray(scalars: cache, shape: states["k_cache"]!.shape)
      return ["logits": NDArray(scalars: logits, shape: [1, tokens.count, 400])]
    }
  }

  struct CoreAITests {
    private func open() async throws -> ChatModel {
      let export = try TinyExport(memory: .input)
      try export.edit("mlx-hiermem-coreml", "mlx-hiermem-coreai")
      try export.edit(
        "[\"logits_0\", \"logits_1\"]",
        "[\"logits\"], \"states\": {\"k_cache\": {\"shape\": [320, 32]}, \"v_cache\": {\"shape\": [320, 32]}}")
      try export.edit("\"lengths\": ", "\"functions\": {\"e8\": 8, \"e16\": 16, \"e32\": 32}, \"lengths\": ")
      let folder = try export.open()
      #expect(folder.manifest.runtime == .coreAI)
      AIModel.register(standIn(), at: folder.url.appendingPathComponent("anchor.mlpackage"))
      let vector = NDArray(scalars: [Float](repeating: 0.25, count: 16), shape: [1, 16])
      AIModel.register(
        AIModel.StandIn { _, _, _ in ["embedding": vector] },
        at: folder.url.appendingPathComponent("retriever.mlpackage"))
      return try await ChatModel.load(folder, compiled: CompiledModels(cache: Fixtures.temporaryFolder()))
    }

    /// The folder says what runs it; memories come and go, and the caches are the caller's.
    @Test func theAnchorComputesAsWithoutCoreAI() async throws {
      let model = try await open()
      #expect(model.anchor is CoreAIAnchor)
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
          #expect(zip(found, wanted).allSatisfy { abs($0 - $1) <= 2e-2 * max(1, abs($1)) })
        }
      }
      let error = await hierMemError { _ = try await model.anchor.logits(after: [1, 2], at: 319) }
      #expect(error?.kind == .usage)
    }

    @Test func theRetrieverIsReadByItsFunctions() async throws {
      let model = try await open()
      #expect(try await model.router?.embedder.embed("neon").count == 16)
    }
  }
#endif
