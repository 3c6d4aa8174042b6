"""JSON that others wrote."""

from __future__ import annotations

import json
import re
from typing import Any

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parsed(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: if it is not valid, is nested too deep, or has a text that no file name and no other text can have:
            half of a pair of surrogates.
    """
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a text in it has half of a pair of surrogates") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value
