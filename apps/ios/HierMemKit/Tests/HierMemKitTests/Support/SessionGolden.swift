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
    let first: Int
    let prefilled: Int
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
  let vectors: [String: [Float]]
  let logits: [Logits]
  let sessions: [String: Session]

  static func read() throws -> SessionGolden { try Fixtures.decode("session.json") }

  var format: ChatFormat { ChatFormat(marks: chat.marks) }
}
