"""Write an adapter for programs that read PEFT's format in part: what each of them takes, as read in their sources.

vLLM: ``lora/lora_model.py`` at 0306474, ``lora/layers/vocab_parallel_embedding.py`` at 0332189, ``lora/peft_helper.py``
of its latest documentation and ``config/lora.py`` of 0.14's; for experts see `vllm_experts`. llama.cpp:
``convert_lora_to_gguf.py`` at 0b03ada and ``src/llama-adapter.h`` at 215841f. Both have one rank and one alpha for a
whole folder, and pass over the patterns of a config in silence, so what they are given is a `portable` adapter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_plus.errors import Problems, entry_of
from lora_plus.layers.kinds import DTYPES
from lora_plus.model.state import Need, State, require
from lora_plus.model.tree import is_spare_replica, own_parameters
from lora_plus.model.unsaved import check_saved
from lora_plus.text import join

from .formats import FORMATS, Files, Inexpressible
from .paths import PathLike, stated
from .peft.config import CONFIG
from .peft.folder import WEIGHTS
from .portable import portable, rank
from .save import describe, values_not_finite, write_files
from .saved_adapter import SavedAdapter
from .target import ModelTarget
from .token_rows import is_rows, row_layers
from .vllm_experts import Experts, vllm_experts


@dataclass(frozen=True)
class Program:
    """What a program takes of PEFT's format; by default all of it."""

    name: str
    kinds: tuple[str, ...] = ()
    """The kinds of layers that it takes adapters of; empty for all of PEFT's."""
    plain: bool = False
    """Whether it takes plain LoRA only: no other variant, and no modules trained in full."""
    ranks: tuple[int, ...] = ()
    """What its largest rank can be set to, in order; empty if it takes any rank."""
    options: str = ""
    """How it is started; ``{rank}`` is the setting for the largest rank."""
    needs_base: bool = False
    """Whether it finds the base model by the name in the folder."""
    unties: bool = True
    """Whether one of two layers with the same weight can have an adapter of its own."""
    whole: bool = False
    """Whether it reads all of PEFT's format, so that it need not get one rank and one scale."""
    experts: Callable[[SavedAdapter, ModelTarget], Experts] = lambda adapter, target: Experts(adapter, set(), [])
    """The adapter with its experts as it takes them; by default as they are."""


PROGRAMS = {
    "peft": Program("PEFT", whole=True),
    "vllm": Program(
        "vLLM",
        kinds=("Linear", "TransposedLinear", "Embedding"),
        plain=True,
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        options="--enable-lora --max-lora-rank {rank}",
        experts=vllm_experts,
    ),
    # it transposes A and B together with the weight of a TransposedLinear, but PEFT's are those of (out, in) already
    "llama.cpp": Program("llama.cpp", kinds=("Linear", "Embedding"), plain=True, needs_base=True, unties=False),
}


ProgramName = Literal["peft", "vllm", "llama.cpp"]
"""The program that reads an export: the names in `PROGRAMS`."""


@dataclass(frozen=True)
class ExportReport:
    """What `export_adapter` wrote. ``str()`` of it is one line for each thing worth knowing."""

    r: int
    """The rank of all layers, which is alpha too."""
    options: str
    """The command-line options that the program needs; empty if it needs none."""

    def __str__(self) -> str:
        return f"rank {self.r} and alpha {self.r} on all layers" + (f"\nopen with {self.options}" * bool(self.options))


def export_adapter(
    model: nn.Module,
    path: PathLike,
    *,
    for_: ProgramName = "peft",
    adapter: str = "default",
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
) -> ExportReport:
    """Write one adapter as a PEFT folder that also programs open which read this format in part.

    All layers have one rank r there and alpha = r: scales are multiplied into B, lower ranks are filled up with zeros,
    and adapters of rows of one weight become one of the whole weight. The updates are the same; dropout is not kept.

    - ``"peft"``: whatever PEFT's format can express, DoRA and modules trained in full too.
    - ``"vllm"``: plain LoRA on linear layers, on embeddings where vLLM's class of the model serves them, and on experts
      and routers of transformers' models, by the names that vLLM has for them. Experts without an adapter get zeros.
      Ranks up to 512; the report says which ``--max-lora-rank`` the server needs.
    - ``"llama.cpp"``: plain LoRA on linear layers and the token embedding, for ``convert_lora_to_gguf.py``, which asks
      for the ``base_model``. A layer whose weight is tied to another layer's cannot be expressed there.

    The last two know the layers by their names in transformers' models. Files are written as `save_adapter` does.

    Args:
        model: the model that holds the adapter.
        path: the folder; missing folders are made.
        for_: the program.
        adapter: the adapter's name.
        dtype: of A, B and the magnitudes, rounded after the scale has been multiplied in; None for float32, or float64
            where the adapter is. Modules trained in full keep theirs.
        base_model: name or folder of the base model, for the config.

    Returns:
        A report: the rank, and the options that the program needs.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: one error with everything that the program cannot express, or that is not finite, or what is
            trainable and must not be (`save_adapter`). Nothing is written then.
    """
    program = _program(for_, dtype)
    state = require(model, "exporting an adapter", Need.TRAINED, adapters=[adapter])
    check_saved(state, adapter, f"adapter {adapter!r} was not exported")
    real = Path(os.path.realpath(stated(path)))
    whole = describe(state, adapter, {} if base_model is None else {"base_model_name_or_path": base_model})
    failure = f"adapter {adapter!r} was not exported for {program.name}; merge_and_unload gives a plain model instead"
    experts = program.experts(whole, ModelTarget(state.names))
    data = portable(experts.adapter, dtype)
    if not is_spare_replica(model):
        state.storage.on_one_rank(lambda: write_files(real, _files(state, program, whole, data, experts, failure)))
    r = rank(data)
    largest = next((each for each in program.ranks if each >= r), r)
    return ExportReport(r, program.options.format(rank=largest))


def to_peft(
    model: nn.Module,
    adapter: str = "default",
    *,
    for_: ProgramName = "peft",
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One adapter in memory, as what is in ``adapter_config.json`` and in ``adapter_model.safetensors``.

    For ``"peft"`` they are what `save_adapter` writes into a folder: the tensors are the adapter's own memory where its
    dtype and layout are those of the file, so copy what shall not follow the training. For ``"vllm"`` and
    ``"llama.cpp"`` they are what `export_adapter` writes, with one rank and the scales in B. Where parameters are
    sharded every rank must call this, and each gets the whole tensors.

    Args:
        model: as in `export_adapter`.
        adapter: as in `export_adapter`.
        dtype: as in `export_adapter`; ``"peft"`` keeps each tensor's dtype.
        base_model: as in `export_adapter`.
        for_: the program that reads them.

    Returns:
        The config, of values that JSON has, and the tensors, detached, by PEFT's names.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: one error with everything that the program cannot express, or that is not finite, or what is
            trainable and must not be (`save_adapter`).
    """
    program = _program(for_, dtype)
    if program.whole and dtype is not None:
        raise ValueError(f"dtype is for programs that get tensors of their own; {program.name} gets the adapter's")
    state = require(model, "taking an adapter in PEFT's format", Need.TRAINED, adapters=[adapter])
    failure = f"adapter {adapter!r} was not taken for {program.name}"
    check_saved(state, adapter, failure)
    whole = describe(state, adapter, {} if base_model is None else {"base_model_name_or_path": base_model})
    experts = program.experts(whole, ModelTarget(state.names))
    data = whole if program.whole else portable(experts.adapter, dtype)
    files = _files(state, program, whole, data, experts, failure)
    return files[CONFIG], dict(files[WEIGHTS].tensors)


def _program(name: str, dtype: torch.dtype | None) -> Program:
    """The program of this name; the arguments are checked."""
    program = entry_of("program", name, PROGRAMS)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES} or None, got {dtype!r}")
    return program


def _files(
    state: State, program: Program, whole: SavedAdapter, data: SavedAdapter, experts: Experts, failure: str
) -> Files:
    """The files of an adapter for a program, from the adapter as it is and as the program gets it."""
    problems = values_not_finite(whole, state)
    if not problems and data is not whole:
        problems += [f"{line} with its scale in B; choose a wider dtype" for line in values_not_finite(data, state)]
    problems += experts.problems
    problems += _not_taken(program, data, {} if program.unties else _tied(state, data), experts.stacks)
    broken = len(problems)
    files = FORMATS["peft"].write(data, ModelTarget(state.names), problems)
    if problems:
        raise (Problems if broken else Inexpressible)(failure, problems)
    return files


def _tied(state: State, data: SavedAdapter) -> dict[str, str]:
    """By the name of an adapted layer, another name of its weight."""
    weights: dict[str, Tensor] = {}
    for path, module in state.names:
        weights |= {join(path, name): parameter for name, parameter in own_parameters(module)}
    for path, adapted in state.weights:
        if adapted.lora_merge is not None:  # another tensor is bound in place of the one that is shared
            weights[join(path, "weight")] = adapted.own_weight()
    names = dict[int, list[str]]()
    for name, weight in weights.items():
        names.setdefault(id(weight), []).append(name)
    own = {path: layer.base.weight_name(path) for path, layer in data.layers.items()}
    alike = {
        path: [name for name in names.get(id(weights.get(mine)), ()) if name != mine] for path, mine in own.items()
    }
    return {path: others[0] for path, others in alike.items() if others}


def _not_taken(
    program: Program, adapter: SavedAdapter, tied: Mapping[str, str], stacks: Collection[str]
) -> Iterator[str]:
    """Why a program does not take a portable adapter, beyond what PEFT's format cannot express.

    ``tied`` has another name of a layer's weight by the layer's name; ``stacks`` are the stacked experts.
    """
    for name, layer in adapter.layers.items():
        if program.kinds and name not in stacks and layer.base.kind not in program.kinds:
            yield f"{name!r}: {program.name} takes adapters of {', '.join(program.kinds)}, not of {layer.base.kind}"
        if not program.unties and name in tied:
            yield f"{name!r}: its weight is also {tied[name]!r}, and {program.name} has one tensor for both"
    if program.plain:
        rows = row_layers(adapter)
        yield from (f"{name!r}: {program.name} takes no rows of tokens; merge_and_unload has them" for name in rows)
        variants = sorted({layer.spec.variant for layer in adapter.layers.values() if not is_rows(layer)} - {"lora"})
        yield from (f"{program.name} has no {variant}, which layers of the adapter are" for variant in variants)
        yield from (f"train_also {path!r}: {program.name} takes no modules trained in full" for path in adapter.trained)
    r = rank(adapter)
    if program.ranks and r > program.ranks[-1]:
        yield f"its rank is {r}, and {program.name} takes {program.ranks[-1]} at most; see resize_adapter"
    if program.needs_base and not adapter.metadata.get("base_model_name_or_path"):
        yield f"{program.name} looks up the config of the base model; give its name or folder as base_model"
