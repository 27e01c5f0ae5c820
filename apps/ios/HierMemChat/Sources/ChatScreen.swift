import HierMemKit
import SwiftUI
import os

/// The conversation, the topics that it is on, and how much memory that takes.
struct ChatScreen: View {
  let assistant: Assistant
  @State private var draft = ""

  var body: some View {
    NavigationStack {
      VStack(spacing: 8) {
        TopicChips(chips: assistant.chips, stayed: assistant.stayed, isFar: assistant.isFar)
        messages
        MemoryMeter(used: assistant.blockBytes, budget: assistant.budget)
        input
      }
      .padding(.horizontal)
      .navigationTitle("HierMemChat")
      .navigationBarTitleDisplayMode(.inline)
      .toolbar {
        Button("New", systemImage: "square.and.pencil") { Task { await assistant.reset() } }
          .disabled(assistant.isAnswering)
      }
    }
  }

  private var messages: some View {
    ScrollView {
      LazyVStack(spacing: 12) {
        ForEach(assistant.lines) { line in
          words(of: line)
            .padding(10)
            .background(line.role == .user ? Color.accentColor.opacity(0.15) : Color.secondary.opacity(0.1))
            .clipShape(.rect(cornerRadius: 12))
            .frame(maxWidth: .infinity, alignment: line.role == .user ? .trailing : .leading)
            .textSelection(.enabled)
        }
      }
    }
    .defaultScrollAnchor(.bottom)
  }

  private func words(of line: Assistant.Line) -> some View {
    VStack(alignment: .leading, spacing: 4) {
      Text(line.text.isEmpty ? "…" : line.text)
      if let source = line.source {
        Text("from \(source)").font(.caption).foregroundStyle(.secondary)
      }
    }
  }

  private var input: some View {
    HStack {
      TextField("Ask something", text: $draft, axis: .vertical)
        .textFieldStyle(.roundedBorder)
        .task(id: draft) {
          // Blocks are read while one types; a pause tells that the question may be whole.
          guard (try? await Task.sleep(for: .milliseconds(400))) != nil else { return }
          await assistant.prepare(for: draft)
        }
      if assistant.isAnswering {
        Button("Stop", systemImage: "stop.circle.fill") { assistant.stop() }
      } else {
        Button("Send", systemImage: "arrow.up.circle.fill") {
          assistant.send(draft)
          draft = ""
        }
        .disabled(draft.trimmingCharacters(in: .whitespacesAndNewlines).isEmpty)
      }
    }
    .labelStyle(.iconOnly)
    .font(.title2)
    .padding(.bottom, 8)
  }
}

/// The nodes of the current path, the widest topic first.
private struct TopicChips: View {
  let chips: [Assistant.Chip]
  let stayed: Bool
  let isFar: Bool

  var body: some View {
    ScrollView(.horizontal, showsIndicators: false) {
      HStack {
        ForEach(chips) { chip in
          Label(chip.label, systemImage: chip.isHere ? "square.stack.3d.up" : "icloud.slash")
            .padding(.horizontal, 10)
            .padding(.vertical, 5)
            .background(.quaternary, in: .capsule)
            .foregroundStyle(chip.isHere ? .primary : .secondary)
            .accessibilityHint(chip.isHere ? "" : "Not downloaded")
        }
        if stayed { Text("kept from before").foregroundStyle(.secondary) }
        if isFar { Text("nothing like it in the bank: no memory").foregroundStyle(.secondary) }
      }
      .font(.caption)
    }
  }
}

/// Blocks in memory, and what the system would still give to the app.
private struct MemoryMeter: View {
  let used: Int
  let budget: Int

  var body: some View {
    HStack {
      Gauge(value: Double(min(used, budget)), in: 0...Double(budget)) {
        Text("Memory blocks")
      } currentValueLabel: {
        Text(used.formatted(.byteCount(style: .memory)))
      }
      .gaugeStyle(.accessoryLinearCapacity)
      Text("\(os_proc_available_memory().formatted(.byteCount(style: .memory))) free")
        .foregroundStyle(.secondary)
    }
    .font(.caption2)
  }
}
