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

from lora_plus.errors import Problems, entry_of, named_keywords
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
"""Name of the program that reads an export: the names in `PROGRAMS`."""


@dataclass(frozen=True)
class ExportReport:
    """The report of `export_adapter`. ``str()`` of it is a short text."""

    r: int
    """The rank of all layers, which is alpha too."""
    options: str
    """The command-line options that the program needs; empty if it needs none."""

    def __str__(self) -> str:
        return f"rank {self.r} and alpha {self.r} on all layers" + (f"\nopen with {self.options}" * bool(self.options))


@named_keywords
def export_adapter(
    model: nn.Module,
    path: PathLike,
    *,
    for_: ProgramName = "peft",
    adapter: str = "default",
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
) -> ExportReport:
    """Save one adapter as a PEFT folder for programs that read only a part of PEFT's format.

    In this folder all layers have one rank r, and alpha = r: scales are multiplied into B, lower ranks are filled up
    with zeros, and adapters of rows of one weight become one of the whole weight. The updates are the same. Dropout is
    dropped.

    - ``"peft"``: everything that PEFT's format can express, also DoRA and modules trained in full.
    - ``"vllm"``: plain LoRA on linear layers, on embeddings if vLLM's class of the model supports them, and on experts
      and routers of transformers' models, with vLLM's names. Experts without an adapter get zeros. Ranks up to 512; the
      report says which ``--max-lora-rank`` the server needs.
    - ``"llama.cpp"``: plain LoRA on linear layers and the token embedding, for ``convert_lora_to_gguf.py``, which needs
      the ``base_model``. Layers with tied weights cannot be expressed.

    For the last two, the layers need the names of transformers' models. Files are written as by `save_adapter`.

    Args:
        model: the model that holds the adapter.
        path: the folder; missing folders are made.
        for_: the program.
        adapter: the adapter's name.
        dtype: dtype of A, B and the magnitudes, which are rounded after the scale is multiplied in; None for float32,
            or float64 if the adapter is float64. Modules trained in full keep their dtype.
        base_model: name or folder of the base model, for the config.

    Returns:
        A report: the rank, and the options that the program needs.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: one error with everything that the program cannot read, non-finite values, and tensors that are
            trainable and must be frozen (`save_adapter`). Nothing is written then.
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
    """One adapter in PEFT's format, in memory: what is in ``adapter_config.json`` and ``adapter_model.safetensors``.

    For ``"peft"`` they are what `save_adapter` writes into a folder. The tensors share memory with the adapter if dtype
    and layout are the same, so copy them if training must not change them. For ``"vllm"`` and ``"llama.cpp"`` they are
    what `export_adapter` writes, with one rank and the scales in B. With sharded parameters every rank must call this,
    and each gets the whole tensors.

    Args:
        model: as in `export_adapter`.
        adapter: as in `export_adapter`.
        dtype: as in `export_adapter`; ``"peft"`` keeps each tensor's dtype.
        base_model: as in `export_adapter`.
        for_: the program that reads them.

    Returns:
        The config, as values that JSON can hold, and the tensors, detached, under PEFT's names.

    Raises:
        KeyError: if the model holds no adapter of this name.
        ValueError: one error with everything that the program cannot read, non-finite values, and tensors that are
            trainable and must be frozen (`save_adapter`).
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
