#if canImport(CoreML)
  import CoreML
  import Foundation

  /// The exported anchor: one model for each function of the package, and one state for all of them,
  /// which holds the key/value cache and the memory.
  ///
  /// The actor never suspends while it works, so that no prediction is in flight while the state is
  /// written, and no two are at once.
  public actor CoreMLAnchor: LanguageAnchor {
    public nonisolated let context: Int
    private let manifest: ExportManifest
    private let functions: [Int: MLModel]  // by the tokens they take
    private let loader: MLModel?
    private let state: MLState
    /// What a model whose memory is an input is given at every call.
    private var memory: [String: MLMultiArray] = [:]

    /// Loads the functions of a compiled anchor. Takes seconds, the first time on a device more.
    ///
    /// - Parameters:
    ///   - package: the compiled model, see ``CompiledModels``.
    ///   - units: where Core ML may compute. Stateful models are reported to fail on the Neural Engine
    ///     (coremltools #2325, executorch #19635), so it is left out unless it is asked for.
    /// - Throws: ``HierMemError`` of kind `model` where the package is not what the manifest says.
    public init(_ manifest: ExportManifest, package: URL, units: MLComputeUnits = .cpuAndGPU) async throws {
      self.manifest = manifest
      context = manifest.anchor.context
      var functions: [Int: MLModel] = [:]
      for (name, tokens) in manifest.anchor.functions {
        functions[tokens] = try await loadModel(package, function: name, units: units).model
      }
      self.functions = functions
      if let name = manifest.anchor.loadBlock {
        loader = try await loadModel(package, function: name, units: units).model
      } else {
        loader = nil
      }
      state = functions[1]!.makeState()  // the manifest's check saw to it that there is one
      if manifest.memory?.mode == .input { memory = try Self.arrays(nil, manifest) }
    }

    public func attach(_ memory: FetchedMemory?) throws {
      try manifest.check(memory)
      guard let mode = manifest.memory?.mode else { return }
      switch mode {
      case .input:
        self.memory = try Self.arrays(memory, manifest)
      case .state:
        if let loader {
          let arrays = try Self.arrays(memory, manifest)
          _ = try predict(loader, arrays)
        } else {
          for name in MemoryConfig.tensorNames {
            try state.withMultiArray(for: name) { try $0.fill(with: memory?.tensors[name]) }
          }
        }
      }
    }

    public func logits(after tokens: [Int], at position: Int) throws -> [Float] {
      guard !tokens.isEmpty, position + tokens.count <= context else {
        throw HierMemError(
          .usage, "\(tokens.count) tokens at position \(position) are beyond the model's context of \(context)")
      }
      let plan = CallPlan(
        count: tokens.count, position: position, sizes: Array(functions.keys), context: context)
      var logits: [Float] = []
      for call in plan.calls {
        try pooled {
          let given = tokens[call.tokens] + [Int](repeating: 0, count: call.size - call.tokens.count)
          let inputs = try [
            "input_ids": MLMultiArray(integers: Array(given), shape: [1, call.size]),
            "position": MLMultiArray(integers: [position + call.tokens.lowerBound], shape: [1]),
          ]
          let outputs = try predict(functions[call.size]!, inputs.merging(memory) { first, _ in first })
          if call.tokens.upperBound == tokens.count {
            logits = try self.logits(outputs, row: call.tokens.count - 1)
          }
        }
      }
      return logits
    }

    /// The logits of one of a call's tokens, from all outputs that they are spread over.
    private func logits(_ outputs: any MLFeatureProvider, row: Int) throws -> [Float] {
      var logits: [Float] = []
      for name in manifest.anchor.logits {
        guard let part = outputs.featureValue(for: name)?.multiArrayValue, part.shape.count == 3 else {
          throw HierMemError(.model, "the anchor gives no output \(name) of logits", hint: "Export it again.")
        }
        logits += try part.floats(at: [0, row])
      }
      return Array(logits.prefix(manifest.anchor.vocabulary))
    }

    private func predict(_ model: MLModel, _ inputs: [String: MLMultiArray]) throws -> any MLFeatureProvider {
      let values = inputs.mapValues { MLFeatureValue(multiArray: $0) }
      return try model.prediction(from: MLDictionaryFeatureProvider(dictionary: values), using: state)
    }

    private static func arrays(_ memory: FetchedMemory?, _ manifest: ExportManifest) throws
      -> [String: MLMultiArray]
    {
      guard let shape = manifest.memory.map({ [$0.layers.count, $0.units, $0.hidden] }) else { return [:] }
      var arrays: [String: MLMultiArray] = [:]
      for name in MemoryConfig.tensorNames {
        let array = try MLMultiArray(shape: shape.map { $0 as NSNumber }, dataType: .float16)
        try array.fill(with: memory?.tensors[name])
        arrays[name] = array
      }
      return arrays
    }
  }
#endif
