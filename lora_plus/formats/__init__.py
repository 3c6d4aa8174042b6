"""File formats: each file here turns plain data into a format's tensors and texts, and back. Nothing here knows of
models, and nothing touches the disk.
"""
