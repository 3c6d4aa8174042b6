"""The sites of adapters in a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lora_plus.layers.site import AdapterSite
from lora_plus.model.tree import Tree, sites_in
from lora_plus.text import join


def adapter_sites(model: nn.Module) -> Iterator[tuple[str, AdapterSite]]:
    """``(name, site)`` for all that has adapters in a model: whole weights, and blocks of their rows."""
    for owner_name, _, site in sites_in(Tree(model).modules):
        if site.lora_adapters:
            yield join(owner_name, site.lora_label), site
