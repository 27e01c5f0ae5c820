import Foundation

/// What a passage puts into a prompt, in the words of mlx_hiermem/sources.py.
extension [ChatMessage] {
  /// A conversation with a passage in its last question.
  func with(_ passage: SourceWindow?) -> [ChatMessage] {
    guard let passage, let last = lastIndex(where: { $0.role == .user }) else { return self }
    var told = self
    told[last] = ChatMessage(
      .user, "\(passage.told)\n\nCopy the answer from the text above: \(self[last].content)")
    return told
  }

  /// What to look for: the last question. One that kept the topic may not name it, so the question before goes
  /// with it.
  func asked(stayed: Bool) -> String {
    filter { $0.role == .user }.suffix(stayed ? 2 : 1).map(\.content).joined(separator: " ")
  }
}

extension SourceWindow {
  /// Its text, with its title before it unless it names it itself.
  fileprivate var told: String {
    let named = title.isEmpty || text.lowercased().range(of: title.lowercased(), options: .literal) != nil
    return named ? text : "\(title): \(text)"
  }
}
