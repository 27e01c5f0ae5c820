import HierMemKit
import SwiftUI

/// A sample over HierMemKit for iPhone, iPad and Mac: chat, what was fetched, knowledge packs. It was parsed and
/// partly type-checked on Linux, and has not run on a device; docs/ios.md says what is not known.
@main struct HierMemChatApp: App {
  @State private var assistant = Assistant()

  var body: some Scene {
    WindowGroup {
      Screens(assistant: assistant)
        .task { await assistant.load { try await TransformersTokenizer(folder: $0) } }
    }
    .backgroundTask(.urlSession(Assistant.downloads)) { [assistant] in
      await assistant.receiveDownloads { try await TransformersTokenizer(folder: $0) }
    }
  }
}

private struct Screens: View {
  let assistant: Assistant

  var body: some View {
    switch assistant.stage {
    case .loading:
      ProgressView("Loading the model. The first time takes a while.").padding()
    case .failed(let why):
      ContentUnavailableView("No model", systemImage: "exclamationmark.triangle", description: Text(verbatim: why))
    case .ready:
      TabView {
        Tab("Chat", systemImage: "bubble.left.and.bubble.right") { ChatScreen(assistant: assistant) }
        Tab("Fetched", systemImage: "square.stack.3d.up") { FetchedScreen(assistant: assistant) }
        Tab("Knowledge", systemImage: "books.vertical") { PacksScreen(assistant: assistant) }
      }
      .tabViewStyle(.sidebarAdaptable)  // tabs on an iPhone, a sidebar on an iPad and a Mac
      .alert("Sorry", isPresented: .constant(assistant.problem != nil)) {
        Button("OK") { assistant.problem = nil }
      } message: {
        Text(verbatim: assistant.problem ?? "")
      }
    }
  }
}
