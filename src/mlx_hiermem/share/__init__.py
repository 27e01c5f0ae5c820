"""Models on the hub: pushed, pulled whole or in part, found by their names."""
