"""Programs that open PEFT folders: what each of them takes, as read in their sources.

vLLM: ``lora/lora_model.py`` at 0306474, ``lora/layers/vocab_parallel_embedding.py`` at 0332189, ``lora/peft_helper.py``
of its latest documentation and ``config/lora.py`` of 0.14's. llama.cpp: ``convert_lora_to_gguf.py`` at 0b03ada and
``src/llama-adapter.h`` at 215841f. Both have one rank and one alpha for a whole folder, and pass over the patterns of
a config in silence, so what they are given is a `portable` adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .portable import rank
from .saved_adapter import SavedAdapter


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


PROGRAMS = {
    "peft": Program("PEFT"),
    "vllm": Program(
        "vLLM",
        kinds=("Linear", "TransposedLinear", "Embedding"),
        plain=True,
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        options="--enable-lora --max-lora-rank {rank}",
    ),
    # it transposes A and B together with the weight of a TransposedLinear, but PEFT's are those of (out, in) already
    "llama.cpp": Program("llama.cpp", kinds=("Linear", "Embedding"), plain=True, needs_base=True, unties=False),
}


def program_problems(program: Program, adapter: SavedAdapter, tied: Mapping[str, str]) -> Iterator[str]:
    """Why a program does not take a portable adapter, beyond what PEFT's format cannot express.

    ``tied`` has another name of a layer's weight by the layer's name.
    """
    for name, layer in adapter.layers.items():
        if program.kinds and layer.base.kind not in program.kinds:
            yield f"{name!r}: {program.name} takes adapters of {', '.join(program.kinds)}, not of {layer.base.kind}"
        if not program.unties and name in tied:
            yield f"{name!r}: its weight is also {tied[name]!r}, and {program.name} has one tensor for both"
    if program.plain:
        variants = sorted({layer.spec.variant for layer in adapter.layers.values()} - {"lora"})
        yield from (f"{program.name} has no {variant}, which layers of the adapter are" for variant in variants)
        yield from (f"train_also {path!r}: {program.name} takes no modules trained in full" for path in adapter.trained)
    r = rank(adapter)
    if program.ranks and r > program.ranks[-1]:
        yield f"its rank is {r}, and {program.name} takes {program.ranks[-1]} at most; see resize_adapter"
    if program.needs_base and not adapter.metadata.get("base_model_name_or_path"):
        yield f"{program.name} looks up the config of the base model; give its name or folder as base_model"
