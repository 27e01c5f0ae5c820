import Foundation

/// A safetensors file, memory-mapped: opening it reads the header, and a tensor's pages are read
/// when they are used. Nothing of the header is believed before it is checked against the file.
public struct SafetensorsFile: Sendable {
  public struct Tensor: Sendable {
    /// As the file has it: F32, F16, BF16, U32, BOOL, …
    public let dtype: String
    public let shape: [Int]
    fileprivate let range: Range<Int>

    public var count: Int { shape.reduce(1, *) }
  }

  public let url: URL
  public let tensors: [String: Tensor]
  private let data: Data

  static let bytesPerValue = [
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
  ]
  private static let largestHeader = 100_000_000

  /// Maps a file.
  ///
  /// - Throws: ``HierMemError`` of kind `bank` where it is missing or damaged.
  public init(contentsOf url: URL) throws {
    self.url = url
    do {
      data = try Data(contentsOf: url, options: .alwaysMapped)
    } catch {
      throw HierMemError(.bank, "cannot open \(url.path)", hint: "Download or export it again.")
    }
    do {
      tensors = try Self.tensors(in: data)
    } catch let damage as Damage {
      throw HierMemError(
        .bank, "\(url.path) is damaged: \(damage.what)", hint: "Download or export it again.")
    }
  }

  /// Calls `body` with the bytes of a tensor, row-major, little-endian, aligned to nothing.
  ///
  /// - Throws: ``HierMemError`` of kind `bank` where there is no such tensor, or what `body` throws.
  public func withBytes<Result>(
    of name: String, _ body: (UnsafeRawBufferPointer) throws -> Result
  ) throws -> Result {
    guard let tensor = tensors[name] else {
      throw HierMemError(.bank, "\(url.path) has no tensor \(name)")
    }
    return try data.withUnsafeBytes { try body(UnsafeRawBufferPointer(rebasing: $0[tensor.range])) }
  }

  private struct Damage: Error {
    let what: String
  }

  private struct Entry: Decodable {
    let dtype: String
    let shape: [Int]
    let offsets: [Int]

    enum CodingKeys: String, CodingKey {
      case dtype, shape
      case offsets = "data_offsets"
    }
  }

  private struct Header: Decodable {
    var entries: [String: Entry] = [:]

    init(from decoder: any Decoder) throws {
      let values = try decoder.container(keyedBy: AnyKey.self)
      for key in values.allKeys where key.stringValue != "__metadata__" {
        entries[key.stringValue] = try values.decode(Entry.self, forKey: key)
      }
    }
  }

  private static func tensors(in data: Data) throws -> [String: Tensor] {
    guard data.count >= 8 else { throw Damage(what: "it has \(data.count) bytes") }
    let size = data.withUnsafeBytes { UInt64(littleEndian: $0.loadUnaligned(as: UInt64.self)) }
    guard size <= largestHeader, Int(size) <= data.count - 8 else {
      throw Damage(what: "its header should be \(size) bytes long")
    }
    let start = 8 + Int(size)
    guard let header = try? decodeJSON(Header.self, from: data[8..<start]) else {
      throw Damage(what: "its header cannot be read")
    }
    return try header.entries.mapValues { entry in
      try tensor(entry, start: start, available: data.count - start)
    }
  }

  /// Checks that a tensor lies within the file and is as long as its shape says.
  private static func tensor(_ entry: Entry, start: Int, available: Int) throws -> Tensor {
    guard let width = bytesPerValue[entry.dtype] else {
      throw Damage(what: "it has values of type \(entry.dtype)")
    }
    var bytes = width
    for size in entry.shape {
      let (product, overflow) = bytes.multipliedReportingOverflow(by: size)
      guard size >= 0, !overflow else { throw Damage(what: "a tensor has the shape \(entry.shape)") }
      bytes = product
    }
    guard entry.offsets.count == 2, entry.offsets[0] >= 0, entry.offsets[1] <= available,
      entry.offsets[1] >= entry.offsets[0], entry.offsets[1] - entry.offsets[0] == bytes
    else {
      throw Damage(
        what: "a tensor of shape \(entry.shape) at \(entry.offsets), with \(available) bytes in all")
    }
    let range = start + entry.offsets[0]..<start + entry.offsets[1]
    return Tensor(dtype: entry.dtype, shape: entry.shape, range: range)
  }
}
