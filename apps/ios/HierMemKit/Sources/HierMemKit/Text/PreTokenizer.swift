import Foundation

/// How a text is cut into the words that a model looks at one by one.
enum PreTokenizer: Sendable {
  /// At white space, which goes, and around punctuation, which stays.
  case bert
  /// Into the matches of a pattern and what lies between.
  case split(Pattern)
  /// Each digit by itself, or each run of them.
  case digits(individual: Bool)
  /// A space in front of a text that has none.
  case prefixSpace

  /// GPT-2's words, which byte-level tokenizers cut by unless they bring a pattern of their own.
  private static let words =
    #"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#

  /// The steps of a byte-level or BERT tokenizer.
  static func steps(_ step: TokenizerFile.Step) throws -> [PreTokenizer] {
    switch step.type {
    case "BertPreTokenizer": return [.bert]
    case "Digits": return [.digits(individual: step.individualDigits ?? false)]
    case "ByteLevel":
      let space: [PreTokenizer] = step.addPrefixSpace ?? true ? [.prefixSpace] : []
      return space + (step.useRegex ?? true ? [.split(try Pattern(words))] : [])
    case "Split":
      guard let regex = step.pattern?.regex, step.behavior == "Isolated", step.invert != true else {
        throw unsupported("a Split that is not by a pattern, isolated")
      }
      return [.split(try Pattern(regex))]
    default: throw unsupported("the pre-tokeniser \(step.type)")
    }
  }

  func callAsFunction(_ text: String) -> [String] {
    switch self {
    case .bert: text.unicodeScalars.bertWords
    case .split(let pattern): pattern.pieces(of: text)
    case .digits(let individual): text.unicodeScalars.cutAtDigits(individual: individual)
    case .prefixSpace: [text.unicodeScalars.first == " " ? text : " " + text]
    }
  }

  /// A regular expression in the dialect of tokenizer.json.
  struct Pattern: @unchecked Sendable {  // NSRegularExpression is immutable, and says it is thread-safe
    private let regex: NSRegularExpression

    /// - Throws: ``HierMemError`` of kind `tokenizer` for a pattern that can't be read.
    init(_ pattern: String) throws {
      // ICU's \s lacks two of Unicode's white spaces, which the tokenizers library has.
      let exact = pattern.replacingOccurrences(of: #"\s"#, with: #"\p{White_Space}"#)
        .replacingOccurrences(of: #"\S"#, with: #"\P{White_Space}"#)
      do {
        regex = try NSRegularExpression(pattern: exact)
      } catch {
        throw unsupported("the pattern \(pattern)")
      }
    }

    func pieces(of text: String) -> [String] {
      let whole = text as NSString
      var pieces: [String] = []
      var end = 0
      for match in regex.matches(in: text, range: NSRange(location: 0, length: whole.length)) {
        let range = match.range
        if range.length == 0 { continue }
        if range.location > end {
          pieces.append(whole.substring(with: NSRange(location: end, length: range.location - end)))
        }
        pieces.append(whole.substring(with: range))
        end = range.location + range.length
      }
      if end < whole.length { pieces.append(whole.substring(from: end)) }
      return pieces
    }
  }
}

extension String.UnicodeScalarView {
  fileprivate var bertWords: [String] {
    var words: [String] = []
    var word = String.UnicodeScalarView()
    func close() {
      if !word.isEmpty { words.append(String(word)) }
      word = String.UnicodeScalarView()
    }
    for scalar in self {
      if scalar.isSpaceForBert {
        close()
      } else if scalar.isPunctuationForBert {
        close()
        words.append(String(scalar))
      } else {
        word.append(scalar)
      }
    }
    close()
    return words
  }

  fileprivate func cutAtDigits(individual: Bool) -> [String] {
    var pieces: [String.UnicodeScalarView] = []
    var lastWasDigit: Bool?
    for scalar in self {
      let isDigit = scalar.isNumber
      if isDigit == lastWasDigit, !(isDigit && individual) {
        pieces[pieces.count - 1].append(scalar)
      } else {
        pieces.append(String.UnicodeScalarView([scalar]))
      }
      lastWasDigit = isDigit
    }
    return pieces.map(String.init)
  }
}

extension Unicode.Scalar {
  /// What Rust's `char::is_numeric` says: the categories Nd, Nl and No.
  fileprivate var isNumber: Bool {
    switch properties.generalCategory {
    case .decimalNumber, .letterNumber, .otherNumber: true
    default: false
    }
  }
}
