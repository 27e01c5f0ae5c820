import Foundation

/// Size and digest of a file.
public struct ManifestFile: Decodable, Hashable, Sendable {
  public let bytes: Int
  public let sha256: String

  public init(bytes: Int, sha256: String) {
    self.bytes = bytes
    self.sha256 = sha256
  }
}

extension ManifestFile {
  enum CodingKeys: CodingKey {
    case bytes, sha256
  }

  /// Sizes are added up: no file is negative, or larger than a thousand billion bytes.
  public init(from decoder: any Decoder) throws {
    let values = try decoder.container(keyedBy: CodingKeys.self)
    bytes = try values.decode(Int.self, forKey: .bytes)
    sha256 = try values.decode(String.self, forKey: .sha256)
    guard (0...1 << 40).contains(bytes) else {
      throw DecodingError.dataCorruptedError(
        forKey: .bytes, in: values, debugDescription: "a file of \(bytes) bytes is not possible")
    }
  }
}

/// One row of the block table.
public struct BlockEntry: Sendable {
  public let path: NodePath
  public let file: ManifestFile
  /// What the block is about, in a few words; may be empty.
  public let label: String
}

/// The two files of a bank's sources.
public struct SourcesEntry: Decodable, Sendable {
  public let windows: Int
  public let documents: Int
  public let texts: ManifestFile
  public let index: ManifestFile
}

/// bank.json: which anchor, which memory design, which blocks. Format version 1.
public struct BankManifest: Sendable {
  public static let format = "mlx-hiermem-bank"
  public static let version = 1

  public let anchorName: String
  public let memory: MemoryConfig
  public let embedder: EmbedderIdentity
  public let tree: ManifestFile
  public let generic: ManifestFile?
  public let sources: SourcesEntry?
  public let blocks: [NodePath: BlockEntry]
  /// Labels of nodes that have no block of their own.
  public let labels: [NodePath: String]
  public let licence: String

  /// Reads bank.json.
  ///
  /// - Throws: ``HierMemError`` of kind `bank` where it is missing, damaged or of another version.
  public init(contentsOf file: URL) throws {
    self = try readJSON(file, as: BankManifest.self, kind: .bank)
  }

  public func label(of node: NodePath) -> String {
    blocks[node]?.label ?? labels[node] ?? ""
  }
}

/// The sentence embedder that a bank's tree was built with.
public struct EmbedderIdentity: Decodable, Equatable, Sendable {
  public let name: String
  public let digest: String
  public let maxTokens: Int

  enum CodingKeys: String, CodingKey {
    case name, digest
    case maxTokens = "max_tokens"
  }
}

extension BankManifest: Decodable {
  enum CodingKeys: String, CodingKey {
    case format, version, anchor, memory, embedder, tree, generic, sources, blocks, labels, licence
  }

  private struct Anchor: Decodable {
    let name: String
  }

  private struct Row: Decodable {
    let path: String
    let file: ManifestFile
    let label: String?

    enum CodingKeys: CodingKey {
      case path, label
    }

    init(from decoder: any Decoder) throws {
      let values = try decoder.container(keyedBy: CodingKeys.self)
      path = try values.decode(String.self, forKey: .path)
      label = try values.decodeIfPresent(String.self, forKey: .label)
      file = try ManifestFile(from: decoder)
    }
  }

  public init(from decoder: any Decoder) throws {
    let values = try decoder.container(keyedBy: CodingKeys.self)
    try checkFormat(
      try values.decode(String.self, forKey: .format), Self.format,
      version: try values.decode(Int.self, forKey: .version), Self.version, kind: .bank)
    anchorName = try values.decode(Anchor.self, forKey: .anchor).name
    memory = try values.decode(MemoryConfig.self, forKey: .memory)
    embedder = try values.decode(EmbedderIdentity.self, forKey: .embedder)
    tree = try values.decode(ManifestFile.self, forKey: .tree)
    generic = try values.decodeIfPresent(ManifestFile.self, forKey: .generic)
    sources = try values.decodeIfPresent(SourcesEntry.self, forKey: .sources)
    licence = try values.decodeIfPresent(String.self, forKey: .licence) ?? ""
    var blocks: [NodePath: BlockEntry] = [:]
    for row in try values.decode([Row].self, forKey: .blocks) {
      let path = try NodePath(parsing: row.path)
      guard path.level <= memory.depth else {
        throw HierMemError(.bank, "the block \(path) is below the tree's \(memory.depth) levels")
      }
      blocks[path] = BlockEntry(path: path, file: row.file, label: row.label ?? "")
    }
    self.blocks = blocks
    var labels: [NodePath: String] = [:]
    for (path, label) in try values.decodeIfPresent([String: String].self, forKey: .labels) ?? [:] {
      labels[try NodePath(parsing: path)] = label
    }
    self.labels = labels
  }
}
