/// A path's memory, and what getting it took.
public struct MemoryFetch: Sendable {
  /// `nil` where no block of the path is on this device.
  public let memory: FetchedMemory?
  /// The nodes whose blocks are in it.
  public let nodes: [NodePath]
  /// The nodes whose blocks have not been downloaded.
  public let missing: [NodePath]
  /// Blocks that were in memory already.
  public let hits: Int
}

/// How short of memory the device is.
public enum MemoryPressure: Sendable {
  case warning
  case critical
}

/// Keeps blocks that were read in memory up to a byte budget, least recently used out first.
///
/// Blocks of the pinned levels (level 1: few, and part of every path) leave only when nothing else
/// is left to evict. Reading goes on beside the actor, so that a prefetch holds nobody up.
public actor BlockCache {
  /// Since the cache was made.
  public struct Statistics: Equatable, Sendable {
    public var hits = 0
    public var misses = 0
    public var evictions = 0
    public var bytesRead = 0
  }

  public nonisolated let bank: MemoryBank
  public let budget: Int
  public let pinnedLevels: Set<Int>
  public private(set) var statistics = Statistics()

  private struct Kept {
    let block: MemoryBlock
    var lastUse: Int
  }

  private var kept: [NodePath: Kept] = [:]
  private var reading: [NodePath: Task<MemoryBlock, any Error>] = [:]
  private var clock = 0

  /// - Parameter budget: bytes.
  public init(bank: MemoryBank, budget: Int = 128 << 20, pinnedLevels: Set<Int> = [1]) {
    self.bank = bank
    self.budget = budget
    self.pinnedLevels = pinnedLevels
  }

  /// Bytes of all blocks in memory.
  public var byteCount: Int { kept.values.reduce(0) { $0 + $1.block.byteCount } }

  /// The nodes whose blocks are in memory.
  public var nodes: Set<NodePath> { Set(kept.keys) }

  /// Joins the blocks of a path, reading those that are not in memory.
  ///
  /// Blocks that are not on the device are left out: each adds to the anchor by itself.
  ///
  /// - Throws: ``HierMemError`` of kind `bank` where a block is damaged.
  public func fetch(_ path: NodePath) async throws -> MemoryFetch {
    let all = bank.nodes(on: path)
    let nodes = all.filter { bank.file(of: $0) != nil }
    return try await join(nodes, missing: all.filter { !nodes.contains($0) })
  }

  /// The control block, which is tied to no cluster.
  public func fetchGeneric() async throws -> MemoryFetch {
    try await join([.generic], missing: [])
  }

  /// Reads blocks that will be needed, as far as they are on the device. Damage shows at `fetch`.
  public func prefetch(_ nodes: [NodePath]) async {
    for node in nodes where bank.file(of: node) != nil {
      _ = try? await block(node)
    }
    evict(to: budget, keeping: [])
  }

  /// Gives memory back when the system asks for it: half of the budget, or all that can be had.
  public func relieve(_ pressure: MemoryPressure) {
    evict(to: pressure == .warning ? budget / 2 : 0, keeping: [])
  }

  /// Forgets the blocks of a subtree, whose files were removed or replaced.
  public func forget(within node: NodePath) {
    for path in Set(kept.keys).union(reading.keys) where path.isWithin(node) {
      kept[path] = nil
      reading.removeValue(forKey: path)?.cancel()
    }
  }

  private func join(_ nodes: [NodePath], missing: [NodePath]) async throws -> MemoryFetch {
    let hits = nodes.count { kept[$0] != nil }
    statistics.hits += hits
    var blocks: [(firstUnit: Int, block: MemoryBlock)] = []
    for node in nodes {
      let first = node == .generic ? 0 : bank.manifest.memory.firstUnit(level: node.level)
      blocks.append((first, try await block(node)))
    }
    evict(to: budget, keeping: Set(nodes))
    let memory = blocks.isEmpty ? nil : try FetchedMemory(config: bank.manifest.memory, blocks: blocks)
    return MemoryFetch(memory: memory, nodes: nodes, missing: missing, hits: hits)
  }

  private func block(_ node: NodePath) async throws -> MemoryBlock {
    clock += 1
    if let found = kept[node] {
      kept[node]!.lastUse = clock
      return found.block
    }
    let task = reading[node] ?? Task.detached { [bank] in try bank.read(node) }
    reading[node] = task
    let block: MemoryBlock
    do {
      block = try await task.value
    } catch {
      if reading[node] == task { reading[node] = nil }
      throw error
    }
    // Whoever waited for the same read has kept it already; whoever forgot it wants it gone.
    if reading[node] == task {
      reading[node] = nil
      kept[node] = Kept(block: block, lastUse: clock)
      statistics.misses += 1
      statistics.bytesRead += block.byteCount
    }
    return block
  }

  private func evict(to limit: Int, keeping needed: Set<NodePath>) {
    var size = byteCount
    let candidates = kept.filter { !needed.contains($0.key) }.sorted { a, b in
      let (pinnedA, pinnedB) = (pinnedLevels.contains(a.key.level), pinnedLevels.contains(b.key.level))
      return pinnedA == pinnedB ? a.value.lastUse < b.value.lastUse : pinnedB
    }
    for (node, entry) in candidates {
      if size <= limit { return }
      size -= entry.block.byteCount
      kept[node] = nil
      statistics.evictions += 1
    }
  }
}
