// On Linux the module is the stand-in in Tests/FoundationModelsStandIn, whose channel the tests read; on Apple's
// systems an app reads it through a LanguageModelSession.
#if os(Linux)
  import FoundationModels
  import Testing

  @testable import HierMemFoundationModels
  @testable import HierMemKit

  /// Requests as a `LanguageModelSession` makes them, against the stand-in's declarations.
  struct FoundationModelsTests {
    private let golden: SessionGolden
    private let anchor: TinyAnchor
    private let model: ChatModel

    init() throws {
      golden = try SessionGolden.read()
      let bank = try Fixtures.tinyBank()
      anchor = TinyAnchor(vocabulary: 400, hidden: bank.manifest.memory.hidden, context: golden.context)
      let tokenizer = try JSONTokenizer(contentsOf: Fixtures.url("inputs/digits/tokenizer.json"))
      let router = MemoryRouter(tree: bank.tree, embedder: KnownEmbedder(vectors: golden.vectors))
      model = ChatModel(
        anchor: anchor, tokenizer: tokenizer, format: golden.format, eos: Set(golden.eos), router: router,
        blocks: BlockCache(bank: bank))
    }

    /// What came through the channel for one request.
    private struct Reply {
      var text = ""
      var tokens = 0
      var nodes = ""
      /// Prompt, cached and reply tokens, as they were told last.
      var usage = [0, 0, 0]
    }

    private func ask(
      _ model: HierMemLanguageModel, _ entries: [Transcript.Entry], _ options: GenerationOptions = .init()
    ) async throws -> Reply {
      let executor = try HierMemExecutor(configuration: model.executorConfiguration)
      let channel = LanguageModelExecutorGenerationChannel()
      let request = LanguageModelExecutorGenerationRequest(
        transcript: Transcript(entries: entries), generationOptions: options)
      async let responded: Void = {
        defer { channel.finish() }
        try await executor.respond(to: request, model: model, streamingInto: channel)
      }()
      var reply = Reply()
      for await event in channel {
        switch event.action.kind {
        case .text(let piece, let tokens):
          reply.text += piece
          reply.tokens += tokens
        case .usage(let input, let output):
          reply.usage = [input.totalTokenCount, input.cachedTokenCount, output.totalTokenCount]
        case .metadata(let values):
          reply.nodes = values["hiermem.nodes"] as? String ?? ""
        }
      }
      try await responded
      return reply
    }

    private func prompt(_ text: String) -> Transcript.Entry {
      .prompt(.init(segments: [.text(.init(content: text))]))
    }

    private func response(_ text: String) -> Transcript.Entry {
      .response(.init(segments: [.text(.init(content: text))]))
    }

    private func instructions(_ text: String) -> [Transcript.Entry] {
      text.isEmpty ? [] : [.instructions(.init(segments: [.text(.init(content: text))]))]
    }

    private func options(_ memory: MemoryChoice = .fetched) -> ChatOptions {
      ChatOptions(memory: memory, maxTokens: golden.maxTokens)
    }

    @Test func aSessionGoesAsInPython() async throws {
      let expected = try #require(golden.sessions["fetched"])
      let model = HierMemLanguageModel(model, options: options())
      var transcript = instructions(expected.system)
      for turn in expected.turns {
        await anchor.clearCalls()
        let reply = try await ask(model, transcript + [prompt(turn.text)])
        #expect(Array(reply.text.utf8) == Array(turn.reply.utf8))
        #expect(reply.nodes == turn.blocks.joined(separator: " "))
        #expect(await anchor.calls.first == turn.prefilled)  // the cache is used from request to request
        #expect(reply.usage[0] - reply.usage[1] == turn.prefilled)
        #expect(reply.usage[2] == reply.tokens)
        transcript += [prompt(turn.text), response(turn.reply)]
      }
    }

    @Test func aHistoryFromElsewhereIsRoutedAgain() async throws {
      let expected = try #require(golden.sessions["fetched"])
      let (before, turn) = (expected.turns[0], expected.turns[1])
      let transcript = instructions(expected.system) + [prompt(before.text), response(before.reply)]
      let reply = try await ask(HierMemLanguageModel(model, options: options()), transcript + [prompt(turn.text)])
      #expect(Array(reply.text.utf8) == Array(turn.reply.utf8))
      #expect(reply.nodes == turn.blocks.joined(separator: " "))
    }

    @Test func sessionsOfOneModelWaitForEachOther() async throws {
      let model = HierMemLanguageModel(model, options: options(.none))
      let alone = try await [ask(model, [prompt("Hi")]).text, ask(model, [prompt("Bye")]).text]
      async let one = ask(model, [prompt("Hi")])
      async let other = ask(model, [prompt("Bye")])
      let both = try await [one.text, other.text]
      #expect(both == alone)
      #expect(model.executorConfiguration == model.executorConfiguration)
      #expect(model.executorConfiguration != HierMemLanguageModel(self.model).executorConfiguration)
    }

    @Test func aBrokenOffRequestLeavesTheModelUsable() async throws {
      let model = HierMemLanguageModel(model, options: options(.none))
      let expected = try await ask(model, [prompt("Hi")]).text
      await anchor.hold()
      let task = Task { try await ask(model, [prompt("Bye")]) }
      task.cancel()
      await anchor.release()
      await #expect(throws: CancellationError.self) { try await task.value }
      #expect(try await ask(model, [prompt("Hi")]).text == expected)
    }

    @Test func saysWhatItCannotDo() async throws {
      let model = HierMemLanguageModel(model, options: options(.none))
      for capability in [LanguageModelCapabilities.Capability.toolCalling, .guidedGeneration, .vision, .reasoning] {
        #expect(!model.capabilities.contains(capability))
      }
      let image = Transcript.Entry.prompt(.init(segments: [.attachment(.init())]))
      for entries in [[.toolCalls(.init()), prompt("Hi")], [image]] {
        await #expect(throws: LanguageModelError.self) { try await ask(model, entries) }
      }
      #expect(await hierMemError { _ = try await ask(model, [response("Hi")]) }?.kind == .usage)
      do {
        _ = try await ask(model, [prompt(String(repeating: "neon ", count: 400))])
        Issue.record("took a question that is too long")
      } catch LanguageModelError.contextSizeExceeded(let exceeded) {
        #expect(exceeded.contextSize == golden.context)
        #expect(exceeded.tokenCount > golden.context)
      }
    }

    @Test func readsATranscript() throws {
      let content = try GeneratedContent(json: "{\"n\": 10}")
      let number = Transcript.Segment.structure(.init(source: "Number", content: content))
      let asked = try AskedConversation(
        Transcript(
          entries: instructions("Be brief.") + [
            prompt("Neon?"), .reasoning(.init()), .response(.init(segments: [number])), prompt("It failed."),
          ] + instructions("Be kind.") + [prompt("And argon?")]))
      #expect(asked.instructions == "Be brief.\n\nBe kind.")
      #expect(asked.history == [ChatMessage(.user, "Neon?"), ChatMessage(.assistant, "{\"n\": 10}")])
      #expect(asked.question == "It failed.\n\nAnd argon?")
    }

    @Test func aRequestsOptionsComeFirst() {
      let usual = ChatOptions(
        system: "Say what you know.", maxTokens: 99, sampling: .init(temperature: 0.5, topP: 0.8))
      let plain = usual.following(GenerationOptions(), instructions: "Be brief.")
      #expect(plain.system == "Say what you know.\n\nBe brief.")
      #expect(plain.maxTokens == 99 && plain.sampling == usual.sampling)
      let greedy = usual.following(.init(samplingMode: .greedy, maximumResponseTokens: 5), instructions: "")
      #expect(greedy.maxTokens == 5 && greedy.sampling.temperature == 0)
      let some = ChatOptions().following(.init(samplingMode: .random(top: 7, seed: 3)), instructions: "")
      #expect(some.sampling == .init(temperature: 1, topP: 1, topK: 7) && some.seed == 3)
      let likely = usual.following(
        .init(samplingMode: .random(probabilityThreshold: 0.9, seed: 4), temperature: 0.2), instructions: "")
      #expect(likely.sampling == .init(temperature: 0.2, topP: 0.9) && likely.seed == 4)
    }
  }
#endif
