import Foundation

/// What is done to a text before it is cut into words.
enum Normalizer: Sendable {
  case nfc
  case bert(Bert)

  struct Bert: Sendable {
    let cleanText: Bool
    let spaceChinese: Bool
    let stripAccents: Bool
    let lowercase: Bool
  }

  init(_ step: TokenizerFile.Step) throws {
    switch step.type {
    case "NFC": self = .nfc
    case "BertNormalizer":
      let lowercase = step.lowercase ?? true
      self = .bert(
        Bert(
          cleanText: step.cleanText ?? true, spaceChinese: step.handleChineseCharacters ?? true,
          stripAccents: step.stripAccents ?? lowercase, lowercase: lowercase))
    default: throw unsupported("the normaliser \(step.type)")
    }
  }

  func callAsFunction(_ text: String) -> String {
    switch self {
    case .nfc: text.precomposedStringWithCanonicalMapping
    case .bert(let bert): bert.normalized(text)
    }
  }
}

extension Normalizer.Bert {
  func normalized(_ text: String) -> String {
    var scalars = String.UnicodeScalarView()
    for scalar in text.unicodeScalars {
      if cleanText, scalar.isDroppedByBert { continue }
      if cleanText, scalar.isSpaceForBert {
        scalars.append(" ")
      } else if spaceChinese, scalar.isChineseForBert {
        scalars.append(contentsOf: [" ", scalar, " "])
      } else {
        scalars.append(scalar)
      }
    }
    if stripAccents {
      let decomposed = String(scalars).decomposedStringWithCanonicalMapping.unicodeScalars
      scalars = String.UnicodeScalarView(decomposed.filter { $0.categoryForBert != .nonspacingMark })
    }
    // Scalar by scalar, because String.lowercased() looks at the neighbours of a final sigma.
    return lowercase
      ? scalars.reduce(into: "") { $0 += $1.properties.lowercaseMapping } : String(scalars)
  }
}

extension Unicode.Scalar {
  /// The general category in Unicode 8, by whose tables the tokenizers library goes here: what came later
  /// is nothing to it, neither punctuation nor a mark. A few characters have moved since.
  fileprivate var categoryForBert: Unicode.GeneralCategory {
    switch value {
    case 0x1734: return .nonspacingMark
    case 0x1885, 0x1886: return .otherLetter
    case 0xA9BD: return .spacingMark
    case 0x166D, 0x111C9: return .otherPunctuation
    default: break
    }
    guard let age = properties.age, age.major <= 8 else { return .unassigned }
    return properties.generalCategory
  }

  var isSpaceForBert: Bool { properties.isWhitespace }

  /// Control characters and their like, apart from the white space among them.
  fileprivate var isDroppedByBert: Bool {
    switch self {
    case "\t", "\n", "\r": return false
    case "\0", "\u{FFFD}": return true
    default:
      switch categoryForBert {
      case .control, .format, .surrogate, .privateUse: return true
      default: return false
      }
    }
  }

  /// The CJK Unified Ideographs, which BERT takes one by one.
  fileprivate var isChineseForBert: Bool {
    switch value {
    case 0x4E00...0x9FFF, 0x3400...0x4DBF, 0x20000...0x2A6DF, 0x2A700...0x2B73F, 0x2B740...0x2B81F,
      0x2B920...0x2CEAF, 0xF900...0xFAFF, 0x2F800...0x2FA1F:
      true
    default: false
    }
  }

  /// Punctuation, to which BERT counts all signs of ASCII.
  var isPunctuationForBert: Bool {
    switch value {
    case 0x21...0x2F, 0x3A...0x40, 0x5B...0x60, 0x7B...0x7E: return true
    default: break
    }
    switch categoryForBert {
    case .connectorPunctuation, .dashPunctuation, .openPunctuation, .closePunctuation,
      .initialPunctuation, .finalPunctuation, .otherPunctuation:
      return true
    default: return false
    }
  }
}
