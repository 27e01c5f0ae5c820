import HierMemKit
import SwiftUI

/// What the last question was given, and the documents that its answer comes from.
struct FetchedScreen: View {
  let assistant: Assistant

  var body: some View {
    NavigationStack {
      List {
        if let fetched = assistant.fetched {
          memory(fetched)
          if let passage = fetched.passage { PassageSection(passage: passage) }
          if let documents = fetched.documents { DocumentsSection(documents: documents) }
          PromptSection(fetched: fetched)
        }
      }
      .overlay {
        if assistant.fetched == nil {
          ContentUnavailableView(
            "Nothing was fetched yet", systemImage: "square.stack.3d.up",
            description: Text("Ask something, and come back."))
        }
      }
      .navigationTitle("Fetched")
    }
  }

  private func memory(_ fetched: Assistant.Fetched) -> some View {
    Section("Memory") {
      ForEach(fetched.nodes) { NodeRow(node: $0) }
      if fetched.isFar {
        Text("Nothing in the bank is like this question: it had no memory.")
      } else if fetched.nodes.isEmpty {
        Text("The question had no memory.")
      }
      if fetched.stayed { Text("It stayed on the topic of the questions before it.") }
    }
  }
}

private struct NodeRow: View {
  let node: Assistant.Node

  var body: some View {
    LabeledContent {
      if node.byteCount == 0 {
        Text("No block")
      } else if node.isHere {
        Text(verbatim: node.byteCount.formatted(.byteCount(style: .file)))
      } else {
        Text("Not downloaded")
      }
    } label: {
      Text(verbatim: node.label)
      Text(verbatim: node.path.description).font(.caption)
    }
    .accessibilityElement(children: .combine)
  }
}

/// The passage that stood in the prompt, where the memory is retrieval.
private struct PassageSection: View {
  let passage: SourceWindow

  var body: some View {
    Section("In the prompt") {
      VStack(alignment: .leading, spacing: 4) {
        Text(verbatim: passage.title.isEmpty ? passage.document : passage.title).font(.headline)
        Text(verbatim: passage.text).textSelection(.enabled)
      }
      .accessibilityElement(children: .combine)
    }
  }
}

private struct DocumentsSection: View {
  let documents: [SourceSentence]

  var body: some View {
    Section("Documents") {
      ForEach(documents.indices, id: \.self) { index in
        VStack(alignment: .leading, spacing: 4) {
          Text(verbatim: documents[index].sentence).textSelection(.enabled)
          Text(verbatim: documents[index].name).font(.caption).foregroundStyle(.secondary)
        }
        .accessibilityElement(children: .ignore)
        .accessibilityLabel(Text(verbatim: documents[index].sentence))
        .accessibilityValue("from \(documents[index].name)")
      }
      if documents.isEmpty { Text("No document that was learnt says this answer.") }
    }
  }
}

private struct PromptSection: View {
  let fetched: Assistant.Fetched

  var body: some View {
    Section("Prompt") {
      LabeledContent("Tokens in all", value: fetched.promptTokens.formatted())
      LabeledContent("Known from before", value: fetched.cachedTokens.formatted())
    }
  }
}
