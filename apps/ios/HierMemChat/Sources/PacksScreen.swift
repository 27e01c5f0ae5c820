import HierMemKit
import SwiftUI

/// The bank's subtrees: what is on the device, what could be, and what may go.
struct PacksScreen: View {
  let assistant: Assistant

  var body: some View {
    NavigationStack {
      List(assistant.packs) { pack in
        PackRow(pack: pack, received: assistant.received[pack.node], assistant: assistant)
      }
      .overlay {
        if assistant.packs.isEmpty {
          ContentUnavailableView("This model has no bank", systemImage: "books.vertical")
        }
      }
      .navigationTitle("Knowledge")
    }
  }
}

private struct PackRow: View {
  let pack: KnowledgePack
  let received: Int?
  let assistant: Assistant

  var body: some View {
    VStack(alignment: .leading, spacing: 6) {
      Text(pack.label.isEmpty ? pack.node.description : pack.label)
      Text(summary).font(.caption).foregroundStyle(.secondary)
      if let received {
        ProgressView(value: Double(min(received, pack.missingBytes)), total: Double(max(pack.missingBytes, 1)))
      }
      HStack {
        if received != nil {
          Button("Stop") { assistant.cancel(pack) }
        } else if pack.missingBytes > 0 {
          Button("Download \(size(pack.missingBytes))") { assistant.download(pack) }
        }
        if received == nil, pack.downloadedBytes > 0 {
          Button("Remove", role: .destructive) { Task { await assistant.remove(pack) } }
        }
      }
      .buttonStyle(.bordered)
      .controlSize(.small)
    }
  }

  private var summary: String {
    var parts = ["\(size(pack.byteCount)) in all"]
    if pack.bundledBytes > 0 { parts.append("\(size(pack.bundledBytes)) in the app") }
    if pack.downloadedBytes > 0 { parts.append("\(size(pack.downloadedBytes)) downloaded") }
    return parts.joined(separator: ", ")
  }

  private func size(_ bytes: Int) -> String { bytes.formatted(.byteCount(style: .file)) }
}
