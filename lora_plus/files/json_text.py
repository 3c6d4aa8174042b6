"""Texts that others wrote, in JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .paths import file_state, open_regular

LONGEST = 100_000_000
"""Bytes of a text, as safetensors allows a header."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parsed(text: str) -> Any:
    """What a JSON text says; a ValueError also for half of a pair of surrogates, which no other text can have."""
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a text in it has half of a pair of surrogates") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


def read_text(path: Path) -> str:
    """The text of a regular file; an OSError if it is longer than any that is meant."""
    with open_regular(path) as file:
        size = file_state(file.fileno())[0]
        if size > LONGEST:
            raise OSError(f"{str(path)!r} has {size:,} bytes, expected at most {LONGEST:,}")
        return file.read(LONGEST).decode("utf-8")
