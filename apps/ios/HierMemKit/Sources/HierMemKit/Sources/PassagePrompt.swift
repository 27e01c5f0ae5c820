import Foundation

/// What a passage puts into a prompt, in the words of mlx_hiermem/source_search.py.
extension [ChatMessage] {
  /// A conversation with a passage as the exchange before its last question, which so stays as it was learnt.
  func with(_ passage: SourceWindow?) -> [ChatMessage] {
    guard let passage, let last = lastIndex(where: { $0.role == .user }) else { return self }
    let title = passage.title.isEmpty ? "it" : passage.title
    let exchange = [ChatMessage(.user, "Tell me about \(title)."), ChatMessage(.assistant, passage.text)]
    return Array(self[..<last]) + exchange + Array(self[last...])
  }

  /// What to look for: the last question. One that kept the topic may not name it, so the question before goes
  /// with it.
  func asked(stayed: Bool) -> String {
    filter { $0.role == .user }.suffix(stayed ? 2 : 1).map(\.content).joined(separator: " ")
  }
}
