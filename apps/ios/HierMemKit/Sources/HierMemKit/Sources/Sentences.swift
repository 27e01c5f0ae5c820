import Foundation

/// A text's sentences and words, as mlx_hiermem/sentences.py and source_search.py have them.
enum Sentences {
  /// A sentence ends with its mark, closing quotes and brackets included, before something that can begin one: a
  /// small letter can where the mark follows a word too long for an abbreviation. It also ends with a blank line, and
  /// scripts without spaces end theirs with a mark of their own. `\w` is spelled out, as ICU's is not Python's.
  private static let between: NSRegularExpression = {
    let space = #"[\t\n\x0B\f\r\x1C-\x20\x85\p{Z}]"#
    let pattern = #"(?<=[.!?…])["'”’)\]]*"# + space + #"+(?=["'“‘(\[]*[[\p{L}\p{N}]-[a-z]])"#
      + #"|(?<=[\p{L}\p{Nl}\p{No}]{5}[.!?])"# + space + "+"
      + #"|(?<=[。！？])"#
      + #"|\n"# + space + #"*\n"#
    return try! NSRegularExpression(pattern: pattern)
  }()

  /// The sentences of a text, white space between them dropped and made single within them.
  static func of(_ text: String) -> [String] {
    let whole = text as NSString
    let marks = between.matches(in: text, range: NSRange(location: 0, length: whole.length))
    var found: [String] = []
    var start = 0
    for end in marks.map(\.range.upperBound) + [whole.length] {
      let piece = whole.substring(with: NSRange(location: start, length: end - start))
      let sentence = piece.unicodeScalars.split(whereSeparator: isSpace).map(String.init).joined(separator: " ")
      if !sentence.isEmpty { found.append(sentence) }
      start = end
    }
    return found
  }

  /// The words in small letters, without the endings that number and person give them.
  static func words(_ text: String) -> Set<String> {
    Set(text.unicodeScalars.split { !isWord($0) }.map { withoutEnding(String($0).lowercased()) })
  }

  private static func withoutEnding(_ word: String) -> String {
    let length = word.unicodeScalars.count
    if length >= 5, word.hasSuffix("es") { return String(word.dropLast(2)) }
    if length >= 4, word.hasSuffix("s") { return String(word.dropLast()) }
    return word
  }

  private static func isSpace(_ scalar: Unicode.Scalar) -> Bool {
    scalar.properties.isWhitespace || (0x1C...0x1F).contains(scalar.value)
  }

  private static func isWord(_ scalar: Unicode.Scalar) -> Bool {
    scalar == "_" || isLetter(scalar) || scalar.properties.numericType != nil
  }

  private static func isLetter(_ scalar: Unicode.Scalar) -> Bool {
    switch scalar.properties.generalCategory {
    case .uppercaseLetter, .lowercaseLetter, .titlecaseLetter, .modifierLetter, .otherLetter: true
    default: false
    }
  }

  /// Function words of English, in small letters: they say nothing by themselves.
  static let plain = Set(
    """
    a i
    am an as at be by do go he if in is it me my no of on or so to up us we
    about above after again all also although among and another any are because been before being below between both
    but can could did does down during each either few first for from had has have her him his how however into its
    itself just made many may more most much must near neither never not now off often one only other others our out
    over own same she should since some such than that the their them then there these they this those through too
    two under until upon use used very was were what when where which while who whose why will with within without
    would years yet you your
    """.split(whereSeparator: \.isWhitespace).map(String.init))
}
