"""check_adapters: live adapters pass, each way of being inert is named, and nothing is left changed."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_plus
from lora_plus import check_adapters, inject_lora


class Model(nn.Module):
    """Two layers, the first of which is used in the way that a test says."""

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.l, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.use = use

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        y = self.norm(x + self.use(self.l, x))
        return {"out": self.last(y), "others": [x]}


def gone(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def only_with_gradients(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer(x) if torch.is_grad_enabled() else F.linear(x, layer.weight, layer.bias)


def only_in_training(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer(x) if layer.training else F.linear(x, layer.weight, layer.bias)


def replaced(layer: nn.Linear, x: Tensor) -> Tensor:
    layer.forward = functools.wraps(layer.forward)(lambda x: F.linear(x, layer.weight))  # type: ignore[method-assign]
    return layer(x)


READ = "its weight is read, but the layer is not called; target the parameter 'l.weight' instead"
OFF = "it runs with gradients off"
INERT: dict[str, tuple[Callable[[nn.Linear, Tensor], Tensor], str]] = {
    "never called": (lambda layer, x: x, "in eval and train: it is not called with these inputs"),
    "weight read": (lambda layer, x: F.linear(x, layer.weight), f"in eval and train: {READ}"),
    "called and read": (lambda layer, x: layer(x) + F.linear(x, layer.weight), "its weight is also read outside of"),
    "forward replaced": (replaced, "in eval and train: the forward assigned to it after the injection"),
    "detached": (lambda layer, x: layer(x).detach(), "in eval and train: no gradient reaches lora_A, lora_B"),
    "times zero": (
        lambda layer, x: 0 * layer(x),
        "in eval and train: with these inputs the gradient of lora_A, lora_B is",
    ),
    "not finite": (lambda layer, x: torch.sqrt(0 * layer(x)), "is not finite"),
    "no_grad": (gone, f"in eval and train: {OFF}"),
    "checkpointed": (lambda layer, x: checkpoint(layer, x, use_reentrant=True), f"in eval and train: {OFF}"),
    "in training only": (only_in_training, f"in eval: {READ}"),
    "with gradients only": (only_with_gradients, "in eval without gradients: it has no effect"),
    "a copy is called": (lambda layer, x: copy.deepcopy(layer)(x), "in eval and train: "),
}


class Kept(nn.Module):
    """A scale that the forward finds where the model has put it besides."""

    def __init__(self, keep: Callable[[nn.Parameter], object], read: Callable[[object], Tensor]) -> None:
        super().__init__()
        self.l, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.kept, self.read = keep(self.scale), read

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x) * self.read(self.kept)


class Pair(NamedTuple):
    number: int
    scale: Tensor


def circle(scale: Tensor) -> list[object]:
    kept: list[object] = [scale]
    kept.append(kept)
    return kept


KEPT: dict[str, tuple[Callable[[nn.Parameter], object], Callable[[object], Tensor]]] = {
    "a list": (lambda scale: [scale], lambda kept: kept[0]),
    "a dict": (lambda scale: {"scale": scale}, lambda kept: kept["scale"]),
    "a list in a tuple": (lambda scale: (1, [scale]), lambda kept: kept[1][0]),
    "a named tuple": (lambda scale: [Pair(1, scale)], lambda kept: kept[0].scale),
    "a list that contains itself": (circle, lambda kept: kept[1][0]),
}
ELSEWHERE: dict[str, tuple[Callable[[nn.Parameter], object], Callable[[object], Tensor]]] = {
    "an object": (lambda scale: SimpleNamespace(scale=scale), lambda kept: kept.scale),
    "a function": (lambda scale: lambda: scale, lambda kept: kept()),
    "a set": (lambda scale: {scale}, lambda kept: next(iter(kept))),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_trained_in_full_is_live_where_the_forward_finds_it_in_a_container(name: str) -> None:
    model, x = Kept(*KEPT[name]), torch.randn(5, 4)
    own = model.scale
    for adapter in "ab":
        inject_lora(model, ["l"], r=2, train_also=["scale"], adapter=adapter)
        assert check_adapters(model, x) == ["l"]
        model(x).sum().backward()
        assert model.scale.grad is not None and model.read(model.kept) is model.scale
    assert lora_plus.remove_lora(model).scale is own and model.read(model.kept) is own


@pytest.mark.parametrize("name", ELSEWHERE)
def test_values_that_the_forward_finds_elsewhere_are_named(name: str) -> None:
    model, x = Kept(*ELSEWHERE[name]), torch.randn(5, 4)
    inject_lora(model, ["l"], r=2, train_also=["scale"], adapter="a")
    assert check_adapters(model, x) == ["l"]
    inject_lora(model, ["l"], r=2, train_also=["scale"], adapter="b")
    before = snapshot(model)
    with pytest.raises(ValueError, match="'scale', trained in full: the forward reads values of 'a', which the model"):
        check_adapters(model, x)
    assert_same(before, snapshot(model))


def test_what_is_trained_in_full_and_not_reached_is_named() -> None:
    for training in (True, False):
        model = inject_lora(Model(lambda layer, x: layer(x)), ["last"], r=2, train_also=["l", "norm"])
        lora_plus.set_adapter(model, "default", trainable=training)
        assert check_adapters(model, torch.randn(5, 4)) == ["last"]
        model.use = INERT["never called"][0]
        with pytest.raises(ValueError, match="is live:\n  'l', trained in full: no gradient reaches it"):
            check_adapters(model, torch.randn(5, 4))
        assert model.l.weight.requires_grad == training and model.l.weight.grad is None


def snapshot(model: nn.Module) -> dict[str, object]:
    """All of a model that a check could disturb."""
    return {
        "tensors": {name: (id(t), t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "gradients": {
            name: None if p.grad is None else (id(p.grad), p.grad.clone()) for name, p in model.named_parameters()
        },
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "random": (torch.get_rng_state(), random.getstate()),
        "dicts": [sorted(module.__dict__) for module in model.modules()],
        "active": [w.lora_active for _, w in lora_plus.model.tree.adapted_weights(model)],
    }


def assert_same(before: object, after: object) -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, (dict, list, tuple)):
        items = (before.keys(), after.keys()) if isinstance(before, dict) else (range(len(before)), range(len(after)))
        assert list(items[0]) == list(items[1])
        for key in items[0]:
            assert_same(before[key], after[key])
    else:
        assert before == after


@pytest.mark.parametrize("name", INERT)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_an_adapter_that_is_not_live_is_named_with_the_reason(name: str) -> None:
    use, reason = INERT[name]
    model = inject_lora(Model(use), ["l", "last"], r=2)
    with pytest.raises(ValueError) as error:
        check_adapters(model, torch.randn(5, 4))
    first, *lines = str(error.value).splitlines()
    assert first == "1 of 2 adapters are not live:" and len(lines) == 1
    assert lines[0].startswith("  'l', ") and reason in lines[0]


def test_the_proposed_target_is_live() -> None:
    model = inject_lora(Model(INERT["weight read"][0]), ["l.weight", "last"], r=2)
    assert check_adapters(model, torch.randn(5, 4)) == ["l.weight", "last"]


def test_the_target_is_proposed_too_where_others_read_the_weight_that_a_head_is_tied_to() -> None:
    def tied(target: str) -> nn.Module:
        model = Model(lambda layer, x: F.linear(x, layer.weight))
        model.first, model.l.weight = (first := nn.Linear(4, 4)), first.weight
        return inject_lora(model, [target, "last"], r=2)

    with pytest.raises(ValueError, match=r"; if its weight is read without a call, target .*'l\.weight'"):
        check_adapters(tied("l"), torch.randn(5, 4))
    assert check_adapters(tied("l.weight"), torch.randn(5, 4)) == ["l.weight", "last"]
    with pytest.raises(ValueError, match=r"inputs that reach it, or exclude it$"):  # it is the parameter already
        check_adapters(inject_lora(Model(lambda layer, x: x), ["l.weight", "last"]), torch.randn(5, 4))


def test_without_inputs_the_user_is_told_to_give_the_models_own() -> None:
    model = inject_lora(Model(lambda layer, x: layer(x)), ["l", "last"], r=2)
    with pytest.raises(
        ValueError, match=r"without inputs; give the model's own inputs: check_adapters\(model, inputs\)"
    ):
        check_adapters(model)
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        check_adapters(model, y=1)
    layer, x = model.l, torch.randn(5, 4)
    model.forward = lambda: layer(x)
    with pytest.raises(ValueError, match="'last', in eval and train: it is not called"):  # a forward may need none
        check_adapters(model)


def test_every_kind_of_layer_is_live(case: Case) -> None:
    model = inject_lora(case.model(), ["layer"], **case.settings)
    assert check_adapters(model, case.input()) == ["layer"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_obstacle(dtype: torch.dtype) -> None:
    for case in CASES[:3]:
        assert check_adapters(inject_lora(case.model(dtype), ["layer"], **case.settings), case.input(dtype)) == [
            "layer"
        ]


@pytest.mark.parametrize("use", [lambda layer, x: layer(x), INERT["never called"][0]])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_changed(use: Callable[[nn.Linear, Tensor], Tensor], training: bool) -> None:
    model, x = Model(use).train(training), torch.randn(5, 4, requires_grad=True)
    randomise(inject_lora(model, ["l", "last"], r=2, dropout=0.3, train_also=["norm"]))
    model.norm.eval()
    model(2 * x)["out"].sum().backward()
    inputs = (2 * x,)  # which has a graph of its own
    before, gradient = snapshot(model), x.grad.clone()
    for _ in range(2):
        try:
            check_adapters(model, *inputs)
        except ValueError:
            assert use is INERT["never called"][0]
        assert_same(before, snapshot(model))
    assert torch.equal(x.grad, gradient)
    inputs[0].sum().backward()


def test_an_error_of_the_model_leaves_it_unchanged_too() -> None:
    model = randomise(inject_lora(Model(lambda layer, x: layer(x)), ["l", "last"], r=2))
    x = torch.randn(5, 7)
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        check_adapters(model, x)
    assert_same(before, snapshot(model))


def test_buffers_and_rescaled_rows_come_back() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 2))
    inject_lora(model, ["3"], r=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_adapters(model, torch.randint(9, (5, 2)))
    assert_same(before, dict(model.state_dict()))


class OnGPU(nn.GRU):
    """What a recurrent layer does on a GPU, where cuDNN has no backward in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.training or not torch.is_grad_enabled() or not torch.backends.cudnn.enabled
        return super().forward(x)[0]


def test_recurrent_layers_are_differentiated_in_eval_mode_without_cudnn() -> None:
    model = inject_lora(nn.Sequential(OnGPU(4, 3)), ["0"], r=2)
    assert check_adapters(model, torch.randn(5, 4)) == ["0.weight_ih_l0", "0.weight_hh_l0"]
    assert torch.backends.cudnn.enabled


def test_layers_skipped_at_random_in_training_get_several_chances() -> None:
    class Dropping(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                if not self.training or torch.rand(()) < 0.8:
                    x = x + layer(x)
            return x

    model = inject_lora(Dropping(*[nn.Linear(4, 4) for _ in range(4)]), "all-linear", r=2)
    assert len(check_adapters(model, torch.randn(3, 4))) == 4


def test_keywords_nested_outputs_wrappers_and_graph_modes() -> None:
    model = inject_lora(Model(lambda layer, x: layer(x)), ["l", "last"], r=2)
    compiled = torch.compile(model, backend="eager")
    for call in (
        lambda: check_adapters(model, x=torch.randn(5, 4)),
        lambda: check_adapters(compiled, torch.randn(5, 4)),
    ):
        for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with context:
                assert call() == ["l", "last"]


def test_only_the_active_adapters_are_checked() -> None:
    model = inject_lora(Model(lambda layer, x: layer(x)), ["l"], r=2)
    inject_lora(model, ["last"], r=2, adapter="second")
    assert check_adapters(model, torch.randn(5, 4)) == ["last"]
    lora_plus.set_adapter(model, ["default", "second"])
    assert check_adapters(model, torch.randn(5, 4)) == ["l", "last"]
    lora_plus.set_adapter(model, [])
    with pytest.raises(ValueError, match="there is no active adapter to check"):
        check_adapters(model, torch.randn(5, 4))


def test_what_cannot_be_checked_is_refused() -> None:
    model, x = inject_lora(Model(lambda layer, x: layer(x)), ["l"], r=2), torch.randn(5, 4)
    with lora_plus.merged(model), pytest.raises(ValueError, match=r"the model is merged \('l' is\); call unmerge_lora"):
        check_adapters(model, x)
    with lora_plus.disabled(model), pytest.raises(ValueError, match="the adapters are disabled"):
        check_adapters(model, x)
    lora_plus.set_adapter(model, {"default": 0})
    with pytest.raises(ValueError, match="the factor of 'default' is 0, so it has no effect"):
        check_adapters(model, x)
    with pytest.raises(ValueError, match="'l' has no values yet"):
        check_adapters(inject_lora(Model(lambda layer, x: layer(x)).to("meta"), ["l"], r=2), x)


def test_the_number_of_passes_does_not_depend_on_the_number_of_adapters() -> None:
    for layers in (3, 30):
        model = inject_lora(nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)]), "all-linear", r=2)
        calls: list[int] = []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert len(check_adapters(model, torch.randn(2, 4))) == layers and len(calls) == 3
