import Foundation

/// One sentence, and where it stands.
public struct SourceSentence: Equatable, Sendable {
  public let document: String
  public let title: String
  /// Where its window begins: `page 3`, `line 12`; may be empty.
  public let place: String
  public let sentence: String
  /// 0 to 1.
  public let score: Double

  /// `Potter's wheel (pots.pdf, page 3)`.
  public var name: String {
    let place = [document, place].filter { !$0.isEmpty }.joined(separator: ", ")
    if title.isEmpty || place.isEmpty { return title.isEmpty ? place : title }
    return "\(title) (\(place))"
  }
}

/// Where an answer comes from: the document, and the sentence that says it.
///
/// The path is the index: only the windows of the question's leaf are looked through. Windows are ranked by their
/// vectors, the sentences of the best by vector and by words. A sentence counts as a source if it says what the
/// answer says beyond the question. The rule and its settings are mlx_hiermem/source_search.py's.
public struct SourceSearch: Sendable {
  public let sources: BankSources
  public let embedder: any TextEmbedder

  /// Windows of a leaf, whose sentences are embedded.
  private static let lookedInto = 3
  /// Sentences of an answer that are looked for.
  private static let claims = 2
  /// What a source scores at least.
  private static let bound = 0.4

  public init(sources: BankSources, embedder: any TextEmbedder) {
    self.sources = sources
    self.embedder = embedder
  }

  /// The window that a question wants most; `nil` where the leaf has none, or the question has no path.
  public func passage(for question: String, in leaf: NodePath) async throws -> SourceWindow? {
    guard leaf != .root else { return nil }
    let vector = try await embedder.embed(question)
    guard let cosines = try sources.cosines(of: vector, in: leaf), let windows = try sources.windows(of: leaf) else {
      return nil
    }
    return windows[first(ofMost: cosines)]
  }

  /// The sentences of a leaf that say an answer, best first, one of a window; none of them may.
  ///
  /// Without an answer, the sentences that suit the question best, whatever their score.
  public func find(in leaf: NodePath, question: String, answer: String = "") async throws -> [SourceSentence] {
    guard let windows = try sources.windows(of: leaf) else { return [] }
    let said = Sentences.of(answer).prefix(Self.claims).map { "\(question) \($0)" }
    var claims: [[Float]] = []
    for claim in said.isEmpty ? [question] : said { claims.append(try await embedder.embed(claim)) }
    let cosines = try claims.compactMap { try sources.cosines(of: $0, in: leaf) }
    let near = windows.indices.map { window in cosines.map { $0[window] }.max() ?? 0 }
    var found: [SourceSentence] = []
    for number in order(near).prefix(Self.lookedInto) {
      found.append(try await best(of: windows[number], question, answer, claims))
    }
    let kept = found.filter { answer.isEmpty || $0.score >= Self.bound }
    return order(kept.map(\.score)).map { kept[$0] }
  }

  /// The sentence of a window that says an answer best.
  private func best(
    of window: SourceWindow, _ question: String, _ answer: String, _ claims: [[Float]]
  ) async throws -> SourceSentence {
    let sentences = Sentences.of(window.text)
    let texts = sentences.isEmpty ? [window.text] : sentences
    var scores: [Double] = []
    for text in texts {
      let vector = try await embedder.embed("\(window.title). \(text)")
      let near = claims.map { dot(vector, $0) }.max() ?? 0
      scores.append(score(near: near, said: agreement(question, answer, "\(window.title) \(text)")))
    }
    let best = first(ofMost: scores)
    return SourceSentence(
      document: window.document, title: window.title, place: window.place, sentence: texts[best], score: scores[best])
  }
}

/// From 0 to 1; the weights are fitted to 240 questions by benchmarks/sources.py.
private func score(near: Double, said: Double) -> Double {
  1 / (1 + exp(-(-6.6 + 7.1 * near + 3.6 * said)))
}

/// Which share of what an answer says beyond its question a text says too; of an answer that adds nothing to its
/// question, which share of it.
private func agreement(_ question: String, _ answer: String, _ text: String) -> Double {
  func orElse(_ some: Set<String>, _ others: Set<String>) -> Set<String> { some.isEmpty ? others : some }
  let told = Sentences.words(answer)
  let new = orElse(told.subtracting(Sentences.words(question)), told)
  let said = orElse(new.subtracting(Sentences.plain), new)
  return said.isEmpty ? 0 : Double(said.intersection(Sentences.words(text)).count) / Double(said.count)
}

/// Places by value, the largest first; equal ones stay in their order.
private func order<Value: Comparable>(_ values: [Value]) -> [Int] {
  values.indices.sorted { values[$0] == values[$1] ? $0 < $1 : values[$0] > values[$1] }
}

private func first<Value: Comparable>(ofMost values: [Value]) -> Int {
  order(values)[0]
}
