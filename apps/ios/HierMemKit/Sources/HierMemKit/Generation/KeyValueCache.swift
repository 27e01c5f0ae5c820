/// What keys and values were computed under: they are shared under equal keys alone.
struct MemoryKey: Equatable, Sendable {
  /// Where a passage is in the prompt; `nil` elsewhere.
  let choice: MemoryChoice?
  /// The blocks that were attached.
  let nodes: [NodePath]
}

/// What an anchor's key/value cache holds: which tokens, computed under which memory.
struct KeyValueCache: Sendable {
  /// `nil` where it is not known.
  private var key: MemoryKey?
  private(set) var tokens: [Int] = []

  /// Keeps what a prompt has in common with the cache, and returns how many tokens that is.
  ///
  /// Only what was computed under the same memory is of use; the last token is always computed again,
  /// because its logits are needed.
  mutating func reuse(_ prompt: [Int], under key: MemoryKey) -> Int {
    var shared = 0
    if key == self.key {
      let most = min(tokens.count, prompt.count - 1)
      while shared < most, tokens[shared] == prompt[shared] { shared += 1 }
    }
    self.key = key
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
