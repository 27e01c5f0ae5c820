// swift-tools-version: 6.0
// HierMemKit, at the top because Swift Package Manager looks for a package's manifest there.
import PackageDescription

let package = Package(
  name: "HierMemKit",
  platforms: [.iOS(.v18), .macOS(.v15)],
  products: [
    .library(name: "HierMemKit", targets: ["HierMemKit"]),
    .library(name: "HierMemFoundationModels", targets: ["HierMemFoundationModels"]),
  ],
  targets: [
    .target(name: "HierMemKit", path: "apps/ios/HierMemKit/Sources/HierMemKit"),
    .target(
      name: "HierMemFoundationModels", dependencies: ["HierMemKit"],
      path: "apps/ios/HierMemKit/Sources/HierMemFoundationModels"),
    .testTarget(
      name: "HierMemKitTests", dependencies: ["HierMemKit", "HierMemFoundationModels"],
      path: "apps/ios/HierMemKit/Tests/HierMemKitTests", resources: [.copy("Fixtures")]),
  ]
)

// Linux has none of Core ML, Core AI and FoundationModels. Stand-ins with the same declarations let the code that
// uses them be compiled and tested there, Core ML's with arrays whose rows are padded as a phone's may be.
#if os(Linux)
  let standIns = ["CoreML", "CoreAI", "FoundationModels"]
  for name in standIns {
    package.targets.append(.target(name: name, path: "apps/ios/HierMemKit/Tests/\(name)StandIn"))
  }
  package.targets[0].dependencies += ["CoreML", "CoreAI"]
  package.targets[1].dependencies += ["FoundationModels"]
  package.targets[2].dependencies += ["CoreML", "CoreAI", "FoundationModels"]
#endif
