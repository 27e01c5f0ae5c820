@testable import HierMemKit

/// The sessions of tests/swift_session.py, which Python's own Session ran.
struct SessionGolden: Decodable {
  struct Session: Decodable {
    let memory: String
    let system: String
    let blocked: [String]
    let turns: [Turn]
  }

  struct Turn: Decodable {
    let text: String
    let reply: String
    let path: String
    let stayed: Bool
    let far: Bool
    let blocks: [String]
    /// The title of what stood in the prompt.
    let passage: String?
    /// What says the reply; `nil` where there was nothing to look through.
    let sources: [String]?
    let shown: Int
    let prefilled: Int
  }

  struct Found: Decodable {
    struct Source: Decodable {
      let document, title, place, sentence, name: String
      let score: Double
    }

    let leaf, question, answer: String
    let sources: [Source]
  }

  struct Parted: Decodable {
    let text: String
    let sentences: [String]
  }

  struct Logits: Decodable {
    let memory: String
    let blocks: [String]
    let logits: [Double]
  }

  struct Chat: Decodable {
    let marks: [String: String]
  }

  let context: Int
  let eos: [Int]
  let maxTokens: Int
  let chat: Chat
  let reach: Float
  let passageReach: Float
  let vectors: [String: [Float]]
  /// Vectors of length 1, for what the sources are asked.
  let worded: [String: [Float]]
  let found: [Found]
  /// What the questions of `found` are with their leaf's passage in front.
  let prompts: [[String]]
  let sentences: [Parted]
  /// Words that say nothing by themselves.
  let plain: [String]
  let logits: [Logits]
  let sessions: [String: Session]

  static func read() throws -> SessionGolden { try Fixtures.decode("session.json") }

  var format: ChatFormat { ChatFormat(marks: chat.marks) }
}
