import Foundation

/// A tokenizer.json: byte-level BPE (GPT-2, SmolLM, Llama 3, Qwen, GPT-NeoX) or BERT's WordPiece.
public struct JSONTokenizer: TextTokenizer {
  private enum Model {
    case wordPiece(WordPiece)
    case bytePairs(BytePairEncoding)
  }

  private let normalizers: [Normalizer]
  private let preTokenizers: [PreTokenizer]
  private let model: Model
  /// Tokens that are looked for before the text is normalised, and those that are looked for after.
  private let rawTokens: AddedTokens
  private let normalizedTokens: AddedTokens
  private let specialIDs: Set<Int>
  public let controlTokens: [String: Int]
  private let addedTexts: [Int: String]
  /// What stands around a text: ids in front and behind.
  private let frame: (before: [Int], after: [Int])

  /// Opens tokenizer.json.
  ///
  /// - Throws: ``HierMemError`` of kind `tokenizer` where it is missing, damaged, or has parts that are
  ///   not known here.
  public init(contentsOf url: URL) throws {
    let file = try readJSON(url, as: TokenizerFile.self, kind: .tokenizer)
    normalizers = try (file.normalizer?.flat ?? []).map(Normalizer.init)
    preTokenizers = try (file.preTokenizer?.flat ?? []).flatMap(PreTokenizer.steps)
    let types = (file.preTokenizer?.flat ?? []).map(\.type)
    switch file.model.type {
    case "BPE" where types.contains("ByteLevel"): model = .bytePairs(try BytePairEncoding(file.model))
    case "WordPiece": model = .wordPiece(try WordPiece(file.model))
    default: throw unsupported("the model \(file.model.type ?? "of no type") with \(types)")
    }
    if let odd = file.addedTokens.first(where: { $0.singleWord || $0.lstrip || $0.rstrip }) {
      throw unsupported("the token \(odd.content) with rules about its neighbours")
    }
    rawTokens = AddedTokens(file.addedTokens.filter { !$0.normalized })
    normalizedTokens = AddedTokens(file.addedTokens.filter(\.normalized))
    let special = file.addedTokens.filter(\.special)
    specialIDs = Set(special.map(\.id))
    controlTokens = Dictionary(special.map { ($0.content, $0.id) }) { first, _ in first }
    addedTexts = Dictionary(file.addedTokens.map { ($0.id, $0.content) }) { first, _ in first }
    frame = try Self.frame(file.postProcessor?.flat ?? [])
    let ids = [file.addedTokens.map(\.id), Array(file.model.vocab.values), frame.before, frame.after].joined()
    if let odd = ids.first(where: { !(0...Int(Int32.max)).contains($0) }) {
      throw unsupported("a token of the id \(odd)")
    }
  }

  public func encode(_ text: String, markup: Bool) -> [Int] {
    let unseen = markup ? [] : specialIDs
    return rawTokens.split(text, unseen: unseen).flatMap { piece -> [Int] in
      guard case .text(let text) = piece else { return piece.ids }
      let normalized = normalizers.reduce(text) { $1($0) }
      return normalizedTokens.split(normalized, unseen: unseen).flatMap { piece -> [Int] in
        guard case .text(let text) = piece else { return piece.ids }
        return words(text).flatMap(encodeWord)
      }
    }
  }

  /// Token ids with what the tokenizer puts around a text.
  ///
  /// - Parameter limit: the most tokens, those around included; the end of a longer text is left out.
  public func encodeFramed(_ text: String, limit: Int = .max) -> [Int] {
    let room = max(0, limit - frame.before.count - frame.after.count)
    return Array((frame.before + encode(text, markup: true).prefix(room) + frame.after).prefix(max(0, limit)))
  }

  /// The ids of a text that belong to rare words, of a vocabulary that is sorted by how often a piece was seen, as
  /// BERT's is.
  func rarePieces(_ text: String, limit: Int) -> Set<Int> {
    Set(encodeFramed(text, limit: limit).filter { $0 >= 5000 })
  }

  public func decode(_ tokens: [Int]) -> String {
    let shown = tokens.filter { !specialIDs.contains($0) }
    func texts(_ vocabulary: Vocabulary) -> [String] {
      shown.compactMap { addedTexts[$0] ?? vocabulary.token(of: $0) }
    }
    switch model {
    case .wordPiece(let model): return model.decode(texts(model.vocabulary))
    case .bytePairs(let model): return model.decode(texts(model.vocabulary))
    }
  }

  private func words(_ text: String) -> [String] {
    preTokenizers.reduce([text]) { pieces, cut in pieces.flatMap { cut($0) } }
  }

  private func encodeWord(_ word: String) -> [Int] {
    switch model {
    case .wordPiece(let model): model.encode(word)
    case .bytePairs(let model): model.encode(word)
    }
  }

  private static func frame(_ steps: [TokenizerFile.Step]) throws -> (before: [Int], after: [Int]) {
    var frame: (before: [Int], after: [Int]) = ([], [])
    for step in steps where step.type != "ByteLevel" {
      guard step.type == "TemplateProcessing", let pieces = step.single, let tokens = step.specialTokens,
        let place = pieces.firstIndex(where: { $0.special == nil })
      else { throw unsupported("the post-processor \(step.type)") }
      func ids(_ pieces: ArraySlice<TokenizerFile.Step.Piece>) -> [Int] {
        pieces.flatMap { piece in piece.special.flatMap { tokens[$0.id]?.ids } ?? [] }
      }
      frame = (ids(pieces[..<place]), ids(pieces[(place + 1)...]))
    }
    return frame
  }
}

/// Tokens that are found in a text as a whole, before anything is cut: the leftmost, and of those that
/// begin at one place the longest.
struct AddedTokens: Sendable {
  enum Piece {
    case text(String)
    case token(Int)

    var ids: [Int] {
      if case .token(let id) = self { [id] } else { [] }
    }
  }

  /// By first byte, longest first.
  private let tokens: [UInt8: [(bytes: [UInt8], id: Int)]]

  init(_ added: [TokenizerFile.AddedToken]) {
    self.init(Dictionary(added.map { ($0.content, $0.id) }) { first, _ in first })
  }

  init(_ ids: [String: Int]) {
    let listed = ids.filter { !$0.key.isEmpty }.map { (bytes: Array($0.key.utf8), id: $0.value) }
    tokens = Dictionary(grouping: listed) { $0.bytes[0] }
      .mapValues { $0.sorted { $0.bytes.count > $1.bytes.count } }
  }

  /// - Parameter unseen: ids of tokens whose spelling stays text.
  func split(_ text: String, unseen: Set<Int> = []) -> [Piece] {
    if tokens.isEmpty { return text.isEmpty ? [] : [.text(text)] }
    let bytes = Array(text.utf8)
    var pieces: [Piece] = []
    var (start, index) = (0, 0)
    func close(_ end: Int) {
      if end > start { pieces.append(.text(String(decoding: bytes[start..<end], as: UTF8.self))) }
    }
    while index < bytes.count {
      let found = tokens[bytes[index]]?.first { bytes[index...].starts(with: $0.bytes) }
      guard let found else {
        index += 1
        continue
      }
      if unseen.contains(found.id) {
        index += found.bytes.count
        continue
      }
      close(index)
      pieces.append(.token(found.id))
      index += found.bytes.count
      start = index
    }
    close(index)
    return pieces
  }
}
