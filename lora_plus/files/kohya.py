"""The format of kohya-ss/sd-scripts: one safetensors file, with underscores for the dots in the names of modules.

Tensors are named ``<module>.lora_down.weight`` ``(r, in)``, ``<module>.lora_up.weight`` ``(out, r)`` and
``<module>.alpha``, one number. The update is ``alpha / r * up @ down``, with alpha = r where there is none; that of a
convolution has ``(r, in, *kernel)`` and ``(out, r, 1, 1)``, and the matrix product is that of the flattened tensors.
A module is called ``lora_unet_`` and its name in the U-Net or transformer, or ``lora_te_``, ``lora_te1_``,
``lora_te2_`` and its name in a text encoder. Source: ``networks/lora.py`` of sd-scripts.

What is written has one alpha for all modules, the most common one, and other scales in the up matrix: diffusers gives
every module the alpha that most have.

``<module>.dora_scale`` ``(out, 1, ...)`` is LyCORIS's magnitude over output channels, and means what DoRA's means here:
it divides by the norm of the rows of the updated weight (``LoConModule.apply_weight_decompose``). With ``(1, in, ...)``
LyCORIS divides by the norm of the columns, which is another method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_plus.tensors.matrix import accumulation_dtype

from .formats import FORMATS, Contents, Files, Format
from .outline import outline_named_by
from .pairs import Dialect, Pair, assemble, find_pairs, format_problems
from .saved_adapter import SavedAdapter, alpha_under, most_common
from .target import Target
from .token_rows import is_rows

DIALECT = Dialect(
    "kohya",
    (("lora_down.weight", "lora_up.weight"),),
    "dora_scale",
    "_",
    {
        "lora_unet": ("unet", "transformer"),
        "lora_transformer": ("transformer",),
        "lora_te": ("text_encoder",),
        "lora_te1": ("text_encoder",),
        "lora_te2": ("text_encoder_2",),
        "lora_te3": ("text_encoder_3",),
    },
)


def recognises(file: Contents) -> bool:
    """Whether a file is in this format, or in that of a relative of it."""
    return any(DIALECT.names(name) or DIALECT.component(name) for name in file.tensors)


def read(files: Files, target: Target, problems: list[str]) -> SavedAdapter:
    """The adapter that a file describes; its metadata says nothing that counts here."""
    tensors, _ = files[""]
    pairs = find_pairs(tensors, DIALECT, problems)

    def settings(module: str, pair: Pair) -> dict[str, Any] | None:
        magnitude = pair.tensors.get("lora_magnitude")
        if magnitude is not None:
            shape, out_features = tuple(magnitude.shape), pair.tensors["lora_B"].shape[0]
            if shape != (out_features, *[1] * (len(shape) - 1)):
                problems.append(
                    f"{module!r}: dora_scale has shape {shape}, expected ({out_features}, 1, ...); that of a norm over "
                    "columns is another method than DoRA"
                )
                return None
            convolution = len(shape) > 2
            pair.tensors["lora_magnitude"] = magnitude.transpose(0, 1) if convolution else magnitude.flatten()
        return pair.settings()

    return assemble(pairs, DIALECT, settings, target, problems)


def write(adapter: SavedAdapter, target: Target, problems: list[str]) -> Files:
    """The file, without dropout.

    The target's children ``unet``, ``transformer``, ``text_encoder`` and ``text_encoder_2`` get their prefixes; a
    target that has none of them is taken for a U-Net.
    """
    problems += format_problems(adapter, DIALECT)
    names = target.names() or outline_named_by(adapter).names
    reasons = {
        "dora": "programs read its DoRA magnitudes in different ways",
        "groups": "programs disagree on the shapes of a grouped convolution",
    }
    children = {name.partition(".")[0] for name in names}
    known = {
        "unet": "lora_unet",
        "transformer": "lora_transformer",
        # sd-scripts counts where there are several
        "text_encoder": "lora_te1" if "text_encoder_2" in children else "lora_te",
        "text_encoder_2": "lora_te2",
        "text_encoder_3": "lora_te3",
    }
    prefixes = {child: prefix for child, prefix in known.items() if child in children} or {"": "lora_unet"}
    spelled = DIALECT.spelled(names)
    tensors: dict[str, Tensor] = {}
    alphas = {name: alpha_under(layer, "standard") for name, layer in adapter.layers.items()}
    alpha = most_common(list(alphas.values()))
    for name, layer in sorted(adapter.layers.items()):
        problems += [
            f"{name!r}: {reason}" for what, reason in reasons.items()
            if what in (layer.spec.variant, *layer.base.facts)
        ]  # fmt: skip
        alike = [repr(other) for other in spelled.get(name.replace(".", "_"), []) if other != name]
        if alike:
            problems.append(f"{name!r} is spelled like {' and '.join(alike)} with underscores for dots")
        if is_rows(layer):  # said above
            continue
        child = next((child for child in prefixes if not child or name.startswith(f"{child}.")), None)
        if child is None:
            problems.append(f"{name!r} is in none of {sorted(prefixes)}, and only these have prefixes")
            continue
        module = f"{prefixes[child]}_{name.removeprefix(child).removeprefix('.')}".replace(".", "_")
        A, B = layer.tensors["lora_A"], layer.tensors["lora_B"]
        if alphas[name] != alpha:
            B = B.to(accumulation_dtype(B.dtype)) * (alphas[name] / alpha)
        kernel = layer.base.shape[2:]
        tensors[f"{module}.lora_down.weight"] = A.reshape(len(A), -1, *kernel)
        tensors[f"{module}.lora_up.weight"] = B.reshape(*B.shape, *[1] * len(kernel))
        number = torch.tensor(alpha, dtype=torch.float32, device="cpu")
        tensors[f"{module}.alpha"] = number if number.item() == alpha else number.new_tensor(alpha, dtype=torch.float64)
    return {"": Contents(tensors, {})}


FORMATS["kohya"] = Format(
    "kohya's format", "one file of kohya's sd-scripts, `lora_unet_....lora_down.weight`, `.lora_up.weight`, `.alpha`",
    read, write, recognises,
)  # fmt: skip
