import Foundation

/// policy.json: which nodes of a bank are closed to everyone who asks, and which texts it has no memory for.
///
/// A blocked node stands for all that is below it. Blocking is no removal: the bytes stay.
public struct BankPolicy: Equatable, Sendable {
  /// What becomes of a text whose nearest child is blocked.
  public enum OnBlocked: String, Decodable, Sendable {
    /// It goes to the nearest child that is open.
    case sibling
    /// Its path ends above.
    case parent
  }

  public let blocked: Set<NodePath>
  public let onBlocked: OnBlocked
  /// How far from the last node of its path a text may be and still be given memory.
  public let reach: Float
  /// The same from the nearest passage, for a bank that is routed by its passages.
  public let passageReach: Float

  /// Blocks nothing.
  public static let open = BankPolicy()

  public init(
    blocked: Set<NodePath> = [], onBlocked: OnBlocked = .sibling, reach: Float = .infinity,
    passageReach: Float = .infinity
  ) {
    self.blocked = blocked
    self.onBlocked = onBlocked
    self.reach = reach
    self.passageReach = passageReach
  }

  /// Whether there are texts for which the bank has no memory.
  public var hasReach: Bool { min(reach, passageReach) < .infinity }

  /// Reads policy.json; no file blocks nothing.
  ///
  /// - Throws: ``HierMemError`` of kind `bank` for a damaged one: what it blocked must not come open.
  public init(contentsOf file: URL) throws {
    guard FileManager.default.fileExists(atPath: file.path) else {
      self = .open
      return
    }
    self = try readJSON(file, as: BankPolicy.self, kind: .bank)
  }

  /// The node that closes this path: itself or the highest blocked node above; `nil` where it is open.
  public func blocker(of path: NodePath) -> NodePath? {
    path.prefixes.first { blocked.contains($0) }
  }

  /// The same policy with more nodes closed. What a blocked node covers is not listed any more.
  public func blocking(_ nodes: some Sequence<NodePath>) -> BankPolicy {
    let wanted = blocked.union(nodes)
    let tops = wanted.filter { node in !node.prefixes.dropLast().contains { wanted.contains($0) } }
    return BankPolicy(blocked: tops, onBlocked: onBlocked, reach: reach, passageReach: passageReach)
  }
}

extension BankPolicy: Decodable {
  enum CodingKeys: String, CodingKey, CaseIterable {
    case blocked
    case onBlocked = "on_blocked"
    case reach
    case passageReach = "passage_reach"
  }

  public init(from decoder: any Decoder) throws {
    let found = Set(try decoder.container(keyedBy: AnyKey.self).allKeys.map(\.stringValue))
    let unknown = found.subtracting(CodingKeys.allCases.map(\.rawValue)).sorted()
    guard unknown.isEmpty else {
      throw HierMemError(.bank, "unknown settings \(unknown.joined(separator: ", "))")
    }
    let values = try decoder.container(keyedBy: CodingKeys.self)
    let nodes = try values.decode([String].self, forKey: .blocked).map(NodePath.init(parsing:))
    blocked = Set(nodes)
    onBlocked = try values.decodeIfPresent(OnBlocked.self, forKey: .onBlocked) ?? .sibling
    reach = try Self.distance(.reach, in: values)
    passageReach = try Self.distance(.passageReach, in: values)
  }

  private static func distance(_ key: CodingKeys, in values: KeyedDecodingContainer<CodingKeys>) throws -> Float {
    let found = try values.decodeIfPresent(Float.self, forKey: key) ?? .infinity
    guard found > 0 else { throw HierMemError(.bank, "\(key.rawValue) is \(found), not more than 0") }
    return found
  }
}
