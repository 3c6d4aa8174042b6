"""Which layers are adapted, what is refused, and that nothing else changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from torch import nn

import lora_plus
from lora_plus import LoRALinear, inject_lora, lora_summary, remove_lora
from lora_plus.files import adapter_state_dict
from lora_plus.layers import LoRALayer
from lora_plus.layers import kinds as layers
from lora_plus.model import adapter_names
from lora_plus.model.tree import adapted_weights
from lora_plus.training import reset_lora_parameters


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.mlp(self.q(h) * torch.sigmoid(self.v(h)))


class Net(nn.Module):
    """An embedding, two blocks, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


TOKENS = torch.arange(10).reshape(2, 5)


def adapted(model: nn.Module) -> list[str]:
    return [name for name, _ in adapted_weights(model)]


LINEARS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("q", "v", "mlp.0", "mlp.2")]


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["q", "v"], [f"blocks.{i}.{name}" for i in (0, 1) for name in "qv"]),
        ("q", ["blocks.0.q", "blocks.1.q"]),
        (["blocks.1.q"], ["blocks.1.q"]),
        (["1.q"], ["blocks.1.q"]),
        ("blocks.*.mlp.*", [f"blocks.{i}.mlp.{j}" for i in (0, 1) for j in (0, 2)]),
        ("0.mlp.[0-9]", ["blocks.0.mlp.0", "blocks.0.mlp.2"]),
        (re.compile(r"blocks\.0\..*"), [name for name in LINEARS if name.startswith("blocks.0")]),
        (nn.Linear, [*LINEARS, "lm_head"]),
        ([nn.Embedding], ["embed"]),
        (lambda name, module: isinstance(module, nn.Linear) and module.out_features == 16,
         ["blocks.0.mlp.0", "blocks.1.mlp.0"]),
        ("all-linear", LINEARS),
        (["all-linear", "embed"], ["embed", *LINEARS]),
    ],
    ids=str,
)  # fmt: skip
def test_targets_select(targets: Any, wanted: list[str]) -> None:
    model = inject_lora(Net(), targets, r=2)
    assert adapted(model) == wanted


def test_all_linear_leaves_out_a_head_that_is_trained_or_tied_or_excluded() -> None:
    net = Net()
    net.lm_head.weight = nn.Parameter(net.lm_head.weight.detach().clone())
    assert adapted(inject_lora(copy.deepcopy(net), "all-linear")) == [*LINEARS, "lm_head"]
    assert adapted(inject_lora(copy.deepcopy(net), "all-linear", train_also="lm_head")) == LINEARS
    assert adapted(inject_lora(copy.deepcopy(net), "all-linear", exclude=["lm_head", "mlp.*"])) == [
        name for name in LINEARS if "mlp" not in name
    ]


def test_the_root_itself_may_be_the_target() -> None:
    for target in ("", "all-linear", nn.Linear):
        layer = nn.Linear(4, 4)
        assert inject_lora(layer, target, r=2) is layer and isinstance(layer, LoRALinear)
        assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A.default", "lora_B.default"]
        assert type(remove_lora(layer)) is nn.Linear


def test_ranks_and_alphas_by_pattern() -> None:
    model = inject_lora(
        Net(), ["q", "v"], r=4, alpha=8, rank_pattern={"1.q": 2, re.compile(".*v"): 3}, alpha_pattern={"blocks.0.*": 6}
    )
    found = {row.name: (row.r, row.alpha, row.scale) for row in lora_summary(model).rows}
    assert found == {
        "blocks.0.q": (4, 6, 1.5), "blocks.0.v": (3, 6, 2.0), "blocks.1.q": (2, 8, 4.0), "blocks.1.v": (3, 8, 8 / 3),
    }  # fmt: skip


def snapshot(model: nn.Module) -> Any:
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [type(module) for module in model.modules()],
        repr(model),
        [p.requires_grad for p in model.parameters()],
        [sorted(module.__dict__) for module in model.modules()],
    )


def same(before: Any, after: Any) -> bool:
    tensors = before[0].keys() == after[0].keys() and all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    return tensors and before[1:] == after[1:]


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"targets": ["q", "qq"]}, ValueError,
     "nothing was changed, because of:\n  target 'qq' matches no module or parameter (did you mean 'q'?)"),
    ({"targets": ["blocks.0.w"]}, ValueError,
     "target 'blocks.0.w' matches no module or parameter (did you mean 'blocks.0.v' or 'blocks.0.q' or 'blocks.0'?)"),
    ({"targets": ["norm"]}, ValueError,
     "target 'norm' matches nothing that can be adapted: blocks.0.norm (LayerNorm), blocks.1.norm (LayerNorm); "
     "supported are Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Embedding, Linear, "
     "GPT-2's Conv1D, the weights of MultiheadAttention, RNNBase, RNNCellBase, EmbeddingBag, Bilinear, and "
     "parameters of two or three dimensions"),
    ({"targets": ["LM_HAED"]}, ValueError, "matches no module or parameter (did you mean 'lm_head'?)"),
    ({"targets": ["all_linear"]}, ValueError, "matches no module or parameter (did you mean 'all-linear'?)"),
    ({"targets": ["linear"]}, ValueError, "matches no module or parameter (did you mean 'all-linear'?)"),
    ({"targets": [r".*\.(q|v)"]}, ValueError, "or parameter; for a regular expression pass re.compile(...)"),
    ({"targets": ["mlp"]}, ValueError, "blocks.1.mlp (Sequential); name what is in it: 'mlp.*'"),
    ({"targets": ["wxyz"]}, ValueError, "parameter; there is 'blocks', 'embed', 'lm_head', 'mlp', 'norm' and 3 more"),
    ({"targets": []}, ValueError, "no target"),
    ({"targets": ["q"], "exclude": ["q"]}, ValueError, "target 'q' matches only layers that exclude takes out"),
    ({"targets": ["q"], "exclude": ["nope"]}, ValueError, "exclude 'nope' matches no module"),
    ({"targets": ["q"], "train_also": ["lm_haed"]}, ValueError,
     "train_also 'lm_haed' matches no module or parameter (did you mean 'lm_head'?)"),
    ({"targets": ["q"], "train_also": ["blocks.0"]}, ValueError,
     "'blocks.0.q' is both a target and trained by train_also or train_rows; add it to exclude"),
    ({"targets": ["q"], "train_also": ["mlp.1"]}, ValueError, "train_also: 'blocks.0.mlp.1' (GELU) has no parameter"),
    ({"targets": ["q"], "rank_pattern": {"v": 2}}, ValueError, "rank_pattern 'v' matches no adapted layer"),
    ({"targets": ["q"], "rank_pattern": {"v": 2, "k": 3}, "alpha_pattern": {"w": 2}}, ValueError,
     "rank_pattern 'v' matches no adapted layer; there is 'q'\n"
     "  rank_pattern 'k' matches no adapted layer; there is 'q'\n"
     "  alpha_pattern 'w' matches no adapted layer; there is 'q'"),
    ({"targets": ["q"], "rank_pattern": {"0.q": 2, "q": 3}}, ValueError,
     "rank_pattern: '0.q' and 'q' both match 'blocks.0.q'"),
    ({"targets": ["q"], "alpha_pattern": {"0.q": 2, "blocks.*": 2}}, ValueError, "alpha_pattern: '0.q' and 'blocks.*'"),
    ({"targets": ["q"], "rank_pattern": {"q": 0}}, ValueError, "rank_pattern['q']: r must be positive, got 0"),
    ({"targets": ["q"], "rank_pattern": ["q"]}, TypeError, "rank_pattern must be a mapping"),
    ({"targets": ["q"], "r": 0}, ValueError, "r must be positive, got 0"),
    ({"targets": ["q"], "r": -1}, ValueError, "r must be positive, got -1"),
    ({"targets": ["q"], "r": 4.0}, TypeError, "r must be an int, got 4.0"),
    ({"targets": ["q"], "r": "8"}, TypeError, "r must be an int, got '8'"),
    ({"targets": ["q"], "r": True}, TypeError, "r must be an int, got True"),
    ({"targets": ["q"], "alpha": float("nan")}, ValueError, "alpha must be finite and not zero"),
    ({"targets": ["q"], "alpha": float("inf")}, ValueError, "alpha must be finite and not zero"),
    ({"targets": ["q"], "alpha": 0}, ValueError, "alpha must be finite and not zero"),
    ({"targets": ["q"], "alpha": None}, TypeError, "alpha must be a number, got None"),
    ({"targets": ["q"], "dropout": 1.0}, ValueError, "dropout must be in [0, 1), got 1.0"),
    ({"targets": ["q"], "dropout": -0.5}, ValueError, "dropout must be in [0, 1), got -0.5"),
    ({"targets": ["q"], "dropout": float("nan")}, ValueError, "dropout must be in [0, 1), got nan"),
    ({"targets": ["q"], "scaling": "foo"}, ValueError,
     "unknown scaling 'foo'; choose one of ['rslora', 'standard']"),
    ({"targets": ["q"], "variant": "foo"}, ValueError,
     "unknown variant 'foo'; choose one of ['dora', 'lora', 'lora_fa']"),
    ({"targets": ["q"], "init": "foo"}, ValueError, "unknown init 'foo'; choose one of ['gaussian', 'kaiming', "),
    ({"targets": ["q"], "dtype": torch.int8}, TypeError, "dtype must be a floating-point torch.dtype or None"),
    ({"targets": ["q"], "adapter": "a.b"}, ValueError, "must not be empty or contain a dot, got 'a.b'"),
    ({"targets": ["q"], "adapter": ""}, ValueError, "must not be empty or contain a dot, got ''"),
    ({"targets": ["q"], "adapter": "train"}, ValueError, "the name 'train' of an adapter is an attribute of nn.Module"),
    ({"targets": ["q"], "adapter": 3}, TypeError, "an adapter's name must be a str, got 3"),
    ({"targets": [3]}, TypeError, "a pattern must be a name, a glob"),
    ({"targets": ["q"], "r": 3, "init": lambda weight, r, generator: (weight, weight)}, ValueError,
     "returned A (8, 8) and B (8, 8); expected (3, 8) and (8, 3)"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "text"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_with_the_reason_and_nothing_changed(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = Net()
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(text)):
        inject_lora(model, **arguments)
    assert same(before, snapshot(model))


def test_all_problems_are_in_one_error() -> None:
    with pytest.raises(ValueError) as info:
        inject_lora(Net(), ["q", "w", "norm"], exclude="x", train_also="y")
    for part in ("target 'w'", "target 'norm'", "exclude 'x'", "train_also 'y'"):
        assert part in str(info.value)


def test_layers_that_cannot_be_adapted_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="finds no linear layer to adapt"):
        inject_lora(nn.ModuleDict({"norm": nn.LayerNorm(8)}), "all-linear")
    with pytest.raises(ValueError, match="not initialised; run a forward pass first"):
        inject_lora(nn.Sequential(nn.LazyLinear(3)), ["0"])
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    for targets in (["0"], "all-linear"):
        with pytest.raises(ValueError, match=r"whose weight is torch\.uint8, expected one of"):
            inject_lora(nn.Sequential(packed), targets)
    with pytest.raises(ValueError, match="no values on the meta device"), torch.device("meta"):
        inject_lora(nn.Sequential(nn.Linear(4, 4)), ["0"], variant="dora")


def test_a_second_injection_needs_another_name() -> None:
    model = inject_lora(Net(), ["q"])
    with pytest.raises(ValueError, match="the model has an adapter 'default' already"):
        inject_lora(model, ["v"])
    inject_lora(model, ["q", "v"], adapter="second", r=2)
    assert adapter_names(model) == ["default", "second"]
    assert all(layer.active_names() == ["second"] for _, layer in adapted_weights(model))


def test_everything_but_the_adapters_and_train_also_is_frozen() -> None:
    model = inject_lora(Net(), ["q"], train_also=["norm"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"blocks.{i}.{name}"
        for i in (0, 1)
        for name in ("q.lora_A.default", "q.lora_B.default", "norm.weight", "norm.bias")
    }


def test_remove_gives_back_values_flags_and_classes_also_of_modules_trained_in_full() -> None:
    model = Net()
    model.blocks[0].v.bias.requires_grad_(False)
    before = snapshot(model)
    inject_lora(model, ["q"], train_also=["norm", "embed"])
    inject_lora(model, ["v"], adapter="other")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    lora_plus.merge_lora(model, adapters=["default", "other"])
    remove_lora(model)
    assert same(before, snapshot(model))


def test_disabled_also_takes_back_modules_trained_in_full() -> None:
    model = Net()
    base = model(TOKENS)
    inject_lora(model, ["q"], train_also=["norm"])
    randomise(model)
    with torch.no_grad():
        model.blocks[0].norm.weight.mul_(3)
    trained = model(TOKENS)
    flags = [p.requires_grad for p in model.parameters()]
    with lora_plus.disabled(model), lora_plus.disabled(model):
        assert torch.equal(model(TOKENS), base)
    assert torch.equal(model(TOKENS), trained) and not torch.equal(trained, base)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_references_hooks_and_ties_stay() -> None:
    model = Net()
    seen = []
    layer = model.blocks[0].q
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    kept = [layer]
    inject_lora(model, ["q", "embed"], r=2)
    randomise(model)
    assert kept[0] is model.blocks[0].q and model.lm_head.weight is model.embed.weight
    model(TOKENS)
    with lora_plus.disabled(model):
        model(TOKENS)
    assert not torch.equal(seen[0], seen[1]), "a hook sees the adapted output"


def test_a_shared_module_is_adapted_once_for_all_its_names() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    inject_lora(model, ["b"], r=2)
    assert model["a"] is model["b"] and adapted(model) == ["a"]
    assert set(model.state_dict()) == {
        f"{name}.{key}" for name in "ab" for key in ("weight", "bias", "lora_A.default", "lora_B.default")
    }


def test_a_forward_assigned_to_the_layer_stays_the_base_computation() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    plain = model[0].forward
    own: Callable[..., torch.Tensor] = lambda x: plain(x) * 2  # noqa: E731
    model[0].forward = own  # type: ignore[method-assign]
    base = model(x)
    inject_lora(model, ["0"], r=2)
    assert torch.equal(model(x), base)
    randomise(model)
    assert not torch.allclose(model(x), base)
    remove_lora(model)
    assert torch.equal(model(x), base) and model[0].forward is own


def test_the_encoder_layer_s_fused_kernel_does_not_drop_the_adapter() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        fused = encoder(x)
        inject_lora(encoder, ["linear1", "linear2"], r=2)
        torch.testing.assert_close(encoder(x), fused)
        randomise(encoder)
        y = encoder(x)
        assert not torch.allclose(y, fused, atol=1e-2)
        torch.testing.assert_close(y, encoder.train()(x), rtol=0, atol=1e-4)
        torch.testing.assert_close(lora_plus.merge_and_unload(encoder.eval())(x), y, rtol=0, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_random_numbers_come_from_the_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = inject_lora(Net(), "all-linear", generator=torch.Generator().manual_seed(5))
    after_model = torch.get_rng_state()
    torch.set_rng_state(state)
    Net()
    assert torch.equal(after_model, torch.get_rng_state())
    second = inject_lora(Net(), "all-linear", generator=torch.Generator().manual_seed(5))
    for name, p in first.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, second.get_parameter(name))
    third = inject_lora(Net(), "all-linear", generator=torch.Generator().manual_seed(6))
    assert not torch.equal(first.blocks[0].q.lora_A["default"], third.blocks[0].q.lora_A["default"])


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_adapters_are_float32_or_wider(base: torch.dtype) -> None:
    model = inject_lora(Net().to(base), ["q"])
    assert model.blocks[0].q.lora_A["default"].dtype == (torch.float64 if base == torch.float64 else torch.float32)
    asked = inject_lora(Net().to(base), ["q"], dtype=torch.bfloat16)
    assert {p.dtype for p in asked.parameters() if p.requires_grad} == {torch.bfloat16}


def test_kaiming_bound_is_that_of_the_fan_in() -> None:
    layers = {"linear": nn.Linear(64, 9), "conv": nn.Conv2d(16, 9, 2)}
    model = inject_lora(nn.ModuleDict(layers), list(layers), r=500)
    for layer in model.values():
        A = layer.lora_A["default"]
        assert A.shape == (500, 64)
        assert A.abs().max() <= 1 / 8
        assert A.abs().max() > 0.9 / 8
        assert abs(A.mean()) < 0.01


def test_an_init_may_be_a_function() -> None:
    def ones(weight: torch.Tensor, r: int, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        out_features, in_features = weight.shape
        return torch.ones(r, in_features), torch.ones(out_features, r)

    plain = nn.Conv2d(3, 5, 2)
    model = inject_lora(nn.Sequential(copy.deepcopy(plain)), ["0"], r=2, alpha=2, init=ones)
    x = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        plain.weight.add_(2.0)  # alpha / r = 1 times a sum of two products of ones
    torch.testing.assert_close(model(x), plain(x))


def test_the_summary_counts_and_notes() -> None:
    model = inject_lora(Net(), ["0.q"], r=9, train_also=["1.norm"])
    inject_lora(model, ["embed"], r=2, adapter="second")
    summary = lora_summary(model)
    rows = {row.name: row for row in summary.rows}
    assert rows["blocks.0.q"].parameters == 9 * (8 + 8)
    assert rows["blocks.0.q"].note == "r exceeds the weight's full rank 8; inactive"
    assert rows["embed"].layer == "Embedding" and rows["embed"].note == "not on 'lm_head.weight', tied to it"
    assert summary.trained == [("blocks.1.norm", "default", 16)]
    assert summary.trainable == 2 * (11 + 8), "what was there before the second adapter is frozen"
    assert summary.total == sum(p.numel() for p in model.parameters())
    assert str(summary).splitlines()[0].split()[:4] == ["layer", "type", "adapter", "r"]
    assert "blocks.0.q" in str(summary) and "are trainable" in str(summary)
    both = {row.name: row.note for row in lora_summary(inject_lora(Net(), ["embed", "lm_head"])).rows}
    assert both["embed"] == "merging unties it from 'lm_head.weight'; tied='both' would not"
    assert both["lm_head"] == "merging unties it from 'embed.weight'; tied='both' would not"


def test_adapters_are_chosen_and_deleted() -> None:
    model = Net()
    base = model(TOKENS)
    outputs = {}
    for name, target in (("a", "q"), ("b", ["q", "v"])):
        inject_lora(model, target, adapter=name, r=2)
        randomise(model)
        lora_plus.set_adapter(model, name)
        outputs[name] = model(TOKENS)
    for name in ("a", "b"):
        lora_plus.set_adapter(model, name)
        outputs[name] = model(TOKENS)
        assert not torch.allclose(outputs[name], base)
    assert not torch.allclose(outputs["a"], outputs["b"])
    lora_plus.set_adapter(model, ["a", "b"])
    both = model(TOKENS)
    with lora_plus.merged(model):
        torch.testing.assert_close(model.eval()(TOKENS), both)
    lora_plus.set_adapter(model, [])
    assert torch.equal(model(TOKENS), base)
    lora_plus.set_adapter(model, "a")
    lora_plus.delete_adapter(model, "b")
    assert torch.equal(model(TOKENS), outputs["a"])
    assert adapted(model) == ["blocks.0.q", "blocks.1.q"] and type(model.blocks[0].v) is nn.Linear
    for call in (lora_plus.set_adapter, lora_plus.delete_adapter):
        with pytest.raises(KeyError, match="the model has no adapter 'nope': it has 'a'"):
            call(model, "nope")


def test_two_active_dora_adapters_are_refused() -> None:
    model = inject_lora(Net(), ["q"], variant="dora")
    inject_lora(model, ["q"], variant="dora", adapter="second")
    for call in (lambda: lora_plus.set_adapter(model, ["default", "second"]),
                 lambda: lora_plus.merge_lora(model, adapters=["default", "second"])):  # fmt: skip
        with pytest.raises(ValueError, match="are not defined"):
            call()


def test_a_lora_adapter_beside_a_dora_adapter_merges_to_what_it_computes() -> None:
    model = inject_lora(Net().double(), ["q"], variant="dora")
    inject_lora(model, ["q"], adapter="sum")
    randomise(model)
    for order in (["sum", "default"], ["default", "sum"]):
        lora_plus.set_adapter(model, order)
        y = model.eval()(TOKENS)
        with lora_plus.merged(model):
            torch.testing.assert_close(model(TOKENS), y, rtol=1e-12, atol=1e-12)


def test_reset_draws_anew_in_place() -> None:
    model = inject_lora(Net(), ["q"], generator=torch.Generator().manual_seed(1))
    layer = model.blocks[0].q
    A = layer.lora_A["default"]
    start = A.detach().clone()
    randomise(model)
    reset_lora_parameters(model, generator=torch.Generator().manual_seed(1))
    assert layer.lora_A["default"] is A and torch.equal(A, start)
    assert not torch.count_nonzero(layer.lora_B["default"])


def test_a_layer_whose_forward_returns_no_tensor_says_so() -> None:
    class Pair(nn.Linear):
        def forward(self, input: torch.Tensor) -> Any:
            return super().forward(input), None

    model = inject_lora(nn.Sequential(Pair(3, 3)), ["0"])
    with pytest.raises(TypeError, match="the forward of Pair returns a tuple, and an update can only be added"):
        model(torch.randn(2, 3))


def test_a_user_s_own_kind_of_layer_is_one_entry(tmp_path: Path) -> None:
    class Outer(nn.Module):
        """y[b, o] = sum_i x[b, i] W[i, o], stored transposed, and no bias."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    @layers.adapts(Outer)
    class LoRAOuter(LoRALayer):
        layout = "i o -> o i"

        def low_rank(
            self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, dropout: float, shape: torch.Size
        ) -> torch.Tensor:
            return x @ A.T @ B.T * scale

    try:
        model, x = randomise(inject_lora(nn.Sequential(Outer()), ["0"], r=2)), torch.randn(5, 4)
        y = model(x)
        lora_plus.save_adapter(model, tmp_path / "own.safetensors")
        fresh = nn.Sequential(Outer())
        fresh.load_state_dict({"0.weight": model[0].weight})
        assert torch.equal(lora_plus.load_adapter(fresh, tmp_path / "own.safetensors")(x), y)
        torch.testing.assert_close(lora_plus.merge_and_unload(model)(x), y)
        assert type(model[0]) is Outer
    finally:
        del layers.KINDS[Outer]


def test_injecting_under_a_meta_device_context_makes_real_adapters() -> None:
    with torch.device("meta"):
        model = inject_lora(Net(), ["q", "embed"])
    assert {p.device.type for p in model.parameters() if p.requires_grad} == {"cpu"}
    assert all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad)


def test_a_layer_inside_a_module_trained_in_full_cannot_be_adapted() -> None:
    model = inject_lora(Net(), ["q"], train_also=["1.mlp"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'blocks.1.mlp.0' cannot be adapted: 'blocks.1.mlp' is trained in full with"):
        inject_lora(model, ["mlp.0"], adapter="b")
    assert same(before, snapshot(model))


def test_an_adapter_is_not_saved_while_disabled(tmp_path: Path) -> None:
    model = inject_lora(Net(), ["q"], train_also=["norm"])
    with (
        lora_plus.disabled(model),
        pytest.raises(ValueError, match=r"'blocks.0.norm' shows its original"),
    ):
        lora_plus.save_adapter(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    with lora_plus.disabled(model), pytest.raises(ValueError, match=r"'blocks.0.norm' shows its original values"):
        adapter_state_dict(model)


def test_suggested_names_are_ones_that_can_be_adapted() -> None:
    with pytest.raises(ValueError) as error:
        inject_lora(nn.ModuleDict({"lstm": nn.LSTM(4, 4)}), ["lstm.weight_ih_l9"])
    assert "weight_ih_l0" in str(error.value) and "bias" not in str(error.value)


def test_adapters_made_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    path, model, loaded = tmp_path / "a.safetensors", Net(), Net()
    with torch.inference_mode():
        inject_lora(model, ["q"], r=2)
        lora_plus.save_adapter(model, path)
        lora_plus.load_adapter(loaded, path, trainable=True)
    for each in (model, loaded):
        each(TOKENS).sum().backward()
        assert all(p.grad is not None for p in each.parameters() if p.requires_grad)


def test_a_scale_that_no_float32_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha 1e\+300 and r 2 give a scale of 5e\+299, which float32 cannot hold"):
        inject_lora(Net(), ["q"], r=2, alpha=1e300)
