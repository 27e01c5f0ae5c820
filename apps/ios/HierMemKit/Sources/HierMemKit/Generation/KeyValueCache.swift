/// What an anchor's key/value cache holds: which tokens, computed under which memory.
struct KeyValueCache: Sendable {
  /// The blocks that were attached; `nil` where it is not known.
  private var blocks: [NodePath]?
  private(set) var tokens: [Int] = []

  /// Keeps what a prompt has in common with the cache, and returns how many tokens that is.
  ///
  /// Only what was computed under the same blocks is of use; the last token is always computed again,
  /// because its logits are needed.
  mutating func reuse(_ prompt: [Int], blocks: [NodePath]) -> Int {
    var shared = 0
    if blocks == self.blocks {
      let most = min(tokens.count, prompt.count - 1)
      while shared < most, tokens[shared] == prompt[shared] { shared += 1 }
    }
    self.blocks = blocks
    tokens.removeSubrange(shared...)
    return shared
  }

  /// Notes tokens that were computed behind the others.
  mutating func append(_ more: [Int]) {
    tokens += more
  }

  /// Forgets everything, for example when the anchor failed half-way.
  mutating func clear() {
    self = KeyValueCache()
  }
}
