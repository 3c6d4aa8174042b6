"""What adapters do to each tensor of a checkpoint, and everything that does not fit."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from lora_plus.files.checks import base_problem, is_finite, settings_problem, shape_problems, value_problems
from lora_plus.files.fit import FITTERS
from lora_plus.files.peft.shapes import usual_base
from lora_plus.files.read import described
from lora_plus.files.rename import Names, Renaming
from lora_plus.files.saved_adapter import SavedLayer
from lora_plus.files.target import Target
from lora_plus.files.tensor_file import DTYPES as STORED
from lora_plus.files.tensor_file import StoredTensor, equal_in_dtype, read, read_all
from lora_plus.files.token_rows import is_rows
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.layers.kinds import DTYPES
from lora_plus.model.places import rows_overlap
from lora_plus.tensors.matrix import joined_rows, matrix_shape
from lora_plus.tensors.merged_weight import Summand
from lora_plus.tensors.token_rows import ROWS, moved_rows, row_factors
from lora_plus.tensors.variant import FACTORS, VARIANTS
from lora_plus.text import endings, join, near_misses, some

from .folder import Checkpoint

Shape = tuple[int, ...]


@dataclass
class Change:
    """What adapters do to one tensor."""

    updates: dict[str, list[SavedLayer]] = field(default_factory=dict)
    """By adapter, its layer of the whole weight or those of rows, with its factor in their alpha."""
    replacement: Tensor | None = None

    @property
    def layout(self) -> str:
        """How the tensor is stored."""
        return next(iter(self.updates.values()))[0].base.layout

    def summands(self, shape: Sequence[int]) -> list[Summand]:
        """The adapters as merging into a weight of this shape takes them."""
        found = []
        for layers in self.updates.values():
            spec, (A, B), scale = layers[0].spec, layers[0].factors(), layers[0].spec.scale
            blocks = [(each.base.rows[0], *each.factors(), each.spec.scale) for each in layers if each.base.rows]
            if blocks:
                blocks.sort(key=lambda block: block[0])
                (A, B), scale = joined_rows(blocks, matrix_shape(self.layout, tuple(shape))[0]), 1.0
            found.append(Summand(spec.variant, A, B, scale, layers[0].tensors))
        return found


def planned(checkpoint: Checkpoint, paths: Sequence[Path], factors: Sequence[float], names: Names | None) -> Plan:
    """What adapters, each multiplied by its factor, do to a checkpoint; with all problems."""
    plan = Plan(checkpoint, Renaming(names))
    for index, (path, factor) in enumerate(zip(paths, factors, strict=True)):
        plan.add(f"adapter {str(path)!r}: " if len(paths) > 1 else "", str(index), path, factor)
    plan.check()
    for name, change in () if plan.problems else plan.changes.items():
        read_all(layer.tensors for layers in change.updates.values() for layer in layers)
        change.replacement = read(change.replacement)
        for layers in change.updates.values():
            layers[:] = [with_factors(each, checkpoint, name) if is_rows(each) else each for each in layers]
    return plan


def with_factors(layer: SavedLayer, checkpoint: Checkpoint, name: str) -> SavedLayer:
    """Rows of tokens with A and B of what they add to those of this tensor of the checkpoint."""
    ids = layer.base.facts["ids"]
    moved = moved_rows(layer.tensors[ROWS], checkpoint.rows(name, ids))
    A, B = row_factors(layer.spec.variant, moved, ids, layer.base.shape[0])
    return replace(layer, tensors={**layer.tensors, "lora_A": A, "lora_B": B})


class CheckpointTarget(Target):
    """A checkpoint, as the readers of formats ask it."""

    def __init__(self, checkpoint: Checkpoint, rename: Renaming) -> None:
        self.checkpoint, self.rename = checkpoint, rename
        self.modules = {name.removesuffix(".weight"): None for name in checkpoint.tensors if name.endswith(".weight")}

    def names(self) -> Collection[str]:
        return self.modules.keys()

    def base(self, name: str) -> BaseLayer | None:
        stored = self.checkpoint.tensors.get(f"{name}.weight")
        return None if stored is None else usual_base(stored.shape)

    def tensor(self, name: str) -> Tensor | None:
        new = self.rename(name) or ""
        stored = self.checkpoint.tensors.get(new)  # None where it is tied to another one
        return self.checkpoint.read(new) if stored is not None and STORED.get(stored.dtype) in DTYPES else None

    def repeats(self, name: str, tensor: Tensor) -> bool | None:
        stored = self.tensor(name)
        return None if stored is None else equal_in_dtype(tensor, stored)

    def shape(self, name: str) -> Shape | None:
        stored = self.checkpoint.tensors.get(self.rename(name) or "")
        return None if stored is None else stored.shape


class Plan:
    """What becomes of each tensor of a checkpoint; what is wrong is collected in ``problems``."""

    def __init__(self, checkpoint: Checkpoint, rename: Renaming) -> None:
        self.checkpoint, self.target = checkpoint, CheckpointTarget(checkpoint, rename)
        self.changes: dict[str, Change] = {}
        self.problems: list[str] = []
        self.doubts: list[str] = []
        """What to warn of."""
        self.missing: list[tuple[str, str, Shape | None]] = []
        self.told: dict[str, set[str]] = {}
        """By tensor, the names that its weight has in a file that says that these are tied."""

    def add(self, where: str, adapter: str, path: Path, factor: float) -> None:
        """Enter an adapter, multiplied by a factor; ``where`` comes before its problems."""
        problems: list[str] = []
        data = described(path, self.target, problems)
        for fitted in () if self.target.rename.given else FITTERS:
            data = fitted(data, self.target, problems)
        rename = str if data.resolved else self.target.rename
        tensors = {name: rename(layer.base.weight_name(name)) for name, layer in data.layers.items()}
        if not problems and not any(tensors.values()):
            problems.append("it has no adapted layer")
        for name, layer in data.layers.items():
            target = tensors[name]
            if target is not None and isinstance(layer.base.facts.get("tied"), dict):
                target = self._stored(
                    target, [f"{rename(other)}.weight" for other in layer.base.facts["tied"]], problems
                )
            if target is not None:
                wrong = [f"{name!r}: {line}" for line in self._enter(where, adapter, target, layer, factor)]
                # the values of what has no place in the checkpoint can be of any size
                if not wrong and target in self.checkpoint.tensors:
                    wrong = value_problems({name: layer}).get(name, [])
                problems += wrong
        if data.trained and factor != 1:
            problems.append(f"weight {factor:g} does not apply to {sorted(data.trained)}, which it trains in full")
        for name, trained in data.trained.items():
            problems += self._replace(where, name, trained)
        self.problems += [where + line for line in problems]

    def _stored(self, name: str, others: Sequence[str], problems: list[str]) -> str | None:
        """The one tensor that the checkpoint has for a weight with these other names; None if it has several."""
        stored = [each for each in (name, *others) if each in self.checkpoint.tensors] or [name]
        if len(stored) > 1:
            apart = " and ".join(map(repr, stored))
            problems.append(f"the file has one adapter for {apart}, which the checkpoint stores apart; tie them first")
            return None
        self.told[stored[0]] = {name, *others}
        return stored[0]

    def check(self) -> None:
        """What only shows when all adapters are known."""
        if not self.problems:  # else what was not read may have had the names
            self.problems += self.target.rename.unused()
        if own := [name for name in self.checkpoint.tensors if _IN_A_MODEL.fullmatch(name)]:
            self.problems.append(
                f"{some(own, 1)}: the base was saved with adapters in it; save it after remove_lora(model), or after "
                "merge_and_unload(model) to keep them"
            )
        told = self.changes or self.target.rename.given
        lacking = None if told else _prefix([name for _, name, _ in self.missing], self.checkpoint.tensors)
        if lacking is not None:
            option, given = "=".join(lacking), dict([lacking])
            self.problems.append(f"did you mean names={given}, or --rename {option}? So all are in the checkpoint")
        by_shape: dict[Shape, list[str]] = {}
        for other, stored in self.checkpoint.tensors.items() if self.missing and lacking is None else ():
            by_shape.setdefault(stored.shape, []).append(other)
        for number, (where, name, shape) in enumerate(self.missing):
            alike = [] if shape is None else by_shape.get(shape, [])
            # looking for near misses is slow, and a few of them show what is wrong
            hint = near_misses(name, self.checkpoint.tensors) if number < 3 else ""
            self.problems.append(f"{where}the checkpoint has no tensor {name!r}{self._tie(name, alike, hint)}")
        for name, change in self.changes.items():
            rescaling = any(VARIANTS[layers[0].spec.variant].rescales for layers in change.updates.values())
            if rescaling and len(change.updates) > 1:
                self.problems.append(f"{name!r}: {_NO_SUM}")
            if change.updates and change.replacement is not None:
                self.problems.append(f"{name!r} is both adapted and trained in full")

    def _enter(self, where: str, adapter: str, target: str, layer: SavedLayer, factor: float) -> Iterator[str]:
        base, variant = layer.base, layer.spec.variant
        stored = self.checkpoint.tensors.get(target)
        if stored is None:
            self.missing.append((where, target, base.shape or _implied_shape(layer)))
            return
        wrong = self._misfit(target, stored, base) or settings_problem(layer)
        lines = shape_problems(layer) if wrong is None else [wrong]
        if lines:
            yield from lines
            return
        change = self.changes.setdefault(target, Change())
        if change.updates and change.layout != base.layout:
            yield f"layout {base.layout!r}, and another adapter says {change.layout!r} of {target!r}"
        own = change.updates.setdefault(adapter, [])
        if any(rows_overlap(base.rows, other.base.rows) for other in own):
            yield f"it changes rows of {target!r} that another layer of the same adapter changes too"
        if VARIANTS[variant].rescales and factor != 1:
            yield f"weight {factor:g}: {_NO_SUM}"
        spec = replace(layer.spec, alpha=layer.spec.alpha * factor)
        own.append(SavedLayer(base, spec, layer.tensors))

    def _misfit(self, target: str, stored: StoredTensor, base: BaseLayer) -> str | None:
        """Why a tensor of the checkpoint is not the weight that an adapter belongs to."""
        if STORED.get(stored.dtype) not in DTYPES:
            return (
                f"{target!r} is stored as {stored.dtype}, to which an update cannot be added (it may be quantized); "
                "merge into the checkpoint in floating point that it was made from"
            )
        if not base.kind:  # the file's format says nothing of it
            return f"{target!r} has shape {stored.shape}, which is no layer that the file's format has adapters of"
        if (wrong := base_problem(base)) is not None:
            return wrong
        if base.shape != stored.shape:
            return f"its weight has shape {base.shape} in the adapter, {stored.shape} in the checkpoint"
        told = self.told.get(target, ())
        tied = [repr(each) for each, kept in self.checkpoint.metadata.items() if kept == target and each not in told]
        if tied:
            return f"{target!r} is also {' and '.join(tied)}, which its update would change too; {_UNTIE}"
        if base.kind == "Embedding" and not told:
            self._doubt_head(target, stored)
        return None

    def _doubt_head(self, target: str, stored: StoredTensor) -> None:
        """Note where a head is likely to have the weight of an embedding."""
        alone = sum(stored.shape == other.shape for other in self.checkpoint.tensors.values()) == 1
        config = self.checkpoint.config()
        if alone and config.get("tie_word_embeddings", "model_type" in config):  # transformers' default
            self.doubts.append(
                f"{target!r} may be the weight of the head too (tie_word_embeddings), which the embedding's update "
                f"then changes as well; if so, {_UNTIE}"
            )

    def _replace(self, where: str, name: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        renamed = {part: self.target.rename(join(name, part)) for part in tensors}
        names = {target: part for part, target in renamed.items() if target is not None}
        module = {target.removesuffix(part) for target, part in names.items() if part and target.endswith(part)}
        lacking = [other for other in self.checkpoint.tensors if other.startswith(tuple(module)) and other not in names]
        yield from (f"{name!r} is trained in full, but {other!r} of the checkpoint is not in it" for other in lacking)
        for target, part in names.items():
            tensor, stored = tensors[part], self.checkpoint.tensors.get(target)
            if stored is None:
                self.missing.append((where, target, tuple(tensor.shape)))
                continue
            dtype = STORED.get(stored.dtype)
            if tuple(tensor.shape) != stored.shape:
                yield f"{target!r} has shape {tuple(tensor.shape)} in the adapter, {stored.shape} in the checkpoint"
            elif dtype != tensor.dtype and not (dtype in DTYPES and tensor.dtype in DTYPES):
                yield f"{target!r} is {tensor.dtype} in the adapter, {stored.dtype} in the checkpoint"
            elif not is_finite(tensor):
                yield f"{target!r} has values that are not finite"
            change = self.changes.setdefault(target, Change())
            if change.replacement is not None:
                yield f"{target!r} is trained in full by another adapter too"
            change.replacement = tensor

    def _tie(self, name: str, alike: Sequence[str], hint: str) -> str:
        """Why a tensor may be absent: it has another name, or another one, which is ``alike``, stands for it."""
        kept = self.checkpoint.metadata.get(name)
        if kept in self.checkpoint.tensors:
            return f": it is tied to {kept!r}, and the checkpoint has one tensor for both; {_UNTIE}"
        if len(alike) != 1:
            return hint
        return (
            f"{hint}; if it is tied to {alike[0]!r}, which has the same shape, there is one tensor for both: {_UNTIE}"
        )


_UNTIE = "save the base with the two untied first"
_NO_SUM = (
    "DoRA rescales the weight, so a factor or a sum with another adapter is not defined; merge it alone, with weight 1"
)


_CONTAINERS = "|".join(each.name for variant in VARIANTS.values() for each in (*FACTORS, *variant.tensors))
_IN_A_MODEL = re.compile(rf"(?:.*\.)?(?:{_CONTAINERS})\.(?!weight$|bias$)[^.]+")
"""Names of an adapter's tensors in the ``state_dict`` of a model; a module of the base's own can be called as they."""


def _prefix(names: Sequence[str], there: Collection[str]) -> tuple[str, str] | None:
    """The one prefix that all of these names lack, or have too many, to be there: as an entry of `Names`, if any."""
    if not names:
        return None
    first = names[0]
    found = [("", other[: -len(first) - 1]) for other in there if other.endswith(f".{first}")]
    found += [(f"{first[: -len(end) - 1]}", "") for end in endings(first) if end in there]
    renames = {pair: Renaming(dict([pair])) for pair in found}
    fit = [pair for pair, rename in renames.items() if all(rename(name) in there for name in names)]
    return fit[0] if len(fit) == 1 else None


def _implied_shape(layer: SavedLayer) -> Shape | None:
    """The shape of a linear layer's weight that A and B fit."""
    A, B = layer.factors()
    return (B.shape[0], A.shape[1]) if len(A.shape) == len(B.shape) == 2 else None
