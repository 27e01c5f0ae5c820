/// BERT's model: a word is the longest tokens that make it up, from the left.
struct WordPiece: Sendable {
  let vocabulary: Vocabulary
  let unknown: Int
  /// In front of a token that is not the first of its word.
  let prefix: String
  /// In characters; a longer word is unknown.
  let longestWord: Int

  init(_ model: TokenizerFile.Model) throws {
    vocabulary = try Vocabulary(model.vocab)
    prefix = model.continuingPrefix ?? "##"
    longestWord = model.longestWord ?? 100
    guard let unknown = vocabulary.id(of: model.unknownToken ?? "[UNK]") else {
      throw unsupported("no token for unknown words")
    }
    self.unknown = unknown
  }

  func encode(_ word: String) -> [Int] {
    let scalars = Array(word.unicodeScalars)
    guard scalars.count <= longestWord else { return [unknown] }
    var ids: [Int] = []
    var start = 0
    while start < scalars.count {
      var end = scalars.count
      var found: Int?
      while end > start {
        var piece = String(String.UnicodeScalarView(scalars[start..<end]))
        if start > 0 { piece = prefix + piece }
        found = vocabulary.id(of: piece)
        if found != nil { break }
        end -= 1
      }
      guard let found else { return [unknown] }
      ids.append(found)
      start = end
    }
    return ids
  }

  func decode(_ tokens: [String]) -> String {
    tokens.enumerated().map { index, token in
      if index == 0 { return token }
      return token.hasPrefix(prefix) ? String(token.dropFirst(prefix.count)) : " " + token
    }.joined()
  }
}
