// swift-tools-version: 6.0
// HierMemKit, at the top because Swift Package Manager looks for a package's manifest there.
import PackageDescription

let package = Package(
  name: "HierMemKit",
  platforms: [.iOS(.v18), .macOS(.v15)],
  products: [.library(name: "HierMemKit", targets: ["HierMemKit"])],
  targets: [
    .target(name: "HierMemKit", path: "apps/ios/HierMemKit/Sources/HierMemKit"),
    .testTarget(
      name: "HierMemKitTests", dependencies: ["HierMemKit"],
      path: "apps/ios/HierMemKit/Tests/HierMemKitTests", resources: [.copy("Fixtures")]),
  ]
)

// Linux has neither Core ML nor Core AI. Stand-ins with the same declarations let the code that uses
// them be compiled and tested there, Core ML's with arrays whose rows are padded as a phone's may be.
#if os(Linux)
  package.targets.append(.target(name: "CoreML", path: "apps/ios/HierMemKit/Tests/CoreMLStandIn"))
  package.targets.append(.target(name: "CoreAI", path: "apps/ios/HierMemKit/Tests/CoreAIStandIn"))
  package.targets[0].dependencies += ["CoreML", "CoreAI"]
  package.targets[1].dependencies += ["CoreML", "CoreAI"]
#endif
