import Foundation
import Testing

@testable import HierMemKit

struct QuantizationTests {
  static let kinds = [StoredScalar.float16, .bfloat16, .float32].flatMap { dtype in
    [2, 4, 8].flatMap { bits in [32, 64, 128].map { (dtype, MemoryQuantization(bits: bits, groupSize: $0)) } }
  }

  /// Equal to MLX's dequantisation in the stored type, bit for bit.
  @Test(arguments: kinds)
  func dequantisesAsMLX(_ dtype: StoredScalar, _ how: MemoryQuantization) throws {
    let name = "\(dtype.rawValue)-\(how.bits)-\(how.groupSize)"
    let file = try SafetensorsFile(contentsOf: Fixtures.url("quantized.safetensors"))
    let found = try file.withBytes(of: "\(name).packed") { packed in
      try file.withBytes(of: "\(name).scales") { scales in
        try file.withBytes(of: "\(name).biases") { biases in
          how.dequantized(packed: packed, scales: scales, biases: biases, dtype: dtype)
        }
      }
    }
    let expected = try file.withBytes(of: "\(name).values") { bytes in
      (0..<bytes.count / 2).map { bytes.loadUnaligned(fromByteOffset: 2 * $0, as: UInt16.self) }
    }
    #expect(expected.count == 6 * 128)
    #expect(found.map(\.bitPattern) == expected)
  }

  @Test func bfloat16RoundsToTheNearestEven() {
    for (bits, rounded) in [(0x3F80_8000, 0x3F80_0000), (0x3F81_8000, 0x3F82_0000), (0x3F80_8001, 0x3F81_0000)] {
      let value = StoredScalar.bfloat16.rounded(Float(bitPattern: UInt32(bits)))
      #expect(value.bitPattern == UInt32(rounded))
    }
    #expect(StoredScalar.bfloat16.rounded(.infinity) == .infinity)
    #expect(StoredScalar.bfloat16.rounded(.nan).isNaN)
  }

  /// A quantised bank's blocks, through bank.json and the block files.
  @Test func readsAQuantisedBlock() throws {
    let source = try SafetensorsFile(contentsOf: Fixtures.url("quantized.safetensors"))
    let json = """
      {"kind": "ffn", "branching": 2, "block_sizes": [3], "layers": [0, 1], "hidden": 128,
       "quantization": [{"bits": 4, "group_size": 64}]}
      """
    let config = try JSONDecoder().decode(MemoryConfig.self, from: Data(json.utf8))
    let parts = [("", "packed", "U32", 16), (".scales", "scales", "F16", 2), (".biases", "biases", "F16", 2)]
    var header: [String] = []
    var data = Data()
    for tensor in MemoryConfig.tensorNames {
      for (ending, part, dtype, width) in parts {
        let bytes = try source.withBytes(of: "float16-4-64.\(part)") { Data($0) }
        header.append(
          #""\#(tensor)\#(ending)":{"dtype":"\#(dtype)","shape":[2,3,\#(width)],"data_offsets":[\#(data.count),\#(data.count + bytes.count)]}"#)
        data += bytes
      }
    }
    let text = "{" + header.joined(separator: ",") + "}"
    let url = Fixtures.temporaryFolder().appendingPathComponent("0.safetensors")
    let length = (0..<8).map { UInt8(truncatingIfNeeded: text.utf8.count >> (8 * $0)) }
    try (Data(length) + Data(text.utf8) + data).write(to: url)
    let block = try MemoryBlock(contentsOf: url, config: config, level: 1)
    let expected = try source.withBytes(of: "float16-4-64.values") { bytes in
      (0..<bytes.count / 2).map { Float16(bitPattern: bytes.loadUnaligned(fromByteOffset: 2 * $0, as: UInt16.self)) }
    }
    for name in MemoryConfig.tensorNames { #expect(block.tensors[name] == expected) }
  }
}
