#if canImport(CoreML)
  import CoreML
  import Foundation

  /// The exported retriever: text → a vector of length 1, by which a text's path is found.
  public actor CoreMLEmbedder: TextEmbedder {
    private let retriever: ExportManifest.Retriever
    private let tokenizer: JSONTokenizer
    private let model: MLModel

    /// Loads a compiled retriever.
    ///
    /// - Parameters:
    ///   - package: the compiled model, see ``CompiledModels``.
    ///   - tokenizer: of the retriever, which is not the anchor's.
    public init(
      _ retriever: ExportManifest.Retriever, package: URL, tokenizer: JSONTokenizer,
      units: MLComputeUnits = .cpuAndGPU
    ) async throws {
      self.retriever = retriever
      self.tokenizer = tokenizer
      model = try await loadModel(package, units: units).model
    }

    public nonisolated func rarePieces(_ text: String) -> Set<Int>? {
      tokenizer.rarePieces(text, limit: retriever.lengths[retriever.lengths.count - 1])
    }

    /// Embeds a text, of a long one the beginning.
    ///
    /// - Throws: ``HierMemError`` of kind `model` where the model is not what the manifest says.
    public func embed(_ text: String) throws -> [Float] {
      let longest = retriever.lengths[retriever.lengths.count - 1]
      let ids = tokenizer.encodeFramed(text, limit: longest)
      let length = retriever.lengths.first { $0 >= ids.count } ?? longest
      let padding = [Int](repeating: 0, count: length - ids.count)
      let real = [Int](repeating: 1, count: ids.count)
      let inputs = try [
        "input_ids": MLMultiArray(integers: ids + padding, shape: [1, length]),
        "attention_mask": MLMultiArray(integers: real + padding, shape: [1, length]),
      ].mapValues { MLFeatureValue(multiArray: $0) }
      let outputs = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: inputs))
      guard let array = outputs.featureValue(for: "embedding")?.multiArrayValue,
        array.shape.last?.intValue == retriever.dimension
      else {
        throw HierMemError(
          .model, "the retriever gives no embedding of \(retriever.dimension) values", hint: "Export it again.")
      }
      return try array.floats(at: [Int](repeating: 0, count: array.shape.count - 1))
    }
  }
#endif
