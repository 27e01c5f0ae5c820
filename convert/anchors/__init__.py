"""Checkpoints of many forms become one: an mlx-lm model folder."""
