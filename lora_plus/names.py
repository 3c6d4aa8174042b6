"""Dotted names inside a model."""


def join(path: str, name: str) -> str:
    """The dotted name of something inside the module at ``path``; either is empty for the module itself."""
    return f"{path}.{name}" if path and name else path or name
