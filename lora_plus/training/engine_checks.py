"""What engines add to the check of an optimizer. Nothing of ours is imported here, so that they can do so early."""

from collections.abc import Callable

from torch import nn

ENGINE_CHECKS: list[Callable[[nn.Module, list[str]], list[str]]] = []
"""From a model and what was found wrong with its training to all that is wrong, on this rank or on any."""
