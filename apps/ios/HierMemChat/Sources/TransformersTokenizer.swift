import Foundation
import HierMemKit
import Tokenizers

/// The Tokenizers library of swift-transformers behind HierMemKit's protocol, for models whose tokenizer
/// HierMemKit does not run itself.
///
/// Unchecked because the library's tokenizers are immutable, which their protocol does not say.
struct TransformersTokenizer: TextTokenizer, @unchecked Sendable {
  private let tokenizer: any Tokenizer

  /// - Parameter folder: with tokenizer.json, tokenizer_config.json and config.json.
  init(folder: URL) async throws {
    tokenizer = try await AutoTokenizer.from(modelFolder: folder)
  }

  func encode(_ text: String) -> [Int] { tokenizer.encode(text: text, addSpecialTokens: false) }

  func decode(_ tokens: [Int]) -> String { tokenizer.decode(tokens: tokens, skipSpecialTokens: true) }
}
