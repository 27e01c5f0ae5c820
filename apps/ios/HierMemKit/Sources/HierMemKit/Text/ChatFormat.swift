import Foundation

/// Who speaks in a conversation.
public enum Role: String, Codable, Sendable {
  case system, user, assistant
}

/// One message of a conversation.
public struct Message: Codable, Equatable, Sendable {
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

  public init(marks: [String: String], trim: Bool = false) {
    self.marks = marks
    self.trim = trim
  }

  /// Whether there is a place for a system message.
  public var takesSystemMessage: Bool { marks["start>system"] != nil }

  /// The prompt of a conversation, ready for the assistant's words.
  ///
  /// - Throws: ``HierMemError`` of kind `usage` where the template has no place for a message.
  public func prompt(_ messages: [Message]) throws -> String {
    var text = ""
    var before = "start"
    for message in messages {
      let said = trim
        ? message.content.trimmingCharacters(in: .whitespacesAndNewlines) : message.content
      text += try mark(before, message.role.rawValue) + said
      before = message.role.rawValue
    }
    return text + (try mark(before, "reply"))
  }

  private func mark(_ before: String, _ next: String) throws -> String {
    guard let mark = marks["\(before)>\(next)"] else {
      throw HierMemError(
        .usage, "this model's chat template has no place for \(next) after \(before)")
    }
    return mark
  }
}
