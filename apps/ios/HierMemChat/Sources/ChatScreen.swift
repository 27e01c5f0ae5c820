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
        if let fetched = assistant.fetched { TopicChips(fetched: fetched) }
        messages
        MemoryMeter(used: assistant.blockBytes, budget: assistant.budget)
        input
      }
      .padding(.horizontal)
      .navigationTitle(Text(verbatim: "HierMemChat"))
      #if os(iOS)
        .navigationBarTitleDisplayMode(.inline)
      #endif
      .toolbar {
        Button("New conversation", systemImage: "square.and.pencil") { Task { await assistant.reset() } }
          .disabled(assistant.isAnswering)
          .keyboardShortcut("n")
      }
      .onChange(of: assistant.isAnswering) { _, isAnswering in
        guard !isAnswering, let line = assistant.lines.last, line.role == .assistant else { return }
        AccessibilityNotification.Announcement(line.text).post()
      }
    }
  }

  private var messages: some View {
    ScrollView {
      LazyVStack(spacing: 12) {
        ForEach(assistant.lines) { line in
          LineBubble(line: line)
            .frame(maxWidth: .infinity, alignment: line.role == .user ? .trailing : .leading)
        }
      }
    }
    .defaultScrollAnchor(.bottom)
  }

  private var input: some View {
    HStack {
      TextField("Ask something", text: $draft, axis: .vertical)
        .textFieldStyle(.roundedBorder)
        .onSubmit(send)
        .task(id: draft) {
          // Blocks are read while one types; a pause tells that the question may be whole.
          guard (try? await Task.sleep(for: .milliseconds(400))) != nil else { return }
          await assistant.prepare(for: draft)
        }
      if assistant.isAnswering {
        Button("Stop", systemImage: "stop.circle.fill") { assistant.stop() }
      } else {
        Button("Send", systemImage: "arrow.up.circle.fill", action: send).disabled(isEmpty)
      }
    }
    .labelStyle(.iconOnly)
    .font(.title2)
    .padding(.bottom, 8)
  }

  private var isEmpty: Bool { draft.trimmingCharacters(in: .whitespacesAndNewlines).isEmpty }

  private func send() {
    guard !isEmpty, !assistant.isAnswering else { return }
    assistant.send(draft)
    draft = ""
  }
}

private struct LineBubble: View {
  let line: Assistant.Line

  var body: some View {
    VStack(alignment: .leading, spacing: 4) {
      Text(verbatim: line.text.isEmpty ? "…" : line.text)
      if let source = line.source {
        Text("from \(source)").font(.caption).foregroundStyle(.secondary)
      }
    }
    .padding(10)
    .background(line.role == .user ? Color.accentColor.opacity(0.15) : Color.secondary.opacity(0.1))
    .clipShape(.rect(cornerRadius: 12))
    .textSelection(.enabled)
    .accessibilityElement(children: .ignore)
    .accessibilityLabel(line.role == .user ? Text("You asked") : Text("The model answered"))
    .accessibilityValue(spoken)
  }

  private var spoken: Text {
    guard let source = line.source else { return Text(verbatim: line.text) }
    return Text("\(line.text), from \(source)")
  }
}

/// The nodes of the current path, the widest topic first.
private struct TopicChips: View {
  let fetched: Assistant.Fetched

  var body: some View {
    ScrollView(.horizontal, showsIndicators: false) {
      HStack {
        ForEach(fetched.nodes) { node in
          Label {
            Text(verbatim: node.label)
          } icon: {
            Image(systemName: node.isHere ? "square.stack.3d.up" : "icloud.slash")
          }
          .padding(.horizontal, 10)
          .padding(.vertical, 5)
          .background(.quaternary, in: .capsule)
          .foregroundStyle(node.isHere ? .primary : .secondary)
          .accessibilityElement(children: .ignore)
          .accessibilityLabel("Topic \(node.label)")
          .accessibilityValue(node.isHere ? Text("fetched") : Text("Not downloaded"))
        }
        if fetched.stayed { Text("kept from before").foregroundStyle(.secondary) }
        if fetched.isFar { Text("nothing like it in the bank: no memory").foregroundStyle(.secondary) }
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
        Text(verbatim: size(used))
      }
      .gaugeStyle(.accessoryLinearCapacity)
      .accessibilityElement(children: .ignore)
      .accessibilityLabel("Memory blocks")
      .accessibilityValue("\(size(used)) of \(size(budget))")
      #if os(iOS)
        Text("\(size(os_proc_available_memory())) free").foregroundStyle(.secondary)
      #endif
    }
    .font(.caption2)
  }

  private func size(_ bytes: Int) -> String { bytes.formatted(.byteCount(style: .memory)) }
}
