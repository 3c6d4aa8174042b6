"""What torch's other tools do to adapted layers: they work, or they are refused with a next step that works."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Conv1D, randomise
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune, remove_weight_norm, weight_norm

from lora_plus import disabled, inject_lora, merge_and_unload, merge_lora, remove_lora, rename_adapter, unmerge_lora
from lora_plus.model import adapter_names

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


class Bare(nn.Module):
    """A parameter that is read by the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.other = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.T + self.other


FOLDED: list[
    tuple[Callable[[], nn.Module], str, Callable[[], nn.Module], Callable[..., nn.Module], tuple[int, ...]]
] = [
    (lambda: nn.Linear(4, 5), "0", lambda: nn.BatchNorm1d(5), fusion.fuse_linear_bn_eval, (3, 4)),
    (lambda: nn.Conv2d(4, 5, 2), "0", lambda: nn.BatchNorm2d(5), fusion.fuse_conv_bn_eval, (3, 4, 3, 3)),
    (lambda: nn.Linear(4, 5), "0.weight", lambda: nn.BatchNorm1d(5), fusion.fuse_linear_bn_eval, (3, 4)),
]


@pytest.mark.parametrize(("layer", "target", "norm", "fuse", "shape"), FOLDED, ids=["linear", "conv", "in the weight"])
def test_a_batch_norm_is_not_folded_into_an_adapted_layer(
    layer: Any, target: str, norm: Any, fuse: Any, shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(layer(), norm())
    for buffer in model[1].buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    randomise(inject_lora(model.double().eval(), [target], r=2))
    x = torch.randn(shape, dtype=torch.float64)
    y = model(x)
    with pytest.raises(
        ValueError, match=r"a batch norm cannot be folded into a (Linear|Conv2d) with adapters, .*merge_and"
    ):
        fuse(*model)
    assert torch.equal(copy.deepcopy(model)(x), y)
    merge_and_unload(model)
    torch.testing.assert_close(fuse(*model)(x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "target"), [(lambda: nn.Linear(4, 5), "0"), (lambda: nn.LSTM(4, 5), "0.weight_ih_l0")]
)
def test_quantizing_by_class_says_what_it_leaves_as_it_is(layer: Any, target: str) -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    model = inject_lora(nn.Sequential(layer()), [target], r=2)
    name = type(layer()).__name__
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
        with pytest.warns(UserWarning, match=f"leaves every {name} with adapters as it is; call merge_and_unload"):
            quantization.quantize_dynamic(model)


COMPUTED: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = {
    "parametrizations.weight_norm": (
        parametrizations.weight_norm,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
    "weight_norm": (weight_norm, remove_weight_norm),
    "prune": (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        lambda layer: prune.remove(layer, "weight"),
    ),
    "parametrize": (
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
}


@pytest.mark.parametrize(("put", "take_off"), COMPUTED.values(), ids=COMPUTED)
@pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 5), lambda: Conv1D(5, 4)], ids=["linear", "transposed"])
def test_a_merged_weight_that_became_a_computed_one_says_what_to_do(layer: Any, put: Any, take_off: Any) -> None:
    model = nn.Sequential(layer(), nn.Linear(5, 5)).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    base_bits, base_y = copy.deepcopy(model.state_dict()), model(x)
    randomise(inject_lora(model, ["0", "1"], r=2))
    adapted_y = model(x).detach()
    merge_lora(model)
    put(model[0])
    refusals: list[Callable[[nn.Module], Any]] = [
        unmerge_lora, remove_lora, merge_and_unload, lambda m: m(x), lambda m: disabled(m).__enter__(),
    ]  # fmt: skip
    for refusal in refusals:
        with pytest.raises(
            ValueError, match=r"was parametrized or pruned; undo that first, with .*remove_parametrizations"
        ):
            refusal(model)
    assert model[1].lora_merge is not None and not model[1].lora_disabled
    take_off(model[0])
    unmerge_lora(model)
    assert torch.equal(model(x), adapted_y)
    remove_lora(model)
    assert torch.equal(model(x), base_y)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base_bits.items())


REFUSED: dict[str, Callable[[nn.Module], Any]] = {
    "parametrizations.weight_norm": lambda module: parametrizations.weight_norm(module, "w"),
    "weight_norm": lambda module: weight_norm(module, "w"),
    "parametrize": lambda module: parametrize.register_parametrization(module, "w", nn.Identity()),
    "delattr": lambda module: delattr(module, "w"),
}


@pytest.mark.parametrize("tool", REFUSED.values(), ids=REFUSED)
def test_an_adapted_parameter_is_not_taken_away(tool: Callable[[nn.Module], Any]) -> None:
    model = randomise(inject_lora(nn.Sequential(Bare()), ["w"], r=2))
    x = torch.randn(3, 4)
    y, kind, keys = model(x), type(model[0]), set(model.state_dict())
    with pytest.raises(
        ValueError, match="'w' has adapters, so it cannot be deleted or parametrized; call merge_and_unload"
    ):
        tool(model[0])
    assert type(model[0]) is kind and set(model.state_dict()) == keys
    assert torch.equal(model(x), y)
    del model[0].other
    merge_and_unload(model)
    tool(model[0])


LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(4, 6), {"targets": ["layer"]}),
    "rows": (lambda: nn.Linear(4, 6), {"targets": ["layer.q", "layer.v"], "fused": {"layer": ["q", "k", "v"]}}),
    "parameter": (Bare, {"targets": ["layer.w"]}),
    "lstm": (lambda: nn.LSTM(4, 3), {"targets": ["layer"]}),
}


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
@pytest.mark.parametrize(("make", "settings"), LAYERS.values(), ids=LAYERS)
def test_a_shallow_copy_keeps_its_adapters(make: Callable[[], nn.Module], settings: Any, merged: bool) -> None:
    def run(layer: nn.Module) -> Tensor:
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    x = torch.randn(2, 3, 4)
    model = nn.ModuleDict({"layer": make()}).eval()
    plain = run(model["layer"]).detach()
    randomise(inject_lora(model, r=2, **settings))
    y = run(model["layer"]).detach()
    if merged:
        merge_lora(model)
        y = run(model["layer"]).detach()
    with disabled(model):
        inside = copy.copy(model["layer"])
        assert torch.equal(run(inside), y)
        assert torch.equal(run(model["layer"]), plain)
    copied = copy.copy(model["layer"])
    assert [id(p) for p in copied.parameters()] == [id(p) for p in model["layer"].parameters()]
    assert torch.equal(run(copied), y)
    rename_adapter(model, "default", "renamed")
    assert torch.equal(run(copied), y)
    remove_lora(model)
    assert torch.equal(run(model["layer"]), plain)
    assert torch.equal(run(copied), y)
    assert adapter_names(copied) == ["default"]
    if merged:
        unmerge_lora(copied)
    remove_lora(copied)
    assert torch.equal(run(copied), plain)
