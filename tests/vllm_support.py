"""How vLLM computes with an adapter of experts, restated from its ``lora/model_manager.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def read_by_vllm(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the names of vLLM's modules, the scale in B."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, part, _ = key.removeprefix("base_model.model.").rsplit(".", 2)
        found.setdefault(path, {})[part] = tensor
    scale = config["lora_alpha"] / config["r"]
    return {path: (pair["lora_A"], pair["lora_B"] * scale) for path, pair in found.items()}


def served_one_by_one(model: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]], labels: tuple[str, ...]) -> nn.Module:
    """The model of single experts with its weights as vLLM computes with them (`pack_moe`)."""
    for path, experts in model.named_modules():
        if path.endswith("experts") and any(name.startswith(f"{path}.") for name in pairs):
            for label in labels:  # torch.stack of all of them, none missing and all of one rank
                for part in (0, 1):
                    torch.stack([pairs[f"{path}.{e}.{label}"][part] for e in range(len(experts))])  # type: ignore[arg-type]
    with torch.no_grad():
        for path, (A, B) in pairs.items():
            model.get_submodule(path).weight += B @ A  # type: ignore[operator]
    return model


def served_in_stacks(model: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """The model of stacks with its weights as vLLM computes with them (`_stack_moe_lora_weights`)."""
    with torch.no_grad():
        for path, (A, B) in pairs.items():
            name, stacked = path.removesuffix(".base_layer"), path.endswith(".base_layer")
            if not name.endswith("experts"):
                model.get_submodule(path).weight += B @ A  # type: ignore[operator]
                continue
            assert {name, f"{name}.base_layer"} <= pairs.keys()
            weight = getattr(model.get_submodule(name), "gate_up_proj" if stacked else "down_proj")
            count = len(weight)
            A = A.reshape(count, -1, A.shape[-1])
            B = B.reshape(len(B), -1, count).permute(2, 0, 1)
            weight += (B @ A).mT if model.get_submodule(name).is_transposed else B @ A
    return model
