#if os(Linux) || canImport(FoundationModels, _version: 2)
  import FoundationModels
  import HierMemKit

  /// A transcript as ChatSession takes it: instructions, what was said, and the question.
  @available(iOS 27, macOS 27, visionOS 27, *)
  struct AskedConversation: Equatable, Sendable {
    var instructions = ""
    /// The user's and the assistant's messages in turn.
    private(set) var history: [ChatMessage] = []
    let question: String

    /// Reasoning is left out, as the model has shown it to nobody.
    ///
    /// - Throws: `LanguageModelError.unsupportedTranscriptContent` for tools and images, ``HierMemError`` of kind
    ///   `usage` where the transcript does not end with a prompt.
    init(_ transcript: Transcript) throws {
      var messages: [ChatMessage] = []
      for entry in transcript {
        switch entry {
        case .instructions(let given):
          instructions = joined([instructions, try Self.text(given.segments, of: entry)])
        case .prompt(let prompt):
          messages.append(ChatMessage(.user, try Self.text(prompt.segments, of: entry)))
        case .response(let response):
          messages.append(ChatMessage(.assistant, try Self.text(response.segments, of: entry)))
        case .reasoning:
          continue
        default:
          throw Self.unsupported(entry, "It has no tools.")
        }
        messages = Self.merged(messages)
      }
      guard let last = messages.popLast(), last.role == .user else {
        throw HierMemError(.usage, "the transcript does not end with a prompt")
      }
      history = messages
      question = last.content
    }

    /// Two messages of one speaker become one: a chat template has no place for the second. A prompt that failed
    /// leaves such a pair.
    private static func merged(_ messages: [ChatMessage]) -> [ChatMessage] {
      let pair = messages.suffix(2)
      guard pair.count == 2, let role = pair.first?.role, role == pair.last?.role else { return messages }
      return messages.dropLast(2) + [ChatMessage(role, joined(pair.map(\.content)))]
    }

    private static func text(_ segments: [Transcript.Segment], of entry: Transcript.Entry) throws -> String {
      try segments.map { segment in
        switch segment {
        case .text(let text): return text.content
        case .structure(let structure): return structure.content.jsonString
        default: throw unsupported(entry, "It takes text alone.")
        }
      }.joined(separator: "\n")
    }

    private static func unsupported(_ entry: Transcript.Entry, _ why: String) -> LanguageModelError {
      .unsupportedTranscriptContent(
        .init(unsupportedContent: [entry], debugDescription: "A HierMem model cannot take this entry. \(why)"))
    }
  }

  @available(iOS 27, macOS 27, visionOS 27, *)
  extension ChatOptions {
    /// These options as far as a request says nothing else. One that names no seed gets one by chance.
    func following(_ wishes: GenerationOptions, instructions: String) -> ChatOptions {
      var options = self
      options.system = joined([system, instructions])
      if let most = wishes.maximumResponseTokens { options.maxTokens = most }
      if let temperature = wishes.temperature { options.sampling.temperature = temperature }
      options.seed = .random(in: .min ... .max)
      switch wishes.samplingMode?.kind {
      case .greedy:
        options.sampling.temperature = 0
      case .randomTopK(let count, let seed):
        options.draw(topP: 1, topK: count, seed: seed, temperature: wishes.temperature)
      case .randomProbabilityThreshold(let share, let seed):
        options.draw(topP: share, topK: 0, seed: seed, temperature: wishes.temperature)
      default:
        break
      }
      return options
    }

    /// Whoever asks for chance gets it, also from a model that otherwise takes the likeliest token.
    private mutating func draw(topP: Double, topK: Int, seed: UInt64?, temperature: Double?) {
      let usual = sampling.temperature == 0 ? 1 : sampling.temperature
      sampling = .init(temperature: temperature ?? usual, topP: topP, topK: topK)
      if let seed { self.seed = seed }
    }
  }

  private func joined(_ texts: [String]) -> String {
    texts.filter { !$0.isEmpty }.joined(separator: "\n\n")
  }
#endif
