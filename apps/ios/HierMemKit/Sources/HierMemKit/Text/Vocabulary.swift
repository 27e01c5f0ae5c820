/// Tokens and their ids.
struct Vocabulary: Sendable {
  /// A token compared by its bytes: to Swift, strings that look alike are equal.
  private struct Key: Hashable, Sendable {
    let text: String

    static func == (a: Key, b: Key) -> Bool { a.text.utf8.elementsEqual(b.text.utf8) }

    func hash(into hasher: inout Hasher) {
      for byte in text.utf8 { hasher.combine(byte) }
      hasher.combine(0xFF as UInt8)
    }
  }

  private let ids: [Key: Int]
  private let tokens: [Int: String]

  /// - Throws: ``HierMemError`` of kind `tokenizer` where two tokens have one id.
  init(_ vocabulary: [String: Int]) throws {
    ids = Dictionary(uniqueKeysWithValues: vocabulary.map { (Key(text: $0), $1) })
    tokens = Dictionary(vocabulary.map { ($1, $0) }) { first, _ in first }
    guard tokens.count == ids.count else { throw unsupported("two tokens of one id") }
  }

  func id(of token: String) -> Int? { ids[Key(text: token)] }

  func token(of id: Int) -> String? { tokens[id] }
}
