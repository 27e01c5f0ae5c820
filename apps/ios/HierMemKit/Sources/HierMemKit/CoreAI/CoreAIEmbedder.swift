#if canImport(CoreAI)
  import CoreAI
  import Foundation

  /// The retriever of a folder that `hiermem export coreai` wrote: text → a vector of length 1.
  ///
  /// Compiled against declarations taken from Apple's documentation; it has not run on a device.
  @available(iOS 27, macOS 27, *)
  public actor CoreAIEmbedder: TextEmbedder {
    private let retriever: ExportManifest.Retriever
    private let tokenizer: JSONTokenizer
    private let functions: [Int: InferenceFunction]  // by the tokens they take

    /// - Parameter tokenizer: of the retriever, which is not the anchor's.
    public init(
      _ retriever: ExportManifest.Retriever, asset: URL, tokenizer: JSONTokenizer,
      options: SpecializationOptions = .default
    ) async throws {
      let model = try await loadAsset(asset, options)
      var functions: [Int: InferenceFunction] = [:]
      for (name, tokens) in retriever.functions ?? [:] {
        functions[tokens] = try loadFunction(name, of: model, asset)
      }
      guard retriever.lengths.allSatisfy({ functions[$0] != nil }) else {
        throw HierMemError(
          .model, "the retriever lacks a function for one of its lengths", hint: "Export the model again.")
      }
      self.retriever = retriever
      self.tokenizer = tokenizer
      self.functions = functions
    }

    public nonisolated func rarePieces(_ text: String) -> Set<Int>? {
      tokenizer.rarePieces(text, limit: retriever.lengths[retriever.lengths.count - 1])
    }

    /// Embeds a text, of a long one the beginning.
    public func embed(_ text: String) async throws -> [Float] {
      let longest = retriever.lengths[retriever.lengths.count - 1]
      let ids = tokenizer.encodeFramed(text, limit: longest)
      let length = retriever.lengths.first { $0 >= ids.count } ?? longest
      let padding = [Int32](repeating: 0, count: length - ids.count)
      let inputs = [
        "input_ids": NDArray(scalars: ids.map(Int32.init) + padding, shape: [1, length]),
        "attention_mask": NDArray(
          scalars: [Int32](repeating: 1, count: ids.count) + padding, shape: [1, length]),
      ]
      return try await Self.run(functions[length]!, inputs, retriever.dimension)
    }

    /// One call, outside the actor, as what it returns cannot come in.
    private nonisolated static func run(
      _ function: InferenceFunction, _ inputs: [String: NDArray], _ dimension: Int
    ) async throws -> [Float] {
      var outputs = try await function.run(inputs: inputs)
      guard let array = outputs.remove("embedding")?.ndArray, array.shape.last == dimension else {
        throw HierMemError(
          .model, "the retriever gives no embedding of \(dimension) values", hint: "Export it again.")
      }
      return try array.floats(at: [Int](repeating: 0, count: array.shape.count - 1))
    }
  }
#endif
