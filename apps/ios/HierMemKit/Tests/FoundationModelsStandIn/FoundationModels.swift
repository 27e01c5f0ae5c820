/// The part of Apple's FoundationModels (iOS 27 and macOS 27) that HierMemFoundationModels uses, for Linux.
///
/// The declarations were written from Apple's documentation of the framework and from what WWDC26's session 339
/// shows; nothing here was compiled against the framework. What Apple's session does with a model is not here:
/// the tests make requests and read the channel themselves.
import Foundation

public protocol LanguageModel: Sendable {
  associatedtype Executor: LanguageModelExecutor where Self == Executor.Model

  var capabilities: LanguageModelCapabilities { get }
  var executorConfiguration: Executor.Configuration { get }
}

public protocol LanguageModelExecutor: Sendable {
  associatedtype Configuration: Hashable, Sendable
  associatedtype Model: LanguageModel

  init(configuration: Configuration) throws

  func prewarm(model: Model, transcript: Transcript)

  /// `nonisolated(nonsending)` in Apple's, which this compiler does not know.
  func respond(
    to request: LanguageModelExecutorGenerationRequest, model: Model,
    streamingInto channel: LanguageModelExecutorGenerationChannel
  ) async throws
}

extension LanguageModelExecutor {
  public func prewarm(model: Model, transcript: Transcript) {}
}

public struct LanguageModelCapabilities: Sendable {
  public struct Capability: Hashable, Sendable {
    let name: String

    public static let guidedGeneration = Capability(name: "guidedGeneration")
    public static let reasoning = Capability(name: "reasoning")
    public static let toolCalling = Capability(name: "toolCalling")
    public static let vision = Capability(name: "vision")
  }

  private let capabilities: Set<Capability>

  public init(_ capabilities: [Capability]) {
    self.capabilities = Set(capabilities)
  }

  public func contains(_ capability: Capability) -> Bool { capabilities.contains(capability) }
}

public struct GenerationOptions: Sendable {
  public struct SamplingMode: Sendable {
    public enum Kind: Sendable {
      case greedy
      case randomTopK(Int, seed: UInt64?)
      case randomProbabilityThreshold(Double, seed: UInt64?)
    }

    public let kind: Kind

    public static var greedy: SamplingMode { SamplingMode(kind: .greedy) }

    public static func random(top k: Int, seed: UInt64? = nil) -> SamplingMode {
      SamplingMode(kind: .randomTopK(k, seed: seed))
    }

    public static func random(probabilityThreshold: Double, seed: UInt64? = nil) -> SamplingMode {
      SamplingMode(kind: .randomProbabilityThreshold(probabilityThreshold, seed: seed))
    }
  }

  public var samplingMode: SamplingMode?
  public var temperature: Double?
  public var maximumResponseTokens: Int?

  public init(samplingMode: SamplingMode? = nil, temperature: Double? = nil, maximumResponseTokens: Int? = nil) {
    self.samplingMode = samplingMode
    self.temperature = temperature
    self.maximumResponseTokens = maximumResponseTokens
  }
}

public struct GeneratedContent: Sendable {
  public let jsonString: String

  public init(json: String) throws {
    jsonString = json
  }
}

public protocol ConvertibleToGeneratedContent: Sendable {}

extension String: ConvertibleToGeneratedContent {}

public enum LanguageModelError: Error {
  public struct ContextSizeExceeded: Sendable {
    public var contextSize: Int
    public var tokenCount: Int
    public var debugDescription: String

    public init(contextSize: Int, tokenCount: Int, debugDescription: String) {
      self.contextSize = contextSize
      self.tokenCount = tokenCount
      self.debugDescription = debugDescription
    }
  }

  public struct UnsupportedTranscriptContent: Sendable {
    public var unsupportedContent: [Transcript.Entry]
    public var debugDescription: String

    public init(unsupportedContent: [Transcript.Entry], debugDescription: String) {
      self.unsupportedContent = unsupportedContent
      self.debugDescription = debugDescription
    }
  }

  case contextSizeExceeded(ContextSizeExceeded)
  case unsupportedTranscriptContent(UnsupportedTranscriptContent)
}
