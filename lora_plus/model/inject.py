"""Put adapters into a model, by giving its layers other classes in place, and take them out again."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lora_plus.errors import entry_of, named_keywords
from lora_plus.layers.adapter import check_adapter_name
from lora_plus.layers.class_swap import SwappedModule
from lora_plus.layers.freezing import restore_requires_grad, set_requires_grad
from lora_plus.layers.fused_kernels import resume_nesting, stop_nesting
from lora_plus.layers.kinds import why_no_numbers
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.tensors.init import Init, InitName, Start
from lora_plus.tensors.random_state import draws
from lora_plus.tensors.variant import AdapterSpec, Scaling, VariantName
from lora_plus.text import parents

from .patterns import Pattern
from .places import TIES, Place
from .selection import Selection
from .state import EXCHANGE, Need, State, require
from .train_also import Unit, drop_heads, mark_trained, train_heads

M = TypeVar("M", bound=nn.Module)


@contextmanager
def gc_paused() -> Iterator[None]:
    """No cyclic garbage collection inside: it would walk thousands of new objects again and again, and free none.

    Also a decorator. A collector that was off before stays off.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@named_keywords
@gc_paused()
@draws
def inject_lora(
    model: M,
    targets: Pattern | Sequence[Pattern],
    *,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    exclude: Pattern | Sequence[Pattern] = (),
    rank_pattern: Mapping[Any, int] | None = None,
    alpha_pattern: Mapping[Any, float] | None = None,
    scaling: Scaling = "standard",
    init: InitName | Init = "kaiming",
    variant: VariantName = "lora",
    train_also: Pattern | Sequence[Pattern] = (),
    train_rows: Mapping[Any, Sequence[int]] | None = None,
    fused: Mapping[Any, Sequence[str] | Mapping[str, int]] | None = None,
    layouts: Mapping[Any, str] | None = None,
    tied: Literal["named", "both"] = "named",
    adapter: str = "default",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> M:
    """Add low-rank adapters to the selected layers of a model, and freeze everything else.

    The layers become LoRA layers in place: the same objects, with the same parameters under the same names. With the
    default init B is zero, so the output is unchanged. Do not run the model in one thread while another changes it.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = inject_lora(model, ["0"], r=2, train_also=["2"])
        >>> sorted(name for name, p in model.named_parameters() if p.requires_grad)
        ['0.lora_A.default', '0.lora_B.default', '2.bias', '2.weight']

    Args:
        model: any module; it is changed.
        targets: what gets adapters: a pattern or a list of patterns. A pattern is a name (``"q"`` matches ``q`` and
            every name that ends in ``.q``), a glob (``"layers.*.mlp.*"``, matched from the start of the name or after
            any dot), a compiled regular expression (on the full name), a module type, a function ``(name, module) ->
            bool``, ``"all-linear"``, or ``""`` for the model itself. Patterns match layers, parts of layers that read
            their weights themselves (``attn.q``, ``lstm.weight_ih_l0``), and otherwise parameters of two or three
            dimensions.
        r: rank of the update.
        alpha: numerator of the scaling.
        dropout: probability that an entry of an adapter's input is dropped in training.
        exclude: patterns of layers that get no adapter although a target matches them.
        rank_pattern: ``{pattern: r}`` for layers with another rank; two keys on one layer are an error.
        alpha_pattern: the same for ``alpha``.
        scaling: ``"standard"`` (alpha / r) or ``"rslora"`` (alpha / sqrt(r)).
        init: ``"kaiming"``, ``"gaussian"``, ``"orthogonal"`` (B zero), ``"kaiming_B"`` (A zero), ``"pissa"``,
            ``"milora"``, ``"olora"`` (A and B from the weight; this start is subtracted from the update), or a function
            ``(weight, r, generator) -> (A, B)``.
        variant: ``"lora"``, ``"lora_fa"`` (A frozen at its start; plain LoRA in files of other formats) or ``"dora"``.
        train_also: patterns of modules to train in full and save with the adapter, such as a new head. A pattern that
            matches no module is looked for among the parameters, such as ``"q.bias"``. Each adapter has its own values.
        train_rows: ``{pattern: ids}``: rows of embeddings and heads to train and save with the adapter, such as those
            of new tokens, ``{"embed_tokens": [32000, 32001]}``. A tied head uses them, too. ``targets`` can be empty.
        fused: ``{"c_attn": ["q", "k", "v"]}`` for layers that compute several projections together, or
            ``{"qkv": {"q": 64, "k": 16, "v": 16}}`` with the rows of each. The targets are then ``c_attn.q``, ..., each
            with its own A and B, or ``c_attn`` for all of them.
        layouts: ``{pattern: layout}`` for parameters that are not stored as (out, in): one of ``"i o -> o i"``,
            ``"e o i -> e o i"`` (a stack of experts, the default for three dimensions), ``"e i o -> e o i"``.
        tied: for a weight that several layers share, such as an embedding and a head: ``"named"`` adapts the layers
            that targets name, each with its own A and B; ``"both"`` gives all layers that share the weight one A and
            one B, so that they stay tied when they are merged.
        adapter: name of the adapter. A model can hold several; the one injected last is the active one.
        dtype: dtype of A and B; None for float32, or the base's dtype if that is wider.
        generator: source of all random numbers; None for torch's global generator.

    Returns:
        The same model.

    Raises:
        ValueError: naming every pattern that matches nothing that can be adapted, and every setting out of range. The
            model is then as it was.
    """
    check_adapter_name(adapter)
    spec = AdapterSpec(r=r, alpha=alpha, dropout=dropout, scaling=scaling, variant=variant)
    start = Start(init, dtype, generator)
    state = require(model, "adding an adapter", Need.GROWABLE, new=adapter)
    with state.storage.outlined():
        selection = Selection(
            state.names, spec, targets, exclude=exclude, train_also=train_also, rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern, fused=fused, layouts=layouts, train_rows=train_rows,
        )  # fmt: skip
        places = entry_of("tied", tied, TIES)(selection, state.names)
        check_selection(state, [place for place, _ in places], selection.train_also)
        prepared = [(place, own, place.new_tensors(state.storage, own, start)) for place, own in places]
        attach(state, adapter, prepared, selection.train_also)
    return model


def remove_lora(model: M) -> M:
    """Remove all adapters and restore the plain model, as it was before the first injection.

    This restores classes, parameter names, ``requires_grad``, the weights of merged layers, and the values of modules
    trained in full (``train_also``). To keep what was learnt, call `merge_and_unload` instead.

    Returns:
        The same model.
    """
    needs = Need.ENABLED | Need.RESTORABLE | Need.UNFOLLOWED | Need.EXCHANGEABLE | Need.HIDEABLE
    state = require(model, "removing adapters", needs)
    heads = list(state.trained())
    EXCHANGE[-1](state, (), heads)
    drop_heads(state, heads, state.storage)
    for _, weight in state.weights:
        if weight.lora_merge is not None:
            weight.unmerge()
    make_plain(state)
    return model


def make_plain(state: State) -> None:
    """Turn everything adapted into what it was, with the weights that are bound, and restore ``requires_grad``."""
    modules = [module for _, module in state.modules]
    for module in modules:
        if isinstance(module, SwappedModule):
            module.restore()
    resume_nesting(modules)
    restore_requires_grad(modules)


def attach(
    state: State,
    adapter: str,
    prepared: Sequence[tuple[Place, AdapterSpec, dict[str, Tensor]]],
    train_also: Sequence[Unit] = (),
    *,
    trainable: bool = True,
) -> None:
    """Put prepared tensors in their places, freeze the rest of the model, and make the adapter the active one."""
    for place, _, _ in prepared:
        place.check_adoptable()
    modules = [module for _, module in state.modules]
    for unit in train_also:
        mark_trained(unit, adapter, state.storage)
    set_requires_grad(modules, False)
    train_heads(state, state.trained(), False)
    EXCHANGE[-1](state, (adapter,), ())
    train_heads(state, state.trained(adapter), trainable)
    for _, weight in state.weights:
        for site in weight.adapter_sites():
            site.freeze_adapters()
    for place, spec, tensors in prepared:
        place.adopt().add_adapter(adapter, spec, tensors, trainable=trainable)
    new = {place.adapted() for place, _, _ in prepared}
    for weight in filter(None, new.union(weight for _, weight in state.weights)):
        weight.activate((adapter,))
    for module in modules:
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(c, AdaptedWeight) for c in module.modules()):
            stop_nesting(module)


def make_active(
    state: State, names: Sequence[str], strengths: Mapping[str, float] | None = None, *, trainable: bool | None = None
) -> None:
    """Let just these adapters take part, as `set_adapter` does once all is checked."""
    EXCHANGE[-1](state, names, ())
    for _, weight in state.weights:
        weight.activate(names, strengths)
    if trainable is not None:
        for _, adapter, _ in state.adapters():
            adapter.set_trainable(trainable and adapter.name in names)
        train_heads(state, state.trained(), False)
        train_heads(state, (head for head in state.trained() if trainable and head.adapter in names), True)


def check_selection(state: State, places: Sequence[Place], train_also: Sequence[Unit]) -> None:
    """Raise if a layer is inside of what another adapter trains in full, or something cannot be so trained.

    So, too, where weights have values only while a forward runs that would not bring in the adapted ones.
    """
    # A tool that offloads weights assigns a forward to the module around which it brings them in. A layer with such a
    # forward of its own can be adapted: that forward is then its base computation.
    assigned = {name for name, module in state.names if "forward" in module.__dict__}
    for place in places if assigned else ():
        if isinstance(place.owner, AdaptedWeight) or not place.stored().is_meta:
            continue
        around = {"", place.owner_name, *parents(place.owner_name)} & assigned
        if around and (not place.called or place.owner_name not in around):
            raise ValueError(
                f"the weight of {place.name!r} is offloaded: it has values only while {max(around, key=len)!r} runs, "
                "whose hook does not handle adapters; exclude it, or do not offload it"
            )
    named = {id(unit.record()) for unit in train_also}
    heads = sorted(state.trained(), key=lambda head: id(head.record) not in named)  # the last of tied ones is refused
    trained = {id(it): head for head in heads for it in (*head.unit.modules(), *head.unit.tensors().values())}
    for place in places if trained else ():
        for head in filter(None, map(trained.get, (id(place.owner), id(place.stored())))):
            with_it = f"{head.unit.name!r} is trained in full with the adapter {head.adapter!r}"
            raise ValueError(f"{place.name!r} cannot be adapted: {with_it}; leave it out, or call delete_adapter first")
    weights = {id(weight.own_weight()) for _, weight in state.weights if train_also}
    weights |= {id(place.stored()) for place in places if train_also}
    for unit in train_also:
        bound, modules = unit.tensors().values(), unit.modules()
        if not all(isinstance(value, Tensor) for value in bound):
            raise ValueError(f"train_also: {unit.name!r} has state that is not a tensor and could not be restored")
        for head in filter(None, map(trained.get, map(id, bound))):
            if unit.record() is None or id(head.record) not in named:
                raise ValueError(
                    f"train_also: {unit.name!r} has a tensor of {head.unit.name!r}, which the adapter {head.adapter!r} "
                    "trains in full; name the same for both adapters"
                )
        if not any(isinstance(value, nn.Parameter) and value.is_floating_point() for value in bound):
            raise ValueError(f"train_also: {unit.name!r} ({type(unit.module).__name__}) has no parameter to train")
        if any(map(why_no_numbers, [getattr(child, "weight", None) for child in modules] or bound)):
            raise ValueError(f"train_also: {unit.name!r} has a quantized weight, which cannot be trained")
        if any(isinstance(child, AdaptedWeight) for child in modules) or not weights.isdisjoint(map(id, bound)):
            raise ValueError(f"train_also: {unit.name!r} is an adapted weight, or contains or is tied to one; omit it")
