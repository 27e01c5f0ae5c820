import Foundation

/// manifest.json of an exported folder, version 1. convert/coreml/package.py describes it.
public struct ExportManifest: Sendable {
  /// What runs the packages of a folder.
  public enum Runtime: String, Sendable {
    case coreML = "mlx-hiermem-coreml"
    case coreAI = "mlx-hiermem-coreai"
  }

  public static let version = 1

  public struct Tensor: Decodable, Sendable {
    public let shape: [Int]
  }

  public struct Anchor: Decodable, Sendable {
    public let package: String
    /// The tokens that each function takes.
    public let functions: [String: Int]
    /// The function that writes the memory states from inputs, where there is one.
    public let loadBlock: String?
    public let context: Int
    /// Ids from here on are padding.
    public let vocabulary: Int
    /// The outputs that make up the logits, in order.
    public let logits: [String]
    /// The states, by name; of Core ML's the package itself tells.
    public let states: [String: Tensor]?

    enum CodingKeys: String, CodingKey {
      case package, functions, context, vocabulary, logits, states
      case loadBlock = "load_block"
    }
  }

  public struct Memory: Decodable, Sendable {
    /// How a model gets its memory.
    public enum Mode: String, Decodable, Sendable {
      /// It is written once, and stays.
      case state
      /// It is given to every call.
      case input
    }

    public let mode: Mode
    public let layers: [Int]
    public let units: Int
    public let hidden: Int
    public let blockSizes: [Int]

    enum CodingKeys: String, CodingKey {
      case mode, layers, units, hidden
      case blockSizes = "block_sizes"
    }
  }

  public struct Retriever: Decodable, Sendable {
    public let package: String
    /// Its tokenizer.json.
    public let tokenizer: String
    /// The token counts that it takes, ascending.
    public let lengths: [Int]
    public let dimension: Int
    /// The function for each length, where it is not one for all.
    public let functions: [String: Int]?

    enum CodingKeys: String, CodingKey {
      case package, tokenizer, lengths, functions
      case dimension = "dim"
    }
  }

  public struct Bank: Decodable, Sendable {
    public struct Remote: Decodable, Sendable {
      /// Of the bank's folder; ends with a slash.
      public let url: URL
    }

    public let folder: String
    public let remote: Remote?
    /// The files that are not bundled.
    public let download: [String: ManifestFile]
  }

  private struct Sampling: Decodable {
    let temperature: Double
    let topP: Double
    let topK: Int
    let maxTokens: Int

    enum CodingKeys: String, CodingKey {
      case temperature
      case topP = "top_p"
      case topK = "top_k"
      case maxTokens = "max_tokens"
    }
  }

  public let runtime: Runtime
  public let name: String
  public let anchor: Anchor
  /// `nil` for an anchor without memories.
  public let memory: Memory?
  public let retriever: Retriever?
  /// The folder with the anchor's tokenizer.json.
  public let tokenizer: String
  /// `nil` where the chat template does more than to put marks between the messages.
  public let chat: ChatFormat?
  /// The tokens that end a reply.
  public let eos: [Int]
  public let sampling: TokenSampler.Settings
  /// The most tokens of a reply.
  public let maxTokens: Int
  public let bank: Bank?
  /// Every bundled file but manifest.json and receipt.json.
  public let files: [String: ManifestFile]
}

extension ExportManifest: Decodable {
  enum CodingKeys: String, CodingKey {
    case format, version, name, anchor, memory, retriever, tokenizer, chat, eos, sampling, bank, files
  }

  public init(from decoder: any Decoder) throws {
    let values = try decoder.container(keyedBy: CodingKeys.self)
    let format = try values.decode(String.self, forKey: .format)
    runtime = Runtime(rawValue: format) ?? .coreML
    try checkFormat(
      format, runtime.rawValue,
      version: try values.decode(Int.self, forKey: .version), Self.version, kind: .model)
    name = try values.decode(String.self, forKey: .name)
    anchor = try values.decode(Anchor.self, forKey: .anchor)
    memory = try values.decodeIfPresent(Memory.self, forKey: .memory)
    retriever = try values.decodeIfPresent(Retriever.self, forKey: .retriever)
    tokenizer = try values.decode(String.self, forKey: .tokenizer)
    chat = try values.decodeIfPresent(ChatFormat.self, forKey: .chat)
    eos = try values.decode([Int].self, forKey: .eos)
    let sampling = try values.decode(Sampling.self, forKey: .sampling)
    self.sampling = TokenSampler.Settings(
      temperature: sampling.temperature, topP: sampling.topP, topK: sampling.topK)
    maxTokens = sampling.maxTokens
    bank = try values.decodeIfPresent(Bank.self, forKey: .bank)
    files = try values.decode([String: ManifestFile].self, forKey: .files)
    try check()
  }

  private func check() throws {
    try checkAnchor()
    try checkNames()
    guard (1...1 << 24).contains(maxTokens) else {
      throw HierMemError(.model, "replies of at most \(maxTokens) tokens are not possible")
    }
    guard (memory == nil) == (bank == nil), (bank == nil) == (retriever == nil) else {
      throw HierMemError(.model, "memory, bank and retriever go together, and one of them is missing")
    }
    guard retriever.map({ !$0.lengths.isEmpty && $0.lengths == $0.lengths.sorted() }) ?? true else {
      throw HierMemError(.model, "the retriever's lengths are not ascending")
    }
    guard retriever.map({ $0.lengths.allSatisfy((1...1 << 16).contains) }) ?? true else {
      throw HierMemError(.model, "the retriever takes texts of \(retriever?.lengths ?? []) tokens")
    }
  }

  /// Arrays are made by these numbers.
  private func checkAnchor() throws {
    let numbers = 1...1 << 24
    guard anchor.functions.values.contains(1), anchor.functions.values.allSatisfy(numbers.contains),
      numbers.contains(anchor.context), numbers.contains(anchor.vocabulary), !anchor.logits.isEmpty
    else {
      throw HierMemError(.model, "the anchor has no function for one token, no context or no logits")
    }
    for (name, state) in anchor.states ?? [:] {
      var left = 1 << 34  // values
      for size in state.shape where size > 0 { left /= size }
      guard !state.shape.isEmpty, state.shape.allSatisfy({ $0 > 0 }), left > 0 else {
        throw HierMemError(.model, "the anchor has a state \(name) of \(state.shape)")
      }
    }
  }

  /// What a manifest names lies in its own folder.
  private func checkNames() throws {
    let names = [anchor.package, tokenizer, retriever?.package, retriever?.tokenizer, bank?.folder].compactMap { $0 }
    for name in names + files.keys where name.hasPrefix("/") || name.split(separator: "/").contains("..") {
      throw HierMemError(.model, "the manifest names \(name), which is not in its folder", hint: "Export it again.")
    }
  }
}

extension ExportManifest {
  /// Changes with any file of a package: its program, its weights, what it declares.
  func digest(ofPackage name: String) -> String {
    let rows = files.filter { $0.key.hasPrefix("\(name)/") }.sorted { $0.key < $1.key }
    return dataDigest(Data(rows.map { "\($0.key) \($0.value.sha256)\n" }.joined().utf8))
  }

  /// - Throws: ``HierMemError`` of kind `model` where the anchor takes no memory of that size.
  func check(_ fetched: FetchedMemory?) throws {
    guard let fetched else { return }
    guard let memory else {
      throw HierMemError(.model, "this anchor was exported without memory", hint: "Export it with its bank.")
    }
    guard fetched.layers == memory.layers.count, fetched.units == memory.units, fetched.hidden == memory.hidden
    else {
      throw HierMemError(
        .model, "the memory is [\(fetched.layers), \(fetched.units), \(fetched.hidden)], the anchor takes "
          + "[\(memory.layers.count), \(memory.units), \(memory.hidden)]",
        hint: "Export the model again with this bank.")
    }
  }
}
