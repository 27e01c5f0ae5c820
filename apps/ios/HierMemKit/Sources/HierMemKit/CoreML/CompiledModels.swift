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
    /// - Parameter digest: of the package's weights, so that an update of the app is noticed.
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
      } catch {
        throw HierMemError(
          .model, "\(package.path) cannot be compiled: \(error.localizedDescription)",
          hint: "Copy the exported folder again; the app needs iOS 18 or macOS 15.")
      }
      return kept
    }
  }

  func loadModel(_ package: URL, _ configuration: MLModelConfiguration) throws -> MLModel {
    do {
      return try MLModel(contentsOf: package, configuration: configuration)
    } catch {
      let function = configuration.functionName.map { " (function \($0))" } ?? ""
      throw HierMemError(
        .model, "\(package.path)\(function) cannot be loaded: \(error.localizedDescription)",
        hint: "Export the model again; the device needs iOS 18 or macOS 15.")
    }
  }

  extension ChatModel {
    /// Loads what an exported folder has, ready for a ``ChatSession``. Call it off the main actor: it takes
    /// seconds, and at the first start after an install minutes.
    ///
    /// - Parameters:
    ///   - budget: bytes of blocks that are kept in memory.
    ///   - compiled: where compiled models are kept.
    /// - Throws: ``HierMemError`` where something is missing or does not fit.
    public static func load(_ folder: ModelFolder, compiled: CompiledModels, budget: Int = 128 << 20)
      async throws -> ChatModel
    {
      let manifest = folder.manifest
      guard let format = manifest.chat else {
        throw HierMemError(
          .model, "this model's chat template is more than marks between messages",
          hint: "Make a ChatModel of your own with a ChatFormat that fits.")
      }
      func package(_ name: String) async throws -> URL {
        let weights = manifest.files["\(name)/Data/com.apple.CoreML/weights/weight.bin"]
        return try await compiled.url(
          for: folder.url.appendingPathComponent(name), digest: weights?.sha256 ?? "none")
      }
      let anchor = try CoreMLAnchor(manifest, package: try await package(manifest.anchor.package))
      var router: Router?
      if let bank = folder.bank, let retriever = manifest.retriever {
        let tokenizer = try JSONTokenizer(contentsOf: folder.url.appendingPathComponent(retriever.tokenizer))
        let embedder = try CoreMLEmbedder(
          retriever, package: try await package(retriever.package), tokenizer: tokenizer)
        router = Router(tree: bank.tree, embedder: embedder, policy: bank.policy)
      }
      return ChatModel(
        anchor: anchor, tokenizer: folder.tokenizer, format: format, eos: Set(manifest.eos), router: router,
        blocks: folder.bank.map { BlockCache(bank: $0, budget: budget) })
    }
  }
#endif
