"""Which modules compute in this thread: what belongs to a call is kept here, and nothing on the module changes."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn


class Calls(threading.local):
    """The calls that run in this thread. Other threads and copies of a module do not see them."""

    # a subclass of threading.local, since torch.compile follows that, and no ContextVar
    innermost: tuple[nn.Module, dict[Any, Any], Any] | None
    """The module called last, what its call has noted, and the same of the call around it."""

    def __init__(self) -> None:
        # in each thread before its first call: torch.compile guards on the attributes that there are
        self.innermost = None

    def begin(self, module: nn.Module, noted: dict[Any, Any] | None = None) -> Any:
        """Enter a call of the module, which begins with these notes; what is returned must be given to `end`."""
        outer = self.innermost
        self.innermost = (module, noted or {}, outer)
        return outer

    def end(self, outer: Any) -> None:
        """Leave the innermost call."""
        self.innermost = outer

    def noted(self, module: nn.Module) -> dict[Any, Any] | None:
        """What the innermost call of this module has noted; None if none runs in this thread."""
        call: Any = self.innermost
        while call is not None and call[0] is not module:
            call = call[2]
        return None if call is None else call[1]
