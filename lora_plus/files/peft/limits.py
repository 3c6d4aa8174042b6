"""What PEFT's format cannot express exactly, and why."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lora_plus.files.outline import Outline
from lora_plus.files.saved_adapter import SavedAdapter, SavedLayer
from lora_plus.layers.base_layer import PARAMETER, BaseLayer
from lora_plus.tensors.variant import only_adds
from lora_plus.text import endings, parents

from .config import fan_in_fan_out
from .pattern_keys import expression
from .tensors import ATTENTION, stack_problem


@dataclass(frozen=True)
class Units:
    """An adapter by what PEFT adapts as one: each has one or several of our adapters, by their names."""

    modules: dict[str, dict[str, SavedLayer]]
    """By module; of a linear layer there are several where they have some rows each."""
    attentions: dict[str, dict[str, SavedLayer]]
    """By attention module, its parts."""
    parameters: dict[str, dict[str, SavedLayer]]
    """By the full name of a parameter."""

    @functools.cached_property
    def transposed(self) -> bool:
        """Whether there is a linear layer that stores its weight as (in, out)."""
        return any(layer.base.kind == "TransposedLinear" for own in self.modules.values() for layer in own.values())


def units(adapter: SavedAdapter) -> Units:
    """The adapter's layers by what PEFT adapts as one."""
    found = Units({}, {}, {})
    for name, layer in sorted(adapter.layers.items(), key=lambda item: (item[1].base.facts.get("rows", [0]), item[0])):
        facts = layer.base.facts
        owner, _, parameter = facts.get("parameter", "").rpartition(".")
        if layer.base.kind != PARAMETER:
            found.modules.setdefault(owner if "rows" in facts else name, {})[name] = layer
        elif facts.get("of") != ATTENTION:
            found.parameters.setdefault(facts["parameter"], {})[name] = layer
        else:
            module = owner.removesuffix("out_proj").removesuffix(".") if parameter == "weight" else owner
            found.attentions.setdefault(module, {})[name] = layer
    return found


def format_problems(adapter: SavedAdapter, found: Units, outline: Outline, ties: Sequence[Sequence[str]]) -> list[str]:
    """Every reason why an adapter cannot be written in PEFT's format."""
    problems = [
        f"train_also {name!r} is tied to {other!r}, and PEFT would untie them; train both, or save a file"
        for name, other in (tied_to_others(ties, adapter.trained) if ties else ())
    ]
    modules = {**found.modules, **found.attentions}
    layers = adapter.layers.values()
    # PEFT has no dropout where it adapts attention, whatever the config says
    heard = [layer for part in (found.modules, found.parameters) for group in part.values() for layer in group.values()]
    if "" in modules or "" in adapter.trained:
        problems.append("the model itself is adapted, and PEFT names only modules inside a model")
    if len({layer.spec.variant == "dora" for layer in layers}) > 1:
        problems.append("some layers are DoRA and some are not, and PEFT has one setting for all")
    if len({layer.spec.dropout for layer in heard}) > 1:
        problems.append("layers differ in dropout, and PEFT has one setting for all")
    reasons = [
        *(
            (name, reason)
            for name, layer in adapter.layers.items()
            for reason in layer_problems(layer.base, layer.spec.variant, name)
        ),
        *(
            (name, "PEFT adapts attention only where q, k and v have one weight together, in_proj_weight")
            for module, parts in found.attentions.items()
            if "in_proj_weight" not in outline.modules.get(module, ())
            for name in parts
        ),
        *(_of_parameters(found, outline) if outline.whole and found.parameters else ()),
    ]
    problems += [f"{name!r}: {reason}" for name, reason in reasons]
    if found.attentions or found.parameters:
        problems += _of_the_order(found, outline)
    return problems + [
        f"train_also {path!r}: {reason}"
        for path, held in adapter.trained.items()
        for reason in (() if "" in held else _of_trained(path, adapter, found, outline))
    ]


def layer_problems(base: BaseLayer, variant: str, name: str = "") -> Iterator[str]:
    """Why PEFT has no adapter that computes the same on such a layer."""
    dora = variant == "dora"
    if not (dora or only_adds(variant)):
        yield f"PEFT has no variant {variant!r}; save a .safetensors file, or merge it"
    if "tied" in base.facts and "ids" not in base.facts and not _is_tied_by_peft(name, base):
        yield "PEFT ties adapters of 'embed_tokens' and 'lm_head' only; save a .safetensors file"
    if "max_norm" in base.facts:
        yield "PEFT adds the update of an embedding after applying max_norm, this library before"
    if base.kind.startswith("ConvTranspose"):
        yield f"PEFT has no adapter for {base.kind}"
    elif dora and "groups" in base.facts:
        # its product of B and A does not go by the groups (_DoraConvNdLayer.get_lora_weight)
        yield "PEFT's DoRA of a grouped convolution divides by the norm of another weight than W + s B A"
    if dora and (base.kind == PARAMETER or "rows" in base.facts):
        yield "PEFT has no DoRA for parameters, attention modules and blocks of rows"


def _is_tied_by_peft(name: str, base: BaseLayer) -> bool:
    """Whether PEFT's ``ensure_weight_tying`` ties these layers: the embedding, and heads by a name that it knows."""
    kinds = {name: base.kind, **base.facts["tied"]}
    known = all(name.rpartition(".")[2] in ("embed_tokens", "lm_head") for name in kinds)
    return known and sorted(kinds.values()) == ["Embedding", "Linear"]


def _of_parameters(found: Units, outline: Outline) -> Iterator[tuple[str, str]]:
    owners = {name.rpartition(".")[0] for name in found.parameters}
    adapted = {**found.modules, **found.attentions}
    # PEFT looks among the parameters of its own adapters too
    others = [*outline.parameters, *(f"{name}.lora_{part}.default.weight" for name in adapted for part in "AB")]
    alike: dict[str, list[str]] = {}
    for other in others:
        for ending in endings(other):
            if ending in found.parameters and other not in found.parameters:
                alike.setdefault(ending, []).append(other)
    for full, layers in found.parameters.items():
        owner = full.rpartition(".")[0]
        base = next(iter(layers.values())).base
        reasons = [stack_problem(base, owner in outline.transposed)]
        if not owner:
            reasons.append("PEFT adapts no parameter of the model itself, only of modules inside it")
        if owner in outline.uncalled:
            reasons.append(f"PEFT adapts a parameter while its module is called, and {owner!r} has no forward")
        if ".base_layer" in f".{owner}":
            reasons.append("PEFT takes 'base_layer' in a name for its own")
        if owner in adapted:
            reasons.append(f"PEFT adapts either {owner!r} or its parameters")
        outer = [other for other in parents(owner) if other in owners]
        reasons += [
            f"PEFT cannot adapt it together with parameters of {other!r}, which is around it" for other in outer
        ]
        reasons += [f"PEFT would adapt {name!r} too, which ends in the same" for name in alike.get(full, ())]
        yield from ((name, reason) for name in layers for reason in reasons if reason is not None)


def _of_the_order(found: Units, outline: Outline) -> Iterator[str]:
    """Where fan_in_fan_out, which PEFT switches from layer to layer, is on for what it does not fit, or may be."""
    kinds = {name: next(iter(layers.values())).base.kind for name, layers in found.modules.items()}
    kinds |= dict.fromkeys(found.attentions, ATTENTION)
    in_order = {name: kinds[name] for name in outline.modules if name in kinds}
    states = fan_in_fan_out(in_order, found.transposed and not found.attentions)
    for name in found.attentions:
        if states.get(name):
            yield f"{name!r}: PEFT would transpose its out_proj, because the linear layer before it is a transposed one"
    if found.parameters and any(list(states.values())[-1:]):
        yield (
            f"{sorted(found.parameters)}: PEFT adapts no parameters of a model whose last adapted linear layer is a "
            "transposed one"
        )
    if outline.whole:
        return
    load = "load the adapter into its model and save it from there"
    for full in found.parameters:
        yield f"{full!r}: how PEFT adapts a parameter depends on its module; {load}"
    if found.attentions and found.transposed:
        yield f"{sorted(found.attentions)}: PEFT may transpose out_proj, by the order of the layers; {load}"


def _of_trained(path: str, adapter: SavedAdapter, found: Units, outline: Outline) -> Iterator[str]:
    wrapped = [name for name in outline.names if name.endswith(path) and name not in adapter.trained]
    yield from (f"PEFT would take {name!r} for it, which ends in the same" for name in wrapped)
    try:
        # PEFT also reads the name as a regular expression, for modules that get no adapter
        kept_out = expression(path)
    except ValueError as error:
        yield f"PEFT reads the name as a regular expression, and it {error}"
    else:
        for name in sorted({*found.modules, *found.attentions}):
            if name not in wrapped and kept_out(name):
                yield f"PEFT reads the name as a regular expression, and {name!r} matches it"
    if path in outline.containers:
        yield "PEFT trains only modules with a forward of their own in full"
    owners = {name.rpartition(".")[0] for name in found.parameters}
    for owner in parents(path):
        if owner in owners:
            yield f"PEFT does not find it inside {owner!r}, whose parameters it adapts"


def tied_to_others(ties: Iterable[Sequence[str]], trained: Collection[str]) -> Iterator[tuple[str, str]]:
    """Of ``ties``, parameters of modules trained in full that others share, by both names: PEFT unties them."""
    for names in ties:
        inside = [name for name in names if any(not path or name.startswith(f"{path}.") for path in trained)]
        outside = [name for name in names if name not in inside]
        if inside and outside:
            yield inside[0], outside[0]
