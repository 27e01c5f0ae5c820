import Foundation

/// The tensors of one block, dequantised: gate, up and down, each [layers, units, hidden], row-major.
public struct MemoryBlock: Sendable {
  public let units: Int
  public let tensors: [String: [Float16]]

  /// Bytes in memory.
  public var byteCount: Int { tensors.values.reduce(0) { $0 + 2 * $1.count } }

  /// Reads a block of a level; level 0 is the generic block, which may have any number of units.
  ///
  /// - Throws: ``HierMemError`` of kind `bank` where the file is missing, damaged, or has other tensors
  ///   than the bank's memory config says.
  public init(contentsOf url: URL, config: MemoryConfig, level: Int) throws {
    guard level <= config.depth else {
      throw HierMemError(.bank, "\(url.path) is of level \(level), the memory has \(config.depth)")
    }
    let file = try SafetensorsFile(contentsOf: url)
    guard let units = level > 0 ? config.blockSizes[level - 1] : file.tensors["gate"]?.shape.dropFirst().first
    else { throw HierMemError(.bank, "\(url.path) has no tensor gate") }
    self.units = units
    var tensors: [String: [Float16]] = [:]
    for name in MemoryConfig.tensorNames {
      tensors[name] = try Self.values(name, of: file, config: config, level: level, units: units)
    }
    self.tensors = tensors
  }

  private static func values(
    _ name: String, of file: SafetensorsFile, config: MemoryConfig, level: Int, units: Int
  ) throws -> [Float16] {
    let rows = [config.layers.count, units]
    guard let how = config.quantization(level: level) else {
      try file.require(name, config.dtype.safetensorsName, rows + [config.hidden])
      return try file.withBytes(of: name) { bytes in
        (0..<bytes.count / config.dtype.byteCount).map { Float16(config.dtype.load(bytes, $0)) }
      }
    }
    let (scales, biases) = (name + ".scales", name + ".biases")
    try file.require(name, "U32", rows + [config.hidden * how.bits / 32])
    for part in [scales, biases] {
      try file.require(part, config.dtype.safetensorsName, rows + [config.hidden / how.groupSize])
    }
    return try file.withBytes(of: name) { packed in
      try file.withBytes(of: scales) { scales in
        try file.withBytes(of: biases) { biases in
          how.dequantized(packed: packed, scales: scales, biases: biases, dtype: config.dtype)
        }
      }
    }
  }
}

extension SafetensorsFile {
  /// - Throws: ``HierMemError`` of kind `bank` unless there is such a tensor.
  func require(_ name: String, _ dtype: String, _ shape: [Int]) throws {
    let found = tensors[name]
    guard let found, found.dtype == dtype, found.shape == shape else {
      let there = found.map { "\(name) \($0.dtype) \($0.shape)" } ?? "no \(name)"
      throw HierMemError(
        .bank, "\(url.path) holds \(there), expected \(name) \(dtype) \(shape)",
        hint: "It belongs to another bank or another version of this one.")
    }
  }
}

/// A path's blocks joined along the units, as an anchor takes them: each tensor [layers, R, hidden].
///
/// The units of a level's block stand where the level has its place; what has no block is zero, and
/// adds nothing.
public struct FetchedMemory: Sendable {
  public let layers: Int
  public let units: Int
  public let hidden: Int
  public let tensors: [String: [Float16]]

  /// Joins blocks that begin at the given units.
  ///
  /// - Throws: ``HierMemError`` of kind `bank` where a block has more units than there is room for.
  init(config: MemoryConfig, blocks: [(firstUnit: Int, block: MemoryBlock)]) throws {
    layers = config.layers.count
    units = config.fetchedSize
    hidden = config.hidden
    var tensors: [String: [Float16]] = [:]
    for (first, block) in blocks where first + block.units > units {
      throw HierMemError(
        .bank, "a block has \(block.units) units, the memory has room for \(units - first)",
        hint: "Export the model again with this bank.")
    }
    for name in MemoryConfig.tensorNames {
      var joined = [Float16](repeating: 0, count: layers * units * hidden)
      for (first, block) in blocks {
        let values = block.tensors[name]!  // a block has all of them
        let length = block.units * hidden
        for layer in 0..<layers {
          let start = (layer * units + first) * hidden
          joined.replaceSubrange(start..<start + length, with: values[layer * length..<(layer + 1) * length])
        }
      }
      tensors[name] = joined
    }
    self.tensors = tensors
  }

  public var byteCount: Int { tensors.values.reduce(0) { $0 + 2 * $1.count } }
}
