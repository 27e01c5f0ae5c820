import Foundation

@testable import HierMemKit

/// The twin of `TinyAnchor` in tests/swift_session.py: logits that depend on every cached token, and on
/// the memory that each was computed under.
actor TinyAnchor: Anchor {
  nonisolated let context: Int
  /// How many tokens each call was given.
  private(set) var calls: [Int] = []
  private(set) var attachments = 0
  /// The call that fails, counted from now; for tests of what remains of a conversation then.
  private var failing: Int?
  /// Whoever waits for `release`, while calls are held up.
  private var waiting: [CheckedContinuation<Void, Never>]?

  private let embeddings: [[Double]]
  private let head: [[Double]]
  private var memory: FetchedMemory?
  private var rows: [[Double]] = []

  init(vocabulary: Int, hidden: Int, context: Int) {
    self.context = context
    embeddings = Fixtures.uniform(31, vocabulary, hidden).map { $0.map(Double.init) }
    head = Fixtures.uniform(32, vocabulary, hidden).map { $0.map(Double.init) }
  }

  func failAtCall(_ call: Int) { failing = call }

  func clearCalls() { calls = [] }

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
    precondition(position <= rows.count && position + tokens.count <= context)
    calls.append(tokens.count)
    rows.removeSubrange(position...)
    rows += tokens.map { widened(embeddings[$0]) }
    var sum = [Double](repeating: 0, count: embeddings[0].count)
    for (index, row) in rows.enumerated() {
      let weight = pow(0.9, Double(rows.count - 1 - index))
      for column in sum.indices { sum[column] += weight * row[column] }
    }
    return head.map { Float(dot($0, sum)) }
  }

  /// A token's hidden state, with what the memory adds in each of its layers.
  private func widened(_ embedding: [Double]) -> [Double] {
    guard let memory else { return embedding }
    var x = embedding
    for layer in 0..<memory.layers {
      var added = [Double](repeating: 0, count: memory.hidden)
      for unit in 0..<memory.units {
        func row(_ name: String) -> [Double] {
          let start = (layer * memory.units + unit) * memory.hidden
          return memory.tensors[name]![start..<start + memory.hidden].map(Double.init)
        }
        let gate = dot(row("gate"), x)
        let inner = gate / (1 + exp(-gate)) * dot(row("up"), x)
        for (column, value) in row("down").enumerated() { added[column] += inner * value }
      }
      for column in x.indices { x[column] += added[column] }
    }
    return x
  }

  private func dot(_ a: [Double], _ b: [Double]) -> Double {
    zip(a, b).reduce(0) { $0 + $1.0 * $1.1 }
  }
}

/// An embedder of texts whose vectors are known.
struct KnownEmbedder: TextEmbedder {
  let vectors: [String: [Float]]

  func embed(_ text: String) throws -> [Float] {
    guard let vector = vectors[text] else { throw HierMemError(.usage, "no vector for '\(text)'") }
    return vector
  }
}
