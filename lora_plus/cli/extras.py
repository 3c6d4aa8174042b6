"""Optional packages, and what to install where one is missing."""

EXTRAS = {
    "cli": {"typer", "rich"},
    "demo": {"platformdirs", "tokenizers", "gguf", "numpy"},
}
"""The packages of each optional extra, by the names they are imported under."""


def hint(error: ModuleNotFoundError) -> str | None:
    """What to install where a package of an extra is missing; None for any other one."""
    extra = next((extra for extra, packages in EXTRAS.items() if error.name in packages), None)
    return extra and f'lora-plus needs {error.name}, which is not installed: pip install "lora-plus[{extra}]"'
