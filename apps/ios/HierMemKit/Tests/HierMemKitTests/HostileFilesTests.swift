import Foundation
import Testing

@testable import HierMemKit

#if canImport(Glibc)
  import Glibc
#endif

/// Changed copies of good files, which tests/torture/swift.py makes: each is read, or refused by a HierMemError.
///
/// One byte is written for each as it is done, so that who watches knows what a process died of.
@Suite(.serialized, .enabled(if: Fixtures.isMade("hostile/cases.json"), "run by `make test-swift`"))
struct HostileFilesTests {
  struct Case: Decodable, CustomTestStringConvertible {
    let name, reader, file: String
    var testDescription: String { name }
  }

  struct Cases: Decodable {
    struct Limits: Decodable {
      let seconds: Double
      /// Bytes beside four times the file.
      let growth: Int
    }

    let cases: [Case]
    let limits: Limits

    static func read() -> Cases? {
      (try? Data(contentsOf: Fixtures.made("hostile/cases.json"))).flatMap {
        try? JSONDecoder().decode(Cases.self, from: $0)
      }
    }
  }

  @Test(arguments: Cases.read()?.cases ?? [])
  func eachIsReadOrRefused(_ one: Case) throws {
    let limits = try #require(Cases.read()).limits
    let folder = Fixtures.temporaryFolder().appendingPathComponent(one.name)
    try FileManager.default.copyItem(at: Fixtures.made("hostile/\(one.name)"), to: folder)
    defer { try? FileManager.default.removeItem(at: folder.deletingLastPathComponent()) }
    let file = folder.appendingPathComponent(one.file)
    let found = Found(Fixtures.made("hostile/\(one.name).found"))
    let inputs = try Inputs(Fixtures.made("hostile/\(one.name).inputs"))
    for (number, input) in inputs.all.dropFirst(found.count).enumerated() {
      try? FileManager.default.removeItem(at: file)  // what is mapped of the one before stays as it is
      try input.write(to: file)
      let (began, peak) = (Usage.seconds, Usage.peak)
      var said: Found.Word
      do {
        try HostileReader(folder: folder).read(one.reader)
        said = .read
      } catch is HierMemError {
        said = .refused
      } catch {
        said = .untyped
      }
      if Usage.seconds - began > limits.seconds { said = .slow }
      if Usage.peak - peak > limits.growth + 4 * input.count { said = .memory }
      found.add(said)
      #expect(said == .read || said == .refused, "input \(number) of \(one.name): \(said)")
    }
  }
}

/// Reads a folder's files as an app does, and all of them.
private struct HostileReader {
  let folder: URL

  func read(_ kind: String) throws {
    switch kind {
    case "bank": try readBank(MemoryBank(folder: folder, downloads: folder.appendingPathComponent("none")))
    case "export":
      let found = try ModelFolder(at: folder, downloads: folder.appendingPathComponent("none"))
      try tokenize(found.tokenizer)
      _ = try found.manifest.chat?.prompt([ChatMessage(.user, "Gold?")])
      _ = found.makeDownloader()
      try found.bank.map(readBank)
      try? found.verify()  // the packages are not there
    case "tokenizer":
      let found = try JSONTokenizer(contentsOf: folder.appendingPathComponent("tokenizer.json"))
      try tokenize(found)
      _ = found.encodeFramed("What is gold?", limit: 8)
    default: throw CocoaError(.featureUnsupported)
    }
  }

  /// All that a chat, and the list of what is there, ask of a bank.
  private func readBank(_ bank: MemoryBank) throws {
    for level in 1...2 {
      for pack in bank.packs(level: level) {
        _ = (pack.missingBytes, pack.label, bank.missingBlocks(within: pack.node).count)
      }
    }
    let vector = [Float](repeating: 0.25, count: bank.tree.dimension)
    var (path, refusal) = (NodePath.root, HierMemError?.none)
    func attempt(_ body: () throws -> Void) throws {
      do { try body() } catch let error as HierMemError { refusal = refusal ?? error }
    }
    var descent: MemoryRoute?
    try attempt { descent = try bank.tree.route(vector, policy: bank.policy) }
    path = descent?.path ?? .root
    try attempt { _ = try fetched(bank, path) }
    try attempt { _ = try bank.read(.generic) }
    for entry in bank.manifest.blocks.values { try attempt { _ = try fetched(bank, entry.path) } }
    if let sources = bank.sources {
      try attempt {
        if let descent {
          path = try bank.tree.route(
            vector, byPassagesOf: sources, policy: bank.policy, descent: descent, asking: "What is gold?",
            with: AllAreRare(vector: vector)).path
        }
      }
      for leaf in [path] + leaves(bank.tree, below: .root) {
        try attempt { _ = try sources.cosines(of: vector, in: leaf) }
        try attempt { for window in try sources.windows(of: leaf) ?? [] { _ = Sentences.of(window.text) } }
      }
    }
    if let refusal { throw refusal }
  }

  private func fetched(_ bank: MemoryBank, _ path: NodePath) throws -> FetchedMemory {
    let config = bank.manifest.memory
    return try FetchedMemory(
      config: config,
      blocks: bank.nodes(on: path).map { (config.firstUnit(level: $0.level), try bank.read($0)) })
  }

  /// No more than a few: a tree may have very many.
  private func leaves(_ tree: ClusterTree, below node: NodePath) -> [NodePath] {
    let children = Array(tree.children(of: node).prefix(4))
    return children.isEmpty ? [node] : children.flatMap { leaves(tree, below: $0) }
  }

  private func tokenize(_ tokenizer: any TextTokenizer) throws {
    for text in ["What is gold? 12 + 30 = 42.", "<|im_end|> Größe\u{301} 日本 \u{10FFFF}\0", ""] {
      for markup in [true, false] { _ = tokenizer.decode(try tokenizer.encode(text, markup: markup)) }
    }
  }
}

/// To which each word is a rare one.
private struct AllAreRare: TextEmbedder {
  let vector: [Float]

  func embed(_ text: String) -> [Float] { vector }
  func rarePieces(_ text: String) -> Set<Int>? { Set(Sentences.words(text).map(\.hashValue)) }
}

/// Inputs one after another, each behind its length in four bytes.
private struct Inputs {
  let all: [Data]

  init(_ url: URL) throws {
    let data = try Data(contentsOf: url)
    var (all, place) = ([Data](), 0)
    while place < data.count {
      let length = data.withUnsafeBytes { UInt32(littleEndian: $0.loadUnaligned(fromByteOffset: place, as: UInt32.self)) }
      all.append(data.subdata(in: place + 4..<place + 4 + Int(length)))
      place += 4 + Int(length)
    }
    self.all = all
  }
}

/// What has become of each input, in a file that outlives the process.
private final class Found {
  enum Word: String {
    case read = "r"
    case refused = "u"
    case untyped = "e"
    case slow = "s"
    case memory = "m"
  }

  let count: Int
  private let file: Int32

  init(_ url: URL) {
    file = open(url.path, O_WRONLY | O_CREAT | O_APPEND, 0o644)
    count = Int(lseek(file, 0, SEEK_END))
  }

  deinit { close(file) }

  func add(_ word: Word) {
    _ = word.rawValue.withCString { write(file, $0, 1) }
  }
}

/// What this process has used.
private enum Usage {
  static var seconds: Double { Double(clock()) / Double(CLOCKS_PER_SEC) }

  /// Bytes that were resident at most.
  static var peak: Int {
    var usage = rusage()
    #if os(Linux)
      getrusage(Int32(RUSAGE_SELF.rawValue), &usage)
      return Int(usage.ru_maxrss) << 10
    #else
      getrusage(RUSAGE_SELF, &usage)
      return Int(usage.ru_maxrss)
    #endif
  }
}
