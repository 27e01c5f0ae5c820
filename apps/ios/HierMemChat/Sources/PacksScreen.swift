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
      VStack(alignment: .leading, spacing: 6) {
        Text(verbatim: name)
        Text(verbatim: summary).font(.caption).foregroundStyle(.secondary)
      }
      .accessibilityElement(children: .combine)
      if let received {
        ProgressView(value: Double(min(received, pack.missingBytes)), total: Double(max(pack.missingBytes, 1)))
          .accessibilityLabel("Download of \(name)")
      }
      buttons
    }
  }

  private var buttons: some View {
    HStack {
      if received != nil {
        Button("Stop") { assistant.cancel(pack) }
          .accessibilityLabel("Stop the download of \(name)")
      } else if pack.missingBytes > 0 {
        Button("Download \(size(pack.missingBytes))") { assistant.download(pack) }
          .accessibilityLabel("Download \(name), \(size(pack.missingBytes))")
      }
      if received == nil, pack.downloadedBytes > 0 {
        Button("Remove", role: .destructive) { Task { await assistant.remove(pack) } }
          .accessibilityLabel("Remove \(name)")
      }
    }
    .buttonStyle(.bordered)
    .controlSize(.small)
  }

  private var name: String { pack.label.isEmpty ? pack.node.description : pack.label }

  private var summary: String {
    var parts = [String(localized: "\(size(pack.byteCount)) in all")]
    if pack.bundledBytes > 0 { parts.append(String(localized: "\(size(pack.bundledBytes)) in the app")) }
    if pack.downloadedBytes > 0 { parts.append(String(localized: "\(size(pack.downloadedBytes)) downloaded")) }
    return parts.joined(separator: ", ")
  }

  private func size(_ bytes: Int) -> String { bytes.formatted(.byteCount(style: .file)) }
}
