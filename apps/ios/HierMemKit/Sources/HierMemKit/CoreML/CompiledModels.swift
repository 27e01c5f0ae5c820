#if canImport(CoreML)
  import CoreML
  import Foundation

  /// Models as Core ML runs them, compiled from the packages of an exported folder once per install.
  public struct CompiledModels: Sendable {
    /// Where compiled models are kept, for example in Application Support.
    public let cache: URL

    public init(cache: URL) {
      self.cache = cache
    }

    /// The compiled model of a package: one that lies beside it (`xcrun coremlcompiler`), one that was
    /// compiled before, or a new one, which takes a while.
    ///
    /// - Parameter digest: of the whole package: an update of the app may bring another program with the
    ///   same weights.
    /// - Throws: ``HierMemError`` of kind `model` where it can't be compiled.
    public func url(for package: URL, digest: String) async throws -> URL {
      let files = FileManager.default
      let name = package.deletingPathExtension().lastPathComponent
      let beside = package.deletingPathExtension().appendingPathExtension("mlmodelc")
      if files.fileExists(atPath: beside.path) { return beside }
      let kept = cache.appendingPathComponent("\(name)-\(digest.prefix(16)).mlmodelc", isDirectory: true)
      if files.fileExists(atPath: kept.path) { return kept }
      do {
        let compiled = try await MLModel.compileModel(at: package)
        try files.createDirectory(at: cache, withIntermediateDirectories: true)
        for old in try files.contentsOfDirectory(atPath: cache.path) where old.hasPrefix("\(name)-") {
          try files.removeItem(at: cache.appendingPathComponent(old))
        }
        try files.moveItem(at: compiled, to: kept)
        try keepOutOfBackups(cache)
      } catch {
        if files.fileExists(atPath: kept.path) { return kept }  // another call was faster
        throw HierMemError(
          .model, "\(package.path) cannot be compiled: \(error.localizedDescription)",
          hint: "Copy the exported folder again; the app needs iOS 18 or macOS 15.")
      }
      return kept
    }
  }

  /// A model that nobody else has yet, on its way to the actor that will.
  struct LoadedModel: @unchecked Sendable {
    let model: MLModel
  }

  func loadModel(_ package: URL, function: String? = nil, units: MLComputeUnits) async throws -> LoadedModel {
    let configuration = MLModelConfiguration()
    configuration.computeUnits = units
    configuration.functionName = function
    do {
      return LoadedModel(model: try await MLModel.load(contentsOf: package, configuration: configuration))
    } catch {
      let function = function.map { " (function \($0))" } ?? ""
      throw HierMemError(
        .model, "\(package.path)\(function) cannot be loaded: \(error.localizedDescription)",
        hint: "Export the model again; the device needs iOS 18 or macOS 15.")
    }
  }

  extension CompiledModels {
    /// The units that worked on this device for a package when these were asked for, if it was tried.
    func units(for digest: String, asked: MLComputeUnits) -> MLComputeUnits? {
      guard let text = try? String(contentsOf: note(digest, asked), encoding: .utf8), let raw = Int(text) else {
        return nil
      }
      return MLComputeUnits(rawValue: raw)
    }

    func keep(_ units: MLComputeUnits, for digest: String, asked: MLComputeUnits) {
      try? FileManager.default.createDirectory(at: cache, withIntermediateDirectories: true)
      try? "\(units.rawValue)".write(to: note(digest, asked), atomically: true, encoding: .utf8)
    }

    private func note(_ digest: String, _ asked: MLComputeUnits) -> URL {
      cache.appendingPathComponent("units-\(digest.prefix(16))-\(asked.rawValue)")
    }
  }

  extension CoreMLAnchor {
    /// Loads the anchor with the first of `units` with which it loads and computes a token; the CPU is
    /// always tried last. What worked is kept, and is what the next start with the same `units` begins with.
    static func load(
      _ manifest: ExportManifest, package: URL, units: MLComputeUnits, compiled: CompiledModels
    ) async throws -> CoreMLAnchor {
      let digest = manifest.digest(ofPackage: manifest.anchor.package)
      var choices = [compiled.units(for: digest, asked: units) ?? units]
      if choices[0] != .cpuOnly { choices.append(.cpuOnly) }
      for (index, choice) in choices.enumerated() {
        do {
          let anchor = try await CoreMLAnchor(manifest, package: package, units: choice)
          _ = try await anchor.logits(after: [0], at: 0)
          compiled.keep(choice, for: digest, asked: units)
          return anchor
        } catch where index + 1 < choices.count {
          continue
        }
      }
      throw HierMemError(.model, "\(package.path) cannot be run", hint: "Export the model again.")
    }
  }

  extension ChatModel {
    /// Loads what an exported folder has, ready for a ``ChatSession``. Call it off the main actor: it takes
    /// seconds, and at the first start after an install minutes.
    ///
    /// - Parameters:
    ///   - budget: bytes of blocks that are kept in memory.
    ///   - compiled: where compiled models are kept.
    ///   - units: where Core ML may compute the anchor. Where it fails there, the CPU does; what worked is
    ///     kept for the next start. Core AI chooses by itself.
    /// - Throws: ``HierMemError`` where something is missing or does not fit.
    public static func load(
      _ folder: ModelFolder, compiled: CompiledModels, units: MLComputeUnits = .cpuAndGPU, budget: Int = 128 << 20
    ) async throws -> ChatModel {
      let manifest = folder.manifest
      guard let format = manifest.chat else {
        throw HierMemError(
          .model, "this model's chat template is more than marks between messages",
          hint: "Make a ChatModel of your own with a ChatFormat that fits.")
      }
      var retrieverTokenizer: JSONTokenizer?
      if let retriever = manifest.retriever {
        retrieverTokenizer = try JSONTokenizer(contentsOf: folder.url.appendingPathComponent(retriever.tokenizer))
      }
      let (anchor, embedder) = try await models(folder, compiled, units, retrieverTokenizer)
      var router: MemoryRouter?
      if let bank = folder.bank, let embedder {
        router = MemoryRouter(tree: bank.tree, embedder: embedder, policy: bank.policy, sources: bank.sources)
      }
      return ChatModel(
        anchor: anchor, tokenizer: folder.tokenizer, format: format, eos: Set(manifest.eos), router: router,
        blocks: folder.bank.map { BlockCache(bank: $0, budget: budget) })
    }

    /// By what the folder holds, and what the system offers.
    private static func models(
      _ folder: ModelFolder, _ compiled: CompiledModels, _ units: MLComputeUnits, _ tokenizer: JSONTokenizer?
    ) async throws -> (any LanguageAnchor, (any TextEmbedder)?) {
      let manifest = folder.manifest
      guard manifest.runtime == .coreML else { return try await coreAIModels(folder, tokenizer) }
      func package(_ name: String) async throws -> URL {
        try await compiled.url(
          for: folder.url.appendingPathComponent(name), digest: manifest.digest(ofPackage: name))
      }
      let anchor = try await CoreMLAnchor.load(
        manifest, package: try await package(manifest.anchor.package), units: units, compiled: compiled)
      guard let retriever = manifest.retriever, let tokenizer else { return (anchor, nil) }
      let embedder = try await CoreMLEmbedder(
        retriever, package: try await package(retriever.package), tokenizer: tokenizer)
      return (anchor, embedder)
    }
  }

  private func coreAIModels(_ folder: ModelFolder, _ tokenizer: JSONTokenizer?) async throws
    -> (any LanguageAnchor, (any TextEmbedder)?)
  {
    #if canImport(CoreAI)
      if #available(iOS 27, macOS 27, *) {
        let manifest = folder.manifest
        let anchor = try await CoreAIAnchor(
          manifest, asset: folder.url.appendingPathComponent(manifest.anchor.package))
        guard let retriever = manifest.retriever, let tokenizer else { return (anchor, nil) }
        let embedder = try await CoreAIEmbedder(
          retriever, asset: folder.url.appendingPathComponent(retriever.package), tokenizer: tokenizer)
        return (anchor, embedder)
      }
    #endif
    throw HierMemError(
      .model, "the folder is for Core AI, which this system does not have",
      hint: "Bundle one of `hiermem export coreml` for systems before iOS 27 and macOS 27.")
  }
#endif
