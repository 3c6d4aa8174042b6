"""Adapters on the disk: formats, saving, loading."""
