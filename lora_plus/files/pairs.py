"""Adapters that are pairs of tensors in one safetensors file, as programs for image models write them.

Each module has a down matrix, our A, and an up matrix, our B; those of a convolution are convolutions, down
``(r, in, *kernel)`` and up ``(out, r, 1, ...)``. Which kind of layer a module is, the model knows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lora_plus.layers.base_layer import BaseLayer
from lora_plus.tensors.variant import only_adds
from lora_plus.text import near_misses

from .peft.tensors import convolution_from_peft
from .saved_adapter import SavedAdapter, SavedLayer, checked_spec
from .target import Target
from .token_rows import is_rows, row_layers

KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d")
"""The kinds of layers that these formats have adapters of."""

_OTHER_METHODS = {
    "hada_*": "of LoHa, a Hadamard product",
    "lokr_*": "of LoKr, a Kronecker product",
    "oft_*": "of OFT, a rotation",
    "lora_mid": "the middle one of a convolution in three parts (CP decomposition)",
    "diff": "the difference of a whole weight",
    "diff_b": "the difference of a bias",
    "[wb]_norm": "the difference of a norm's weight or bias",
}
"""Tensors of other methods that such files have, by the pattern of their last name, and what they are."""

_NUMBERS = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
"""What Python has a number for; that of a boolean is refused with the settings."""


@dataclass(frozen=True)
class Dialect:
    """How a format spells the names of tensors and modules."""

    name: str
    pairs: tuple[tuple[str, str], ...]
    """How the names of a down matrix and of its up matrix end."""
    magnitude: str
    """How the name of DoRA's magnitude ends."""
    separator: str
    """What stands between the parts of a module's name."""
    components: Mapping[str, tuple[str, ...]]
    """What the names of modules in one part of a pipeline start with, and how models call that part."""

    @property
    def endings(self) -> dict[str, str]:
        """How the name of a tensor ends, and what the tensor is to us."""
        sides = {end: part for pair in self.pairs for end, part in zip(pair, ("lora_A", "lora_B"), strict=True)}
        return {**sides, self.magnitude: "lora_magnitude", "alpha": "alpha"}

    @property
    def only(self) -> str:
        """What the format has adapters of, as a sentence."""
        return f"{self.name} files have adapters of {', '.join(KINDS)} only"

    def names(self, tensor: str) -> bool:
        """Whether the name of a tensor says that it is one of an adapter in this format."""
        return any(tensor.endswith(f".{end}") for pair in self.pairs for end in pair)

    def spelled(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The names of modules by how a file spells them."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(name.replace(".", self.separator), []).append(name)
        return found

    def component(self, module: str) -> str:
        """The part of a pipeline that a module of the file says it belongs to; empty if it says none."""
        return next((part for part in self.components if module.startswith(f"{part}{self.separator}")), "")


@dataclass
class Pair:
    """What a file has for one module."""

    tensors: dict[str, Tensor]
    """``lora_A``, ``lora_B``, and ``lora_magnitude`` for DoRA."""
    r: int
    alpha: float | None
    """None if the file has none."""

    def settings(self) -> dict[str, Any]:
        """What the tensors alone say: alpha = r if there is none, and DoRA if there is a magnitude."""
        alpha = self.r if self.alpha is None else self.alpha
        variant = "dora" if "lora_magnitude" in self.tensors else "lora"
        return {"r": self.r, "alpha": alpha, "scaling": "standard", "variant": variant, "dropout": 0.0}


def find_pairs(tensors: Mapping[str, Tensor], dialect: Dialect, problems: list[str]) -> dict[str, Pair]:
    """The whole pairs of a file by module; everything else is added to the problems."""
    endings = dialect.endings
    found: dict[str, dict[str, str]] = {}
    unread: set[str] = set()
    for key in sorted(tensors):
        end = next((end for end in endings if key.endswith(f".{end}")), None)
        if end is None:
            last = key.removesuffix(".weight").rpartition(".")[2]
            what = next((what for pattern, what in _OTHER_METHODS.items() if fnmatchcase(last, pattern)), None)
            unread.add(key.rpartition(".")[0].removesuffix(".lora_mid"))
            reason = f"is {what}, and only LoRA and DoRA are read" if what else "belongs to no adapter"
            problems.append(f"tensor {key!r} {reason}")
            continue
        parts = found.setdefault(key.removesuffix(f".{end}"), {})
        first = parts.setdefault(endings[end], end)
        if first != end:
            problems.append(f"tensor {key!r}: the module has {first} already")
    pairs = {}
    for module, parts in found.items():
        if module in unread:
            continue
        given = {part: tensors[f"{module}.{end}"] for part, end in parts.items()}
        wrong = [f"{module!r}: {line}" for line in _wrong(parts, given, dialect)]
        problems += wrong
        if not wrong:
            alpha = given.pop("alpha").item() if "alpha" in given else None
            pairs[module] = Pair(given, given["lora_A"].shape[0], alpha)
    return pairs


def _wrong(parts: Mapping[str, str], given: Mapping[str, Tensor], dialect: Dialect) -> Iterator[str]:
    ends = next((pair for pair in dialect.pairs if set(pair) & set(parts.values())), dialect.pairs[0])
    missing = [end for end, part in zip(ends, ("lora_A", "lora_B"), strict=True) if part not in parts]
    yield from (f"{end} is missing" for end in missing)
    shapes = {part: tuple(tensor.shape) for part, tensor in given.items()}
    if "alpha" in given and math.prod(shapes["alpha"]) != 1:
        yield f"alpha has shape {shapes['alpha']}, expected a single number"
    elif "alpha" in given and given["alpha"].dtype not in _NUMBERS:
        yield f"alpha is {given['alpha'].dtype}, expected a number"
    if missing:
        return
    flat = [part for part in ("lora_A", "lora_B") if len(shapes[part]) < 2]
    yield from (f"{parts[part]} has shape {shapes[part]}, expected two dimensions or more" for part in flat)
    # of a convolution in groups, B has the rank of one group; the layer's shape shows it
    if len(shapes["lora_A"]) == len(shapes["lora_B"]) == 2 and shapes["lora_A"][0] != shapes["lora_B"][1]:
        yield f"{parts['lora_A']} has rank {shapes['lora_A'][0]}, {parts['lora_B']} has {shapes['lora_B'][1]}"


def assemble(
    pairs: Mapping[str, Pair],
    dialect: Dialect,
    settings_of: Callable[[str, Pair], dict[str, Any] | None],
    target: Target,
    problems: list[str],
) -> SavedAdapter:
    """The adapter that the pairs of a file are, under the names of the target; what is wrong is added to the problems.

    ``settings_of`` gives the settings of a module's adapter; None if they are wrong, which it has reported.
    """
    names = target.names()
    if names is None:
        problems.append(
            f"{dialect.name} files do not say what kind of layers their modules are; load the file into its model, and "
            "save it as a .safetensors file"
        )
        return SavedAdapter({}, {})
    layers = {}
    for module, name in _resolve(pairs, names, dialect, target, problems).items():
        settings = settings_of(module, pairs[module])
        spec = None if settings is None else checked_spec(repr(module), settings, problems)
        if spec is None:
            continue
        base = target.base(name)
        if base is not None and base.kind not in KINDS:
            problems.append(f"{name!r}: {base.kind}; {dialect.only}")
            continue
        # whoever asks for the adapter reports modules that cannot be adapted
        layer = SavedLayer(base or BaseLayer("", "", ()), spec, pairs[module].tensors)
        whole = layer if len(layer.base.shape) < 3 else convolution_from_peft(name, layer, problems)
        if whole is not None:
            layers[name] = whole
    return SavedAdapter(dict(sorted(layers.items())), {}, resolved=True)


def _resolve(
    modules: Collection[str], names: Collection[str], dialect: Dialect, target: Target, problems: list[str]
) -> dict[str, str]:
    """The name in the target, out of its ``names``, of each module of a file, where there is just one."""
    spelled = dialect.spelled(names)
    children = {name.partition(".")[0] for name in names}
    found: dict[str, str] = {}
    lost: dict[str, dict[str, str]] = {}
    sizes: Counter[str] = Counter()
    for module in modules:
        wanted = target.rename(module, dialect.separator)
        if wanted is None:
            continue
        component, spelling = _inside(wanted.replace(".", dialect.separator), dialect, spelled, children)
        sizes[component] += 1
        # of modules that are spelled alike, the one that can be adapted is meant
        alike = [wanted] if wanted in names else spelled.get(spelling, [])
        alike = [name for name in alike if target.base(name) is not None] or alike
        if len(alike) == 1:
            found[module] = alike[0]
        elif alike:
            choice = f"say which with names={{{module!r}: {alike[0]!r}}}"
            problems.append(f"{module!r} can be {' or '.join(map(repr, alike))}; {choice}")
        else:
            lost.setdefault(component, {})[module] = spelling
    first: dict[str, str] = {}
    for module, name in found.items():
        if first.setdefault(name, module) != module:
            problems.append(f"{first[name]!r} and {module!r} are both {name!r} here; map or leave out one with names")
    for component, missing in lost.items():
        problems += _lost(component, missing, spelled, whole=len(missing) == sizes[component])
    return {module: name for module, name in found.items() if first[name] == module}


def _inside(wanted: str, dialect: Dialect, spelled: Collection[str], children: Collection[str]) -> tuple[str, str]:
    """The component that a module belongs to, and how its name is spelled in a target, which may be that component."""
    component = dialect.component(wanted)
    if not component or wanted in spelled:
        return component, wanted
    rest = wanted.removeprefix(f"{component}{dialect.separator}")
    child = next((name for name in dialect.components[component] if name in children), None)
    return component, rest if child is None else f"{child}{dialect.separator}{rest}"


def _lost(component: str, missing: Mapping[str, str], spelled: Collection[str], whole: bool) -> Iterator[str]:
    """What to say of modules that the target does not have."""
    # looking for near misses is slow, and a few of them show what is wrong
    hints = [near_misses(spelling, spelled) for spelling in list(missing.values())[:3]] + [""] * len(missing)
    if component and whole:
        yield (
            f"none of the {len(missing)} modules of {component!r} is in the model, the first is "
            f"{next(iter(missing))!r}{hints[0]}; load the file into a model that has them, map them with names, or "
            f"leave them out with names={{{component!r}: None}}"
        )
    else:
        for module, hint in zip(missing, hints, strict=False):
            yield f"{module!r}: the model has no such module{hint}"


def format_problems(adapter: SavedAdapter, dialect: Dialect) -> list[str]:
    """Every reason why an adapter cannot be written as pairs."""
    lines = [
        f"{name!r}: {'some rows of a weight' if 'rows' in layer.base.facts else layer.base.kind}; {dialect.only}"
        for name, layer in adapter.layers.items()
        if layer.base.kind not in KINDS or "rows" in layer.base.facts
    ]
    lines += [
        f"{name!r}: {dialect.name} files have no variant {layer.spec.variant!r}; save a native file, or merge it"
        for name, layer in adapter.layers.items()
        if layer.spec.variant != "dora" and not only_adds(layer.spec.variant)
    ]
    lines += [f"{name!r}: rows of tokens; {dialect.only}" for name in row_layers(adapter)]
    lines += [
        f"{name!r}: {dialect.name} files have no adapter that tied layers share; save a native file"
        for name, layer in adapter.layers.items()
        if "tied" in layer.base.facts and not is_rows(layer)
    ]
    lines += [f"{name!r}: the model itself is adapted, and it has no name" for name in adapter.layers if not name]
    return lines + [f"train_also {name!r}: {dialect.only}" for name in adapter.trained]
