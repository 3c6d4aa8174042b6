"""Adapters made of adapters: several combined into one, and one given another rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_plus.errors import Problems
from lora_plus.layers.adapter import AdapterSite
from lora_plus.layers.adapter_tensors import check_adapter_name
from lora_plus.model.adapters import check_adapter
from lora_plus.model.inject import attach, check_injectable, check_whole
from lora_plus.model.places import Place, adapted_places
from lora_plus.model.train_also import trained_modules
from lora_plus.tensors.low_rank import Factors, truncated_product
from lora_plus.tensors.matrix import accumulation_dtype, full_precision
from lora_plus.tensors.random_state import draws
from lora_plus.tensors.variant import SCALINGS, VARIANTS, AdapterSpec, only_adds
from lora_plus.text import counted, printable

from .methods import METHODS, Method, Options, Update


@dataclass(frozen=True)
class CombineReport:
    """What came out. ``str()`` of it is one line for each thing worth knowing."""

    adapter: str
    """The adapter's name."""
    ranks: dict[str, int]
    """Its rank on each layer."""
    errors: dict[str, float]
    """How far the update of each layer is from the wanted one, relative to that (Frobenius norm); 0 where no rank was
    cut off."""
    ignored: list[str] = field(default_factory=list)
    """What differs in a tuned model and is not in the adapter, by name (`extract_adapter` only)."""

    def __str__(self) -> str:
        lowest, highest = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"{lowest}" if lowest == highest else f"{lowest} to {highest}"
        lines = [f"adapter {self.adapter!r}: {counted(len(self.ranks), 'layer')}, rank {ranks}"]
        if any(self.errors.values()):
            worst = max(self.errors, key=self.errors.__getitem__)
            median = sorted(self.errors.values())[len(self.errors) // 2]
            lines.append(
                f"relative error of the update: {median:.2g} in the median layer, {self.errors[worst]:.2g} in {worst!r}"
            )
        if self.ignored:
            more = f" and {len(self.ignored) - _SHOWN} more" if len(self.ignored) > _SHOWN else ""
            lines.append(f"not in it, though they differ: {printable(', '.join(self.ignored[:_SHOWN]))}{more}")
        return "\n".join(lines)


_SHOWN = 10
"""How many names a report prints."""


# ---- over a model ----------------------------------------------------------------------------------------------------


@draws
def combine_adapters(
    model: nn.Module,
    adapters: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    adapter: str = "combined",
    method: str = "sum",
    r: int | None = None,
    density: float | None = None,
    generator: torch.Generator | None = None,
    trainable: bool = False,
) -> CombineReport:
    """Add to a model an adapter that is made of some that it has, whatever their ranks and layers.

    With ``D_i = w_i s_i B_i A_i``, zero where an adapter has no such layer, the update of each layer is:

    - ``"sum"``: ``D_1 + D_2 + ...``, exact: the factors side by side, so ranks add up.
    - ``"svd"``: the best approximation of that sum of rank r; no matrix of the layer's size is made.
    - ``"ties"``: each D_i keeps the ``density`` largest part of its entries; by entry, the mean of those that have the
      sign of their sum; cut to rank r (arXiv:2306.01708).
    - ``"dare"``: each entry of D_i stays with probability ``density``, divided by it; the sum, cut to rank r
      (arXiv:2311.03099).
    - ``"dare_ties"``: thinned as in dare, joined as in ties.

    The last three hold a matrix of the layer's size for each adapter, for one layer at a time. The adapters that it is
    made of keep every bit. As after an injection, the new one is the active one and the others are frozen.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> for name in ("math", "code"):
        ...     _ = inject_lora(model, ["0"], r=2, adapter=name)
        >>> combine_adapters(model, ["math", "code"], weights=[1, -0.5], adapter="math without code").ranks
        {'0': 4}

    Args:
        model: a model with adapters; it is changed.
        adapters: the names of those to combine.
        weights: a factor for each, which may be negative; None for 1.
        adapter: the name of the new one.
        method: one of the above.
        r: the largest rank that a layer gets: less where its update has less. For all methods but ``"sum"``.
        density: part of the entries that stays, above 0 and at most 1. For ``"ties"``, ``"dare"``, ``"dare_ties"``.
        generator: source of the random numbers of ``"dare"`` and ``"dare_ties"``; None for torch's global generator.
        trainable: whether the new adapter shall be trained.

    Returns:
        A report: ranks, and what cutting them lost.

    Raises:
        KeyError: if the model holds no adapter of such a name.
        TypeError, ValueError: if a setting is out of range, missing, or without effect for the method; if an adapter
            cannot be combined (DoRA, ``train_also``, values that are not finite, sharded tensors); if the model is
            merged or disabled, or has an adapter of the new name. The model is then as it was.
    """
    check_adapter_name(adapter)
    chosen, options = _chosen(method, {"r": r, "density": density, "generator": generator})
    by_adapter = _by_adapter(adapters, weights)
    check_adapter(model, *by_adapter)
    check_injectable(model, adapter)
    check_whole(model, "combining adapters")
    draft = _combined(model, by_adapter, chosen, options)
    attach(model, adapter, draft.prepared, (), trainable=trainable)
    return draft.report(adapter)


@draws
def resize_adapter(
    model: nn.Module, *, r: int, adapter: str = "default", generator: torch.Generator | None = None
) -> CombineReport:
    """Give an adapter another rank, in place: its update stays what it was, or the nearest there is of a lower rank.

    A higher rank keeps the update as it is: A gets rows that are drawn as at the start, B columns of zeros. Scale,
    scaling rule, ``requires_grad`` and what a variant has besides (DoRA's magnitudes) stay; alpha follows from the
    scale. A and B become new parameters, so make the optimizer afterwards. An adapter that started from a part of the
    weight (PiSSA and the like) is taken for the update of rank 2 r that it is, and becomes a plain one.

    Args:
        model: a model with the adapter; it is changed.
        r: the new rank, on all of its layers.
        adapter: the adapter's name.
        generator: source of the new rows of A; None for torch's global generator.

    Returns:
        A report: ranks, and what cutting them lost.

    Raises:
        KeyError: if the model holds no adapter of this name.
        TypeError, ValueError: if r is not a positive int, the model is merged or disabled, or the adapter's values are
            not finite or sharded. The model is then as it was.
    """
    AdapterSpec(r=r, alpha=1)
    check_adapter(model, adapter)
    check_injectable(model, "")  # it gets new parameters, as if an adapter were added
    check_whole(model, "resizing an adapter")
    draft = Draft()
    sites = [(place, site) for place, site in adapted_places(model) if adapter in site.lora_specs]
    changed = [_resize(draft, place, site, adapter, r, generator) for place, site in sites]
    draft.check(f"adapter {adapter!r} cannot be resized; it is unchanged")
    for (_, site), (spec, tensors) in zip(sites, changed, strict=True):
        site.exchange_tensors(adapter, tensors)
        if tensors:
            site.forget_start(adapter)
        site.lora_specs[adapter] = spec
    return draft.report(adapter)


# ---- an adapter in the making ----------------------------------------------------------------------------------------


@dataclass
class Draft:
    """What has been computed of an adapter, place by place, and what is wrong with it; no model is changed."""

    prepared: list[tuple[Place, AdapterSpec, dict[str, Tensor]]] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def fit(self, place: Place, device: torch.device, compute: Callable[..., Factors], *args: Any) -> Factors | None:
        """The factors that a computation gives; None if they are not finite, which is a problem."""
        try:
            with full_precision(device):
                fit = compute(*args)
        except torch.linalg.LinAlgError:  # what a decomposition says of such numbers
            fit = None
        if fit is None or not all(bool(factor.isfinite().all()) for factor in (fit.A, fit.B)):
            self.problems.append(f"{place.name!r}: its update is too large for its dtype to be computed with")
            return None
        return fit

    def add(self, place: Place, fit: Factors, dtype: torch.dtype) -> None:
        """Take these factors, in this dtype and with the scale 1, for a new adapter."""
        r = fit.A.shape[-2]
        tensors = {"lora_A": fit.A.to(dtype).contiguous(), "lora_B": fit.B.to(dtype).contiguous()}
        self.prepared.append((place, AdapterSpec(r=r, alpha=r), tensors))
        self.note(place, r, fit.error)

    def note(self, place: Place, r: int, error: float) -> None:
        """Have this in the report."""
        self.ranks[place.name], self.errors[place.name] = r, error

    def check(self, failure: str) -> None:
        """Raise if anything is wrong."""
        if self.problems:
            raise Problems(failure, self.problems)

    def report(self, adapter: str, ignored: Sequence[str] = ()) -> CombineReport:
        return CombineReport(adapter, self.ranks, self.errors, list(ignored))


def unusable(*tensors: Tensor) -> str | None:
    """Why these tensors cannot be computed with; None if they can."""
    if any(tensor.is_meta for tensor in tensors):
        return "has no values (meta device); load them first"
    if any(hasattr(tensor, "full_tensor") for tensor in tensors):
        return "is sharded; do this before the model is sharded"
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
    return None if finite else "has values that are not finite"


@torch.no_grad()
def _combined(model: nn.Module, weights: Mapping[str, float], method: Method, options: Options) -> Draft:
    draft = Draft()
    draft.problems += [
        f"{path!r} is trained in full with {name!r}, and values have no sum as updates have; use adapters without "
        "train_also"
        for name in weights
        for path, _, _ in trained_modules(model, name)
    ]
    for place, site in adapted_places(model):
        names = [name for name in weights if name in site.lora_specs]
        wrong = [f"{place.name!r}: {name!r} {why}" for name in names if (why := _no_summand(site, name)) is not None]
        draft.problems += wrong
        if wrong or not names:
            continue
        parts = [(*site.factors(name), weights[name] * site.lora_specs[name].scale) for name in names]
        dtype = accumulation_dtype(*(factor.dtype for A, B, _ in parts for factor in (A, B)))
        updates = [Update(A.to(dtype), B.to(dtype), factor) for A, B, factor in parts]
        fit = draft.fit(place, updates[0].A.device, method.combine, updates, options)
        if fit is not None:
            draft.add(place, fit, dtype)
    draft.check(f"adapters {list(weights)} cannot be combined; the model is unchanged")
    return draft


def _no_summand(site: AdapterSite, adapter: str) -> str | None:
    """Why an adapter's part of a place cannot be added to another's; None if it can."""
    variant = site.lora_specs[adapter].variant
    if VARIANTS[variant].rescales:
        return f"is of the variant {variant!r}, which rescales the weight: that is no update that could be added"
    if not only_adds(variant):
        return f"is of the variant {variant!r}, which is more than a product of A and B"
    return unusable(*site.factors(adapter))


def _of_rank(spec: AdapterSpec) -> str | None:
    """Why an adapter cannot have another rank; None if it can."""
    tied = [tensor.name for tensor in VARIANTS[spec.variant].tensors if "r" in tensor.axes]
    return f"is of the variant {spec.variant!r}, whose {', '.join(tied)} cannot have another rank" if tied else None


@torch.no_grad()
def _resize(
    draft: Draft, place: Place, site: AdapterSite, adapter: str, r: int, generator: torch.Generator | None
) -> tuple[AdapterSpec, dict[str, nn.Parameter]]:
    """The settings and the parameters at the new rank; those that there are where nothing changes."""
    spec, plain = site.plain(adapter)
    A, B = plain["lora_A"], plain["lora_B"]
    fit: Factors | None = Factors(A, B, 0.0)
    if (why := unusable(A, B) or _of_rank(spec)) is not None:
        draft.problems.append(f"{place.name!r} {why}")
        fit = None
    elif r < spec.r:
        dtype = accumulation_dtype(A.dtype, B.dtype)
        fit = draft.fit(place, A.device, truncated_product, A.to(dtype), B.to(dtype), r)
    own = site.adapter_tensors(adapter)
    if fit is None or (r == spec.r and A is own["lora_A"]):
        draft.note(place, spec.r, 0.0)
        return spec, {}
    new_A, new_B, error = fit
    missing = r - new_A.shape[-2]  # also where the rank falls, but not below the full one
    if missing:
        rows = AdapterSpec(r=missing, alpha=1)
        fresh = place.new_tensors(rows, init="kaiming", dtype=A.dtype, generator=generator)
        new_A = torch.cat([new_A, fresh["lora_A"].to(new_A)], dim=-2)
        new_B = torch.cat([new_B, fresh["lora_B"].to(new_B)], dim=-1)
    draft.note(place, r, error)
    tensors = {"lora_A": new_A, "lora_B": new_B}
    return replace(spec, r=r, alpha=spec.scale / SCALINGS[spec.scaling](1.0, r)), {
        name: nn.Parameter(new.to(own[name].dtype).contiguous(), own[name].requires_grad)
        for name, new in tensors.items()
    }


# ---- settings --------------------------------------------------------------------------------------------------------


def _chosen(method: str, given: Mapping[str, Any]) -> tuple[Method, Options]:
    """The method and what it is told, checked."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {list(METHODS)}")
    takes = METHODS[method].options
    for name, value in given.items():
        if value is not None and name not in takes:
            others = [other for other, entry in METHODS.items() if name in entry.options]
            raise ValueError(f"{name} has no effect with method {method!r}; leave it out, or choose one of {others}")
        if value is None and name in takes and name != "generator":
            raise ValueError(f"method {method!r} needs {name}")
    options = Options(**{name: value for name, value in given.items() if value is not None})
    if "r" in takes:
        AdapterSpec(r=options.r, alpha=1)
    if not isinstance(options.density, (int, float)) or isinstance(options.density, bool):
        raise TypeError(f"density must be a number, got {options.density!r}")
    if not 0 < options.density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {options.density}")
    return METHODS[method], options


def _by_adapter(adapters: Sequence[str], weights: Sequence[float] | None) -> dict[str, float]:
    """The weight of each adapter, checked."""
    if isinstance(adapters, str):
        raise TypeError(f"adapters must be a list of names, got {adapters!r}")
    names = list(adapters)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"adapters must be one name or more, each once, got {names}")
    numbers = [1.0] * len(names) if weights is None else list(weights)
    if len(numbers) != len(names):
        raise ValueError(f"weights must be one for each of the {len(names)} adapters, got {len(numbers)}")
    for name, number in zip(names, numbers, strict=True):
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            raise TypeError(f"the weight of {name!r} must be a number, got {number!r}")
        if not math.isfinite(number):
            raise ValueError(f"the weight of {name!r} must be finite, got {number}")
    return dict(zip(names, numbers, strict=True))
