"""A PEFT folder with adapters of stacked experts, for what has a layer for each matrix of each expert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lora_plus.files.experts import STACK, STACKED, in_its_block, labels_there
from lora_plus.layers.base_layer import PARAMETER, BaseLayer

from .names import PREFIX, split_key
from .renaming import FolderTarget


def with_stacks(known: FolderTarget, tensors: Mapping[str, Tensor]) -> FolderTarget:
    """The target with the stacked parameters that the folder has adapters of instead of the layers that are there.

    They are read as if the target had them, under the folder's names; `fit_experts` makes adapters of the layers.
    """
    names = known.outline.names
    counts = Counter(name.rpartition(".")[0] for name in names)
    paths = {split[0] for key in tensors if (split := split_key(key.removeprefix(PREFIX))) is not None}
    stacks = dict[str, BaseLayer]()
    for path in sorted({path.removesuffix(".base_layer") for path in paths}):
        owner = in_its_block(path, names)
        for stacked in STACKED:
            full, labels = f"{path}.{stacked}", labels_there(owner, stacked, names) or ()
            bases = [base for label in labels if (base := known.base(f"{owner}.0.{label}")) is not None]
            if bases and len(bases) == len(labels) and all(len(base.shape) == 2 for base in bases):
                shape = counts[owner], sum(base.shape[0] for base in bases), bases[0].shape[1]
                stacks[full] = BaseLayer(PARAMETER, STACK, shape, {"parameter": full})
        if owner != path and (base := known.base(f"{owner}.weight")) is not None:
            stacks[f"{path}.weight"] = replace(base, facts={"parameter": f"{path}.weight"})
    if not stacks:
        return known
    owned: dict[str, list[str]] = {}
    for full in stacks:
        owner, _, parameter = full.rpartition(".")
        owned.setdefault(owner, []).append(parameter)
    outline = replace(
        known.outline, modules={**known.outline.modules, **owned}, names={**known.outline.names, **dict.fromkeys(owned)}
    )
    return replace(known, outline=outline, base=lambda name: stacks.get(name) or known.base(name))
