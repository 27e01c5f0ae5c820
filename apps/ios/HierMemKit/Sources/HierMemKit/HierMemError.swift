import Foundation

/// What went wrong, where, and what to do next: everything that HierMemKit throws on purpose.
public struct HierMemError: LocalizedError, Equatable, Sendable {
  /// What kind of thing is wrong, for callers that act on it.
  public enum Kind: Sendable {
    /// What was asked for is not possible.
    case usage
    /// A question does not fit the model's context.
    case context
    /// A bank, or a file of one, is missing, damaged, or of another format version.
    case bank
    /// The exported folder or one of its models is missing, damaged, or of another format version.
    case model
    /// A tokenizer needs what HierMemKit does not have.
    case tokenizer
    /// A block could not be brought from where the bank says it is.
    case download
  }

  public let kind: Kind
  /// What is wrong and where.
  public let what: String
  /// What to do next; empty where there is nothing to say.
  public let hint: String

  public init(_ kind: Kind, _ what: String, hint: String = "") {
    self.kind = kind
    self.what = what
    self.hint = hint
  }

  public var errorDescription: String? {
    hint.isEmpty ? what : "\(what.hasSuffix(".") ? String(what.dropLast()) : what). \(hint)"
  }
}
