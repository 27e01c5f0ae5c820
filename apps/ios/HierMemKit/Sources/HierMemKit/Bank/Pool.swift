import Foundation

/// One round of a loop that never suspends: on Apple's systems, what the round was given by Objective-C would otherwise
/// stay until the last round is done.
func pooled<T>(_ round: () throws -> T) rethrows -> T {
  #if canImport(ObjectiveC)
    try autoreleasepool(invoking: round)
  #else
    try round()
  #endif
}
