// Core ML's declarations, as far as HierMemKit uses them, for Linux, where there is no Core ML. They
// are written from Apple's documentation. A model here is a closure that a test has registered, and
// every array's rows are padded, as they may be on a phone.

import Foundation

public enum MLComputeUnits: Int, Sendable {
  case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine
}

public final class MLModelConfiguration: NSObject {
  public var computeUnits = MLComputeUnits.all
  public var functionName: String?
}

public enum MLMultiArrayDataType: Int, Sendable {
  case float16, float32, int32

  var byteCount: Int { self == .float16 ? 2 : 4 }
}

public final class MLMultiArray: NSObject {
  public let shape: [NSNumber]
  public let strides: [NSNumber]
  public let dataType: MLMultiArrayDataType
  private let bytes: UnsafeMutableRawBufferPointer

  /// Values between the end of a row and the next.
  private static let padding = 3

  public convenience init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws {
    self.init(padded: shape.map(\.intValue), dataType)
  }

  private init(padded shape: [Int], _ dataType: MLMultiArrayDataType) {
    var strides = [1]
    for (index, size) in shape.dropFirst().reversed().enumerated() {
      strides.insert((size + (index == 0 ? Self.padding : 0)) * strides[0], at: 0)
    }
    self.shape = shape.map { $0 as NSNumber }
    self.strides = strides.map { $0 as NSNumber }
    self.dataType = dataType
    bytes = .allocate(byteCount: shape[0] * strides[0] * dataType.byteCount, alignment: 16)
    bytes.initializeMemory(as: UInt8.self, repeating: 0)
  }

  deinit { bytes.deallocate() }

  public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R {
    try body(UnsafeRawBufferPointer(bytes))
  }

  public func withUnsafeMutableBytes<R>(
    _ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R
  ) rethrows -> R {
    try body(bytes, strides.map(\.intValue))
  }
}

public final class MLFeatureValue: NSObject {
  public let multiArrayValue: MLMultiArray?

  public init(multiArray: MLMultiArray) {
    multiArrayValue = multiArray
  }
}

public protocol MLFeatureProvider {
  var featureNames: Set<String> { get }
  func featureValue(for featureName: String) -> MLFeatureValue?
}

public final class MLDictionaryFeatureProvider: NSObject, MLFeatureProvider {
  private let values: [String: MLFeatureValue]

  public init(dictionary: [String: Any]) throws {
    values = dictionary.compactMapValues { $0 as? MLFeatureValue }
  }

  public var featureNames: Set<String> { Set(values.keys) }

  public func featureValue(for featureName: String) -> MLFeatureValue? { values[featureName] }
}

public final class MLState: NSObject {
  private let arrays: [String: MLMultiArray]

  init(_ arrays: [String: MLMultiArray]) {
    self.arrays = arrays
  }

  public func withMultiArray<R>(
    for stateName: String, _ body: (MLMultiArray) throws -> R
  ) rethrows -> R {
    try body(arrays[stateName]!)
  }
}

public final class MLModel: NSObject {
  /// What a test puts in a model's place.
  public struct StandIn: Sendable {
    public typealias Predict =
      @Sendable (_ function: String?, _ inputs: any MLFeatureProvider, _ state: MLState?) throws
      -> [String: MLMultiArray]

    let states: [String: [Int]]
    let refuses: Set<MLComputeUnits>
    let predict: Predict

    /// - Parameter refuses: units with which it cannot be loaded.
    public init(
      states: [String: [Int]] = [:], refuses: Set<MLComputeUnits> = [], predict: @escaping Predict
    ) {
      self.states = states
      self.refuses = refuses
      self.predict = predict
    }
  }

  private static let lock = NSLock()
  nonisolated(unsafe) private static var registered: [String: StandIn] = [:]  // guarded by `lock`

  public static func register(_ standIn: StandIn, at url: URL) {
    lock.withLock { registered[url.path] = standIn }
  }

  private let standIn: StandIn
  private let function: String?

  public init(contentsOf url: URL, configuration: MLModelConfiguration) throws {
    guard let found = Self.lock.withLock({ Self.registered[url.path] }) else {
      throw CocoaError(.fileNoSuchFile)
    }
    standIn = found
    function = configuration.functionName
  }

  public static func load(contentsOf url: URL, configuration: MLModelConfiguration) async throws -> MLModel {
    let model = try MLModel(contentsOf: url, configuration: configuration)
    lock.withLock { loads[url.path, default: []].append(configuration.computeUnits) }
    if model.standIn.refuses.contains(configuration.computeUnits) { throw CocoaError(.featureUnsupported) }
    return model
  }

  /// The units with which the models of a package were asked for, in order.
  public static func units(at url: URL) -> [MLComputeUnits] { lock.withLock { loads[url.path] ?? [] } }

  nonisolated(unsafe) private static var loads: [String: [MLComputeUnits]] = [:]  // guarded by `lock`

  public static func compileModel(at modelURL: URL) async throws -> URL {
    let copy = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID()).mlmodelc")
    try FileManager.default.copyItem(at: modelURL, to: copy)
    return copy
  }

  public func makeState() -> MLState {
    MLState(
      standIn.states.mapValues { shape in
        try! MLMultiArray(shape: shape.map { $0 as NSNumber }, dataType: .float16)
      })
  }

  public func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider {
    try outputs(standIn.predict(function, input, nil))
  }

  public func prediction(from input: any MLFeatureProvider, using state: MLState) throws
    -> any MLFeatureProvider
  {
    try outputs(standIn.predict(function, input, state))
  }

  // The system has these too; in asynchronous code they would be preferred.
  public func prediction(from input: any MLFeatureProvider) async throws -> any MLFeatureProvider {
    try outputs(standIn.predict(function, input, nil))
  }

  public func prediction(from input: any MLFeatureProvider, using state: MLState) async throws
    -> any MLFeatureProvider
  {
    try outputs(standIn.predict(function, input, state))
  }

  private func outputs(_ arrays: [String: MLMultiArray]) throws -> any MLFeatureProvider {
    try MLDictionaryFeatureProvider(
      dictionary: arrays.mapValues { MLFeatureValue(multiArray: $0) })
  }
}
