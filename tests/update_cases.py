"""What the tests of adapters made of others share: both tables in one form, and updates as matrices, by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import CASES, Case, randomise
from parameter_cases import PARAMETER_CASES, ParameterCase
from torch import Tensor, nn

import lora_plus
from lora_plus.files import adapter_state_dict


@dataclass(frozen=True, repr=False)
class Subject:
    """A model to adapt, from either table."""

    name: str
    model: Callable[..., nn.Module]
    targets: Any
    settings: dict[str, Any]
    run: Callable[[nn.Module], list[Tensor]]

    def __repr__(self) -> str:
        return self.name

    def inject(self, model: nn.Module, **changes: Any) -> nn.Module:
        return lora_plus.inject_lora(model, self.targets, **{**self.settings, **changes})

    @property
    def selection(self) -> dict[str, Any]:
        """Those of the settings that say which places are meant."""
        return {"targets": self.targets} | {
            name: value for name, value in self.settings.items() if name in ("fused", "layouts")
        }

    def adapted(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model with the adapters a and b, of different rank and scale, neither of them zero."""
        model = self.model(dtype).eval()
        self.inject(model, adapter="a")
        self.inject(model, adapter="b", r=2, alpha=7, rank_pattern=None, scaling="rslora")
        return randomise(model)


def _from_layer(case: Case) -> Subject:
    return Subject(case.name, case.model, ["layer"], case.settings, lambda model: [model(case.input())])


def _from_parameter(case: ParameterCase) -> Subject:
    return Subject(case.name, case.model, case.targets, case.settings, lambda model: case.run(model))


EVERYTHING = [*map(_from_layer, CASES), *map(_from_parameter, PARAMETER_CASES)]
DORA = [subject for subject in EVERYTHING if subject.settings.get("variant") == "dora"]
SUBJECTS = [subject for subject in EVERYTHING if subject not in DORA]
BY_NAME = {subject.name: subject for subject in EVERYTHING}

every_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=repr)
some_subjects = pytest.mark.parametrize(
    "subject",
    [BY_NAME[name] for name in ("linear", "embedding", "conv2d-groups", "experts-layouts", "fused-linear", "bare")],
    ids=repr,
)


def updates(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """``s B A`` for each place, by hand."""
    state = adapter_state_dict(model, adapter=adapter)
    return {
        row.name: row.scale
        * torch.einsum("...or,...ri->...oi", state[f"{row.name}.lora_B"], state[f"{row.name}.lora_A"])
        for row in lora_plus.lora_summary(model).rows
        if row.adapter == adapter
    }


def changes(model: nn.Module, adapters: list[str]) -> dict[str, Tensor]:
    """What merging these adapters adds to each tensor of the base."""
    base = lora_plus.remove_lora(copy.deepcopy(model)).state_dict()
    merged = lora_plus.merge_and_unload(copy.deepcopy(model), adapters=adapters).state_dict()
    return {name: merged[name] - tensor for name, tensor in base.items()}


def least_error(matrix: Tensor, r: int) -> float:
    """The relative error of the best approximation of rank r, over the whole stack where it is one."""
    values = torch.linalg.svdvals(matrix)
    return float(values[..., r:].square().sum().sqrt() / matrix.norm())


def close(one: Any, other: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All that a call that fails must leave as it is."""
    state = model.state_dict(keep_vars=True)
    return (
        repr(model),
        {name: id(tensor) for name, tensor in state.items()},
        {name: tensor.detach().clone().tolist() for name, tensor in state.items() if not tensor.is_meta},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        [weight.lora_active for _, weight in lora_plus.model.tree.adapted_weights(model)],
        torch.get_rng_state().tolist(),
    )
