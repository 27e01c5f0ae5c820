import Foundation

/// SplitMix64: small, and the same numbers everywhere for the same seed.
struct SplitMix64: RandomNumberGenerator, Sendable {
  private var state: UInt64

  init(seed: UInt64) {
    state = seed
  }

  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ z >> 30) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ z >> 27) &* 0x94D0_49BB_1331_11EB
    return z ^ z >> 31
  }

  /// From 0 up to, but not including 1.
  mutating func nextUnit() -> Double {
    Double(next() >> 11) * 0x1p-53
  }
}

/// Picks the next token from logits: the likeliest, or by chance among the likely.
public struct TokenSampler: Sendable {
  /// How a reply is sampled.
  public struct Settings: Equatable, Sendable {
    /// 0 always takes the likeliest token.
    public var temperature: Double
    /// The likeliest tokens that together have this share of the probability; 1 for all.
    public var topP: Double
    /// At most so many of the likeliest; 0 for all.
    public var topK: Int

    public init(temperature: Double = 0, topP: Double = 1, topK: Int = 0) {
      self.temperature = temperature
      self.topP = topP
      self.topK = topK
    }
  }

  public let settings: Settings
  private var random: SplitMix64

  /// - Parameter seed: equal seeds give equal choices.
  public init(_ settings: Settings = Settings(), seed: UInt64) {
    self.settings = settings
    random = SplitMix64(seed: seed)
  }

  /// The chosen token; the lowest id wins a tie for the likeliest.
  ///
  /// As in mlx-lm, `topP` and then `topK` are taken before the temperature.
  public mutating func sample(_ logits: [Float]) -> Int {
    let best = logits.indices.max { logits[$0] < logits[$1] || (logits[$0] == logits[$1] && $0 > $1) }!
    guard settings.temperature > 0 else { return best }
    let top = Double(logits[best])
    let candidates = candidates(logits, top: top)
    let weights = candidates.map { exp((Double(logits[$0]) - top) / settings.temperature) }
    var left = random.nextUnit() * weights.reduce(0, +)
    for (index, weight) in weights.enumerated() {
      left -= weight
      if left < 0 { return candidates[index] }
    }
    return candidates.last ?? best  // rounding may leave a little; no logit is a candidate where all are NaN
  }

  /// The tokens to choose from, in the order of their ids.
  private func candidates(_ logits: [Float], top: Double) -> [Int] {
    var kept = Array(logits.indices)
    if settings.topP > 0, settings.topP < 1 {
      let weights = logits.map { exp(Double($0) - top) }
      let total = weights.reduce(0, +)
      // What is less likely than this can't be needed, which leaves little to sort.
      let least = (1 - settings.topP) * total / Double(logits.count)
      let sorted = kept.filter { weights[$0] >= least }.sorted { logits[$0] > logits[$1] }
      var mass = 0.0
      var lowest = -Float.infinity
      for token in sorted {
        if mass >= settings.topP * total { break }
        mass += weights[token]
        lowest = logits[token]
      }
      kept = kept.filter { logits[$0] >= lowest }
    }
    if settings.topK > 0, settings.topK < kept.count {
      let likeliest = kept.sorted { (logits[$0], $1) > (logits[$1], $0) }.prefix(settings.topK)
      kept = likeliest.sorted()
    }
    return kept
  }
}
