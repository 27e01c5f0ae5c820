#if canImport(Darwin)
  import Dispatch

  /// Passes the system's memory warnings on to a cache, for as long as it lives.
  ///
  /// Unchecked because the sources are only made and cancelled, which any thread may do.
  public final class MemoryPressureMonitor: @unchecked Sendable {
    private let sources: [any DispatchSourceMemoryPressure]

    public init(relieving cache: BlockCache) {
      let kinds: [(DispatchSource.MemoryPressureEvent, MemoryPressure)] = [
        (.warning, .warning), (.critical, .critical),
      ]
      sources = kinds.map { event, pressure in
        let source = DispatchSource.makeMemoryPressureSource(eventMask: event)
        source.setEventHandler { [weak cache] in
          guard let cache else { return }
          Task { await cache.relieve(pressure) }
        }
        source.activate()
        return source
      }
    }

    deinit { sources.forEach { $0.cancel() } }
  }
#endif
