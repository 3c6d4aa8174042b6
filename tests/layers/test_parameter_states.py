"""The laws of weights adapted as parameters or as blocks of rows: training, copies, files, merging, removal."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import randomise
from parameter_cases import PARAMETER_CASES, Inputs, ParameterCase, assert_close, loss, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_plus
from lora_plus.files import adapter_state_dict
from lora_plus.layers import parameter_owner
from lora_plus.model.tree import adapted_weights

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

LORA_CASES = [case for case in PARAMETER_CASES if not case.dora]


@pytest.fixture(params=PARAMETER_CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> ParameterCase:
    return request.param


def train(case: ParameterCase, model: nn.Module, inputs: Inputs, steps: int) -> None:
    optimizer = lora_plus.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(case.run(model, inputs)).backward()
        optimizer.step()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_plain(case: ParameterCase, model: nn.Module, before: nn.Module) -> None:
    """The model is what ``before`` was: keys and their order, classes, flags, attributes, text, bits."""
    assert list(model.state_dict()) == list(before.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before.named_parameters()]
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
    assert repr(model) == repr(before)
    flags = [parameter.requires_grad for parameter in before.parameters()]
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [sorted(module.__dict__) for module in model.modules()] == [sorted(m.__dict__) for m in before.modules()]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.state_dict().items())
    assert same_bits(case.run(model), case.run(before))


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(other, marks=pytest.mark.slow) for other in (torch.float32, torch.float16))],
)
def test_training_leaves_the_base_alone_and_moves_the_adapter(case: ParameterCase, dtype: torch.dtype) -> None:
    model, inputs = case.model(dtype), case.input(dtype)
    objects, before = dict(model.named_parameters()), bits(model)
    case.inject(model)
    start = bits(model)
    train(case, model, inputs, 100)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(state) - set(before)
    assert not [name for name in trained if torch.equal(state[name], start[name])]
    lora_plus.remove_lora(model)
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())


def test_keys_types_and_objects_come_back(case: ParameterCase) -> None:
    model, before = case.model(), case.model()
    model.part.requires_grad_(False)
    before.part.requires_grad_(False)
    for each in (model, before):
        next(each.parameters()).requires_grad_()
    names, objects = list(model.state_dict()), dict(model.named_parameters())
    part = model.part
    case.inject(model)
    assert model.part is part and isinstance(part, type(before.part))
    assert [name for name in model.state_dict() if name in names] == names
    added = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert added == set(model.state_dict()) - set(names)
    randomise(model)
    case.run(model)
    lora_plus.remove_lora(model)
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())
    assert_plain(case, model, before)


def test_a_base_checkpoint_loads_after_injection(case: ParameterCase) -> None:
    model, other = case.adapted(), case.model(seed=5)
    wanted = set(model.state_dict()) - set(other.state_dict())
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert set(result.missing_keys) == wanted and not result.unexpected_keys
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
    weights = case.explicit_weights(other.state_dict(), adapter_state_dict(model))
    other.load_state_dict(weights, strict=False)
    assert_close(case.run(model), case.run(other))


@pytest.mark.parametrize("assign", [False, True])
def test_a_whole_state_dict_goes_round(case: ParameterCase, assign: bool) -> None:
    source = case.adapted().eval()
    target = case.inject(case.model(seed=5)).eval()
    objects = [parameter for _, parameter in target.named_parameters()]
    state = copy.deepcopy(source.state_dict())
    target.load_state_dict(state, strict=True, assign=assign)
    assert same_bits(case.run(target), case.run(source))
    kept = [new is old for new, old in zip(target.parameters(), objects, strict=True)]
    assert all(kept) if not assign else not any(kept)
    flags = [parameter.requires_grad for parameter in source.parameters()]
    assert [parameter.requires_grad for parameter in target.parameters()] == flags
    assert_plain(case, lora_plus.remove_lora(target), lora_plus.remove_lora(source))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize(
    ("way", "merge", "removed"),
    [
        ("deepcopy", False, "copy"),
        ("deepcopy", False, "original"),
        ("deepcopy", True, "copy"),
        ("deepcopy", True, "original"),
        ("pickle", False, "original"),
        ("pickle", True, "copy"),
    ],
)
def test_copies_are_equal_and_independent(case: ParameterCase, way: str, merge: bool, removed: str) -> None:
    model = case.adapted().eval()
    unmerged = case.run(model)  # recurrent layers keep the weights of their last forward
    if merge:
        lora_plus.merge_lora(model)
    before = case.run(model)
    twin = COPIES[way](model)
    assert type(twin.part) is type(model.part)
    assert same_bits(case.run(twin), before)
    gone, kept = (twin, model) if removed == "copy" else (model, twin)
    assert_plain(case, lora_plus.remove_lora(gone), case.model().eval())
    assert same_bits(case.run(kept), before)
    if merge:
        lora_plus.unmerge_lora(kept)
        assert same_bits(case.run(kept), unmerged)
    randomise(kept, seed=3)
    assert_close(case.run(kept), case.run(case.explicit(kept)))


def test_a_file_gives_the_same_bits(case: ParameterCase, tmp_path: Path) -> None:
    model = case.adapted().eval()
    lora_plus.save_adapter(model, tmp_path / "one.safetensors")
    loaded = lora_plus.load_adapter(case.model(), tmp_path / "one.safetensors", adapter="other").eval()
    with torch.no_grad():  # what is loaded is frozen
        assert same_bits(case.run(loaded), case.run(model))
    lora_plus.save_adapter(loaded, tmp_path / "two.safetensors", adapter="other")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert_plain(case, lora_plus.remove_lora(loaded), case.model().eval())


def test_two_adapters_are_chosen_summed_merged_and_deleted(case: ParameterCase) -> None:
    plain = case.model()
    second = replace(case, options={**case.options, "variant": "lora", "r": 3})
    model = randomise(second.inject(case.inject(case.model(), adapter="first"), adapter="second")).eval()
    base = bits(plain)
    states = {name: adapter_state_dict(model, adapter=name) for name in ("first", "second")}
    rescaled = {**base, **case.explicit_weights(base, states["first"])}
    weights = {
        (): base,
        ("first",): rescaled,
        ("second",): second.explicit_weights(base, states["second"]),
        ("second", "first"): second.explicit_weights(rescaled, states["second"]),
    }
    wanted = {}
    for names, each in weights.items():
        plain.load_state_dict({**base, **each})
        wanted[names] = case.run(plain)
    for names, output in wanted.items():
        lora_plus.set_adapter(model, names)
        assert_close(case.run(model), output)
        if names:
            with lora_plus.merged(model):
                assert_close(case.run(model), output)
            with lora_plus.merged(model, adapters=["second"]):
                assert_close(case.run(model), wanted["second",])
    lora_plus.delete_adapter(model, "first")
    assert_close(case.run(model), wanted["second",])
    lora_plus.delete_adapter(model, "second")
    assert_plain(case, model, case.model().eval())


def test_disabled_gives_the_base_and_restores_the_state(case: ParameterCase) -> None:
    model, frozen = case.adapted().eval(), case.frozen().eval()
    for merge in (False, True):
        if merge:
            lora_plus.merge_lora(model)
        before = case.run(model)
        with lora_plus.disabled(model):
            assert same_bits(case.run(model), case.run(frozen))
            with lora_plus.disabled(model):
                assert same_bits(case.run(model), case.run(frozen))
            assert same_bits(case.run(model), case.run(frozen))
        assert same_bits(case.run(model), before)


def test_merging_is_undone_bit_for_bit(case: ParameterCase) -> None:
    model, inputs = case.adapted(torch.bfloat16).eval(), case.input(torch.bfloat16)
    weights = {path: (weight.weight, weight.weight.detach().clone()) for path, weight in adapted_weights(model)}
    output = case.run(model, inputs)
    for _ in range(100):
        lora_plus.merge_lora(model)
        lora_plus.unmerge_lora(model)
    lora_plus.merge_lora(model)
    assert not any(torch.equal(weight.weight, weights[path][1]) for path, weight in adapted_weights(model))
    with pytest.raises(ValueError, match=r"it is merged already; call unmerge_lora\(model\) first"):
        lora_plus.merge_lora(model)
    lora_plus.unmerge_lora(model)
    with pytest.raises(ValueError, match="the model is not merged"):
        lora_plus.unmerge_lora(model)
    for path, weight in adapted_weights(model):
        assert weight.weight is weights[path][0] and torch.equal(weight.weight, weights[path][1])
    assert same_bits(case.run(model, inputs), output)


def test_while_merged_the_state_dict_is_the_plain_model_s_and_nothing_is_loaded(case: ParameterCase) -> None:
    model, plain = case.adapted().eval(), case.model().eval()
    lora_plus.merge_lora(model)
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state, strict=True)
    assert same_bits(case.run(plain.requires_grad_(False)), case.run(model))
    with pytest.raises(RuntimeError, match=r"is merged; call unmerge_lora\(model\) before loading"):
        model.load_state_dict(case.model().state_dict(), strict=False)
    with pytest.raises(ValueError, match="is merged, so its adapters would get no gradient"):
        case.run(model.train())
    randomise(model.eval(), seed=3)
    with pytest.raises(ValueError, match="was changed while it was merged"):
        case.run(model)
    lora_plus.unmerge_lora(model)
    assert_close(case.run(model), case.run(case.explicit(model)))


def test_moving_to_another_dtype_takes_the_adapters_along(case: ParameterCase) -> None:
    for merge in (False, True):
        model = case.adapted().eval()
        wanted = case.run(model)
        if merge:
            lora_plus.merge_lora(model)
        model.float()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        inputs = case.input(torch.float32)
        assert_close([leaf.double() for leaf in case.run(model, inputs)], wanted, 1e-5)
        if merge:
            lora_plus.unmerge_lora(model)
            assert_close([leaf.double() for leaf in case.run(model, inputs)], wanted, 1e-5)


@pytest.mark.parametrize("case", LORA_CASES, ids=lambda case: case.name)
def test_adapters_on_a_meta_base_have_values_and_keep_them(case: ParameterCase) -> None:
    real = case.model()
    with torch.device("meta"):
        model = case.model()
    randomise(case.inject(model))
    values = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert not any(value.is_meta for value in values.values())
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict(), strict=False)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in values.items())
    assert_close(case.run(model), case.run(case.explicit(model)))


def test_every_tensor_is_in_one_optimizer_group(case: ParameterCase) -> None:
    model = case.adapted()
    groups = lora_plus.loraplus_param_groups(model, lr=1e-3, lr_ratio=8)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    by_name = {group["name"]: group for group in groups}
    assert set(by_name) == {"lora_A", "lora_B"} | ({"lora_magnitude"} if case.dora else set())
    assert len(by_name["lora_A"]["params"]) == len(by_name["lora_B"]["params"]) == len(case.places)
    assert by_name["lora_B"]["lr"] == 8 * by_name["lora_A"]["lr"]
    rows = lora_plus.lora_summary(model).rows
    assert sorted(row.name for row in rows) == sorted(case.places)
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters() if p.requires_grad)


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "share_memory": lambda model: model.share_memory(),
    "_apply": lambda model: model._apply(torch.clone),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_merged_recurrent_layer_moves_with_its_model(layer: type[nn.RNNBase], move: str, training: bool) -> None:
    model = nn.ModuleDict({"before": nn.Linear(4, 4), "rnn": layer(4, 3, num_layers=2), "after": nn.Linear(3, 3)})
    lora_plus.inject_lora(model, ["before", "rnn", "after"], r=2)
    randomise(model).train(training)
    plain = MOVES[move](lora_plus.remove_lora(copy.deepcopy(model)))
    lora_plus.merge_lora(model)
    merged = MOVES[move](copy.deepcopy(lora_plus.merge_and_unload(copy.deepcopy(model))))
    MOVES[move](model)
    assert {tensor.dtype for tensor in model.parameters()} == {tensor.dtype for tensor in plain.parameters()}
    x = torch.randn(5, 2, 4, dtype=plain["before"].weight.dtype)
    for copied in (model, pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert same_bits(copied["rnn"](x)[0], merged["rnn"](x)[0])
            weights = [getattr(merged["rnn"], name) for name in merged["rnn"]._flat_weights_names]
            assert all(map(torch.equal, copied["rnn"]._flat_weights, weights))
        lora_plus.unmerge_lora(copied)
        assert loss(copied["rnn"](x)[0]).requires_grad
        lora_plus.remove_lora(copied)
        assert list(copied.state_dict()) == list(plain.state_dict())
        assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in copied.state_dict().items())
        assert same_bits(copied["rnn"](x)[0], plain["rnn"](x)[0])


# ---- activation checkpoints ------------------------------------------------------------------------------------------

Inside = Callable[..., Tensor]


class Rereading(nn.Module):
    """Reads its weight around and inside of what is computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x: Tensor, read: Callable[[Rereading, Inside, Tensor], Tensor], inside: Inside) -> Tensor:
        return read(self, inside, x)


READS: dict[str, Callable[[Rereading, Inside, Tensor], Tensor]] = {
    "in two checkpoints": lambda m, inside, x: inside(lambda x: x @ m.w.tanh(), x) + inside(lambda x: x @ m.w.sin(), x),
    "twice in one": lambda m, inside, x: inside(lambda x: x @ m.w.tanh() + (x @ m.w.mT).sin(), x),
    "before and inside": lambda m, inside, x: x @ m.w + inside(lambda x: x @ m.w.mT, x),
    "inside and after": lambda m, inside, x: inside(lambda x: (x @ m.w.mT).sin(), x) + x @ m.w.tanh(),
    "once for all": lambda m, inside, x: (lambda w: inside(lambda x: x @ w.tanh(), x) + x @ w)(m.w),
}


@pytest.mark.parametrize("hooks_are_told", [True, False], ids=["", "by a torch that does not tell its hooks"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("read", READS)
def test_weights_are_read_around_and_inside_of_checkpoints(
    read: str, variant: str, hooks_are_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hooks_are_told:
        with monkeypatch.context() as patched:
            patched.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
            found = importlib.util.find_spec(parameter_owner.__name__)
            assert found is not None and found.loader is not None
            fresh = importlib.util.module_from_spec(found)
            found.loader.exec_module(fresh)
        monkeypatch.setattr(parameter_owner, "_TOP_HOOKS", fresh._TOP_HOOKS)
    torch.manual_seed(0)
    model = randomise(lora_plus.inject_lora(Rereading(), ["w"], r=2, variant=variant))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def gradients(inside: Inside) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x, READS[read], inside).sum(), wanted)

    again = gradients(lambda run, x: checkpoint(run, x, use_reentrant=False))
    torch.testing.assert_close(again, gradients(lambda run, x: run(x)), rtol=1e-12, atol=1e-12)
