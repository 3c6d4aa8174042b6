"""Over a whole model: its adapters' tensors, which of them are active, and what was adapted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from lora_plus.errors import check_number
from lora_plus.layers.adapter import Adapter, check_adapter_name
from lora_plus.layers.class_swap import SwappedModule
from lora_plus.layers.freezing import restore_requires_grad, set_requires_grad
from lora_plus.layers.fused_kernels import resume_nesting
from lora_plus.layers.layer import LoRALayer
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.text import aligned, join

from .inject import check_exchangeable, check_restorable, check_unsharded
from .storage import reshard, shards_of
from .train_also import originals, trained_modules, unmark_trained
from .tree import adapted_weights, adapter_sites, adapters_of, named_modules
from .unsaved import check_saved, unsaved


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters that the model holds.

    They are in the order of the layers that they are on, and on one layer in the order in which they were added.
    """
    return list(dict.fromkeys(name for _, site, _ in adapter_sites(model) for name in site.lora_adapters))


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that take part in the forward.

    They are in the order of the layers that they are on, and on one layer in the order in which they are applied.
    """
    return list(dict.fromkeys(name for _, weight in adapted_weights(model) for name in weight.active_names()))


def check_adapter(model: nn.Module, *adapters: str) -> None:
    """Raise a KeyError if the model does not hold adapters of all these names."""
    names = adapter_names(model)
    for adapter in adapters:
        if adapter not in names:
            there = f"it has {', '.join(map(repr, names))}" if names else "it has none; call inject_lora first"
            raise KeyError(f"the model has no adapter {adapter!r}: {there}")


def set_adapter(
    model: nn.Module, adapters: str | Sequence[str] | Mapping[str, float], *, trainable: bool | None = None
) -> None:
    """Let just these adapters, one or several, take part in the forward.

    Modules trained in full (``train_also``) keep their values, whichever adapter they belong to.

    Args:
        model: a model with adapters.
        adapters: a name, several, or a mapping from name to a factor of the adapter's scale, as in
            ``{"style": 0.6, "task": 1.0}``. The factor holds, also in merging, until adapters are chosen again; it is
            not saved. It may be zero or negative.
        trainable: True makes these adapters, and the modules trained in full with them, trainable and freezes all
            others; False freezes all; None leaves ``requires_grad`` as it is.

    Raises:
        KeyError: if the model holds no adapter of such a name.
        TypeError: if a factor is not a number.
        ValueError: if the model is merged, two of them on one layer have no agreed sum (DoRA), or a factor is not
            finite, or not 1 for a variant that rescales the weight (DoRA). The model is then as it was.
    """
    names = (adapters,) if isinstance(adapters, str) else tuple(dict.fromkeys(adapters))
    strengths = adapters if isinstance(adapters, Mapping) else dict.fromkeys(names, 1.0)
    check_adapter(model, *names)
    _check_strengths(strengths)
    reshard(model)  # or parameters that are whole after a forward get the flags, not those that are trained
    weights = list(adapted_weights(model))
    for path, weight in weights:
        weight.check_enabled()
        check_unmerged(path, weight, "choosing its adapters")
        for each in weight.in_order(names):
            factor = strengths[each.name]
            if each.variant.rescales and factor != 1:
                raise ValueError(
                    f"the factor of {each.name!r} must be 1, got {factor}: on {path!r} it is of the variant "
                    f"{each.spec.variant!r}, which rescales the weight, so that its effect is not proportional to its "
                    "scale"
                )
    for _, weight in weights:
        weight.activate(names, strengths)
    if trainable is not None:
        for _, held, _ in adapters_of(model):
            held.set_trainable(trainable and held.name in names)
        for _, module, record in trained_modules(model):
            set_requires_grad(module.modules(), trainable and record.adapter in names)


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name.

    Its parameters stay the same objects, so optimizers go on working; its place among the adapters, whether it is
    active, with what factor, trained or merged, and the modules trained in full with it stay, too. Only the keys in
    ``state_dict()`` change.

    Raises:
        KeyError: if the model holds no adapter of the old name.
        TypeError, ValueError: if it cannot have the new name, another one has it, the adapters are disabled, or the
            model is sharded by ``fully_shard``.
    """
    check_adapter(model, old)
    check_unsharded(model)
    check_adapter_name(new)
    if new in adapter_names(model):
        raise ValueError(f"the model has an adapter {new!r} already; choose another name, or call delete_adapter first")
    weights = [weight for _, weight in adapted_weights(model)]
    for weight in weights:
        weight.check_enabled()
    for weight in weights:
        weight.rename_everywhere(old, new)
    for _, _, record in trained_modules(model, old):
        record.adapter = new


def delete_adapter(model: nn.Module, adapter: str) -> None:
    """Drop one adapter; layers left without any become plain again, modules it trained in full get their own values.

    If it was the active one, none is active afterwards: choose another with `set_adapter`.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: if the model is merged.
    """
    check_adapter(model, adapter)
    weights = [(path, weight) for path, weight in adapted_weights(model) if adapter in weight.adapter_names()]
    for path, weight in weights:
        weight.check_enabled()
        check_unmerged(path, weight, "deleting an adapter")
    check_restorable(model)
    check_exchangeable(model)
    for _, module, _ in list(trained_modules(model, adapter)):
        unmark_trained(module, restore=True)
        set_requires_grad(module.modules(), False)
    for _, module in named_modules(model):
        if isinstance(module, SwappedModule):
            module.drop(adapter)
    if not adapter_names(model):
        resume_nesting(model.modules())
        restore_requires_grad(model.modules())


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base model for the length of a ``with`` block; afterwards the previous state, whatever it was.

    Adapters are passed over, merged weights and modules trained in full are exchanged for the original ones;
    ``requires_grad`` and the merge state are not touched.

    Raises:
        ValueError: if the model has no adapter, for one that is injected inside would not be disabled; or if a module
            is trained in full whose parameters have no shape of their own between forwards
            (FullyShardedDataParallel, ZeRO-3).
    """
    check_any_adapter(model, "disabled")
    check_exchangeable(model)
    layers = [weight for _, weight in adapted_weights(model)]
    for layer in layers:
        layer.check_unmergeable()
    for layer in layers:
        layer.disable()
    try:
        with originals(model):
            yield model
    finally:
        for layer in layers:
            layer.enable()
        reshard(model)


def adapter_state_dict(model: nn.Module, *, adapter: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors, detached: ``<module>.lora_A``, ``<module>.lora_B``, ... and modules trained with it.

    Names are the plain model's, whatever wraps it. Where parameters are sharded (``fully_shard``, tensor parallelism,
    FullyShardedDataParallel, ZeRO-3) every rank must call this, and each gets the whole tensors, gathered layer by
    layer. A warning names trainable parameters that belong to no adapter, as that of `save_adapter` does.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: if what is trainable must not be (`save_adapter`), or the adapters are disabled.
    """
    check_adapter(model, adapter)
    check_saved(model, adapter, f"the tensors of adapter {adapter!r} were not taken")
    shards = shards_of(model)
    state: dict[str, Tensor] = {}
    for path, held, _ in adapters_of(model, adapter):
        state |= {join(path, container): tensor for container, tensor in shards.whole(held.tensors()).items()}
    for path, module, record in trained_modules(model, adapter):
        if record.exchanged:
            raise ValueError(f"{path!r} shows its original values; leave the disabled(model) block first")
        tensors = shards.whole(module.state_dict(keep_vars=True))
        state |= {join(path, name): tensor for name, tensor in tensors.items()}
    return state


def check_any_adapter(model: nn.Module, block: str) -> None:
    """Raise if a block of this name would be opened on a model without adapters, where it could hold for none."""
    if not any(adapted_weights(model)) and not any(trained_modules(model)):
        raise ValueError(
            f"the model has no adapter, and {block} would not hold for one that is injected inside the block; call "
            "inject_lora before"
        )


def check_unmerged(path: str, weight: AdaptedWeight, what: str) -> None:
    """Raise, saying before what it must be undone, if this weight of a model is merged."""
    if weight.lora_merge is not None:
        raise ValueError(f"the model is merged ({path!r} is); call unmerge_lora(model) before {what}")


def _check_strengths(strengths: Mapping[str, float]) -> None:
    for name, factor in strengths.items():
        check_number(f"the factor of {name!r}", factor, "finite")


@dataclass(frozen=True)
class SummaryRow:
    """One adapter on one layer."""

    name: str
    """The first name in the model of the layer, parameter or block of rows."""
    layer: str
    """The class of the layer without adapters, or ``"parameter"``."""
    adapter: str
    r: int
    alpha: float
    scale: float
    parameters: int
    """How many numbers the adapter holds for this layer."""
    note: str
    """What a user should know about it; mostly empty."""


@dataclass(frozen=True)
class Summary:
    """What was adapted in a model. ``str()`` of it is a table."""

    rows: list[SummaryRow]
    trained: list[tuple[str, str, int]]
    """Modules trained in full: name, adapter, number of parameters."""
    trainable: int
    """Trainable parameters of the whole model, each counted once."""
    total: int
    """All parameters of the model, each counted once."""
    unsaved: list[tuple[str, int]]
    """Trainable parameters that are saved with no adapter, by name, and their sizes."""

    def __str__(self) -> str:
        head = ("layer", "type", "adapter", "r", "alpha", "scale", "parameters", "note")
        cells = [head] + [
            (row.name or "(model)", row.layer, row.adapter, str(row.r), f"{row.alpha:g}", f"{row.scale:.4g}",
             f"{row.parameters:,}", row.note)
            for row in self.rows
        ]  # fmt: skip
        cells += [(name, "in full", adapter, "", "", "", f"{size:,}", "") for name, adapter, size in self.trained]
        cells += [(name, "trained, not saved", "", "", "", "", f"{size:,}", "") for name, size in self.unsaved]
        share = f"{self.trainable / self.total:.2%}" if self.total else "0%"
        return "\n".join([*aligned(cells), f"{self.trainable:,} of {self.total:,} parameters are trainable ({share})"])


def lora_summary(model: nn.Module) -> Summary:
    """What was adapted: layers, ranks, scales, sizes of whole tensors, and notes on what is unusual."""
    shape = shards_of(model).shape
    rows = []
    for path, adapter, weight in adapters_of(model):
        what = weight.base_class.__name__ if isinstance(weight, LoRALayer) else "parameter"
        shapes = {container: shape(tensor) for container, tensor in adapter.tensors().items()}
        size, spec = sum(each.numel() for each in shapes.values()), adapter.spec
        notes = _notes(adapter, shapes, weight)
        rows.append(SummaryRow(path, what, adapter.name, spec.r, spec.alpha, spec.scale, size, notes))
    trained = [
        (path, record.adapter, sum(shape(p).numel() for p in module.parameters()))
        for path, module, record in trained_modules(model)
    ]
    parameters = list(model.parameters())
    trainable = sum(shape(p).numel() for p in parameters if p.requires_grad)
    beside = [(name, shape(parameter).numel()) for name, parameter in unsaved(model).parameters.items()]
    return Summary(rows, trained, trainable, sum(shape(p).numel() for p in parameters), beside)


def _notes(adapter: Adapter, shapes: Mapping[str, Sequence[int]], weight: AdaptedWeight) -> str:
    merge = weight.lora_merge
    full_rank = min(shapes["lora_B"][-2], shapes["lora_A"][-1])
    spec = adapter.spec
    notes = {
        f"variant {spec.variant}": spec.variant != "lora",
        f"r exceeds the weight's full rank {full_rank}": spec.r > full_rank,
        "inactive": adapter.name not in weight.active_names(),
        f"scale times {adapter.strength:g}": adapter.strength != 1,
        "merged": merge is not None and adapter.name in merge.adapters,
        f"rounding lost {merge.lost if merge else 0} of the update": merge is not None and merge.lost is not None,
    }
    return "; ".join(note for note, holds in notes.items() if holds)
