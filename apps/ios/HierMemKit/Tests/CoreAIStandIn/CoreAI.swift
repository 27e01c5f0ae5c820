// Core AI's declarations, as far as HierMemKit uses them, for Linux, where there is no Core AI. They
// are written from Apple's documentation of the beta, and not one has been compiled against the real
// framework. A model here is a closure that a test has registered.

import Foundation

public enum ComputeUnitKind: Hashable, Sendable {
  case cpu, gpu, neuralEngine
}

public struct SpecializationOptions: Sendable {
  public static let `default` = SpecializationOptions(preferred: nil)
  public static let cpuOnly = SpecializationOptions(preferred: .cpu)

  public let preferredComputeUnitKind: ComputeUnitKind?

  public init(preferredComputeUnitKind: ComputeUnitKind) {
    self.init(preferred: preferredComputeUnitKind)
  }

  private init(preferred: ComputeUnitKind?) { preferredComputeUnitKind = preferred }
}

public struct NDArray: Sendable {
  public enum ScalarType: Hashable, Sendable {
    case int32, float16, float32

    var byteCount: Int { self == .float16 ? 2 : 4 }
  }

  public let shape: [Int]
  public let scalarType: ScalarType
  fileprivate var bytes: [UInt8]

  public init(shape: [Int], scalarType: ScalarType) {
    self.shape = shape
    self.scalarType = scalarType
    bytes = [UInt8](repeating: 0, count: shape.reduce(1, *) * scalarType.byteCount)
  }

  public init<Scalar: BitwiseCopyable>(scalars: some Sequence<Scalar>, shape: [Int]) {
    let type: ScalarType = Scalar.self == Float16.self ? .float16 : Scalar.self == Float.self ? .float32 : .int32
    self.init(shape: shape, scalarType: type)
    let values = Array(scalars)
    precondition(values.count == shape.reduce(1, *))
    bytes = values.withUnsafeBytes { Array($0) }
  }

  /// A read-only, typed view.
  public struct View<Element: BitwiseCopyable> {
    let array: NDArray

    /// The pointer to the first element, the shape and the strides.
    public func withUnsafePointer<R>(_ body: (UnsafePointer<Element>, [Int], [Int]) throws -> R) rethrows -> R {
      var strides = [1]
      for size in array.shape.dropFirst().reversed() { strides.insert(size * strides[0], at: 0) }
      return try array.bytes.withUnsafeBytes { bytes in
        try body(bytes.bindMemory(to: Element.self).baseAddress!, array.shape, strides)
      }
    }
  }

  public func view<T: BitwiseCopyable>(as type: T.Type = T.self) -> View<T> { View(array: self) }
}

public enum InferenceValue {
  public protocol MutableViewRepresentable {}
}

extension NDArray: InferenceValue.MutableViewRepresentable {}

public struct InferenceFunction: Sendable {
  /// References to arrays that a call writes. The real type borrows them; here they are pointers that
  /// live as long as the caller's call.
  public struct MutableViews {
    fileprivate var arrays: [String: UnsafeMutablePointer<NDArray>] = [:]

    public init() {}

    public mutating func insert(_ array: inout NDArray, for name: String) {
      withUnsafeMutablePointer(to: &array) { arrays[name] = $0 }
    }
  }

  public struct Value {
    public let ndArray: NDArray?
  }

  public struct Outputs {
    fileprivate var values: [String: NDArray]

    public mutating func remove(_ name: String) -> Value? {
      values.removeValue(forKey: name).map { Value(ndArray: $0) }
    }
  }

  let name: String
  let standIn: AIModel.StandIn

  public func run(
    inputs: [String: NDArray], states: consuming MutableViews = MutableViews(),
    outputViews: consuming MutableViews = MutableViews()
  ) async throws -> Outputs {
    var written = states.arrays.mapValues(\.pointee)
    let outputs = try standIn.run(name, inputs, &written)
    for (name, array) in written { states.arrays[name]!.pointee = array }
    return Outputs(values: outputs)
  }
}

public struct AIModel: Sendable {
  /// What a test puts in a model's place.
  public struct StandIn: Sendable {
    public typealias Run =
      @Sendable (_ function: String, _ inputs: [String: NDArray], _ states: inout [String: NDArray]) throws
      -> [String: NDArray]

    let run: Run

    public init(run: @escaping Run) { self.run = run }
  }

  private static let lock = NSLock()
  nonisolated(unsafe) private static var registered: [String: StandIn] = [:]  // guarded by `lock`
  /// What was asked for at the last loads, by path.
  nonisolated(unsafe) public private(set) static var asked: [String: SpecializationOptions] = [:]

  public static func register(_ standIn: StandIn, at url: URL) {
    lock.withLock { registered[url.path] = standIn }
  }

  private let standIn: StandIn

  public init(contentsOf modelURL: URL, options: SpecializationOptions = .default) async throws {
    let found = Self.lock.withLock {
      Self.asked[modelURL.path] = options
      return Self.registered[modelURL.path]
    }
    guard let found else { throw CocoaError(.fileReadNoSuchFile) }
    standIn = found
  }

  public func loadFunction(named name: String) throws -> InferenceFunction? {
    InferenceFunction(name: name, standIn: standIn)
  }
}
