"""Biases in PEFT's format: those of the base that are trained (``bias``), and one that B adds (``lora_bias``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from lora_plus.files.outline import Outline
from lora_plus.files.saved_adapter import SavedAdapter, SavedLayer
from lora_plus.tensors.matrix import accumulation_dtype
from lora_plus.text import join, some

from .limits import Units
from .names import LORA_BIAS

SETTINGS = ("none", "all", "lora_only")
"""What PEFT's ``bias`` can be."""

_MODEL = "load the adapter into its model"


def trained_parameters(adapter: SavedAdapter) -> list[str]:
    """The parameters that are trained in full on their own."""
    return [path for path, tensors in adapter.trained.items() if "" in tensors]


def is_bias(name: str) -> bool:
    """Whether PEFT's ``bias="all"`` trains the parameter of this name."""
    return name == "bias" or name.endswith(".bias")


def setting_of(adapter: SavedAdapter, found: Units, outline: Outline, problems: list[str]) -> str:
    """The ``bias`` under which PEFT trains just the parameters that the adapter trains; where there is none, a problem.

    With ``"lora_only"`` PEFT trains the biases of all adapted layers, with ``"all"`` every parameter called bias.
    """
    trained = set(trained_parameters(adapter))
    if not trained:
        return "none"
    owners = [path for path in adapter.trained if path not in trained]
    every = {
        name for name in outline.parameters if is_bias(name) and not name.startswith(tuple(f"{o}." for o in owners))
    }
    adapted = {name for name in every if name.removesuffix("bias").removesuffix(".") in found.modules}
    others = sorted(name for name in trained if not is_bias(name))
    if others:
        problems.append(f"train_also {some(others)}: PEFT trains a single parameter only if it is called bias")
    elif not outline.whole:
        problems.append(f"train_also {some(sorted(trained))}: which biases PEFT trains depends on the model; {_MODEL}")
    elif found.attentions or found.parameters:
        problems.append(f"train_also {some(sorted(trained))}: PEFT trains other biases beside attention and parameters")
    elif trained == adapted:
        return "lora_only"
    elif trained != every:
        missing = sorted((adapted if trained < adapted else every) - trained)
        problems.append(
            f"train_also {some(sorted(trained))}: PEFT trains all biases or those of all adapted layers, so "
            f"{some(missing)}, too; train these as well, or save a .safetensors file"
        )
    return "all"


def key_of(name: str, found: Units) -> str:
    """What PEFT calls a trained bias."""
    owner = name.removesuffix("bias").removesuffix(".")
    return join(f"{owner}.base_layer", "bias") if owner in found.modules else name


def lost_biases(adapter: SavedAdapter, setting: str, layers: Iterable[str], outline: Outline) -> Iterator[str]:
    """What PEFT has trained under a setting of ``bias``, and the file lacks, as that of some versions does."""
    if setting == "none":
        return
    owners = tuple(f"{path}." for path, tensors in adapter.trained.items() if "" not in tensors)
    every = {name for name in outline.parameters if is_bias(name) and not name.startswith(owners)}
    wanted = {"all": every, "lora_only": every.intersection(join(name, "bias") for name in layers)}
    if missing := sorted(wanted[setting] - adapter.trained.keys()):
        yield (
            f"bias is {setting!r}, and the file lacks {some(missing)}; set it to 'none' in the config to load the "
            "adapter without them"
        )


def add_lora_biases(
    adapter: SavedAdapter,
    biases: Mapping[str, Tensor],
    layers: Mapping[str, SavedLayer],
    value_of: Callable[[str], Tensor | None],
    whole: bool,
    problems: list[str],
) -> None:
    """Fold a bias of B, times the scale, into the layer's own bias, which is then trained in full with the adapter.

    Args:
        adapter: gets the biases.
        biases: the bias of B by layer.
        layers: those of them that are linear layers or convolutions.
        value_of: the base's own parameter of a name; None if there is none.
        whole: whether the base is a model or a checkpoint, whose parameters are all known.
        problems: where that cannot be.
    """
    for name in (name for name in layers if name not in biases):
        problems.append(f"{name!r}: {LORA_BIAS} is missing, which the others have (lora_bias)")
    for name, bias in biases.items():
        full, layer = join(name, "bias"), layers.get(name)
        trained = adapter.trained.get(full)
        own = value_of(full) if trained is None else trained[""]
        if layer is None or own is None or own.shape != bias.shape:
            what = "no bias to add it to here" if own is None else "another kind of bias here"
            told = f"and the layer has {what}" if whole else f"which is added to the layer's own; {_MODEL} and save it"
            problems.append(f"{name!r}: its lora_B has a bias (lora_bias), {told}")
            continue
        dtype = accumulation_dtype(own.dtype, bias.dtype)
        adapter.trained[full] = {"": own.detach().to(dtype) + layer.spec.scale * bias.to(own.device, dtype)}
