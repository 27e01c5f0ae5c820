import Foundation

/// A stretch of a document that was learnt as a whole.
public struct SourceWindow: Decodable, Equatable, Sendable {
  /// The file, or the file and the line of a row.
  public let document: String
  public let title: String
  /// Where it begins: `page 3`, `line 12`; empty where that is not known.
  public let place: String
  public let text: String

  enum CodingKeys: CodingKey {
    case document, title, place, text
  }

  /// Without control characters.
  public init(from decoder: any Decoder) throws {
    let values = try decoder.container(keyedBy: CodingKeys.self)
    func printable(_ key: CodingKeys) throws -> String {
      let scalars = try values.decode(String.self, forKey: key).unicodeScalars.filter { scalar in
        scalar.properties.generalCategory != .control || scalar == "\t" || scalar == "\n"
      }
      return String(String.UnicodeScalarView(scalars))
    }
    (document, title) = (try printable(.document), try printable(.title))
    (place, text) = (try printable(.place), try printable(.text))
  }
}

/// A bank's sources: the windows that its leaves have learnt, and their vectors.
///
/// The index stays memory-mapped. A leaf is found in it by bisection; then its lines and vectors are read, and no
/// others.
public struct BankSources: Sendable {
  private let texts: URL
  private let index: SafetensorsFile
  private let tree: ClusterTree
  private let leaves: Int
  private let windows: Int
  private let dimension: Int

  static let textsName = "sources/windows.jsonl"
  static let indexName = "sources/index.safetensors"

  /// Opens the sources below a bank's folder.
  ///
  /// - Throws: ``HierMemError`` of kind `bank` where the index is missing or damaged, or was not made for this tree.
  public init(folder: URL, tree: ClusterTree) throws {
    texts = folder.appendingPathComponent(Self.textsName)
    index = try SafetensorsFile(contentsOf: folder.appendingPathComponent(Self.indexName))
    self.tree = tree
    dimension = tree.dimension
    leaves = index.tensors["leaves"]?.shape.first ?? 0
    windows = index.tensors["vectors"]?.shape.first ?? 0
    try index.require("vectors", "F16", [windows, dimension])  // so that one more is still a number
    try index.require("branching", "I64", [1])
    try index.require("leaves", "I64", [leaves, 2])
    try index.require("first", "I64", [leaves + 1])
    try index.require("starts", "I64", [windows + 1])
    guard try index.integer("branching", 0) == tree.branching else {
      throw damage("it was made for another tree")
    }
  }

  /// The cosine of an embedding and each window of a leaf; `nil` where the leaf has none.
  func cosines(of embedding: [Float], in leaf: NodePath) throws -> [Float]? {
    guard let rows = try rows(of: leaf) else { return nil }
    return try index.withBytes(of: "vectors") { bytes in
      rows.map { row in
        var sum: Float = 0
        for place in 0..<dimension {
          sum += StoredScalar.float16.load(bytes, row * dimension + place) * embedding[place]
        }
        return sum
      }
    }
  }

  /// The texts of a leaf's windows, in the order of `cosines`; `nil` where it has none.
  func windows(of leaf: NodePath) throws -> [SourceWindow]? {
    guard let rows = try rows(of: leaf) else { return nil }
    let begin = try index.integer("starts", rows.lowerBound)
    let end = try index.integer("starts", rows.upperBound)
    do {
      guard 0 <= begin, begin < end else { throw CocoaError(.fileReadCorruptFile) }
      let file = try FileHandle(forReadingFrom: texts)
      defer { try? file.close() }
      guard try file.seekToEnd() >= end else { throw CocoaError(.fileReadCorruptFile) }
      try file.seek(toOffset: UInt64(begin))
      let lines = (try file.read(upToCount: end - begin) ?? Data()).split(separator: UInt8(ascii: "\n"))
      let windows = try lines.map { try decodeJSON(SourceWindow.self, from: $0) }
      guard windows.count == rows.count else { throw CocoaError(.fileReadCorruptFile) }
      return windows
    } catch {
      throw HierMemError(
        .bank, "cannot read the windows of \(leaf) in \(texts.path)", hint: "Export the model again.")
    }
  }

  /// Where a leaf's windows are; `nil` where it has none.
  private func rows(of leaf: NodePath) throws -> Range<Int>? {
    guard tree.has(leaf) else { return nil }
    let wanted = (leaf.level, leaf.row(branching: tree.branching))
    var (low, high) = (0, leaves)
    while low < high {
      let middle = (low + high) / 2
      if try entry(middle) < wanted { low = middle + 1 } else { high = middle }
    }
    guard low < leaves, try entry(low) == wanted else { return nil }
    let (begin, end) = (try index.integer("first", low), try index.integer("first", low + 1))
    guard 0 <= begin, begin < end, end <= windows else {
      throw damage("the leaf \(leaf) has the windows from \(begin) to \(end) of \(windows)")
    }
    return begin..<end
  }

  /// A row of the table of leaves: level, and row in that level.
  private func entry(_ number: Int) throws -> (Int, Int) {
    (try index.integer("leaves", 2 * number), try index.integer("leaves", 2 * number + 1))
  }

  private func damage(_ what: String) -> HierMemError {
    HierMemError(.bank, "\(index.url.path) is damaged: \(what)", hint: "Export the model again.")
  }
}

extension SafetensorsFile {
  /// A value of a tensor of 64-bit integers, which the caller has checked with `require`.
  fileprivate func integer(_ name: String, _ place: Int) throws -> Int {
    try withBytes(of: name) { bytes in
      Int(Int64(littleEndian: bytes.loadUnaligned(fromByteOffset: 8 * place, as: Int64.self)))
    }
  }
}
