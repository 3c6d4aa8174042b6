"""A different adapter for each sample of a batch: as if the samples were computed one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import CASES, Case, Conv1D, Holder, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_plus
from lora_plus import adapter_per_sample, disabled, inject_lora, set_adapter
from lora_plus.layers.adapter import Adapter
from lora_plus.model import per_sample

UNBATCHED = [case for case in CASES if "unbatched" in case.name]
BATCHED = [case for case in CASES if case not in UNBATCHED]
RANKS = {"a": 3, "b": 1, "c": 2}
NAMES = ["b", None, "a", "b", "c", "a"]


def mixed(model: nn.Module, targets: Any = "layer", ranks: dict[str, int] = RANKS, **settings: Any) -> nn.Module:
    """The model with adapters of these names and ranks, all trainable, their B not zero."""
    for name, r in ranks.items():
        inject_lora(model, targets, adapter=name, **{"alpha": 5, **settings, "r": r})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return randomise(model)


def batch(case: Case, dtype: torch.dtype = torch.float64, size: int = len(NAMES)) -> torch.Tensor:
    return torch.cat([case.input(dtype, seed) for seed in range(size)])[:size]


def one_by_one(model: nn.Module, x: torch.Tensor, names: Sequence[str | None]) -> torch.Tensor:
    """The independent reference: each sample alone, with its adapter as the active one."""
    outputs = []
    for sample, name in zip(x.split(1), names, strict=True):
        set_adapter(model, [] if name is None else name)
        outputs.append(model(sample))
    return torch.cat(outputs)


def gradients(model: nn.Module, output: Callable[[], torch.Tensor], *others: torch.Tensor) -> list[torch.Tensor]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = torch.sin(torch.arange(1.0, 1 + output().numel(), dtype=torch.float64))
    loss = (output().flatten() * weights).sum()
    return list(torch.autograd.grad(loss, [*wanted, *others], materialize_grads=True))


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def check_law(model: nn.Module, x: torch.Tensor, names: Sequence[str | None] = NAMES) -> None:
    """Outputs, and gradients of all adapters and of the input, are those of the samples one by one."""
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    for mode in (True, False):
        model.train(mode)
        wanted = one_by_one(model, x, names)
        wanted_gradients = gradients(model, lambda: one_by_one(model, x, names), *inputs)
        with disabled(model):
            base = model(x)
        assert not torch.allclose(wanted, base, atol=1e-3)
        with adapter_per_sample(model, names):
            y = model(x)
            close(y, wanted)
            close(gradients(model, lambda: model(x), *inputs), wanted_gradients)
            for _ in range(2):
                with torch.no_grad():
                    close(model(x), wanted)
        for sample, name in enumerate(names):
            assert name is not None or torch.equal(y[sample], base[sample])


@pytest.mark.parametrize("case", BATCHED, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "names", [NAMES, ["a", "b", "c"], ["b", "b"], ["c", "a", "a", "c"], ["a", "a", "c", "c"]], ids=str
)
def test_a_mixed_batch_is_its_samples_one_by_one(case: Case, names: list[str | None]) -> None:
    check_law(mixed(case.model(), **case.options), batch(case, size=len(names)), names)


@pytest.mark.parametrize("case", UNBATCHED, ids=lambda case: case.name)
def test_a_layer_without_a_batch_is_refused_even_where_the_size_fits(case: Case) -> None:
    model, x = mixed(case.model(), **case.options), case.input()
    with adapter_per_sample(model, ["a"] * len(x)), pytest.raises(ValueError, match=r"layer 'layer' got an input of"):
        model(x)


def test_features_are_not_taken_for_samples_where_their_number_fits() -> None:
    model = mixed(nn.Sequential(nn.Linear(4, 4)), "0")
    with adapter_per_sample(model, ["a"] * 4), pytest.raises(ValueError, match=r"layer '0' got an input of"):
        model(torch.randn(4))


@pytest.mark.parametrize("variant", [[], ["dora"]], ids=str)
def test_the_factor_of_an_active_adapter_is_not_that_of_a_sample(variant: list[str]) -> None:
    model, x = mixed(nn.Sequential(nn.Linear(4, 4)).double(), "0"), torch.randn(6, 4, dtype=torch.float64)
    for name in variant:  # samples are then computed adapter by adapter
        inject_lora(model, ["0"], adapter=name, variant="dora")
    names = [*NAMES[: 6 - len(variant)], *variant]
    wanted = one_by_one(model, x, names)
    set_adapter(model, {"a": 0.5})
    before = model(x)
    with adapter_per_sample(model, names):
        close(model(x), wanted)
    assert torch.equal(model(x), before)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.other, self.conv = nn.Linear(6, 6), nn.Linear(6, 6), Conv1D(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.other(self.qkv(x)))


def test_row_blocks_and_adapters_that_a_layer_lacks() -> None:
    model = Fused().double()
    inject_lora(model, ["qkv.q"], r=2, adapter="a", fused={"qkv": ["q", "v"]})
    inject_lora(model, ["qkv", "other"], r=3, alpha=2, adapter="b", fused={"qkv": ["q", "v"]})
    inject_lora(model, ["conv"], r=1, adapter="c")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    check_law(randomise(model), torch.randn(6, 2, 6, dtype=torch.float64))


def test_variants_and_dropout_may_differ() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    inject_lora(model, "all-linear", r=2, adapter="a", variant="dora")
    inject_lora(model, "all-linear", r=3, adapter="b", scaling="rslora")
    inject_lora(model, ["0"], r=3, adapter="c")
    check_law(mixed(model, ranks={}), torch.randn(6, 6, dtype=torch.float64))


def test_quantized_layers_take_mixed_batches() -> None:
    pytest.importorskip("bitsandbytes")
    from test_quantized import BASES

    layer = BASES[0].layer()
    model = mixed(Holder(layer), alpha=8)
    x = torch.randn(6, 2, layer.in_features)
    for _ in range(2):
        wanted = one_by_one(model, x, NAMES)
        with adapter_per_sample(model, NAMES):
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
        model.eval()


@pytest.mark.parametrize("dropouts", [(0.5, 0.5), (0.5, 0.0)], ids=str)
@pytest.mark.parametrize("names", [["a", "b"], ["a", None, "a"]], ids=str)
def test_dropout_acts_in_training_only_and_keeps_the_mean(dropouts: tuple[float, float], names: list[str]) -> None:
    model = nn.Sequential(nn.Linear(6, 6)).double()
    for name, dropout in zip("ab", dropouts, strict=True):
        inject_lora(model, ["0"], r=2, adapter=name, dropout=dropout)
    randomise(model)
    x = torch.randn(len(names), 1, 6, dtype=torch.float64)
    wanted = one_by_one(model.eval(), x, names)
    with adapter_per_sample(model, names), torch.no_grad():
        close(model(x), wanted)
        y = model.train()(x.expand(-1, 20_000, -1))
    spread = y.std(1)
    for sample, name in enumerate(names):
        dropped = name is not None and dropouts["ab".index(name)] > 0
        assert bool((spread[sample] > 1e-3).all()) is dropped
    assert ((y.mean(1) - wanted[:, 0]).abs() <= 5 * spread / 20_000**0.5 + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", BATCHED, ids=lambda case: case.name)
def test_low_precision_stays_close_to_float64(case: Case, dtype: torch.dtype) -> None:
    model, x = mixed(case.model(dtype), **case.options), batch(case, dtype)
    exact, names = copy.deepcopy(model).double(), NAMES
    with adapter_per_sample(model, names), adapter_per_sample(exact, names):
        wanted, y = exact(x.double() if x.is_floating_point() else x), model(x)
        with torch.no_grad():
            again = model(x)
    assert y.dtype == dtype and torch.equal(y, again)
    assert (y.double() - wanted).abs().max() <= 8 * torch.finfo(dtype).eps * wanted.abs().max()


def test_autocast_computes_in_half_precision() -> None:
    model, x = mixed(nn.Sequential(nn.Linear(6, 5)), "0"), torch.randn(6, 3, 6)
    with adapter_per_sample(model, NAMES):
        wanted = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16 and model[0].lora_A["a"].grad.dtype == torch.float32
    assert (y.float() - wanted).abs().max() <= 0.03 * wanted.abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = mixed(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double(), "all-linear")
    x = torch.randn(6, 2, 6, dtype=torch.float64, requires_grad=True)
    parameters = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def backward(output: torch.Tensor) -> list[torch.Tensor]:
        for parameter in parameters:
            parameter.grad = None
        output.square().sum().backward()
        return [parameter.grad for parameter in parameters]

    with adapter_per_sample(model, NAMES):
        wanted = backward(model(x))
        close(backward(checkpoint(model, x, use_reentrant=reentrant)), wanted)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_compiled_without_breaks(variant: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = mixed(nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)).double(), "all-linear", variant=variant)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(6, 6, dtype=torch.float64)
    set_adapter(model, "a")
    outside = compiled(x)
    shuffled = ["c", "a", "b", "a", None, "b"]
    for names in (NAMES, shuffled):
        wanted = one_by_one(model, x, names)
        with adapter_per_sample(model, names):
            close(compiled(x), wanted)
            with torch.no_grad():
                close(compiled(x), wanted)
        if variant == "lora":  # the composition of a batch is data, not code
            assert counter.frame_count == 3
    set_adapter(model, "a")
    close(compiled(x), outside)
    torch._dynamo.reset()


def test_without_gradients_factors_are_stacked_once_and_never_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mixed(nn.Sequential(nn.Linear(6, 5)).double(), "0"), torch.randn(6, 6, dtype=torch.float64)
    made = []
    own = Adapter.factors
    monkeypatch.setattr(Adapter, "factors", lambda adapter: made.append(adapter.name) or own(adapter))
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: model[0].lora_B["c"].mul_(2),
        lambda: model.load_state_dict({"0.lora_A.a": torch.ones(3, 6, dtype=torch.float64)}, strict=False),
        lambda: model.load_state_dict({"0.lora_A.b": torch.ones(1, 6, dtype=torch.float64)}, strict=False, assign=True),
        lambda: model[0].__setattr__("unrelated", 1),
    ]
    counts = []
    with adapter_per_sample(model, NAMES), torch.no_grad():
        for change in changes:
            change()
            before = len(made)
            y = model(x)
            counts.append(len(made) - before)
            with torch.enable_grad():
                close(y, model(x).detach())
            model(x)  # a forward with gradients has dropped them
        model.float()
        assert model(x.float()).dtype == torch.float32
    assert counts == [3, 3, 3, 3, 0]


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.attn(x, x, x)[0]))


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        ([], ValueError, "got an empty list"),
        ("a", TypeError, "expected a list with the name of an adapter, or None, for each sample, got 'a'"),
        (["up", 3], TypeError, r"got \['up', 3\]"),
        (["up", "nope"], KeyError, "no adapter 'nope'"),
        (
            ["up", "attn"],
            ValueError,
            r"'attn.in_proj_weight' is adapted in the weight by \['attn'\], .*; run the samples of",
        ),
        (["up", "head"], ValueError, "'head' is trained in full with the adapter 'head', and a batch has only one"),
    ],
    ids=str,
)
def test_what_one_batch_cannot_have_is_refused_at_the_start(names: Any, error: Any, text: str) -> None:
    model = Heads()
    inject_lora(model, ["up"], adapter="head", train_also=["head"])
    inject_lora(model, ["attn.in_proj"], adapter="attn")
    inject_lora(model, ["up"], adapter="up")
    with pytest.raises(error, match=text), adapter_per_sample(model, names):
        pass
    assert [weight.lora_override for _, weight in lora_plus.model.tree.adapted_weights(model)] == [None, None]


def test_adapters_in_the_weight_that_no_sample_has_are_off() -> None:
    model = Heads()
    inject_lora(model, ["up"], adapter="up")
    inject_lora(model, ["attn"], adapter="attn")  # the active one
    randomise(model).eval()
    x = torch.randn(2, 3, 8)
    wanted = one_by_one(model, x, ["up", None])
    set_adapter(model, "attn")
    before = model(x)
    with adapter_per_sample(model, ["up", None]):
        torch.testing.assert_close(model(x), wanted)
    assert torch.equal(model(x), before)


def two() -> tuple[nn.Module, torch.Tensor]:
    return mixed(nn.Sequential(nn.Linear(4, 4)), "0", ranks={"a": 2, "b": 2}), torch.randn(2, 4)


def test_merged_or_disabled_models_are_refused() -> None:
    model, _ = two()
    with disabled(model), pytest.raises(ValueError, match="are disabled"), adapter_per_sample(model, ["a"]):
        pass
    merged = lora_plus.merged(model.eval())
    with (
        merged,
        pytest.raises(ValueError, match=r"^choosing an adapter for each sample needs unmerged"),
    ):
        adapter_per_sample(model, ["a"]).__enter__()


def test_nothing_can_be_changed_inside() -> None:
    model, x = two()
    calls: list[Callable[[], Any]] = [
        lambda: set_adapter(model, "a"),
        lambda: lora_plus.delete_adapter(model, "a"),
        lambda: lora_plus.merge_lora(model),
        lambda: lora_plus.merge_and_unload(model),
        lambda: lora_plus.remove_lora(model),
        lambda: inject_lora(model, ["0"], adapter="c"),
        lambda: lora_plus.check_adapters(model, x),
    ]
    with adapter_per_sample(model, ["a", "b"]):
        for call in calls:
            with pytest.raises(ValueError, match="leave the adapter_per_sample block first"):
                call()
        with disabled(model):
            assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))


def test_blocks_nest_and_restore_after_errors() -> None:
    model, x = two()
    set_adapter(model, "a")
    before = model(x)
    with adapter_per_sample(model, ["b", "a"]):
        outer = model(x)
        with pytest.raises(RuntimeError, match="on purpose"), adapter_per_sample(model, [None, "b"]):
            assert not torch.equal(model(x), outer)
            raise RuntimeError("on purpose")
        assert torch.equal(model(x), outer)
    assert torch.equal(model(x), before) and model[0].active_names() == ["a"]


@pytest.mark.parametrize("shape", [(3, 4), (6, 4), (3, 2, 4)], ids=str)
def test_another_number_of_samples_is_an_error_that_names_the_layer(shape: tuple[int, ...]) -> None:
    model, _ = two()
    text = rf"layer '0' got an input of shape \({', '.join(map(str, shape))}\) .* has names for 2 samples"
    with adapter_per_sample(model, ["a", "b"]), pytest.raises(ValueError, match=text):
        model(torch.randn(shape))


def test_a_layer_that_is_not_called_does_not_matter() -> None:
    model, _ = two()
    holder = nn.ModuleDict({"adapted": model, "plain": nn.Linear(3, 3)})
    with adapter_per_sample(holder, ["a", "b"]):
        assert holder["plain"](torch.randn(7, 3)).shape == (7, 3)


@pytest.mark.parametrize("layers", [4, 40])
def test_samples_are_grouped_once_for_each_set_of_adapters(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers)])
    inject_lora(model, "all-linear", r=1, adapter="a")
    inject_lora(model, "0", r=1, adapter="b")
    grouped = []
    group = per_sample.group_samples
    monkeypatch.setattr(per_sample, "group_samples", lambda *args: (grouped.append(args[1]), group(*args))[1])
    with adapter_per_sample(model, ["a", "b", None]):
        assert grouped == [("a", "b"), ("a",)]
        model(torch.randn(3, 3))


@pytest.mark.parametrize("width", [8, 192])  # for the larger one a layer's autograd function pays
def test_a_batch_of_one_adapter_is_computed_as_with_that_one_active(width: int) -> None:
    model = mixed(nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)), "all-linear", dropout=0.5)
    x = torch.randn(4, 180, width, requires_grad=True)

    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        y = model(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *model[0].lora_A.parameters()], allow_unused=True)]

    for mode in (True, False):
        model.train(mode)
        with adapter_per_sample(model, ["c"] * 4):
            ours = run()
        set_adapter(model, "c")
        for one, other in zip(ours, run(), strict=True):
            assert one is other is None or torch.equal(one, other)
        with adapter_per_sample(model, ["c"] * 3), pytest.raises(ValueError, match="has names for 3 samples"):
            model(x)
