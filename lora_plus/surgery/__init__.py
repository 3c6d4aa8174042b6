"""Adapters and checkpoints without training: combine, resize, extract, merge."""
