import Foundation

/// One message of a conversation.
public struct ChatMessage: Codable, Equatable, Sendable {
  /// Who speaks.
  public enum Role: String, Codable, Sendable {
    case system, user, assistant
  }

  public let role: Role
  public let content: String

  public init(_ role: Role, _ content: String) {
    self.role = role
    self.content = content
  }
}

/// A model's chat template, taken apart by the exporter: what stands between the words of a
/// conversation. No Jinja runs on the device.
public struct ChatFormat: Decodable, Equatable, Sendable {
  /// By who spoke before and who speaks next: `start>user`, `user>assistant`, `user>reply`, …
  private let marks: [String: String]
  /// Whether white space around what is said is dropped.
  private let trim: Bool
  /// The mark that a reply loses all in front of, for models that think aloud; empty for none.
  private let thoughts: String

  private enum CodingKeys: CodingKey {
    case marks, trim, thoughts
  }

  public init(from decoder: any Decoder) throws {
    let values = try decoder.container(keyedBy: CodingKeys.self)
    marks = try values.decode([String: String].self, forKey: .marks)
    trim = try values.decode(Bool.self, forKey: .trim)
    thoughts = try values.decodeIfPresent(String.self, forKey: .thoughts) ?? ""
  }

  public init(marks: [String: String], trim: Bool = false, thoughts: String = "") {
    self.marks = marks
    self.trim = trim
    self.thoughts = thoughts
  }

  /// Whether there is a place for a system message.
  public var takesSystemMessage: Bool { marks["start>system"] != nil }

  /// A piece of a prompt: what stands between the messages, or what a message says.
  public struct Part: Equatable, Sendable {
    public let text: String
    public let isMessage: Bool
  }

  /// The prompt of a conversation, ready for the assistant's words.
  ///
  /// - Throws: ``HierMemError`` of kind `usage` where the template has no place for a message.
  public func prompt(_ messages: [ChatMessage]) throws -> String {
    try parts(messages).map(\.text).joined()
  }

  /// The same in parts, so that what is said can be told from the template's own marks.
  public func parts(_ messages: [ChatMessage]) throws -> [Part] {
    var parts: [Part] = []
    var before = "start"
    for message in messages {
      var said = trim
        ? message.content.trimmingCharacters(in: .whitespacesAndNewlines) : message.content
      if message.role == .assistant, !thoughts.isEmpty {
        let spoken = said.components(separatedBy: thoughts).last ?? said
        said = String(spoken.drop { $0 == "\n" })
      }
      parts.append(Part(text: try mark(before, message.role.rawValue), isMessage: false))
      parts.append(Part(text: said, isMessage: true))
      before = message.role.rawValue
    }
    return parts + [Part(text: try mark(before, "reply"), isMessage: false)]
  }

  private func mark(_ before: String, _ next: String) throws -> String {
    guard let mark = marks["\(before)>\(next)"] else {
      throw HierMemError(
        .usage, "this model's chat template has no place for \(next) after \(before)")
    }
    return mark
  }
}
