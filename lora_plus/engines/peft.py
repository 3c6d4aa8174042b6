"""PEFT's adapters to the LoRA+ groups: the role of each of their parameters, by PEFT's own layers.

PEFT is imported when the roles are asked for. A ``PeftModel`` gets no adapter of this library: its modules have names
of PEFT's, and so would the files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

from lora_plus.model.state import NEEDS, Need, State
from lora_plus.packages import needed

_ROLES = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "magnitude",
}
"""Container of a PEFT layer -> the role of the weights that it holds, by adapter."""


def peft_roles(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """``(adapter, role, parameter)`` for the LoRA adapters of a PEFT model, for `lora_plus.loraplus_param_groups`.

    It recognises PEFT's layers, not names. So it works for a ``PeftModel``, a transformers model with ``add_adapter``,
    quantized layers and ``target_parameters``, wrapped (DDP, compiled) or not. The bias of a ``lora_bias`` adapter has
    the role ``"B_bias"``. Modules that PEFT trains in full (``modules_to_save``, trainable tokens) have no role.

    Examples:
        >>> groups = loraplus_param_groups(model, lr=1e-4, lr_ratio=4, roles=peft_roles(model))
    """
    with needed("peft_roles", "peft"):
        from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for container, role in _ROLES.items():
                for adapter, held in getattr(module, container).items():
                    own = {"weight": held} if isinstance(held, nn.Parameter) else held._parameters
                    for name, parameter in own.items():
                        if parameter is not None:
                            yield adapter, "B_bias" if name == "bias" else role, parameter


def _unwrapped(state: State) -> Iterator[str]:
    yield from _FAULTS(state)
    known = getattr(sys.modules.get("peft"), "PeftModel", None)
    if known is not None and isinstance(state.names[0][1], known):
        yield "this one is a PeftModel; pass model.get_base_model(), or model.unload() to drop PEFT's adapters"


_WHAT, _FAULTS = NEEDS[Need.UNWRAPPED]
NEEDS[Need.UNWRAPPED] = _WHAT, _unwrapped
