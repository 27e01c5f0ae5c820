/// The language model that memories are attached to, with its key/value cache.
public protocol LanguageAnchor: Sendable {
  /// The most tokens that a conversation can have, question and answer together.
  var context: Int { get }

  /// Replaces the memory, by none where it is `nil`. What is in the cache was computed under the old
  /// one, and has to be computed again.
  func attach(_ memory: FetchedMemory?) async throws

  /// Computes tokens that stand from `position` on, and returns the logits behind the last of them.
  ///
  /// The tokens in front of `position` have been computed already; what was behind is forgotten.
  ///
  /// - Parameter tokens: at least one, and no more than `context` allows from `position` on.
  func logits(after tokens: [Int], at position: Int) async throws -> [Float]
}

/// The calls that compute a run of tokens, where a model has functions for fixed numbers of them.
struct CallPlan: Equatable, Sendable {
  struct Call: Equatable, Sendable {
    /// The tokens that the function takes.
    let size: Int
    /// Which of the run's tokens it is given; fewer than `size` are filled up with any others.
    let tokens: Range<Int>
  }

  let calls: [Call]

  /// - Parameters:
  ///   - sizes: of the functions; 1 is among them.
  ///   - position: of the first token.
  ///   - context: which no call may reach beyond, with what it is filled up with.
  init(count: Int, position: Int, sizes: [Int], context: Int) {
    var calls: [Call] = []
    var done = 0
    while done < count {
      let left = count - done
      let fitting = sizes.filter { position + done + $0 <= context }
      // Filling up beats going one by one: few tokens cost a call about as much as many.
      let size = left == 1 ? 1 : fitting.filter { $0 >= left }.min() ?? fitting.max() ?? 1
      calls.append(Call(size: size, tokens: done..<done + min(size, left)))
      done += min(size, left)
    }
    self.calls = calls
  }
}
