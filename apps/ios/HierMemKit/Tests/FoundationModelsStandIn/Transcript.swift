import Foundation

public struct Transcript: Sendable, RandomAccessCollection {
  public struct TextSegment: Sendable {
    public var content: String

    public init(id: String = UUID().uuidString, content: String) {
      self.content = content
    }
  }

  public struct StructuredSegment: Sendable {
    public var content: GeneratedContent

    public init(id: String = UUID().uuidString, source: String, content: GeneratedContent) {
      self.content = content
    }
  }

  /// An image, say.
  public struct AttachmentSegment: Sendable {
    public init() {}
  }

  public enum Segment: Sendable {
    case text(TextSegment)
    case structure(StructuredSegment)
    case attachment(AttachmentSegment)
  }

  public struct Instructions: Sendable {
    public var segments: [Segment]

    public init(id: String = UUID().uuidString, segments: [Segment]) {
      self.segments = segments
    }
  }

  public struct Prompt: Sendable {
    public var segments: [Segment]

    public init(id: String = UUID().uuidString, segments: [Segment]) {
      self.segments = segments
    }
  }

  public struct Response: Sendable {
    public var segments: [Segment]

    public init(id: String = UUID().uuidString, segments: [Segment]) {
      self.segments = segments
    }
  }

  public struct Reasoning: Sendable {
    public init() {}
  }

  public struct ToolCalls: Sendable {
    public init() {}
  }

  public struct ToolOutput: Sendable {
    public var segments: [Segment]

    public init(id: String = UUID().uuidString, toolName: String, segments: [Segment]) {
      self.segments = segments
    }
  }

  public enum Entry: Sendable {
    case instructions(Instructions)
    case prompt(Prompt)
    case toolCalls(ToolCalls)
    case toolOutput(ToolOutput)
    case response(Response)
    case reasoning(Reasoning)
  }

  private let entries: [Entry]

  public init(entries: some Sequence<Entry> = []) {
    self.entries = Array(entries)
  }

  public var startIndex: Int { entries.startIndex }
  public var endIndex: Int { entries.endIndex }

  public subscript(index: Int) -> Entry { entries[index] }
}
