/// What a conversation needs: an anchor, its text format, and where its memories come from.
public struct ChatModel: Sendable {
  public let anchor: any LanguageAnchor
  public let tokenizer: any TextTokenizer
  public let format: ChatFormat
  /// The tokens that end a reply.
  public let eos: Set<Int>
  /// `nil` for a model without a bank, as are the blocks.
  public let router: MemoryRouter?
  public let blocks: BlockCache?

  public init(
    anchor: any LanguageAnchor, tokenizer: any TextTokenizer, format: ChatFormat, eos: Set<Int>,
    router: MemoryRouter? = nil, blocks: BlockCache? = nil
  ) {
    self.anchor = anchor
    self.tokenizer = tokenizer
    self.format = format
    self.eos = eos
    self.router = router
    self.blocks = blocks
  }
}

/// How a conversation is answered.
public struct ChatOptions: Sendable {
  /// Which memory a turn gets.
  public var memory: MemoryChoice
  /// Stands in front of the conversation; empty for none.
  public var system: String
  /// The most tokens of a reply.
  public var maxTokens: Int
  public var sampling: TokenSampler.Settings
  /// Equal seeds give equal replies, where the temperature is not 0.
  public var seed: UInt64
  /// Nodes that are closed to this conversation beside those of the bank's policy.
  public var blocked: Set<NodePath>
  public var history: ChatHistory

  public init(
    memory: MemoryChoice = .fetched, system: String = "", maxTokens: Int = 256,
    sampling: TokenSampler.Settings = .init(), seed: UInt64 = 0, blocked: Set<NodePath> = [],
    history: ChatHistory = .topic
  ) {
    self.memory = memory
    self.system = system
    self.maxTokens = maxTokens
    self.sampling = sampling
    self.seed = seed
    self.blocked = blocked
    self.history = history
  }
}

/// What of a conversation a question sees that is answered with blocks.
public enum ChatHistory: Sendable {
  /// What was said since its path was taken. Blocks were learnt with questions that stand alone, and answer worse
  /// behind exchanges on other things.
  case topic
  case all
}

/// What happens while a question is answered.
public enum ChatEvent: Sendable {
  /// The memory is attached, and the reply begins.
  case started(ChatStart)
  /// The next piece of the reply, and how many tokens it took.
  case text(String, tokens: Int)
}

/// How a question was routed, and which of its blocks are attached.
public struct ChatStart: Sendable {
  /// `nil` where the memory is not found by routing.
  public let turn: ChatTurn?
  public let nodes: [NodePath]
  /// Blocks of the path that have not been downloaded.
  public let missing: [NodePath]
  /// What stands in the prompt, where the memory is retrieval.
  public let passage: SourceWindow?
  /// All that the model is shown, the template's marks included.
  public let promptTokens: Int
  /// Those of them whose keys and values were still there.
  public let cachedTokens: Int
}
