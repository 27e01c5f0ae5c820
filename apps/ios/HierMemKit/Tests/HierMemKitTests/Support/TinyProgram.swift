// The stand-in for Core ML is Linux's only.
#if os(Linux)
  import CoreML
  import Foundation

  @testable import HierMemKit

  /// Vectors of known texts, found by the tokens that the attention mask lets through.
  private func retriever(_ known: [[Int]: [Float]]) -> MLModel.StandIn {
    MLModel.StandIn { _, inputs, _ in
      let (ids, mask) = (inputs.integers("input_ids"), inputs.integers("attention_mask"))
      guard [8, 16, 32].contains(ids.count), let vector = known[zip(ids, mask).filter { $1 == 1 }.map(\.0)] else {
        throw CocoaError(.featureUnsupported)
      }
      let array = try MLMultiArray(shape: [1, 16], dataType: .float32)
      array.write(vector, row: 0)
      return ["embedding": array]
    }
  }

  /// The tiny model as a Core ML program with the functions `decode`, `prefill` and `load_block`.
  ///
  /// Its key/value cache is kept here, because the stand-in's states are Float16. Unchecked because everything
  /// that changes is guarded by the lock.
  final class TinyProgram: @unchecked Sendable {
    let compiled = CompiledModels(cache: Fixtures.temporaryFolder())
    private let model = TinyModel(vocabulary: 400, hidden: 32)
    /// Where the compiled anchor lies.
    let anchor: URL
    private let memoryIsInput: Bool
    private let refuses: Set<MLComputeUnits>
    private let logitsType: MLMultiArrayDataType
    private let lock = NSLock()
    private var cached: [Int: [Double]] = [:]
    private var called: [String] = []

    /// Registers the models of an export, as if its packages had been compiled.
    ///
    /// - Parameter vectors: what the retriever makes of texts.
    init(
      _ export: TinyExport, memory: TinyExport.Memory = .state, logits: MLMultiArrayDataType = .float16,
      vectors: [String: [Float]] = [:], refuses: Set<MLComputeUnits> = []
    ) throws {
      memoryIsInput = memory == .input
      logitsType = logits
      self.refuses = refuses
      let manifest = try export.open().manifest
      let cache = compiled.cache
      func place(_ name: String, _ package: String) -> URL {
        cache.appendingPathComponent("\(name)-\(manifest.digest(ofPackage: package).prefix(16)).mlmodelc")
      }
      anchor = place("anchor", "anchor.mlpackage")
      MLModel.register(standIn, at: anchor)
      let tokenizer = try JSONTokenizer(contentsOf: Fixtures.url("inputs/wordpiece/tokenizer.json"))
      let known = Dictionary(vectors.map { (tokenizer.encodeFramed($0, limit: 32), $1) }) { first, _ in first }
      MLModel.register(retriever(known), at: place("retriever", "retriever.mlpackage"))
    }

    /// The functions that were called, and the tokens they were given.
    var calls: [String] { lock.withLock { called } }

    private var standIn: MLModel.StandIn {
      let shapes = Dictionary(uniqueKeysWithValues: MemoryConfig.tensorNames.map { ($0, [2, 6, 32]) })
      return MLModel.StandIn(states: memoryIsInput ? [:] : shapes, refuses: refuses) { [self] function, inputs, state in
        try lock.withLock { try predict(function, inputs, state) }
      }
    }

    private func predict(_ function: String?, _ inputs: any MLFeatureProvider, _ state: MLState?) throws
      -> [String: MLMultiArray]
    {
      func stored(_ name: String) -> [Float16] { state!.withMultiArray(for: name) { $0.rows } }
      func given(_ name: String) -> [Float16] { inputs.featureValue(for: name)!.multiArrayValue!.rows }
      if function == "load_block" {
        called.append("load_block")
        for name in MemoryConfig.tensorNames {
          try state!.withMultiArray(for: name) { try $0.fill(with: given(name)) }
        }
        return [:]
      }
      let tokens = inputs.integers("input_ids")
      guard tokens.count == ["decode": 1, "prefill": 8][function] else { throw CocoaError(.featureUnsupported) }
      called.append("\(function!) \(tokens.count)")
      let memory = Dictionary(
        uniqueKeysWithValues: MemoryConfig.tensorNames.map { ($0, memoryIsInput ? given($0) : stored($0)) })
      let first = inputs.integers("position")[0]
      let parts = try [250, 156].map {
        try MLMultiArray(shape: [1, tokens.count as NSNumber, $0 as NSNumber], dataType: logitsType)
      }
      for (row, token) in tokens.enumerated() {
        let place = first + row
        cached[place] = model.state(of: token, after: cached[place - 1], memory: memory, layers: 2)
        let logits = model.logits(cached[place]!) + [Float](repeating: 1000, count: 6)  // of padded ids
        parts[0].write(Array(logits[..<250]), row: row)
        parts[1].write(Array(logits[250...]), row: row)
      }
      return ["logits_0": parts[0], "logits_1": parts[1]]
    }
  }

  extension MLFeatureProvider {
    fileprivate func integers(_ name: String) -> [Int] {
      let array = featureValue(for: name)!.multiArrayValue!
      return array.withUnsafeBytes { bytes in
        let values = bytes.bindMemory(to: Int32.self)
        return (0..<array.shape[array.shape.count - 1].intValue).map { Int(values[$0]) }
      }
    }
  }

  extension MLMultiArray {
    /// All values of an array [2, 6, 32], by its strides.
    fileprivate var rows: [Float16] {
      (0..<2).flatMap { layer in
        (0..<6).flatMap { unit in try! floats(at: [layer, unit]).map(Float16.init) }
      }
    }

    /// Writes a row of the last but one axis.
    fileprivate func write(_ values: [Float], row: Int) {
      withUnsafeMutableBytes { bytes, strides in
        let start = strides.count == 1 ? 0 : row * strides[strides.count - 2]
        for (column, value) in values.enumerated() {
          if dataType == .float16 {
            bytes.bindMemory(to: Float16.self)[start + column] = Float16(value)
          } else {
            bytes.bindMemory(to: Float.self)[start + column] = value
          }
        }
      }
    }
  }
#endif
