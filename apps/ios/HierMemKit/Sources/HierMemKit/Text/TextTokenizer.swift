/// Text ↔ token ids of one model.
///
/// ``JSONTokenizer`` reads byte-level BPE and WordPiece tokenizers. For others an app can put the
/// Tokenizers library of swift-transformers behind this protocol; HierMemChat shows how.
public protocol TextTokenizer: Sendable {
  /// Token ids of a text as it is, without what a tokenizer adds around it. Special tokens that stand
  /// in the text are taken as such.
  func encode(_ text: String) throws -> [Int]

  /// The text of token ids, special tokens left out. Bytes that are no UTF-8 become U+FFFD.
  func decode(_ tokens: [Int]) -> String
}

/// Text that grows token by token: gives out what is certain, and holds back half a character.
struct TextStream {
  private let tokenizer: any TextTokenizer
  private var tokens: [Int] = []
  private var given = ""

  init(_ tokenizer: any TextTokenizer) {
    self.tokenizer = tokenizer
  }

  /// What a token adds to the text; empty while a character is not whole.
  mutating func append(_ token: Int) -> String {
    tokens.append(token)
    let text = tokenizer.decode(tokens)
    return text.unicodeScalars.last == "\u{FFFD}" ? "" : rest(of: text)
  }

  /// What was held back.
  mutating func finish() -> String {
    rest(of: tokenizer.decode(tokens))
  }

  private mutating func rest(of text: String) -> String {
    let more = String(text.unicodeScalars.dropFirst(given.unicodeScalars.count))
    given = text
    return more
  }
}
