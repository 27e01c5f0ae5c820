import Foundation

@testable import HierMemKit

/// An exported folder around the tiny bank; its packages are empty.
struct TinyExport {
  /// How the anchor gets its memory.
  enum Memory: String, CaseIterable {
    case state, input, loadBlock
  }

  let folder = Fixtures.temporaryFolder()
  /// Of the anchor's weights, as the manifest says.
  static let digest = "0123456789abcdef0123456789abcdef"

  init(memory: Memory = .state, context: Int = 320) throws {
    let files = FileManager.default
    for package in ["anchor", "retriever"] {
      try files.createDirectory(
        at: folder.appendingPathComponent("\(package).mlpackage"), withIntermediateDirectories: true)
    }
    for (source, target) in [("bank", "bank"), ("inputs/digits", "tokenizer"), ("inputs/wordpiece", "retriever")] {
      try files.copyItem(at: Fixtures.url(source), to: folder.appendingPathComponent(target))
    }
    let marks = String(decoding: try JSONEncoder().encode(SessionGolden.read().chat.marks), as: UTF8.self)
    let loader = memory == .loadBlock ? #""load_block""# : "null"
    let manifest = """
      {"format": "mlx-hiermem-coreml", "version": 1, "name": "tiny",
       "anchor": {"package": "anchor.mlpackage", "functions": {"decode": 1, "prefill": 8}, "load_block": \(loader),
        "context": \(context), "vocabulary": 400, "logits": ["logits_0", "logits_1"]},
       "memory": {"mode": "\(memory == .input ? "input" : "state")", "layers": [1, 3], "units": 6, "hidden": 32,
        "block_sizes": [4, 2]},
       "retriever": {"package": "retriever.mlpackage", "tokenizer": "retriever/tokenizer.json",
        "lengths": [8, 16, 32], "dim": 16},
       "tokenizer": "tokenizer/", "chat": {"marks": \(marks), "trim": false, "thoughts": ""}, "eos": [2],
       "sampling": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_tokens": 24},
       "bank": {"folder": "bank/", "remote": null, "download": {}},
       "files": {"anchor.mlpackage/Data/com.apple.CoreML/weights/weight.bin": {"bytes": 1, "sha256": "\(Self.digest)"}}}
      """
    try Data(manifest.utf8).write(to: folder.appendingPathComponent("manifest.json"))
  }

  func open() throws -> ModelFolder {
    try ModelFolder(at: folder, downloads: Fixtures.temporaryFolder())
  }

  /// Changes the manifest's text.
  func edit(_ old: String, _ new: String) throws {
    let file = folder.appendingPathComponent("manifest.json")
    let text = try String(contentsOf: file, encoding: .utf8)
    guard text.contains(old) else { throw CocoaError(.formatting) }
    try Data(text.replacingOccurrences(of: old, with: new).utf8).write(to: file)
  }
}
