"""Whole checkpoints on the disk, without a model."""
