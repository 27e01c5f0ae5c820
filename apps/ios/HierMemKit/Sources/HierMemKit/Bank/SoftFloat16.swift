/// IEEE 754's binary16, for Intel Macs, on which Swift has no Float16: an archive for "Any Mac" has to
/// compile for them. Only what HierMemKit needs; the bits are those of Float16.
public struct SoftFloat16: BitwiseCopyable, Hashable, Sendable, ExpressibleByIntegerLiteral {
  public let bitPattern: UInt16

  public init(bitPattern: UInt16) {
    self.bitPattern = bitPattern
  }

  public init(integerLiteral value: Int) {
    self.init(Float(value))
  }

  /// The nearest value; of two as near, the one whose last bit is 0.
  public init(_ value: Float) {
    let sign = UInt16(value.bitPattern >> 16) & 0x8000
    let bits = value.bitPattern & 0x7FFF_FFFF
    switch bits {
    case 0x7F80_0001...: bitPattern = sign | 0x7E00  // not a number
    case 0x477F_F000...: bitPattern = sign | 0x7C00  // infinite, or rounded to it
    case 0x3880_0000...:
      let rounded = bits + 0xFFF + ((bits >> 13) & 1)
      bitPattern = sign | UInt16((rounded >> 13) - (112 << 10))
    case 0x3300_0000...:  // subnormal: multiples of 2^-24
      let shift = 126 - (bits >> 23)
      let significand = (bits & 0x7F_FFFF) | 0x80_0000
      let half: UInt32 = 1 << (shift - 1)
      let whole = significand >> shift
      let rest = significand & (2 * half - 1)
      let up = rest > half || (rest == half && whole & 1 == 1)
      bitPattern = sign | UInt16(up ? whole + 1 : whole)
    default: bitPattern = sign
    }
  }
}

extension Float {
  /// Exact.
  public init(_ value: SoftFloat16) {
    let sign = UInt32(value.bitPattern & 0x8000) << 16
    let (exponent, fraction) = (UInt32((value.bitPattern >> 10) & 0x1F), UInt32(value.bitPattern & 0x3FF))
    switch exponent {
    case 0: self = Float(bitPattern: sign | (Float(fraction) * 0x1p-24).bitPattern)
    case 31: self.init(bitPattern: sign | 0x7F80_0000 | fraction << 13)
    default: self.init(bitPattern: sign | (exponent + 112) << 23 | fraction << 13)
    }
  }
}

#if os(macOS) && arch(x86_64)
  public typealias Float16 = SoftFloat16
#endif
