"""Keeping torch's own tools from passing adapters by: fused kernels, folded batch norms, quantization by class.

In eval mode ``nn.TransformerEncoderLayer`` hands ``linear1.weight`` and others to one fused kernel instead of calling
its layers, unless a module inside it has a hook. Around several such layers ``nn.TransformerEncoder`` packs padded
batches into nested tensors, which only that kernel can read.
"""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

_USED_NESTED = "_lora_used_nested_tensor"
_NO_HANDLE = -1
"""The key of a hook that is not taken out again; torch counts its own from 0."""


def keep_out_of_fused_kernels(part: nn.Module) -> None:
    """Make sure that the layer which has this part is called, wherever it is put; a hook on itself would slow it."""
    part._forward_pre_hooks[_NO_HANDLE] = _no_op


def stop_nesting(module: nn.TransformerEncoder) -> None:
    """Let an encoder that contains adapters pass padded batches on as they are."""
    if _USED_NESTED not in module.__dict__:
        module.__dict__[_USED_NESTED] = module.use_nested_tensor
        module.use_nested_tensor = False


def resume_nesting(modules: Iterable[nn.Module]) -> None:
    """Undo `stop_nesting` on all of these."""
    for module in modules:
        if isinstance(module, nn.TransformerEncoder) and _USED_NESTED in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop(_USED_NESTED)


def _no_op(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing; that there is one is enough."""


def check_not_fused(layer_class: type[nn.Module]) -> None:
    """Raise where torch copies an adapted layer to fold a batch norm into it: only the base weight would be scaled.

    Nothing but the caller tells such a copy from any other.
    """
    for frame, _ in traceback.walk_stack(inspect.currentframe()):
        if frame.f_globals.get("__name__") == "torch.nn.utils.fusion":
            raise ValueError(
                f"a batch norm cannot be folded into a {layer_class.__name__} with adapters, which would stay as they "
                "are; call merge_and_unload(model) first"
            )


def warn_of_quantization(layer_class: type[nn.Module]) -> None:
    """Say that torch.ao.quantization, which goes by the exact class, passes a layer by."""
    what = f"torch.ao.quantization leaves every {layer_class.__name__} with adapters as it is"
    warnings.warn(f"{what}; call merge_and_unload(model) first to have it quantized", stacklevel=3)
