"""A bank on disk: manifest, blocks, policy, and everything that checks or changes them."""
