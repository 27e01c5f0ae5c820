import Foundation

#if canImport(CryptoKit)
  import CryptoKit
#endif

/// The sha256 of a file in hexadecimal, read piece by piece.
func fileDigest(_ url: URL) throws -> String {
  let file = try FileHandle(forReadingFrom: url)
  defer { try? file.close() }
  #if canImport(CryptoKit)
    var hash = SHA256()
  #else
    var hash = SHA256Hash()
  #endif
  while try pooled({
    guard let piece = try file.read(upToCount: 1 << 20), !piece.isEmpty else { return false }
    hash.update(data: piece)
    return true
  }) {}
  return hexadecimal(hash.finalize())
}

/// The same of bytes in memory.
func dataDigest(_ data: Data) -> String {
  #if canImport(CryptoKit)
    var hash = SHA256()
  #else
    var hash = SHA256Hash()
  #endif
  hash.update(data: data)
  return hexadecimal(hash.finalize())
}

private func hexadecimal(_ bytes: some Sequence<UInt8>) -> String {
  bytes.map { byte in
    let digits = String(byte, radix: 16)
    return digits.count == 1 ? "0" + digits : digits
  }.joined()
}

#if !canImport(CryptoKit)
  /// SHA-256 (FIPS 180-4), for platforms without CryptoKit.
  struct SHA256Hash {
    private var state = SIMD8<UInt32>(
      0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab,
      0x5be0_cd19)
    private var rest: [UInt8] = []
    private var length: UInt64 = 0

    mutating func update(data: Data) {
      length += UInt64(data.count)
      rest.append(contentsOf: data)
      let whole = rest.count / 64 * 64
      rest.withUnsafeBufferPointer { bytes in
        for start in stride(from: 0, to: whole, by: 64) {
          Self.compress(&state, bytes, start)
        }
      }
      rest.removeFirst(whole)
    }

    mutating func finalize() -> [UInt8] {
      let bits = length * 8
      let padding = (64 + 56 - (rest.count + 1) % 64) % 64
      let tail = [0x80] + [UInt8](repeating: 0, count: padding)
      update(data: Data(tail + (0..<8).map { UInt8(truncatingIfNeeded: bits >> (56 - 8 * $0)) }))
      return (0..<32).map { UInt8(truncatingIfNeeded: state[$0 / 4] >> (24 - 8 * ($0 % 4))) }
    }

    private static func compress(
      _ state: inout SIMD8<UInt32>, _ bytes: UnsafeBufferPointer<UInt8>, _ start: Int
    ) {
      func rotated(_ x: UInt32, _ n: UInt32) -> UInt32 { x >> n | x << (32 - n) }
      var w = [UInt32](repeating: 0, count: 64)
      for i in 0..<16 {
        w[i] = (0..<4).reduce(0) { $0 << 8 | UInt32(bytes[start + 4 * i + $1]) }
      }
      for i in 16..<64 {
        let (x, y) = (w[i - 15], w[i - 2])
        let s0 = rotated(x, 7) ^ rotated(x, 18) ^ x >> 3
        let s1 = rotated(y, 17) ^ rotated(y, 19) ^ y >> 10
        w[i] = w[i - 16] &+ s0 &+ w[i - 7] &+ s1
      }
      var v = state
      for i in 0..<64 {
        let s1 = rotated(v[4], 6) ^ rotated(v[4], 11) ^ rotated(v[4], 25)
        let choice = v[4] & v[5] ^ ~v[4] & v[6]
        let t1 = v[7] &+ s1 &+ choice &+ roundConstants[i] &+ w[i]
        let s0 = rotated(v[0], 2) ^ rotated(v[0], 13) ^ rotated(v[0], 22)
        let majority = v[0] & v[1] ^ v[0] & v[2] ^ v[1] & v[2]
        v = SIMD8(t1 &+ s0 &+ majority, v[0], v[1], v[2], v[3] &+ t1, v[4], v[5], v[6])
      }
      state &+= v
    }

    /// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
    private static let roundConstants: [UInt32] = [
      0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4,
      0xab1c_5ed5, 0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe,
      0x9bdc_06a7, 0xc19b_f174, 0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f,
      0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da, 0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7,
      0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967, 0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc,
      0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85, 0xa2bf_e8a1, 0xa81a_664b,
      0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070, 0x19a4_c116,
      0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
      0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7,
      0xc671_78f2,
    ]
  }
#endif
