/// The values of a block's tensors.
public enum StoredScalar: String, Codable, Sendable {
  case float32, float16, bfloat16
}

/// MLX's affine quantisation: `groupSize` values in a row share a scale and a bias.
public struct MemoryQuantization: Decodable, Hashable, Sendable {
  public let bits: Int
  public let groupSize: Int

  enum CodingKeys: String, CodingKey {
    case bits
    case groupSize = "group_size"
  }
}

/// One memory design: how many units the blocks of each level have, and which layers carry them.
public struct MemoryConfig: Sendable {
  public let kind: String
  /// k, the children of a node.
  public let branching: Int
  /// r_1 … r_p, the units that a block of each level has in each layer; 0 is a level without blocks.
  public let blockSizes: [Int]
  /// The anchor's layers that carry memory.
  public let layers: [Int]
  /// d, the width of the anchor's residual stream.
  public let hidden: Int
  public let dtype: StoredScalar
  /// One entry for each level, `nil` where its blocks are of `dtype` throughout; empty where all are.
  public let quantization: [MemoryQuantization?]

  public var depth: Int { blockSizes.count }

  /// R, the units that a full path adds to a layer.
  public var fetchedSize: Int { blockSizes.reduce(0, +) }

  /// Values of each tensor of a path's blocks, at most: half a gigabyte of them.
  static let mostValues = 1 << 28

  /// The tensors of a block, each [layers, units, hidden]; `down` is stored unit-major.
  static let tensorNames = ["gate", "up", "down"]

  /// Where the units of a level's block begin among the R of a path.
  func firstUnit(level: Int) -> Int { blockSizes[..<(level - 1)].reduce(0, +) }

  /// How the blocks of a level are stored. Level 0 is the generic block, stored like the finest level.
  func quantization(level: Int) -> MemoryQuantization? {
    guard !quantization.isEmpty else { return nil }
    if level > 0 { return quantization[level - 1] }
    let used = zip(quantization, blockSizes).filter { $0.1 > 0 }.map(\.0)
    return used.contains(nil) ? nil : used.compactMap { $0 }.max { $0.bits < $1.bits }
  }
}

extension MemoryConfig: Decodable {
  enum CodingKeys: String, CodingKey, CaseIterable {
    case kind, branching, layers, hidden, dtype, quantization, alpha
    case blockSizes = "block_sizes"
    case ffnWidth = "ffn_width"
    case queryWidth = "q_width"
    case keyValueWidth = "kv_width"
  }

  /// Unknown keys are refused: they would be settings that this version silently ignores.
  public init(from decoder: any Decoder) throws {
    let known = Set(CodingKeys.allCases.map(\.rawValue))
    let found = try decoder.container(keyedBy: AnyKey.self).allKeys.map(\.stringValue)
    let unknown = found.filter { !known.contains($0) }.sorted()
    guard unknown.isEmpty else {
      throw HierMemError(
        .bank, "the memory config has settings that this version does not know: "
          + unknown.joined(separator: ", "), hint: "Use a newer HierMemKit.")
    }
    let values = try decoder.container(keyedBy: CodingKeys.self)
    kind = try values.decode(String.self, forKey: .kind)
    branching = try values.decode(Int.self, forKey: .branching)
    blockSizes = try values.decode([Int].self, forKey: .blockSizes)
    layers = try values.decode([Int].self, forKey: .layers)
    hidden = try values.decode(Int.self, forKey: .hidden)
    dtype = try values.decodeIfPresent(StoredScalar.self, forKey: .dtype) ?? .float16
    quantization = try values.decodeIfPresent([MemoryQuantization?].self, forKey: .quantization) ?? []
    try check()
  }

  private func check() throws {
    guard kind == "ffn" else {
      throw HierMemError(
        .bank, "the bank has memories of kind '\(kind)'",
        hint: "Only FFN memories run on phones: convert or learn such a bank.")
    }
    guard branching >= 2, !blockSizes.isEmpty, blockSizes.allSatisfy({ (0...1 << 20).contains($0) })
    else {
      throw HierMemError(
        .bank, "a tree of branching \(branching) with block sizes \(blockSizes) is not possible")
    }
    guard !layers.isEmpty, Set(layers).count == layers.count, layers.allSatisfy({ $0 >= 0 }),
      (1...1 << 20).contains(hidden)
    else {
      throw HierMemError(.bank, "memory of width \(hidden) in layers \(layers) is not possible")
    }
    guard layers.count * hidden <= Self.mostValues / max(1, fetchedSize) else {
      throw HierMemError(
        .bank, "a memory of [\(layers.count), \(fetchedSize), \(hidden)] values is larger than any phone's")
    }
    guard quantization.isEmpty || quantization.count == depth else {
      throw HierMemError(
        .bank, "\(quantization.count) levels are quantised, the memory has \(depth)")
    }
    for how in quantization.compactMap({ $0 }) {
      guard [2, 4, 8].contains(how.bits), [32, 64, 128].contains(how.groupSize),
        hidden % how.groupSize == 0
      else {
        throw HierMemError(
          .bank, "blocks of \(how.bits) bits in groups of \(how.groupSize) are not possible "
            + "with a width of \(hidden)")
      }
    }
  }
}

/// A coding key of any name.
struct AnyKey: CodingKey {
  let stringValue: String
  var intValue: Int? { nil }

  init(stringValue: String) { self.stringValue = stringValue }
  init?(intValue: Int) { nil }
}
