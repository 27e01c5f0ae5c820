import Foundation

/// Decodes JSON that somebody else may have written.
///
/// Foundation's decoder looks into a string only when it is asked for it, and ends the process where one that is a
/// key is no string: it has a control character, half a surrogate pair, or bytes that are no UTF-8. So all strings are
/// looked into before.
///
/// - Throws: `DecodingError`, or what the type throws.
func decodeJSON<Value: Decodable>(_ type: Value.Type, from data: Data) throws -> Value {
  guard String(validating: data, as: UTF8.self) != nil, data.withUnsafeBytes({ JSONStrings(bytes: $0).areWhole() })
  else {
    throw DecodingError.dataCorrupted(.init(codingPath: [], debugDescription: "a text in it is none"))
  }
  return try JSONDecoder().decode(type, from: data)
}

/// Looks into the strings of a JSON text, and at nothing else.
private struct JSONStrings {
  let bytes: UnsafeRawBufferPointer

  func areWhole() -> Bool {
    var place = 0
    while place < bytes.count {
      if bytes[place] == UInt8(ascii: "\"") {
        guard let end = end(ofStringFrom: place + 1) else { return false }
        place = end
      }
      place += 1
    }
    return true
  }

  /// Where a string's closing quote is; `nil` where it has none, or something in it is wrong.
  private func end(ofStringFrom start: Int) -> Int? {
    var place = start
    while place < bytes.count {
      switch bytes[place] {
      case UInt8(ascii: "\""): return place
      case ..<0x20: return nil
      case UInt8(ascii: "\\"):
        guard let length = lengthOfEscape(at: place) else { return nil }
        place += length
      default: place += 1
      }
    }
    return nil
  }

  private func lengthOfEscape(at place: Int) -> Int? {
    guard place + 1 < bytes.count else { return nil }
    switch bytes[place + 1] {
    case UInt8(ascii: "u"):
      guard let unit = unit(at: place) else { return nil }
      switch unit {
      case 0xD800...0xDBFF:
        guard let low = self.unit(at: place + 6), (0xDC00...0xDFFF).contains(low) else { return nil }
        return 12
      case 0xDC00...0xDFFF: return nil
      default: return 6
      }
    case let letter: return "\"\\/bfnrt".utf8.contains(letter) ? 2 : nil
    }
  }

  /// The number of an escape `\u0123`.
  private func unit(at place: Int) -> Int? {
    guard place + 6 <= bytes.count, bytes[place] == UInt8(ascii: "\\"), bytes[place + 1] == UInt8(ascii: "u") else {
      return nil
    }
    let digits = bytes[place + 2..<place + 6]
    guard digits.allSatisfy({ Character(Unicode.Scalar($0)).isHexDigit }) else { return nil }
    return Int(String(decoding: digits, as: UTF8.self), radix: 16)
  }
}
