import Foundation

@testable import HierMemKit

/// The arithmetic of `TinyAnchor` in tests/swift_session.py: logits that depend on every token so far, and
/// on the memory that each was computed under.
struct TinyModel: Sendable {
  typealias Tensors = [String: [Float16]]

  let embeddings: [[Double]]
  let head: [[Double]]

  init(vocabulary: Int, hidden: Int) {
    embeddings = Fixtures.uniform(31, vocabulary, hidden).map { $0.map(Double.init) }
    head = Fixtures.uniform(32, vocabulary, hidden).map { $0.map(Double.init) }
  }

  /// What is cached for a token: its hidden state, and nine tenths of what is cached for the one before.
  ///
  /// - Parameter memory: gate, up and down, [layers, units, hidden].
  func state(of token: Int, after before: [Double]?, memory: Tensors?, layers: Int) -> [Double] {
    var x = embeddings[token]
    for layer in 0..<(memory == nil ? 0 : layers) {
      let part = memory!.mapValues { $0.count / layers }
      var added = [Double](repeating: 0, count: x.count)
      for unit in 0..<part["gate"]! / x.count {
        func row(_ name: String) -> [Double] {
          let start = layer * part[name]! + unit * x.count
          return memory![name]![start..<start + x.count].map(Double.init)
        }
        let gate = dot(row("gate"), x)
        let inner = gate / (1 + exp(-gate)) * dot(row("up"), x)
        for (column, value) in row("down").enumerated() { added[column] += inner * value }
      }
      for column in x.indices { x[column] += added[column] }
    }
    return before.map { zip(x, $0).map { $0 + 0.9 * $1 } } ?? x
  }

  func logits(_ state: [Double]) -> [Float] { head.map { Float(dot($0, state)) } }

  private func dot(_ a: [Double], _ b: [Double]) -> Double {
    zip(a, b).reduce(0) { $0 + $1.0 * $1.1 }
  }
}

/// The tiny model behind the protocol, without Core ML.
actor TinyAnchor: LanguageAnchor {
  nonisolated let context: Int
  /// How many tokens each call was given.
  private(set) var calls: [Int] = []
  private(set) var attachments = 0
  /// The call that fails, counted from now; for tests of what remains of a conversation then.
  private var failing: Int?
  /// Whoever waits for `release`, while calls are held up.
  private var waiting: [CheckedContinuation<Void, Never>]?

  private let model: TinyModel
  private var memory: FetchedMemory?
  private var states: [[Double]] = []

  init(vocabulary: Int, hidden: Int, context: Int) {
    self.context = context
    model = TinyModel(vocabulary: vocabulary, hidden: hidden)
  }

  func failAtCall(_ call: Int) { failing = call }

  func clearCalls() { calls = [] }

  /// How many calls `hold` has stopped.
  var held: Int { waiting?.count ?? 0 }

  /// Lets no call end before `release`.
  func hold() { waiting = [] }

  func release() {
    waiting?.forEach { $0.resume() }
    waiting = nil
  }

  func attach(_ memory: FetchedMemory?) {
    self.memory = memory
    attachments += 1
  }

  func logits(after tokens: [Int], at position: Int) async throws -> [Float] {
    if waiting != nil { await withCheckedContinuation { waiting?.append($0) } }
    if let left = failing {
      failing = left > 1 ? left - 1 : nil
      if left == 1 { throw HierMemError(.model, "the anchor fails") }
    }
    precondition(position <= states.count && position + tokens.count <= context)
    calls.append(tokens.count)
    states.removeSubrange(position...)
    for token in tokens {
      states.append(
        model.state(of: token, after: states.last, memory: memory?.tensors, layers: memory?.layers ?? 0))
    }
    return model.logits(states[states.count - 1])
  }
}

/// An embedder of texts whose vectors are known.
struct KnownEmbedder: TextEmbedder {
  let vectors: [String: [Float]]
  var pieces: [String: Set<Int>] = [:]

  func rarePieces(_ text: String) -> Set<Int>? { pieces[text] }

  func embed(_ text: String) throws -> [Float] {
    guard let vector = vectors[text] else { throw HierMemError(.usage, "no vector for '\(text)'") }
    return vector
  }
}
