import Testing

@testable import HierMemKit

/// Held to the Float16 that this machine has.
struct SoftFloat16Tests {
  @Test func everyValueIsRead() {
    let wrong = (0...UInt16.max).filter { bits in
      let (ours, theirs) = (Float(SoftFloat16(bitPattern: bits)), Float(Float16(bitPattern: bits)))
      return ours.isNaN ? !theirs.isNaN : ours.bitPattern != theirs.bitPattern
    }
    #expect(wrong.isEmpty)
  }

  /// Values, the middles between neighbours, and what is next to the middles.
  @Test func everyRoundingIsTheSame() {
    var wrong: [Float] = []
    for bits in 0..<UInt16(0x7C00) {
      let low = Float(Float16(bitPattern: bits))
      let high = bits == 0x7BFF ? 65536 : Float(Float16(bitPattern: bits + 1))
      let middle = (low + high) / 2
      for value in [low, middle, middle.nextUp, middle.nextDown] {
        for signed in [value, -value] where SoftFloat16(signed).bitPattern != Float16(signed).bitPattern {
          wrong.append(signed)
        }
      }
    }
    #expect(wrong.isEmpty)
    #expect(SoftFloat16(.nan).bitPattern & 0x7C00 == 0x7C00)
    #expect(SoftFloat16(.infinity).bitPattern == Float16.infinity.bitPattern)
    #expect(SoftFloat16(1e-40).bitPattern == 0)
  }
}
