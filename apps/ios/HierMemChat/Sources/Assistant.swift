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
  struct Chip: Identifiable {
    let node: NodePath
    let label: String
    let isHere: Bool

    var id: NodePath { node }
  }

  private(set) var stage = Stage.loading
  private(set) var lines: [Line] = []
  private(set) var chips: [Chip] = []
  /// Whether the last question would have gone elsewhere by itself.
  private(set) var stayed = false
  /// Whether the last question is like nothing in the bank, and had no memory.
  private(set) var isFar = false
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

  private var session: ChatSession?
  private var bank: MemoryBank?
  private var downloader: BlockDownloader?
  private var answer: Task<Void, Never>?
  private var downloads: [NodePath: Task<Void, Never>] = [:]
  #if canImport(Darwin)
    private var monitor: MemoryPressureMonitor?
  #endif

  /// Opens the exported folder in the app's bundle. The first time after an install takes minutes.
  ///
  /// - Parameter tokenizer: makes a tokenizer from a folder with tokenizer.json, where HierMemKit has none
  ///   that runs it.
  func load(tokenizer: @escaping @Sendable (URL) async throws -> any TextTokenizer) async {
    guard session == nil else { return }
    do {
      let (folder, model) = try await Self.open(budget: budget, tokenizer: tokenizer)
      let options = ChatOptions(
        memory: folder.bank == nil ? .none : .fetched, maxTokens: folder.manifest.maxTokens,
        sampling: folder.manifest.sampling)
      session = ChatSession(model: model, options: options)
      bank = folder.bank
      downloader = folder.makeDownloader()
      packs = bank?.packs() ?? []
      #if canImport(Darwin)
        monitor = model.blocks.map(MemoryPressureMonitor.init)
      #endif
      stage = .ready
    } catch {
      stage = .failed(error.localizedDescription)
    }
  }

  private nonisolated static func open(
    budget: Int, tokenizer: @Sendable (URL) async throws -> any TextTokenizer
  ) async throws -> (ModelFolder, ChatModel) {
    guard let bundled = Bundle.main.url(forResource: "Model", withExtension: nil) else {
      throw HierMemError(
        .model, "the app was built without a model",
        hint: "Run `hiermem export coreml MODEL apps/ios/HierMemChat/Model`, then generate and build it again.")
    }
    let support = try FileManager.default.url(
      for: .applicationSupportDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
    let blocks = support.appendingPathComponent("blocks", isDirectory: true)
    try FileManager.default.createDirectory(at: blocks, withIntermediateDirectories: true)
    let folder: ModelFolder
    do {
      folder = try ModelFolder(at: bundled, downloads: blocks)
    } catch let error as HierMemError where error.kind == .tokenizer {
      let other = try await tokenizer(bundled.appendingPathComponent("tokenizer"))
      folder = try ModelFolder(at: bundled, downloads: blocks, tokenizer: other)
    }
    let compiled = CompiledModels(cache: support.appendingPathComponent("compiled", isDirectory: true))
    return (folder, try await ChatModel.load(folder, compiled: compiled, budget: budget))
  }

  func send(_ text: String) {
    guard let session, !isAnswering else { return }
    isAnswering = true
    lines += [Line(role: .user, text: text), Line(role: .assistant, text: "")]
    answer = Task {
      do {
        for try await event in session.ask(text) {
          switch event {
          case .started(let start): show(start)
          case .text(let piece): lines[lines.count - 1].text += piece
          }
        }
        lines[lines.count - 1].source = try await session.sources()?.first?.name
      } catch {
        problem = error.localizedDescription
      }
      if lines[lines.count - 1].text.isEmpty { lines.removeLast(2) }  // the session has forgotten it, too
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
      (lines, chips, stayed, isFar) = ([], [], false, false)
    } catch {
      problem = error.localizedDescription
    }
  }

  func download(_ pack: KnowledgePack) {
    guard let bank, let downloader, downloads[pack.node] == nil else { return }
    received[pack.node] = 0
    downloads[pack.node] = Task {
      do {
        try await downloader.download(bank.missingBlocks(within: pack.node)) { bytes in
          Task { @MainActor in self.received[pack.node]? = bytes }
        }
      } catch is CancellationError {
        // what has come is kept for the next time
      } catch {
        problem = error.localizedDescription
      }
      (downloads[pack.node], received[pack.node]) = (nil, nil)
      packs = bank.packs()
    }
  }

  func cancel(_ pack: KnowledgePack) { downloads[pack.node]?.cancel() }

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
    stayed = start.turn?.stayed ?? false
    isFar = start.turn?.route.isFar ?? false
    chips = (start.turn?.path.prefixes ?? []).map { node in
      let label = bank?.manifest.label(of: node) ?? ""
      return Chip(
        node: node, label: label.isEmpty ? node.description : label, isHere: !start.missing.contains(node))
    }
  }

  private func measure() async {
    blockBytes = await session?.model.blocks?.byteCount ?? 0
  }
}
