"""The sites of adapters in a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lora_plus.layers.site import AdapterSite
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.model.tree import named_modules, owner_path
from lora_plus.text import join


def adapter_sites(model: nn.Module) -> Iterator[tuple[str, AdapterSite]]:
    """``(name, site)`` for all that has adapters in a model: whole weights, and blocks of their rows."""
    for path, module in named_modules(model):
        for site in module.adapter_sites() if isinstance(module, AdaptedWeight) else ():
            if site.lora_adapters:
                yield join(owner_path(path, module), site.lora_label), site
