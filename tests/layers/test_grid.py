"""One of each kind of layer in every way of running it, dtype and state, beside W + s B A written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case
from parameter_cases import PARAMETER_CASES, At, ParameterCase, distance, double, loss
from torch import Tensor, nn

import lora_plus
from lora_plus.files import adapter_state_dict

LAYERS = {
    "linear": "oi",
    "linear-dora": "oi",
    "conv1d-gpt2": "io",
    "embedding": "io",
    "conv1d": "oi",
    "conv2d-groups": "oi",
    "conv3d": "oi",
    "conv-transpose1d": "io",
    "conv-transpose2d-groups": "io",
    "conv-transpose3d": "io",
}
"""Cases of the table of layers, with the order of their weights' axes."""

PARAMETERS = {
    "attention-masks", "lstm-one-matrix", "gru", "rnn-cell", "bag-mean", "bilinear", "experts", "experts-layouts",
    "fused-linear", "fused-conv1d-gpt2", "fused-conv1d", "bare", "bare-dora", "reader",
}  # fmt: skip
"""Cases of the table of parameters."""

TRAINED_BY_DEFAULT = {"linear", "attention-masks", "experts", "fused-linear", "bare"}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def _as_parameter_case(case: Case) -> ParameterCase:
    """A layer in the form of the other table, which writes W + s B A by hand."""
    places = {"part": At("part.weight", order=LAYERS[case.name])}

    def inputs(source: Any) -> Any:
        return (case.make_input(source.generator, source.dtype),), {}

    return ParameterCase(case.name, case.make, inputs, ["part"], places, case.options)


GRID = [_as_parameter_case(case) for case in CASES if case.name in LAYERS]
GRID += [case for case in PARAMETER_CASES if case.name in PARAMETERS]

WAYS: dict[str, Callable[[], Any]] = {
    "train": torch.enable_grad,
    "eval": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def test_every_kind_is_in_the_grid() -> None:
    assert {case.name for case in GRID} == {*LAYERS, *PARAMETERS}
    assert {case.name for case in GRID} >= TRAINED_BY_DEFAULT


def tolerance(wanted: list[Tensor], dtype: torch.dtype) -> float:
    size = max(1.0, *(leaf.abs().max().item() for leaf in wanted))
    return 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("state", ["unmerged", "merged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", GRID, ids=lambda case: case.name)
def test_every_way_of_running_it_gives_the_weight_written_by_hand(
    case: ParameterCase, dtype: torch.dtype, state: str
) -> None:
    model, inputs = case.adapted(dtype), case.input(dtype)
    wanted = case.run(case.explicit(model, dtype), double(inputs))
    base = case.run(case.model(dtype).double(), double(inputs))
    assert distance(wanted, base) > 5 * tolerance(wanted, torch.bfloat16), "the adapter is inert"
    if state == "merged":
        lora_plus.merge_lora(model)
    for way, context in WAYS.items():
        model.train(way == "train")
        if (way, state) == ("train", "merged"):
            with pytest.raises(ValueError, match="is merged, so its adapters would get no gradient"):
                case.run(model, inputs)
            continue
        with context():
            if way == "autocast" and not runs(case.model(dtype), inputs):
                continue
            output = case.run(model, inputs)
        limit = tolerance(wanted, torch.bfloat16 if way == "autocast" else dtype)
        assert distance(output, wanted) <= limit, way


def runs(plain: nn.Module, inputs: Any) -> bool:
    """Whether torch runs the plain module here; oneDNN's LSTM lacks half precision on some processors."""
    try:
        plain(*inputs[0], **inputs[1])
    except RuntimeError as error:
        assert "could not create a primitive descriptor" in str(error)
        return False
    return True


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c.name in TRAINED_BY_DEFAULT else pytest.mark.slow, id=c.name) for c in GRID],
)
def test_a_thousand_steps_in_bfloat16_leave_every_bit_of_the_base(case: ParameterCase) -> None:
    model, inputs = case.inject(case.model(torch.bfloat16)), case.input(torch.bfloat16)
    start = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    optimizer = lora_plus.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    for _ in range(1000):
        optimizer.zero_grad()
        loss(case.run(model, inputs)).backward()
        optimizer.step()
    state = model.state_dict()
    for name, tensor in case.model(torch.bfloat16).state_dict().items():
        assert torch.equal(state[name], tensor), name
    for name, tensor in adapter_state_dict(model).items():
        assert torch.isfinite(tensor).all() and not torch.equal(tensor, start[name]), name
