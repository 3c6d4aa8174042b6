"""Where is an adapter silently dropped, doubled or corrupted? Every trap of `trap_cases`, in PEFT and in lora_plus.

Run ``python benchmarks/traps.py``; it prints the table and writes it to ``benchmarks/traps.md``. A trap is judged by an
explicit reference: the plain model in float64 with W + s B A written into its weights by hand. Only the values of A and
B are taken from the library under test.
"""

from __future__ import annotations

import argparse
import linecache
import platform
import re
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import lora_plus
from lora_plus.files import adapter_state_dict

R, ALPHA = 2, 4.0
TOLERANCE = 1e-9
"""Far above the rounding of float64, far below the update."""
VERDICTS = ("right", "refused", "wrong", "wrong, silently", "crashes")


@dataclass(frozen=True)
class Outcome:
    """What came of a trap in one library."""

    verdict: str
    """One of VERDICTS."""
    detail: str
    """The measured figure, or the error."""


@dataclass(frozen=True)
class Trap:
    """One situation, to be met by both libraries."""

    name: str
    what: str
    """What is done, in one sentence."""
    peft: Callable[[], Outcome]
    ours: Callable[[], Outcome]


# ---- the two libraries ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Library:
    """The same operations in the words of each library."""

    inject: Callable[..., Any]
    """``(model, targets, **settings) -> model``."""
    tensors: Callable[[Any], Mapping[str, Tensor]]
    """The adapter's tensors, as the library hands them out."""
    merge: Callable[[Any], object]
    unmerge: Callable[[Any], object]
    disabled: Callable[[Any], Any]
    save: Callable[[Any, Path], object]
    load: Callable[[nn.Module, Path], Any]
    check: Callable[[Any, Tensor], object]
    """The call by which a user can learn that an adapter has no effect; PEFT has none."""


def inject_peft(
    model: Any, targets: Any, *, alpha: float = ALPHA, parameters: bool = False, adapter: str = "default", **more: Any
) -> Any:
    """``get_peft_model``, or ``add_adapter`` on what it returned; ``parameters`` if the targets are bare parameters."""
    from peft import LoraConfig, PeftModel, get_peft_model

    more |= {"target_modules": [], "target_parameters": targets} if parameters else {"target_modules": targets}
    config = LoraConfig(r=R, lora_alpha=alpha, **more)  # type: ignore[arg-type]
    if isinstance(model, PeftModel):
        model.add_adapter(adapter, config)
        return model
    return get_peft_model(model, config, adapter_name=adapter)


def inject_ours(model: nn.Module, targets: Any, *, alpha: float = ALPHA, parameters: bool = False, **more: Any) -> Any:
    """`lora_plus.inject_lora`, to which a parameter's name is a target like any other."""
    return lora_plus.inject_lora(model, targets, r=R, alpha=alpha, **more)


def tensors_peft(model: Any) -> Mapping[str, Tensor]:
    """What PEFT would save."""
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(model)
    return state


def load_peft(model: nn.Module, folder: Path) -> Any:
    """The model with the adapter in this folder."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder))  # type: ignore[arg-type]


PEFT = Library(
    inject=inject_peft,
    tensors=tensors_peft,
    merge=lambda model: model.merge_adapter(),
    unmerge=lambda model: model.unmerge_adapter(),
    disabled=lambda model: model.disable_adapter(),
    save=lambda model, folder: model.save_pretrained(str(folder)),
    load=load_peft,
    check=lambda model, x: None,
)
OURS = Library(
    inject=inject_ours,
    tensors=adapter_state_dict,
    merge=lora_plus.merge_lora,
    unmerge=lora_plus.unmerge_lora,
    disabled=lora_plus.disabled,
    save=lora_plus.save_adapter,
    load=lora_plus.load_adapter,
    check=lambda model, x: lora_plus.check_adapters(model, x),
)


def own_name(key: str) -> str:
    """The name that a tensor has in the plain model, without what PEFT's wrappers add to it."""
    return key.removeprefix("base_model.model.").replace("base_layer.", "")


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the base's tensors by their names in the plain model."""
    return {own_name(key): value.clone() for key, value in model.state_dict().items() if "lora_" not in key}


def merge_changes(library: Library, model: nn.Module) -> bool:
    """Merge; whether that has changed any tensor of the base."""
    before = base_weights(model)
    library.merge(model)
    return any(not torch.equal(value, before[name]) for name, value in base_weights(model).items())


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """After an injection: the adapter's tensors."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def randomise(model: nn.Module, size: float = 0.5) -> None:
    """Known random values for A and B, so that the update is not zero."""
    generator = torch.Generator().manual_seed(7)
    for parameter in trainable(model):
        parameter.copy_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def factors(library: Library, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """``{place: {"A": (r, in), "B": (out, r)}}`` in float64, copied from an adapted model."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in library.tensors(model).items():
        place, _, role = own_name(key).removesuffix(".weight").rpartition(".")
        found.setdefault(place, {})[role[-1]] = tensor.detach().double().flatten(1).clone()
    return found


# ---- the reference --------------------------------------------------------------------------------------------------

Make = Callable[[], nn.Module]


def built(make: Make, seed: int = 0) -> nn.Module:
    """The plain model in float64 and eval mode, the same each time."""
    torch.manual_seed(seed)
    return make().double().eval()


def explicit(
    make: Make, adapter: Mapping[str, Mapping[str, Tensor]], scales: Mapping[str, float] | None = None, seed: int = 0
) -> nn.Module:
    """The plain model with W + s B A written into its weights."""
    plain = built(make, seed)
    for place, matrices in adapter.items():
        scale = ALPHA / R if scales is None else scales[place]
        write(plain, place, scale * matrices["B"] @ matrices["A"])
    return plain


@torch.no_grad()
def write(plain: nn.Module, place: str, update: Tensor) -> None:
    """Add an update ``(out, in)`` to the weight at a place, which may be a module, a parameter or a part of attention.

    A weight that is shared with another layer becomes this layer's own, and one that is computed becomes plain.
    """
    owner, _, leaf = place.rpartition(".")
    module, rows = plain.get_submodule(owner), slice(None)
    if isinstance(module, nn.MultiheadAttention) and leaf in ("q", "k", "v"):
        start = "qkv".index(leaf) * module.embed_dim
        rows, leaf = slice(start, start + module.embed_dim), "in_proj_weight"
    elif leaf in module._modules:
        module = module.get_submodule(leaf)
        leaf = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    if parametrize.is_parametrized(module):
        parametrize.remove_parametrizations(module, leaf)
    elif prune.is_pruned(module):
        prune.remove(module, leaf)
    weight = getattr(module, leaf).detach().clone()
    if isinstance(module, nn.Embedding):
        weight += update.T
    elif isinstance(module, nn.ConvTranspose1d):  # stored as (in, out, kernel)
        weight += update.reshape(weight.shape[1], weight.shape[0], -1).transpose(0, 1)
    else:
        weight[rows] += update.reshape(weight[rows].shape)
    setattr(module, leaf, nn.Parameter(weight))


def judged(got: Tensor, right: Tensor, base: Tensor, what: str = "") -> Outcome:
    """An output beside the right one; ``base`` is the output without any update."""
    error, effect = (got.double() - right).abs().max().item(), (right - base).abs().max().item()
    assert effect > 1e-3, "the update must have an effect that can be measured"
    if error <= TOLERANCE:
        return Outcome("right", f"{what}equals W + s B A to {error:.1e}")
    return Outcome("wrong", f"{what}differs from W + s B A by {error:.1e}, where the update makes {effect:.1e}")


def unchanged(before: Tensor, after: Tensor) -> Outcome:
    """Whether a frozen weight has kept its bits."""
    if torch.equal(before, after):
        return Outcome("right", "the base weight has kept its bits")
    count, size = int((before != after).sum()), (before - after).abs().max().item()
    return Outcome("wrong", f"{count} of {before.numel()} values of the base weight changed, by up to {size:.1e}")


# ---- running and writing --------------------------------------------------------------------------------------------


def run(scenario: Callable[[], Outcome]) -> Outcome:
    """The outcome of one side of a trap.

    An error that the library itself raises is a refusal, one from below it is a crash; one from the traps' own files is
    a mistake here, and is raised.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outcome = scenario()
        except Exception as error:
            frame, number = list(traceback.walk_tb(error.__traceback__))[-1]
            if Path(frame.f_code.co_filename).parent == Path(__file__).parent:
                raise
            by_library = frame.f_globals["__name__"].partition(".")[0] in ("peft", "lora_plus")
            refused = by_library and linecache.getline(frame.f_code.co_filename, number).lstrip().startswith("raise ")
            message = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+", "<folder>", f"{type(error).__name__}: {error}")
            outcome = Outcome("refused" if refused else "crashes", textwrap.shorten(message, 160, placeholder=" ..."))
    # torch warns of nested tensors, whoever calls it
    said = [w for w in caught if Path(torch.__file__).parent not in Path(w.filename).parents]
    if not said:
        return Outcome("wrong, silently" if outcome.verdict == "wrong" else outcome.verdict, outcome.detail)
    text = textwrap.shorten(str(said[0].message), 60, placeholder=" ...")
    return Outcome(outcome.verdict, f"{outcome.detail}; with a warning ({text})")


def versions() -> str:
    """What the table is true for."""
    import peft

    return (
        f"torch {torch.__version__}, peft {peft.__version__}, lora_plus {lora_plus.__version__}, "
        f"Python {platform.python_version()}"
    )


Row = tuple[Trap, Outcome, Outcome]
"""A trap with what came of it in PEFT and in lora_plus."""


def counts(rows: Sequence[Row], column: int) -> str:
    """How often each verdict was given to one library."""
    given = Counter(row[column].verdict for row in rows)  # type: ignore[union-attr]
    return "; ".join(f"{given[verdict]} {verdict}" for verdict in VERDICTS if given[verdict])


def page(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    lines = [
        "# Traps for adapters",
        "",
        f"Measured by `python benchmarks/traps.py` with {versions()},",
        "in float64 on the CPU unless a row says otherwise. The reference is the plain model with W + s B A written",
        "into its weights by hand. *Right* and *wrong* compare with it. *Silently*: without a warning. *Refused*:",
        "the library raises its own error. *Crashes*: an error comes from code that the library calls. A row with",
        '"merged" compares before and after merging, unless it says otherwise.',
        "",
        f"PEFT: {counts(rows, 1)}. lora_plus: {counts(rows, 2)}.",
        "",
        "| trap | PEFT | lora_plus |",
        "|---|---|---|",
    ]
    for trap, *outcomes in rows:
        cells = [f"**{trap.name}**: {trap.what}", *(f"**{o.verdict}**: {o.detail}" for o in outcomes)]
        lines.append("| " + " | ".join(cell.replace("|", r"\|").replace("<", "&lt;") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    from trap_cases import TRAPS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="the Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(versions())
    rows: list[Row] = []
    for trap in TRAPS:
        rows.append((trap, run(trap.peft), run(trap.ours)))
        print(f"\n{trap.name}: {trap.what}")
        for library, outcome in zip(("PEFT", "lora_plus"), rows[-1][1:], strict=True):
            print(f"  {library:<10} {outcome.verdict:<16} {outcome.detail}")
    print(f"\nPEFT: {counts(rows, 1)}\nlora_plus: {counts(rows, 2)}")
    options.out.write_text(page(rows))


if __name__ == "__main__":
    sys.modules["traps"] = sys.modules["__main__"]  # the cases import this file by its name
    main()
