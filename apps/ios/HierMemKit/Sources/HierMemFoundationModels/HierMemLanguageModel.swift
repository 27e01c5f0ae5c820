// iOS 26 has FoundationModels too, but not yet these protocols. On Linux there is a stand-in.
#if os(Linux) || canImport(FoundationModels, _version: 2)
  import FoundationModels
  import HierMemKit

  /// A HierMem model for Apple's `LanguageModelSession`:
  ///
  ///     let session = LanguageModelSession(model: HierMemLanguageModel(model))
  ///     let reply = try await session.respond(to: "What is the atomic number of neon?")
  ///
  /// The system's own model has a window of 4 096 tokens for all that it is told. What this one knows comes from
  /// its bank and takes no room there. It answers with text: it takes no tools, no schemas and no images.
  ///
  /// Compiled against declarations taken from Apple's documentation; it has not run on a device.
  @available(iOS 27, macOS 27, visionOS 27, *)
  public struct HierMemLanguageModel: LanguageModel {
    public typealias Executor = HierMemExecutor

    /// What all sessions of this model share: one anchor answers one request at a time.
    let conversations: Conversations

    /// - Parameters:
    ///   - model: from `ChatModel.load`. Nobody else may use its anchor.
    ///   - options: what a request does not say itself. The session's instructions stand behind `system`.
    public init(_ model: ChatModel, options: ChatOptions = ChatOptions(history: .all)) {
      conversations = Conversations(model, options)
    }

    /// None of those that the framework asks for. It refuses such requests itself.
    public var capabilities: LanguageModelCapabilities { LanguageModelCapabilities([]) }

    public var executorConfiguration: HierMemExecutor.Configuration {
      HierMemExecutor.Configuration(conversations: conversations)
    }

    /// The sentences that say the last answer, see ``ChatSession/sources()``.
    public func sources() async throws -> [SourceSentence]? {
      try await conversations.sources()
    }
  }

  /// Answers the requests of a session with a HierMem model.
  @available(iOS 27, macOS 27, visionOS 27, *)
  public struct HierMemExecutor: LanguageModelExecutor {
    public typealias Model = HierMemLanguageModel

    /// Equal for copies of one model.
    public struct Configuration: Hashable, Sendable {
      let conversations: Conversations

      public static func == (one: Configuration, other: Configuration) -> Bool {
        one.conversations === other.conversations
      }

      public func hash(into hasher: inout Hasher) {
        hasher.combine(ObjectIdentifier(conversations))
      }
    }

    private let conversations: Conversations

    public init(configuration: Configuration) throws {
      conversations = configuration.conversations
    }

    /// Streams the reply to the transcript's last prompt.
    ///
    /// The response's metadata says which memory was attached: `hiermem.nodes` are the nodes of its blocks,
    /// `hiermem.missing` those of blocks that have not been downloaded.
    public func respond(
      to request: LanguageModelExecutorGenerationRequest, model: HierMemLanguageModel,
      streamingInto channel: LanguageModelExecutorGenerationChannel
    ) async throws {
      let asked = try AskedConversation(request.transcript)
      try await conversations.answer(asked, request.generationOptions) { event in
        switch event {
        case .started(let start):
          await channel.send(.response(action: .updateMetadata(start.metadata)))
          await channel.send(.response(action: .usage(start, replyTokens: 0)))
        case .text(let piece, let tokens):
          await channel.send(.response(action: .appendText(piece, tokenCount: tokens)))
        }
      } finished: { start, replyTokens in
        await channel.send(.response(action: .usage(start, replyTokens: replyTokens)))
      }
    }
  }

  @available(iOS 27, macOS 27, visionOS 27, *)
  extension LanguageModelExecutorGenerationChannel.Response.Action {
    fileprivate static func usage(_ start: ChatStart, replyTokens: Int) -> Self {
      .updateUsage(
        input: .init(totalTokenCount: start.promptTokens, cachedTokenCount: start.cachedTokens),
        output: .init(totalTokenCount: replyTokens, reasoningTokenCount: 0))
    }
  }

  @available(iOS 27, macOS 27, visionOS 27, *)
  extension ChatStart {
    fileprivate var metadata: [String: any ConvertibleToGeneratedContent] {
      func names(_ nodes: [NodePath]) -> String { nodes.map(\.description).joined(separator: " ") }
      return ["hiermem.nodes": names(nodes), "hiermem.missing": names(missing)]
    }
  }
#endif
