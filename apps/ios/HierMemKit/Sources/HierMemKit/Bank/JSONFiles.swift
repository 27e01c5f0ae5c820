import Foundation

/// Decodes a JSON file; whatever is wrong with it becomes a ``HierMemError`` that names the file.
func readJSON<Value: Decodable>(_ file: URL, as type: Value.Type, kind: HierMemError.Kind) throws
  -> Value
{
  let data: Data
  do {
    data = try Data(contentsOf: file)
  } catch {
    throw HierMemError(
      kind, "cannot read \(file.lastPathComponent) in \(file.deletingLastPathComponent().path)",
      hint: "Export the model again, or add the whole folder to the app.")
  }
  do {
    return try decodeJSON(type, from: data)
  } catch let error as HierMemError {
    throw HierMemError(kind, "\(file.path): \(error.what)", hint: error.hint)
  } catch let error as DecodingError {
    throw HierMemError(
      kind, "\(file.path) is damaged or incomplete: \(error.summary)", hint: "Export it again.")
  } catch {
    throw HierMemError(kind, "\(file.path) is damaged: \(error.localizedDescription)", hint: "Export it again.")
  }
}

/// Refuses a file of another format, or of a version that this is not.
func checkFormat(
  _ found: String, _ format: String, version: Int, _ known: Int, kind: HierMemError.Kind
) throws {
  guard found == format else {
    throw HierMemError(kind, "the format is '\(found)', not '\(format)'")
  }
  guard version == known else {
    throw HierMemError(
      kind, "format version \(version) is not \(known), which this version reads",
      hint: "Use the HierMemKit that belongs to the exporter.")
  }
}

extension DecodingError {
  /// What is wrong and where, on one line.
  fileprivate var summary: String {
    func place(_ path: [any CodingKey], _ last: String = "") -> String {
      let keys = path.map { $0.intValue.map(String.init) ?? $0.stringValue } + (last.isEmpty ? [] : [last])
      return keys.isEmpty ? "" : " at \(keys.joined(separator: "."))"
    }
    switch self {
    case .keyNotFound(let key, let context):
      return "a value is missing" + place(context.codingPath, key.stringValue)
    case .typeMismatch(let type, let context):
      return "no \(type)" + place(context.codingPath)
    case .valueNotFound(let type, let context):
      return "no \(type)" + place(context.codingPath)
    case .dataCorrupted(let context):
      return context.debugDescription + place(context.codingPath)
    @unknown default:
      return localizedDescription
    }
  }
}
