/// Byte-level BPE: a word's bytes are joined pair by pair, the pair that was learnt first at first.
struct BytePairEncoding: Sendable {
  let vocabulary: Vocabulary
  /// Words that are tokens as they are need no merging.
  private let ignoresMerges: Bool
  private let merges: [Pair: Merge]
  /// By byte. Some vocabularies lack bytes that UTF-8 has no use for, or control characters: they are left out.
  private let byteTokens: [Int?]

  private struct Pair: Hashable, Sendable {
    let left: Int
    let right: Int
  }

  private struct Merge: Sendable {
    let rank: Int
    let joined: Int
  }

  init(_ model: TokenizerFile.Model) throws {
    if model.byteFallback == true { throw unsupported("byte fallback") }
    if model.unknownToken != nil { throw unsupported("a token for unknown bytes") }
    let vocabulary = try Vocabulary(model.vocab)
    func id(_ token: String) throws -> Int {
      guard let id = vocabulary.id(of: token) else { throw unsupported("no token '\(token)'") }
      return id
    }
    var merges: [Pair: Merge] = [:]
    for (rank, merge) in (model.merges ?? []).enumerated() {
      let pair = Pair(left: try id(merge.left), right: try id(merge.right))
      merges[pair] = Merge(rank: rank, joined: try id(merge.left + merge.right))
    }
    self.vocabulary = vocabulary
    self.merges = merges
    ignoresMerges = model.ignoreMerges ?? false
    byteTokens = ByteAlphabet.characters.map { vocabulary.id(of: String($0)) }
  }

  func encode(_ word: String) -> [Int] {
    if ignoresMerges, let whole = vocabulary.id(of: ByteAlphabet.spelled(word)) { return [whole] }
    var ids = word.utf8.compactMap { byteTokens[Int($0)] }
    while let (index, merge) = best(ids) {
      ids[index] = merge.joined
      ids.remove(at: index + 1)
    }
    return ids
  }

  /// The bytes of tokens, as text.
  func decode(_ tokens: [String]) -> String {
    String(decoding: tokens.flatMap(ByteAlphabet.bytes(of:)), as: UTF8.self)
  }

  /// The leftmost of the neighbours that were learnt first.
  private func best(_ ids: [Int]) -> (index: Int, merge: Merge)? {
    var best: (index: Int, merge: Merge)?
    for index in ids.indices.dropLast() {
      if let merge = merges[Pair(left: ids[index], right: ids[index + 1])],
        merge.rank < best?.merge.rank ?? .max
      {
        best = (index, merge)
      }
    }
    return best
  }
}

/// GPT-2's way to write bytes as characters: printable ones stand for themselves, the others for
/// characters from U+0100 on.
enum ByteAlphabet {
  static let characters: [Unicode.Scalar] = {
    var others: UInt32 = 0x100
    return (UInt8.min...UInt8.max).map { byte in
      switch byte {
      case 0x21...0x7E, 0xA1...0xAC, 0xAE...0xFF: return Unicode.Scalar(byte)
      default:
        defer { others += 1 }
        return Unicode.Scalar(others)!  // U+0100 … U+0143
      }
    }
  }()

  private static let values = Dictionary(
    uniqueKeysWithValues: characters.enumerated().map { ($1, UInt8($0)) })

  static func spelled(_ text: String) -> String {
    String(String.UnicodeScalarView(text.utf8.map { characters[Int($0)] }))
  }

  /// A token with characters outside the alphabet, as added tokens may be, stands for itself.
  static func bytes(of token: String) -> [UInt8] {
    let bytes = token.unicodeScalars.compactMap { values[$0] }
    return bytes.count == token.unicodeScalars.count ? bytes : Array(token.utf8)
  }
}
