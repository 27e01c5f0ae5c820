"""What an app is given: the folder, how it is measured and verified; for Core ML and Core AI alike."""
