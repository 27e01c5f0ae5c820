"""Core ML: anchor and retriever as .mlpackage, checked without a Mac."""
