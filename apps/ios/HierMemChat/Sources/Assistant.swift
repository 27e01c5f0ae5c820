import Foundation
import HierMemKit
import Observation

/// What the screens show, and what their buttons do: HierMemKit's objects on the main actor.
///
/// It imports nothing of the user interface, so that `make test-swift` can compile it on Linux.
@MainActor @Observable final class Assistant {
  enum Stage {
    case loading, ready
    case failed(String)
  }

  struct Line: Identifiable {
    let id = UUID()
    let role: ChatMessage.Role
    var text: String
    /// The document that says it, where the bank has its sources.
    var source: String?
  }

  /// One node of the path that the conversation is on.
  struct Node: Identifiable {
    let path: NodePath
    let label: String
    /// Of its block; 0 where it has none.
    let byteCount: Int
    let isHere: Bool

    var id: NodePath { path }
  }

  /// What the last question was given, and where its answer comes from.
  struct Fetched {
    /// The widest topic first.
    var nodes: [Node] = []
    /// Whether the question would have gone elsewhere by itself.
    var stayed = false
    /// Whether it is like nothing in the bank, and had no memory.
    var isFar = false
    /// What stood in the prompt.
    var passage: SourceWindow?
    /// The sentences that say the answer, best first; `nil` where the bank has no sources, or it is not whole yet.
    var documents: [SourceSentence]?
    var promptTokens = 0
    var cachedTokens = 0
  }

  private(set) var stage = Stage.loading
  private(set) var lines: [Line] = []
  /// `nil` before the first question.
  private(set) var fetched: Fetched?
  private(set) var isAnswering = false
  private(set) var packs: [KnowledgePack] = []
  /// Bytes that have come of the packs that are being downloaded.
  private(set) var received: [NodePath: Int] = [:]
  /// Bytes of blocks in memory.
  private(set) var blockBytes = 0
  /// The last error, until it was seen.
  var problem: String?

  /// Bytes of blocks that may stay in memory.
  let budget = 64 << 20

  /// The system's name for this app's downloads.
  nonisolated static let downloads = "org.example.HierMemChat.blocks"

  private var session: ChatSession?
  private var isLoading = false
  private var opening: Task<ModelFolder, any Error>?
  private var bank: MemoryBank?
  private var downloader: BackgroundDownloader?
  private var answer: Task<Void, Never>?
  private var coming: [NodePath: Task<Void, Never>] = [:]
  #if canImport(Darwin)
    private var monitor: MemoryPressureMonitor?
  #endif

  /// Opens the exported folder in the app's bundle. The first time after an install takes minutes.
  ///
  /// - Parameter tokenizer: makes a tokenizer from a folder with tokenizer.json, where HierMemKit has none
  ///   that runs it.
  func load(tokenizer: @escaping @Sendable (URL) async throws -> any TextTokenizer) async {
    guard session == nil, !isLoading else { return }  // another window may have begun
    isLoading = true
    defer { isLoading = false }
    do {
      let folder = try await open(tokenizer)
      let model = try await Self.load(folder, budget: budget)
      let options = ChatOptions(
        memory: folder.bank == nil ? .none : .fetched, maxTokens: folder.manifest.maxTokens,
        sampling: folder.manifest.sampling)
      session = ChatSession(model: model, options: options)
      #if canImport(Darwin)
        monitor = model.blocks.map(MemoryPressureMonitor.init)
      #endif
      stage = .ready
    } catch {
      stage = .failed(error.localizedDescription)
    }
  }

  /// Takes the blocks that came while the app did not run; the system has started it for that.
  func receiveDownloads(tokenizer: @escaping @Sendable (URL) async throws -> any TextTokenizer) async {
    guard (try? await open(tokenizer)) != nil else { return }  // `load` will say why
    await downloader?.receive()
    packs = bank?.packs() ?? []
  }

  /// Opens the folder, once.
  private func open(
    _ tokenizer: @escaping @Sendable (URL) async throws -> any TextTokenizer
  ) async throws -> ModelFolder {
    let task = opening ?? Task { try await Self.open(tokenizer: tokenizer) }
    opening = task
    let folder = try await task.value
    if bank == nil {
      bank = folder.bank
      downloader = folder.makeBackgroundDownloader(identifier: Self.downloads)
      packs = bank?.packs() ?? []
    }
    return folder
  }

  private nonisolated static func open(
    tokenizer: @Sendable (URL) async throws -> any TextTokenizer
  ) async throws -> ModelFolder {
    guard let bundled = Bundle.main.url(forResource: "Model", withExtension: nil) else {
      throw HierMemError(
        .model, "the app was built without a model",
        hint: "Run `hiermem export coreml MODEL apps/ios/HierMemChat/Model`, then generate and build it again.")
    }
    let blocks = try support().appendingPathComponent("blocks", isDirectory: true)
    try FileManager.default.createDirectory(at: blocks, withIntermediateDirectories: true)
    do {
      return try ModelFolder(at: bundled, downloads: blocks)
    } catch let error as HierMemError where error.kind == .tokenizer {
      let other = try await tokenizer(bundled.appendingPathComponent("tokenizer"))
      return try ModelFolder(at: bundled, downloads: blocks, tokenizer: other)
    }
  }

  private nonisolated static func load(_ folder: ModelFolder, budget: Int) async throws -> ChatModel {
    let compiled = CompiledModels(cache: try support().appendingPathComponent("compiled", isDirectory: true))
    return try await ChatModel.load(folder, compiled: compiled, budget: budget)
  }

  private nonisolated static func support() throws -> URL {
    try FileManager.default.url(
      for: .applicationSupportDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
  }

  func send(_ text: String) {
    guard let session, !isAnswering else { return }
    isAnswering = true
    lines += [Line(role: .user, text: text), Line(role: .assistant, text: "")]
    answer = Task {
      let count = await session.messages.count
      do {
        for try await event in session.ask(text) {
          switch event {
          case .started(let start): show(start)
          case .text(let piece, _): lines[lines.count - 1].text += piece
          }
        }
        fetched?.documents = try await session.sources()
        lines[lines.count - 1].source = fetched?.documents?.first?.name
      } catch {
        problem = error.localizedDescription
      }
      await session.settle()
      // What the session keeps is what is shown: a reply that was stopped may have a piece more, or be forgotten.
      let kept = await session.messages
      if kept.count > count { lines[lines.count - 1].text = kept[kept.count - 1].content } else { lines.removeLast(2) }
      await measure()
      isAnswering = false
    }
  }

  /// Breaks the answer off; what was said stays.
  func stop() { answer?.cancel() }

  /// Reads the blocks of a question that is being typed.
  func prepare(for draft: String) async {
    guard !draft.isEmpty, !isAnswering, let session else { return }
    try? await session.prepare(for: draft)  // it is only a guess; an error will show when it is sent
    await measure()
  }

  func reset() async {
    do {
      try await session?.reset()
      (lines, fetched) = ([], nil)
    } catch {
      problem = error.localizedDescription
    }
  }

  func download(_ pack: KnowledgePack) {
    guard let bank, let downloader, coming[pack.node] == nil else { return }
    received[pack.node] = 0
    coming[pack.node] = Task {
      do {
        try await downloader.download(bank.missingBlocks(within: pack.node)) { bytes in
          Task { @MainActor in self.received[pack.node]? = bytes }
        }
      } catch is CancellationError {
        // what has come is kept for the next time
      } catch {
        problem = error.localizedDescription
      }
      (coming[pack.node], received[pack.node]) = (nil, nil)
      packs = bank.packs()
    }
  }

  func cancel(_ pack: KnowledgePack) { coming[pack.node]?.cancel() }

  func remove(_ pack: KnowledgePack) async {
    guard let bank, let session else { return }
    do {
      try bank.removeDownloads(within: pack.node)
    } catch {
      problem = error.localizedDescription
    }
    await session.model.blocks?.forget(within: pack.node)
    packs = bank.packs()
    await measure()
  }

  private func show(_ start: ChatStart) {
    let nodes = (start.turn?.path.prefixes ?? []).map { path in
      let label = bank?.manifest.label(of: path) ?? ""
      return Node(
        path: path, label: label.isEmpty ? path.description : label,
        byteCount: bank?.manifest.blocks[path]?.file.bytes ?? 0, isHere: !start.missing.contains(path))
    }
    fetched = Fetched(
      nodes: nodes, stayed: start.turn?.stayed ?? false, isFar: start.turn?.route.isFar ?? false,
      passage: start.passage, promptTokens: start.promptTokens, cachedTokens: start.cachedTokens)
  }

  private func measure() async {
    blockBytes = await session?.model.blocks?.byteCount ?? 0
  }
}
