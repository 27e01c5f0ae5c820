/// Reading the values of block files. Arithmetic is in Float, rounded to the stored type after each
/// step; for 16-bit types that gives the very bits that arithmetic in the type itself gives.
extension StoredScalar {
  var byteCount: Int { self == .float32 ? 4 : 2 }

  /// The name that safetensors has for it.
  var safetensorsName: String {
    switch self {
    case .float32: "F32"
    case .float16: "F16"
    case .bfloat16: "BF16"
    }
  }

  /// The value at an index.
  @inline(__always)
  func load(_ bytes: UnsafeRawBufferPointer, _ index: Int) -> Float {
    switch self {
    case .float32:
      Float(bitPattern: UInt32(littleEndian: bytes.loadUnaligned(fromByteOffset: 4 * index, as: UInt32.self)))
    case .float16:
      Float(Float16(bitPattern: Self.half(bytes, index)))
    case .bfloat16:
      Float(bitPattern: UInt32(Self.half(bytes, index)) << 16)
    }
  }

  /// The nearest value of this type; of two as near, the one whose last bit is 0.
  @inline(__always)
  func rounded(_ value: Float) -> Float {
    switch self {
    case .float32: return value
    case .float16: return Float(Float16(value))
    case .bfloat16:
      guard value.isFinite else { return value }
      let bits = value.bitPattern
      return Float(bitPattern: (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000)
    }
  }

  private static func half(_ bytes: UnsafeRawBufferPointer, _ index: Int) -> UInt16 {
    UInt16(littleEndian: bytes.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self))
  }
}

extension MemoryQuantization {
  /// Quantised rows as Float16: `scale · q + bias`, in MLX's affine layout.
  ///
  /// - Parameters:
  ///   - packed: rows · width · bits / 8 bytes; of the values in a byte the lowest bits come first.
  ///   - scales: rows · width / groupSize values of `dtype`.
  ///   - biases: as many.
  func dequantized(
    packed: UnsafeRawBufferPointer, scales: UnsafeRawBufferPointer, biases: UnsafeRawBufferPointer,
    dtype: StoredScalar
  ) -> [Float16] {
    let perByte = 8 / bits
    let mask = UInt8(truncatingIfNeeded: 1 << bits - 1)
    let count = packed.count * perByte
    return [Float16](unsafeUninitializedCapacity: count) { values, initialized in
      for group in 0..<count / groupSize {
        let scale = dtype.load(scales, group)
        let bias = dtype.load(biases, group)
        for index in group * groupSize..<(group + 1) * groupSize {
          let code = packed[index / perByte] >> UInt8(bits * (index % perByte)) & mask
          values[index] = Float16(dtype.rounded(dtype.rounded(scale * Float(code)) + bias))
        }
      }
      initialized = count
    }
  }
}
