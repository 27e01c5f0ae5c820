#if canImport(CoreAI)
  import CoreAI
  import Foundation

  /// The anchor of a folder that `hiermem export coreai` wrote.
  ///
  /// The memory is an input of every call, and the caches are states that this actor owns, so that no
  /// step copies either. Compiled against declarations taken from Apple's documentation; it has not run
  /// on a device.
  @available(iOS 27, macOS 27, *)
  public actor CoreAIAnchor: LanguageAnchor {
    public nonisolated let context: Int
    private let manifest: ExportManifest
    private let functions: [Int: InferenceFunction]  // by the tokens they take
    private let caches: Caches
    private var memory: [String: NDArray]
    private var isBusy = false

    /// Loads the functions of an `.aimodel`; Core AI compiles it for the device and keeps what it made.
    ///
    /// - Parameter options: where Core AI should compute, see ``CoreAIUnits``.
    /// - Throws: ``HierMemError`` of kind `model` where the asset is not what the manifest says.
    public init(_ manifest: ExportManifest, asset: URL, options: SpecializationOptions = .default) async throws {
      let model = try await loadAsset(asset, options)
      self.manifest = manifest
      context = manifest.anchor.context
      var functions: [Int: InferenceFunction] = [:]
      for (name, tokens) in manifest.anchor.functions {
        functions[tokens] = try loadFunction(name, of: model, asset)
      }
      self.functions = functions
      caches = try Caches(manifest)
      memory = Self.arrays(nil, manifest)
    }

    public func attach(_ memory: FetchedMemory?) throws {
      try manifest.check(memory)
      self.memory = Self.arrays(memory, manifest)
    }

    public func logits(after tokens: [Int], at position: Int) async throws -> [Float] {
      guard !tokens.isEmpty, position + tokens.count <= context else {
        throw HierMemError(
          .usage, "\(tokens.count) tokens at position \(position) are beyond the model's context of \(context)")
      }
      // A call suspends, and another one in between would write the same caches.
      guard !isBusy else { throw HierMemError(.usage, "the anchor is computing already") }
      isBusy = true
      defer { isBusy = false }
      let plan = CallPlan(
        count: tokens.count, position: position, sizes: Array(functions.keys), context: context)
      var logits: [Float] = []
      for call in plan.calls {
        let given = tokens[call.tokens] + [Int](repeating: 0, count: call.size - call.tokens.count)
        let inputs = [
          "input_ids": NDArray(scalars: given.map(Int32.init), shape: [1, call.size]),
          "position": NDArray(scalars: [Int32(position + call.tokens.lowerBound)], shape: [1]),
        ].merging(memory) { first, _ in first }
        let row = call.tokens.upperBound == tokens.count ? call.tokens.count - 1 : nil
        logits = try await Self.run(
          functions[call.size]!, inputs, caches, row: row, of: manifest.anchor.logits)
      }
      return Array(logits.prefix(manifest.anchor.vocabulary))
    }

    /// One call, outside the actor, as what it returns cannot come in; the logits of a row, or none.
    private nonisolated static func run(
      _ function: InferenceFunction, _ inputs: [String: NDArray], _ caches: Caches, row: Int?, of names: [String]
    ) async throws -> [Float] {
      var (keys, values) = caches.take()
      var views = InferenceFunction.MutableViews()
      views.insert(&keys, for: Caches.names.0)
      views.insert(&values, for: Caches.names.1)
      var outputs = try await function.run(inputs: inputs, states: views)
      caches.put(keys, values)
      guard let row else { return [] }
      var logits: [Float] = []
      for name in names {
        guard let part = outputs.remove(name)?.ndArray, part.shape.count == 3 else {
          throw HierMemError(.model, "the anchor gives no output \(name) of logits", hint: "Export it again.")
        }
        logits += try part.floats(at: [0, row])
      }
      return logits
    }

    private static func arrays(_ memory: FetchedMemory?, _ manifest: ExportManifest) -> [String: NDArray] {
      guard let shape = manifest.memory.map({ [$0.layers.count, $0.units, $0.hidden] }) else { return [:] }
      let zeros = [Float16](repeating: 0, count: memory == nil ? shape.reduce(1, *) : 0)
      return Dictionary(
        uniqueKeysWithValues: MemoryConfig.tensorNames.map { name in
          (name, NDArray(scalars: memory?.tensors[name] ?? zeros, shape: shape))
        })
    }

    /// Keys and values of all tokens so far. They are taken out while a call writes them, so that there is
    /// one reference and nothing is copied. Unchecked because there is never more than one call.
    private final class Caches: @unchecked Sendable {
      static let names = ("k_cache", "v_cache")
      private var arrays: [NDArray]
      private let shapes: [[Int]]

      init(_ manifest: ExportManifest) throws {
        guard let states = manifest.anchor.states, let keys = states[Self.names.0], let values = states[Self.names.1]
        else {
          throw HierMemError(.model, "the manifest names no caches", hint: "Export the model again.")
        }
        shapes = [keys.shape, values.shape]
        arrays = []
      }

      /// Zeros at the first time, and after a call that failed: what it had is lost.
      func take() -> (NDArray, NDArray) {
        if arrays.isEmpty { arrays = shapes.map { NDArray(shape: $0, scalarType: .float16) } }
        defer { arrays = [] }
        return (arrays[0], arrays[1])
      }

      func put(_ keys: NDArray, _ values: NDArray) { arrays = [keys, values] }
    }
  }

  @available(iOS 27, macOS 27, *)
  func loadAsset(_ asset: URL, _ options: SpecializationOptions) async throws -> AIModel {
    do {
      return try await AIModel(contentsOf: asset, options: options)
    } catch {
      throw HierMemError(
        .model, "\(asset.path) cannot be loaded: \(error.localizedDescription)",
        hint: "Export the model again; the device needs iOS 27 or macOS 27.")
    }
  }

  @available(iOS 27, macOS 27, *)
  func loadFunction(_ name: String, of model: AIModel, _ asset: URL) throws -> InferenceFunction {
    guard let function = try model.loadFunction(named: name) else {
      throw HierMemError(.model, "\(asset.path) has no function \(name)", hint: "Export the model again.")
    }
    return function
  }

  @available(iOS 27, macOS 27, *)
  extension NDArray {
    /// The values along the last axis, at indices of the axes before it; by the strides, as rows may be padded.
    func floats(at indices: [Int]) throws -> [Float] {
      func read<T: BitwiseCopyable>(_ type: T.Type, _ float: (T) -> Float) -> [Float] {
        view(as: T.self).withUnsafePointer { pointer, shape, strides in
          let start = zip(indices, strides).reduce(0) { $0 + $1.0 * $1.1 }
          let step = strides[strides.count - 1]
          return (0..<shape[shape.count - 1]).map { float(pointer[start + $0 * step]) }
        }
      }
      switch scalarType {
      case .float16: return read(Float16.self) { Float($0) }
      case .float32: return read(Float.self) { $0 }
      default:
        throw HierMemError(.model, "an output is neither Float16 nor Float32", hint: "Export the model again.")
      }
    }
  }
#endif
