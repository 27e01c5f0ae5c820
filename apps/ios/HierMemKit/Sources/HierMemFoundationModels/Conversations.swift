#if os(Linux) || canImport(FoundationModels, _version: 2)
  import FoundationModels
  import HierMemKit

  /// The conversations that one HierMem model has with any number of sessions.
  ///
  /// A session sends its whole transcript with each request. There is one ``ChatSession``, which takes that up;
  /// while it is the same conversation, keys and values stay, and nothing is routed again. Requests wait for each
  /// other.
  @available(iOS 27, macOS 27, visionOS 27, *)
  actor Conversations {
    private let model: ChatModel
    private let options: ChatOptions
    private let session: ChatSession
    private var isBusy = false
    private var waiting: [CheckedContinuation<Void, Never>] = []

    init(_ model: ChatModel, _ options: ChatOptions) {
      self.model = model
      self.options = options
      session = ChatSession(model: model, options: options)
    }

    /// Answers a conversation's question. `finished` gets the number of tokens that were sent.
    func answer(
      _ asked: AskedConversation, _ wishes: GenerationOptions, emit: @escaping @Sendable (ChatEvent) async -> Void,
      finished: @Sendable (ChatStart, Int) async -> Void
    ) async throws {
      await enter()
      defer { leave() }
      let options = options.following(wishes, instructions: asked.instructions)
      let sent = Sent()
      do {
        try await session.resume(asked.history, options: options)
        try await session.answer(asked.question) { event in
          await sent.note(event)
          await emit(event)
        }
      } catch let error as HierMemError where error.kind == .context {
        throw LanguageModelError.contextSizeExceeded(
          .init(
            contextSize: model.anchor.context, tokenCount: try promptTokens(asked.question, options),
            debugDescription: error.localizedDescription))
      }
      if let start = await sent.start { await finished(start, await sent.tokens) }
    }

    func sources() async throws -> [SourceSentence]? {
      await enter()
      defer { leave() }
      return try await session.sources()
    }

    /// The tokens of a question without anything before it.
    private func promptTokens(_ question: String, _ options: ChatOptions) throws -> Int {
      let system = options.system.isEmpty ? [] : [ChatMessage(.system, options.system)]
      return try model.tokenizer.encode(model.format.parts(system + [ChatMessage(.user, question)])).count
    }

    private func enter() async {
      if isBusy {
        await withCheckedContinuation { waiting.append($0) }
      } else {
        isBusy = true
      }
    }

    /// Hands over to the one that has waited longest.
    private func leave() {
      if waiting.isEmpty {
        isBusy = false
      } else {
        waiting.removeFirst().resume()
      }
    }
  }

  /// What was sent of a reply.
  private actor Sent {
    private(set) var start: ChatStart?
    private(set) var tokens = 0

    func note(_ event: ChatEvent) {
      switch event {
      case .started(let start): self.start = start
      case .text(_, let tokens): self.tokens += tokens
      }
    }
  }
#endif
