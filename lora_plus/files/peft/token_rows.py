"""PEFT's ``trainable_token_indices``: rows of embeddings and heads by their ids, as PEFT keeps and ties them.

As peft 0.21 has it: a tensor holds the rows themselves, in the order of the ids that the config gives by the end of a
module's name, or for the input embedding. Where the model's config says ``tie_word_embeddings``, the layers tied to the
input embedding get its rows; else each module has its own. A linear layer with rows is computed without its bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lora_plus.files.outline import Outline
from lora_plus.files.saved_adapter import SavedAdapter, SavedLayer
from lora_plus.files.target import ModelTarget, Target
from lora_plus.files.token_rows import row_layers
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.model.token_rows import TokenRowsPlace
from lora_plus.tensors.token_rows import ROWS, VARIANT_OF
from lora_plus.tensors.variant import AdapterSpec

from .names import PREFIX
from .renaming import FolderTarget

FIELD = "trainable_token_indices"
_END = ".token_adapter.trainable_tokens_delta"


def is_rows_key(key: str) -> bool:
    """Whether a tensor of this name is rows of tokens."""
    return key.startswith(PREFIX) and key.endswith(_END)


def wrong_indices(indices: Any) -> str | None:
    """What is wrong with a config's ids, by module or of the input embedding; None if nothing is."""
    lists = indices.values() if isinstance(indices, Mapping) else [] if indices is None else [indices]
    if all(isinstance(ids, list) and ids and {*map(type, ids)} == {int} for ids in lists):
        return None
    return f"{FIELD} must be a list of ids, or an object of such lists, got {indices!r}"


# ---- from PEFT -------------------------------------------------------------------------------------------------------


def rows_from_peft(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], known: FolderTarget, target: Target, problems: list[str]
) -> dict[str, SavedLayer]:
    """The rows among the tensors of a folder, by the module's name there."""
    layers: dict[str, SavedLayer] = {}
    indices, unused = config.get(FIELD) or [], []
    for key, tensor in sorted(tensors.items()):
        name = key.removeprefix(PREFIX).removesuffix(_END)
        given = indices if isinstance(indices, list) else [v for end, v in indices.items() if name.endswith(end)]
        ids = indices if isinstance(indices, list) else given[0] if given else []
        base = known.base(name) or _stored(target.rename(name), target)
        if not ids or any(other != ids for other in (() if isinstance(indices, list) else given)):
            problems.append(f"tensor {key!r}: {FIELD} gives no ids of {name!r}, or several lists")
        elif base is None or base.layout not in VARIANT_OF:
            problems.append(f"{name!r}: whose rows these are cannot be told without the model, which has no such layer")
        else:
            spec = AdapterSpec(r=len(ids), alpha=len(ids), variant=VARIANT_OF[base.layout])
            facts = {**base.facts, "ids": ids, "tied": {}}
            layers[name] = SavedLayer(BaseLayer(base.kind, base.layout, base.shape, facts), spec, {ROWS: tensor})
    if isinstance(indices, list):
        unused = [] if layers or not indices or problems else [indices]
    else:
        found = [layer.base.facts["ids"] for layer in layers.values()]
        unused = [ids for end, ids in indices.items() if not any(n.endswith(end) for n in layers) and ids not in found]
    if not (problems or target.rename.given):  # which can leave them out
        problems += [f"{FIELD} {ids!r} has no tensor in the file" for ids in unused]
    for name in layers:
        problems += [f"{name!r}: {why}" for why in unlike_peft(target.rename(name), layers[name].base, target)]
    return layers


def _stored(name: str | None, target: Target) -> BaseLayer | None:
    """What a checkpoint says of a layer that only has rows."""
    return target.base(name) if name is not None and name in (target.names() or ()) else None


def unlike_peft(name: str | None, base: BaseLayer, target: Target) -> Iterator[str]:
    """Why PEFT computes something else with the rows of a layer of a model."""
    if not isinstance(target, ModelTarget) or name not in target.modules:
        return
    layer, root = target.modules[name], target.modules[""]
    readers = TokenRowsPlace(layer, [name], base.facts["ids"], target.named).readers
    if any(isinstance(each, nn.Linear) and each.bias is not None for _, each in readers):
        yield "PEFT computes a linear layer with rows of tokens without its bias"
    embeddings = getattr(root, "get_input_embeddings", lambda: None)()
    config = getattr(root, "config", None)
    ties = embeddings is layer and bool(getattr(config, "tie_word_embeddings", False))
    others = [other for other, _ in readers[1:]]
    if others and not ties:
        yield f"its weight is that of {', '.join(map(repr, others))} too, which PEFT would leave without these rows"
    elif ties and not others:
        yield "the model's config says tie_word_embeddings, so PEFT would give a head these rows, and none is tied"


# ---- to PEFT ---------------------------------------------------------------------------------------------------------


def rows_problems(adapter: SavedAdapter, outline: Outline, target: Target) -> Iterator[str]:
    """Why PEFT's format cannot express the rows of an adapter."""
    names = row_layers(adapter)
    if names and len(names) == len(adapter.layers):
        yield f"{sorted(names)}: PEFT trains rows of tokens beside adapted layers, and there are none; save a file"
    for name in names:
        base = adapter.layers[name].base
        alike = [other for other in outline.names if other != name and other.endswith(name)]
        yield from (f"{name!r}: PEFT would take {other!r} for it, which ends in the same" for other in alike)
        yield from (f"{name!r}: {why}" for why in unlike_peft(name, base, target))
        if not isinstance(target, ModelTarget) and ("tied" in base.facts or base.kind != "Embedding"):
            yield f"{name!r}: what PEFT computes with its rows depends on the model; load and save them there"


def rows_to_peft(adapter: SavedAdapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what the config says of them."""
    names = row_layers(adapter)
    tensors = {f"{PREFIX}{name}{_END}": adapter.layers[name].tensors[ROWS] for name in names}
    return tensors, {FIELD: {name: adapter.layers[name].base.facts["ids"] for name in sorted(names)}} if names else {}
