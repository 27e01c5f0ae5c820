#if canImport(CoreML)
  import CoreML
  import Foundation

  // Core ML lays arrays out as its hardware likes: rows may be padded. Whoever reads or writes one
  // goes by its strides.

  extension MLMultiArray {
    /// An Int32 array.
    convenience init(integers: [Int], shape: [Int]) throws {
      try self.init(shape: shape.map { $0 as NSNumber }, dataType: .int32)
      withUnsafeMutableBytes { bytes, strides in
        let values = bytes.bindMemory(to: Int32.self)
        for (index, integer) in integers.enumerated() {
          values[index * strides[strides.count - 1]] = Int32(integer)
        }
      }
    }

    /// Writes Float16 values, row-major; zeros for `nil`.
    ///
    /// - Throws: ``HierMemError`` of kind `model` where the array is of another type or size.
    func fill(with values: [Float16]?) throws {
      let shape = self.shape.map(\.intValue)
      guard dataType == .float16, values.map({ $0.count == shape.reduce(1, *) }) ?? true,
        let width = shape.last
      else {
        throw HierMemError(
          .model, "a memory of \(values?.count ?? 0) values does not fit an array \(shape)",
          hint: "Export the model again with this bank.")
      }
      withUnsafeMutableBytes { bytes, strides in
        let target = bytes.bindMemory(to: Float16.self)
        for row in 0..<shape.dropLast().reduce(1, *) {
          let start = offset(ofRow: row, shape: shape, strides: strides)
          for column in 0..<width {
            target[start + column * strides[strides.count - 1]] = values?[row * width + column] ?? 0
          }
        }
      }
    }

    /// The values along the last axis, at indices of the axes before it.
    ///
    /// - Throws: ``HierMemError`` of kind `model` where they are neither Float16 nor Float32.
    func floats(at indices: [Int]) throws -> [Float] {
      let shape = self.shape.map(\.intValue)
      let strides = self.strides.map(\.intValue)
      let start = zip(indices, strides).reduce(0) { $0 + $1.0 * $1.1 }
      let step = strides[strides.count - 1]
      let places = (0..<shape[shape.count - 1]).map { start + $0 * step }
      switch dataType {
      case .float16:
        return withUnsafeBytes { bytes in
          let values = bytes.bindMemory(to: Float16.self)
          return places.map { Float(values[$0]) }
        }
      case .float32:
        return withUnsafeBytes { bytes in
          let values = bytes.bindMemory(to: Float.self)
          return places.map { values[$0] }
        }
      default:
        throw HierMemError(.model, "an output is neither Float16 nor Float32", hint: "Export the model again.")
      }
    }
  }

  /// Where a row of the last axis begins, the rows counted row-major.
  private func offset(ofRow row: Int, shape: [Int], strides: [Int]) -> Int {
    var (left, offset) = (row, 0)
    for axis in shape.indices.dropLast().reversed() {
      offset += left % shape[axis] * strides[axis]
      left /= shape[axis]
    }
    return offset
  }
#endif
