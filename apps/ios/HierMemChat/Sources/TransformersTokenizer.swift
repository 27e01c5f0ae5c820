import Foundation
import HierMemKit
import Tokenizers

/// The Tokenizers library of swift-transformers behind HierMemKit's protocol, for models whose tokenizer
/// HierMemKit does not run itself.
///
/// Unchecked because the library's tokenizers are immutable, which their protocol does not say.
struct TransformersTokenizer: TextTokenizer, @unchecked Sendable {
  private struct File: Decodable {
    struct Token: Decodable {
      let id: Int
      let content: String
      let special: Bool
    }

    let added_tokens: [Token]
  }

  private let tokenizer: any Tokenizer
  let controlTokens: [String: Int]

  /// - Parameter folder: with tokenizer.json, tokenizer_config.json and config.json.
  init(folder: URL) async throws {
    tokenizer = try await AutoTokenizer.from(modelFolder: folder)
    let data = try Data(contentsOf: folder.appendingPathComponent("tokenizer.json"))
    let special = try JSONDecoder().decode(File.self, from: data).added_tokens.filter(\.special)
    controlTokens = Dictionary(special.map { ($0.content, $0.id) }) { first, _ in first }
  }

  /// The library always takes the spelling of a control token for that token. Where it must not, the text is
  /// cut inside the spelling, and its parts are encoded one by one.
  func encode(_ text: String, markup: Bool) -> [Int] {
    guard !markup else { return tokenizer.encode(text: text, addSpecialTokens: false) }
    var (parts, start) = ([Substring](), text.startIndex)
    // Literally, and cut between scalars: to Swift, ">" with an accent behind it is another character.
    while let found = controlTokens.keys
      .compactMap({ text.range(of: $0, options: .literal, range: start..<text.endIndex) })
      .min(by: { $0.lowerBound < $1.lowerBound })
    {
      let cut = text.unicodeScalars.index(after: found.lowerBound)
      parts.append(text[start..<cut])
      start = cut
    }
    return (parts + [text[start...]]).flatMap {
      $0.isEmpty ? [] : tokenizer.encode(text: String($0), addSpecialTokens: false)
    }
  }

  func decode(_ tokens: [Int]) -> String { tokenizer.decode(tokens: tokens, skipSpecialTokens: true) }
}
