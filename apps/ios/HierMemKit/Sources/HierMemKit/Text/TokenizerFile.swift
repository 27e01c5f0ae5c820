import Foundation

/// tokenizer.json, as the tokenizers library writes it: those parts that HierMemKit can run.
///
/// Anything else is refused by name, because a tokenizer that is nearly right is wrong.
struct TokenizerFile: Decodable {
  struct AddedToken: Decodable {
    let id: Int
    let content: String
    let special: Bool
    let normalized: Bool
    let singleWord: Bool
    let lstrip: Bool
    let rstrip: Bool

    enum CodingKeys: String, CodingKey {
      case id, content, special, normalized, lstrip, rstrip
      case singleWord = "single_word"
    }
  }

  struct Model: Decodable {
    let type: String?
    let vocab: [String: Int]
    let merges: [Merge]?
    let ignoreMerges: Bool?
    let byteFallback: Bool?
    let unknownToken: String?
    let continuingPrefix: String?
    let longestWord: Int?

    enum CodingKeys: String, CodingKey {
      case type, vocab, merges
      case ignoreMerges = "ignore_merges"
      case byteFallback = "byte_fallback"
      case unknownToken = "unk_token"
      case continuingPrefix = "continuing_subword_prefix"
      case longestWord = "max_input_chars_per_word"
    }
  }

  /// `["a", "b"]`, or in older files `"a b"`.
  struct Merge: Decodable {
    let left: String
    let right: String

    init(from decoder: any Decoder) throws {
      let value = try decoder.singleValueContainer()
      let pair: [String]
      if let text = try? value.decode(String.self) {
        pair = text.split(separator: " ", omittingEmptySubsequences: false).map(String.init)
      } else {
        pair = try value.decode([String].self)
      }
      guard pair.count == 2 else {
        throw DecodingError.dataCorruptedError(in: value, debugDescription: "a merge is not of two parts")
      }
      (left, right) = (pair[0], pair[1])
    }
  }

  /// A normaliser, pre-tokeniser or post-processor: its type, and the settings that any of them has.
  struct Step: Decodable {
    let type: String
    let steps: [Step]?
    // BertNormalizer
    let cleanText: Bool?
    let handleChineseCharacters: Bool?
    let stripAccents: Bool?
    let lowercase: Bool?
    // ByteLevel, Digits, Split
    let addPrefixSpace: Bool?
    let useRegex: Bool?
    let individualDigits: Bool?
    let pattern: Pattern?
    let behavior: String?
    let invert: Bool?
    // TemplateProcessing
    let single: [Piece]?
    let specialTokens: [String: SpecialToken]?

    struct Pattern: Decodable {
      let regex: String?

      enum CodingKeys: String, CodingKey {
        case regex = "Regex"
      }
    }

    struct Piece: Decodable {
      let special: Name?

      struct Name: Decodable {
        let id: String
      }

      enum CodingKeys: String, CodingKey {
        case special = "SpecialToken"
      }
    }

    struct SpecialToken: Decodable {
      let ids: [Int]
    }

    enum CodingKeys: String, CodingKey {
      case type, lowercase, pattern, behavior, invert, single
      case normalizers, pretokenizers, processors
      case cleanText = "clean_text"
      case handleChineseCharacters = "handle_chinese_chars"
      case stripAccents = "strip_accents"
      case addPrefixSpace = "add_prefix_space"
      case useRegex = "use_regex"
      case individualDigits = "individual_digits"
      case specialTokens = "special_tokens"
    }

    init(from decoder: any Decoder) throws {
      let values = try decoder.container(keyedBy: CodingKeys.self)
      type = try values.decode(String.self, forKey: .type)
      steps =
        try values.decodeIfPresent([Step].self, forKey: .normalizers)
        ?? values.decodeIfPresent([Step].self, forKey: .pretokenizers)
        ?? values.decodeIfPresent([Step].self, forKey: .processors)
      cleanText = try values.decodeIfPresent(Bool.self, forKey: .cleanText)
      handleChineseCharacters = try values.decodeIfPresent(Bool.self, forKey: .handleChineseCharacters)
      stripAccents = try values.decodeIfPresent(Bool.self, forKey: .stripAccents)
      lowercase = try values.decodeIfPresent(Bool.self, forKey: .lowercase)
      addPrefixSpace = try values.decodeIfPresent(Bool.self, forKey: .addPrefixSpace)
      useRegex = try values.decodeIfPresent(Bool.self, forKey: .useRegex)
      individualDigits = try values.decodeIfPresent(Bool.self, forKey: .individualDigits)
      pattern = try values.decodeIfPresent(Pattern.self, forKey: .pattern)
      behavior = try values.decodeIfPresent(String.self, forKey: .behavior)
      invert = try values.decodeIfPresent(Bool.self, forKey: .invert)
      single = try values.decodeIfPresent([Piece].self, forKey: .single)
      specialTokens = try values.decodeIfPresent([String: SpecialToken].self, forKey: .specialTokens)
    }

    /// The step itself, or those of a sequence.
    var flat: [Step] { type == "Sequence" ? (steps ?? []).flatMap(\.flat) : [self] }
  }

  let addedTokens: [AddedToken]
  let normalizer: Step?
  let preTokenizer: Step?
  let postProcessor: Step?
  let decoder: Step?
  let model: Model

  enum CodingKeys: String, CodingKey {
    case normalizer, decoder, model
    case addedTokens = "added_tokens"
    case preTokenizer = "pre_tokenizer"
    case postProcessor = "post_processor"
  }
}

/// What HierMemKit's tokenizer does not have.
func unsupported(_ what: String) -> HierMemError {
  HierMemError(
    .tokenizer, "this tokenizer has \(what), which HierMemKit does not run",
    hint: "Put the Tokenizers library of swift-transformers behind TextTokenizer, as HierMemChat does.")
}
