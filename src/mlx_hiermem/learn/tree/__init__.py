"""Windows become a tree: their probes, k-means, the leaves in which each is learnt, labels."""
