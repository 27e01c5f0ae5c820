"""The five kinds of memory, and how they are attached to an anchor's layers."""
