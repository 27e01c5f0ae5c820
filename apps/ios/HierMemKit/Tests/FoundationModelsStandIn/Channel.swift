import Foundation

public struct LanguageModelExecutorGenerationRequest: Sendable {
  public var id: UUID
  public var transcript: Transcript
  public var generationOptions: GenerationOptions

  public init(id: UUID = UUID(), transcript: Transcript, generationOptions: GenerationOptions) {
    self.id = id
    self.transcript = transcript
    self.generationOptions = generationOptions
  }
}

/// What an executor sends. Here it waits for nobody; Apple's lets the sender wait for the reader.
public struct LanguageModelExecutorGenerationChannel: Sendable, AsyncSequence {
  public struct Usage: Sendable {
    public struct Input: Sendable {
      public var totalTokenCount: Int
      public var cachedTokenCount: Int

      public init(totalTokenCount: Int, cachedTokenCount: Int) {
        self.totalTokenCount = totalTokenCount
        self.cachedTokenCount = cachedTokenCount
      }
    }

    public struct Output: Sendable {
      public var totalTokenCount: Int
      public var reasoningTokenCount: Int

      public init(totalTokenCount: Int, reasoningTokenCount: Int) {
        self.totalTokenCount = totalTokenCount
        self.reasoningTokenCount = reasoningTokenCount
      }
    }
  }

  public struct Response: Sendable {
    /// Apple's tells nothing of itself; what this one has is for the tests.
    public struct Action: Sendable {
      public enum Kind: Sendable {
        case text(String, tokenCount: Int)
        case usage(Usage.Input, Usage.Output)
        case metadata([String: any ConvertibleToGeneratedContent])
      }

      public let kind: Kind

      public static func appendText(_ text: String, segmentID: String? = nil, tokenCount: Int) -> Action {
        Action(kind: .text(text, tokenCount: tokenCount))
      }

      public static func updateUsage(input: Usage.Input, output: Usage.Output) -> Action {
        Action(kind: .usage(input, output))
      }

      public static func updateMetadata(_ values: [String: any ConvertibleToGeneratedContent]) -> Action {
        Action(kind: .metadata(values))
      }
    }
  }

  public struct Event: Sendable {
    public let action: Response.Action

    public static func response(entryID: String? = nil, action: Response.Action) -> Event {
      Event(action: action)
    }
  }

  private let events: AsyncStream<Event>
  private let continuation: AsyncStream<Event>.Continuation

  public init() {
    (events, continuation) = AsyncStream.makeStream()
  }

  public func send(_ event: Event) async { continuation.yield(event) }

  /// For the tests: the request has ended.
  public func finish() { continuation.finish() }

  public func makeAsyncIterator() -> AsyncStream<Event>.AsyncIterator { events.makeAsyncIterator() }
}
