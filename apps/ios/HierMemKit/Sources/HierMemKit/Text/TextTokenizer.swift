/// Text ↔ token ids of one model.
///
/// ``JSONTokenizer`` reads byte-level BPE and WordPiece tokenizers. For others an app can put the
/// Tokenizers library of swift-transformers behind this protocol; HierMemChat shows how.
public protocol TextTokenizer: Sendable {
  /// Token ids of a text as it is, without what a tokenizer adds around it.
  ///
  /// - Parameter markup: whether the spelling of a control token, such as `<|im_end|>`, is that token. In
  ///   what somebody typed it is text.
  func encode(_ text: String, markup: Bool) throws -> [Int]

  /// The ids of the control tokens by their spelling.
  var controlTokens: [String: Int] { get }

  /// The text of token ids, special tokens left out. Bytes that are no UTF-8 become U+FFFD.
  func decode(_ tokens: [Int]) -> String
}

extension TextTokenizer {
  /// Token ids of a conversation: the template's control tokens count, those inside a message are text.
  ///
  /// Where no message spells one, this is the tokenizer's work on the prompt as a whole. The rules are those of
  /// `encode_chat` in mlx_hiermem/tokenizer.py.
  public func encode(_ parts: [ChatFormat.Part]) throws -> [Int] {
    let control = AddedTokens(controlTokens)
    // By bytes, as the tokenizer reads them: to Swift, ">" with an accent behind it is another character.
    let isSpelt = parts.contains { $0.isMessage && control.split($0.text).contains { !$0.ids.isEmpty } }
    guard isSpelt else { return try encode(parts.map(\.text).joined(), markup: true) }
    var tokens: [Int] = []
    var text = ""  // the template's and the messages' since the last control token
    for part in parts {
      for piece in part.isMessage ? [.text(part.text)] : control.split(part.text) {
        switch piece {
        case .text(let more): text += more
        case .token(let id):
          tokens += try encode(text, markup: false) + [id]
          text = ""
        }
      }
    }
    return try tokens + encode(text, markup: false)
  }
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
