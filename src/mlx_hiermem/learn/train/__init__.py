"""Blocks are trained: windows become examples, examples become steps, steps become jobs."""
