"""Drawing an adapter of a whole model anew, in place: as a fresh start, or where it has no values yet."""

from __future__ import annotations

import torch
from torch import nn

from lora_plus.model.adapters import check_adapter, check_unmerged
from lora_plus.model.inject import check_uncopied
from lora_plus.model.places import adapted_places
from lora_plus.model.storage import shards_of
from lora_plus.model.tree import adapted_weights
from lora_plus.tensors.init import Init, InitName, Start
from lora_plus.tensors.random_state import draws


@draws
def reset_lora_parameters(
    model: nn.Module,
    *,
    adapter: str = "default",
    init: InitName | Init = "kaiming",
    generator: torch.Generator | None = None,
) -> None:
    """Draw an adapter's tensors anew on all its layers, in place: its start, from which it can be trained again.

    The parameters stay the same objects, and so do the settings of the adapter; modules that are trained in full with
    it are left alone. A DoRA magnitude becomes the norm of the weight that is loaded by then.

    On a sharded model every rank must call this: the tensors are drawn whole, with the first rank's numbers, and
    distributed, so that they are those of one process with the same generator, and a weight that an init starts from is
    gathered, one at a time.

    Example:
        >>> model = inject_lora(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), ["0"], r=2)
        >>> reset_lora_parameters(model, generator=torch.Generator().manual_seed(1))

    Args:
        model: a model with adapters; wrapped, sharded or not.
        adapter: the adapter's name.
        init, generator: as in `inject_lora`. An init that takes a start out of the update again (``"pissa"``) needs an
            adapter that was injected with such a one.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: if the model is merged or disabled, or the init does not fit. The adapter is then as it was.
    """
    check_adapter(model, adapter)
    check_uncopied(model, "resetting an adapter")
    for path, weight in adapted_weights(model):
        weight.check_enabled()
        check_unmerged(path, weight, "resetting an adapter")
    start = Start(init, None, generator)
    shards = shards_of(model)
    prepared = []
    for place, site in adapted_places(model):
        if adapter in site.lora_adapters:
            held = site.lora_adapters[adapter]
            with shards.gathered([place.stored()]):
                fresh = place.new_tensors(held.spec, start)
            held.check_refill(fresh, init)
            prepared.append((held, fresh))
    for held, fresh in prepared:
        with shards.gathered(held.tensors().values(), write=True):
            held.refill(fresh)
