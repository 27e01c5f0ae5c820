"""Models for Core AI, which iOS 27 and macOS 27 have: `hiermem export coreai` and `verify --coreai`."""
