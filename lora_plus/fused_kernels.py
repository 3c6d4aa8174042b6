"""Keeping torch's transformer layers from computing with adapted weights in kernels that pass the adapters by.

In eval mode ``nn.TransformerEncoderLayer`` hands ``linear1.weight`` and others to one fused kernel instead of calling
its layers, unless one of them has a hook. Around several such layers ``nn.TransformerEncoder`` packs padded batches
into nested tensors, which only that kernel can read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_USED_NESTED = "_lora_used_nested_tensor"


def keep_out_of_fused_kernels(layer: nn.Module) -> None:
    """Make sure that this layer is called, wherever it is put."""
    if _no_op not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_no_op)


def let_into_fused_kernels(layer: nn.Module) -> None:
    """Undo `keep_out_of_fused_kernels`."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is _no_op:
            del layer._forward_pre_hooks[key]


def stop_nesting(module: nn.Module) -> None:
    """Let an encoder that contains adapters pass padded batches on as they are; other modules are left alone."""
    if isinstance(module, nn.TransformerEncoder) and _USED_NESTED not in module.__dict__:
        module.__dict__[_USED_NESTED] = module.use_nested_tensor
        module.use_nested_tensor = False


def resume_nesting(modules: Iterable[nn.Module]) -> None:
    """Undo `stop_nesting` on all of these."""
    for module in modules:
        if isinstance(module, nn.TransformerEncoder) and _USED_NESTED in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop(_USED_NESTED)


def _no_op(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing; that there is one is enough."""
