import Foundation

/// Keeps a folder out of backups: what is in it can be made or downloaded again.
func keepOutOfBackups(_ folder: URL) throws {
  #if canImport(Darwin)
    var values = URLResourceValues()
    values.isExcludedFromBackup = true
    var excluded = folder
    try excluded.setResourceValues(values)
  #endif
}
