import Testing

@testable import HierMemKit

struct SamplerTests {
  private struct Golden: Decodable {
    let temperature: Double
    let topP: Double
    let topK: Int
    let tokens: [Int]
  }

  @Test func samplesAsPython() throws {
    var logits = Fixtures.uniform(21, 1, 40)[0].map { $0 * 4 }
    logits[7] = logits[3]
    for golden in try Fixtures.decode("samples.json", as: [Golden].self) {
      let settings = TokenSampler.Settings(temperature: golden.temperature, topP: golden.topP, topK: golden.topK)
      var sampler = TokenSampler(settings, seed: 5)
      #expect(golden.tokens.map { _ in sampler.sample(logits) } == golden.tokens, "\(settings)")
    }
  }

  @Test func theLowestOfEquallyLikelyTokensWins() {
    var sampler = TokenSampler(seed: 0)
    #expect(sampler.sample([0, 3, 1, 3]) == 1)
  }

  @Test func copesWithExtremeLogits() {
    var sampler = TokenSampler(.init(temperature: 0.01, topP: 0.5), seed: 1)
    #expect(sampler.sample([-60_000, 60_000, 0]) == 1)
    var any = TokenSampler(.init(temperature: 1, topP: 0.0001), seed: 1)
    #expect(any.sample([1, 1.5, 1.2]) == 1)
    #expect((0..<3).contains(any.sample([.nan, .nan, .nan])))  // an overflow is no reason to crash
  }

  @Test func callsFillUpAndKeepWithinTheContext() {
    func sizes(_ count: Int, at position: Int) -> [Int] {
      CallPlan(count: count, position: position, sizes: [1, 32], context: 100).calls.map(\.size)
    }
    #expect(sizes(1, at: 0) == [1])
    #expect(sizes(2, at: 0) == [32])
    #expect(sizes(32, at: 0) == [32])
    #expect(sizes(33, at: 0) == [32, 1])
    #expect(sizes(40, at: 0) == [32, 32])
    #expect(sizes(40, at: 60) == [32] + [Int](repeating: 1, count: 8))  // a second one would reach to 124
    #expect(sizes(3, at: 97) == [1, 1, 1])
    for count in 1...100 {
      let calls = CallPlan(count: count, position: 100 - count, sizes: [1, 8, 32], context: 100).calls
      #expect(Array(calls.map(\.tokens).joined()) == Array(0..<count))
      #expect(calls.allSatisfy { 100 - count + $0.tokens.lowerBound + $0.size <= 100 })
    }
  }
}
