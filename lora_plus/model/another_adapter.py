"""Adding an adapter to a model that has some: on the places and with the settings of one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_plus.errors import Problems
from lora_plus.layers.adapter import check_adapter_name
from lora_plus.tensors.init import Init, InitName, Start
from lora_plus.tensors.random_state import draws
from lora_plus.tensors.variant import Scaling, VariantName

from .adapters import check_adapter
from .collector import collector_paused
from .inject import attach, check_injectable
from .places import adapted_places
from .storage import shards_of


@collector_paused()
@draws
def add_adapter(
    model: nn.Module,
    adapter: str,
    *,
    like: str = "default",
    r: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    scaling: Scaling | None = None,
    variant: VariantName | None = None,
    init: InitName | Init = "kaiming",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Add another adapter on the same layers and with the same settings as one that the model has.

    Its tensors are drawn anew. As after `inject_lora`, it is the active and trainable one, and the others are frozen.
    Modules that are trained in full with the other one (``train_also``) are not shared: this one has none. It has
    the other one's alpha, and with it a ratio that `fold_lr_ratio` has moved there.

    Example:
        >>> from lora_plus import adapter_names, inject_lora
        >>> model = inject_lora(nn.Sequential(nn.Linear(8, 8)), ["0"], r=4, adapter="math")
        >>> adapter_names(add_adapter(model, "code", like="math"))
        ['math', 'code']

    Args:
        model: a model with adapters; it is changed.
        adapter: the name of the new one.
        like: the name of the one that it is to be like.
        r, alpha, dropout, scaling, variant: as in `inject_lora`, on all layers; None for those of each layer.
        init, generator: as in `inject_lora`.
        dtype: of A and B; None for that of the other's.

    Returns:
        The same model.

    Raises:
        KeyError: if the model holds no adapter ``like``.
        TypeError, ValueError: if a setting is out of range or does not fit a layer, if it cannot have this name or
            another one has it, or if the model is merged or disabled. The model is then as it was.
    """
    check_adapter(model, like)
    check_injectable(model, adapter)
    check_adapter_name(adapter)
    start = Start(init, dtype, generator)
    given = {"r": r, "alpha": alpha, "dropout": dropout, "scaling": scaling, "variant": variant}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    chosen = [
        (place, site, replace(site.lora_adapters[like].spec, **changes))
        for place, site in adapted_places(model)
        if like in site.lora_adapters
    ]
    misfits = [f"{place.name!r}: {why}" for place, _, spec in chosen if (why := place.misfits(spec)) is not None]
    if misfits:
        raise Problems(f"no adapter like {like!r} with these settings was added, because of", misfits)
    prepared = []
    with shards_of(model).outlined():
        for place, site, spec in chosen:
            own = start if dtype is not None else replace(start, dtype=site.lora_A[like].dtype)
            prepared.append((place, spec, place.new_tensors(spec, own)))
        attach(model, adapter, prepared, ())
    return model
