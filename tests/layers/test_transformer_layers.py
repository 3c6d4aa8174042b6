"""Adapters inside torch's own transformer layers, whose fused kernels read weights instead of calling layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import randomise
from parameter_cases import At, Inputs, ParameterCase, Source, assert_close, distance, loss, same_bits, tensors
from sites import adapter_sites
from torch import Tensor, nn

import lora_plus
from lora_plus.files import adapter_state_dict

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")

WIDTH, HEADS, LENGTH = 4, 2, 3
PADDING = torch.tensor([[False, False, False], [False, False, True]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
SETTINGS: dict[str, Any] = {"dim_feedforward": 6, "dropout": 0.0, "batch_first": True}


def _encoder_layer(**changes: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, **{**SETTINGS, **changes})


def _decoder_layer(**changes: Any) -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(WIDTH, HEADS, **{**SETTINGS, **changes})


def _different(stack: nn.Module) -> nn.Module:
    """The stack with layers that differ: torch starts them as copies of one."""
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return stack


def _encoder(norm_first: bool = False) -> nn.Module:
    layer = _encoder_layer(norm_first=norm_first)
    return _different(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first))


def _decoder(norm_first: bool = False) -> nn.Module:
    return _different(nn.TransformerDecoder(_decoder_layer(norm_first=norm_first), 2))


def _transformer() -> nn.Module:
    return _different(nn.Transformer(WIDTH, HEADS, 2, 1, **SETTINGS))


def _places(*names: str) -> dict[str, At]:
    """Linear layers, attentions (all their projections), and projections of one, as places."""
    places = {}
    for name in (f"part.{name}" for name in names):
        attention, _, projection = name.rpartition(".")
        if projection.endswith("attn"):
            places |= _places(*(f"{name.removeprefix('part.')}.{each}" for each in ("q", "k", "v", "out_proj")))
        elif projection in ("q", "k", "v"):
            start = WIDTH * "qkv".index(projection)
            places[name] = At(f"{attention}.in_proj_weight", (start, start + WIDTH))
        else:
            places[name] = At(f"{name}.weight")
    return places


MLP = ("linear1", "linear2")
ENCODER = ("self_attn", *MLP)
DECODER = ("self_attn", "multihead_attn", *MLP)


def _all(prefixes: tuple[str, ...], names: tuple[str, ...]) -> dict[str, At]:
    return _places(*(f"{prefix}{name}" for prefix in prefixes for name in names))


TWO = ("layers.0.", "layers.1.")
KINDS: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, ...], tuple[str, ...]]] = {
    "encoder-layer": (_encoder_layer, 1, ("",), ENCODER),
    "encoder-layer-norm-first": (lambda: _encoder_layer(norm_first=True, activation="gelu"), 1, ("",), ENCODER),
    "encoder-layer-length-first": (lambda: _encoder_layer(batch_first=False), 1, ("",), ENCODER),
    "encoder": (_encoder, 1, TWO, ENCODER),
    "encoder-norm-first": (lambda: _encoder(norm_first=True), 1, TWO, ENCODER),
    "decoder-layer": (_decoder_layer, 2, ("",), DECODER),
    "decoder": (_decoder, 2, TWO, DECODER),
    "decoder-norm-first": (lambda: _decoder(norm_first=True), 2, TWO, DECODER),
}
"""How it is made, its number of inputs, the prefixes of its layers, and what can be adapted in each."""


def _inputs(count: int) -> Callable[[Source], Inputs]:
    return lambda source: (tuple(source.floats(len(PADDING), LENGTH, WIDTH) for _ in range(count)), {})


def _cases() -> Iterator[ParameterCase]:
    for kind, (make, count, prefixes, names) in KINDS.items():
        choices: dict[str, tuple[Any, dict[str, At]]] = {
            "mlp": (["linear1", "linear2"], _all(prefixes, MLP)),
            "attention": (["self_attn"], _all(prefixes, ("self_attn",))),
            "all": ("all-linear", _all(prefixes, names)),
        }
        if len(prefixes) > 1:
            choices["second-mlp"] = (["layers.1.linear1"], _places("layers.1.linear1"))
            choices["second-q"] = (["layers.1.self_attn.q"], _places("layers.1.self_attn.q"))
        for choice, (targets, places) in choices.items():
            yield ParameterCase(f"{kind}-{choice}", make, _inputs(count), targets, places)
    both = _all(("encoder.layers.0.", "encoder.layers.1."), ENCODER) | _all(("decoder.layers.0.",), DECODER)
    mlp = {name: at for name, at in both.items() if "linear" in name}
    yield ParameterCase("transformer-mlp", _transformer, _inputs(2), ["linear1", "linear2"], mlp)
    yield ParameterCase("transformer-all", _transformer, _inputs(2), "all-linear", both)


TRANSFORMERS = list(_cases())


@pytest.fixture(params=TRANSFORMERS, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> ParameterCase:
    return request.param


def masks(case: ParameterCase) -> list[dict[str, Tensor]]:
    """The masks that the forward takes: none, padding, causal, both."""
    if case.name.startswith("encoder-layer"):
        padding, causal = {"src_key_padding_mask": PADDING}, {"src_mask": CAUSAL}
    elif case.name.startswith("encoder"):
        padding, causal = {"src_key_padding_mask": PADDING}, {"mask": CAUSAL}
    elif case.name.startswith("decoder"):
        padding = {"tgt_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
        causal = {"tgt_mask": CAUSAL}
    else:
        padding = dict.fromkeys(("src_key_padding_mask", "tgt_key_padding_mask"), PADDING)
        causal = {"src_mask": CAUSAL, "tgt_mask": CAUSAL}
    if "length-first" in case.name:  # then the inputs are (LENGTH, batch), and these are two of three
        padding = {"src_key_padding_mask": torch.tensor([[False, True], [False, False], [False, False]])}
        causal = {"src_mask": CAUSAL[:2, :2]}
    as_numbers = {name: torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)
                  for name, mask in padding.items()}  # fmt: skip
    return [{}, padding, causal, {**as_numbers, **causal}]


def real(case: ParameterCase, model: nn.Module, mask: dict[str, Tensor]) -> list[Tensor]:
    """The output where there is no padding: torch's kernels leave there what they like."""
    args, _ = case.input()
    output = model(*args, **mask)
    if any("key_padding" in name for name in mask):
        output = output[~PADDING] if "length-first" not in case.name else output[:, 1:]
    return [output]


def ways(*models: nn.Module) -> Iterator[str]:
    """Training, evaluation, both frozen, and evaluation without gradients."""
    for way in ("train", "eval", "no_grad", "inference_mode", "frozen"):
        for model in models:
            model.train(way == "train")
            if way == "frozen":
                model.requires_grad_(False)
        with torch.inference_mode(way == "inference_mode"), torch.set_grad_enabled(way not in ("no_grad",)):
            yield way


def test_every_way_computes_with_the_weight_written_by_hand(case: ParameterCase) -> None:
    model = case.adapted()
    wanted_of, base_of = case.explicit(model).train(), case.model().train()
    for mask in masks(case):
        wanted, base = real(case, wanted_of, mask), real(case, base_of, mask)
        assert distance(wanted, base) > 1e-3, "the adapter is inert"
        for way in ways(model):
            assert distance(real(case, model, mask), wanted) < 1e-12, (way, list(mask))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_A" in name or "lora_B" in name)
        with lora_plus.merged(model.eval()):
            for way in ("eval", "no_grad"):
                with torch.set_grad_enabled(way == "eval"):
                    assert distance(real(case, model, mask), wanted) < 1e-12, ("merged", way, list(mask))
        with lora_plus.disabled(model):
            assert distance(real(case, model, mask), base) < 1e-12


def test_gradients_are_those_of_the_weight_written_by_hand(case: ParameterCase) -> None:
    for mask in masks(case):
        model, plain = case.adapted(), case.model()
        adapter = adapter_state_dict(model)
        factors = {name: value.clone().requires_grad_() for name, value in adapter.items()}
        weights = case.explicit_weights(plain.state_dict(), factors)
        args, _ = case.input()
        loss(tensors(torch.func.functional_call(plain, weights, args, mask))).backward()
        for mode in (True, False):
            model.train(mode).zero_grad()
            loss(tensors(model(*args, **mask))).backward()
            for name, site in adapter_sites(model):
                for container, parameter in site.lora_adapters["default"].tensors().items():
                    wanted = factors[f"{name}.{container}"].grad
                    assert wanted is not None and torch.count_nonzero(wanted), (name, container)
                    torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-11)


def test_at_the_start_it_computes_what_the_base_does(case: ParameterCase) -> None:
    model, base = case.inject(case.model()), case.frozen()
    for mask in masks(case):
        # the base stays in training, since in evaluation torch may take the fused kernel
        for way in ways(model):
            assert distance(real(case, model, mask), real(case, base, mask)) < 1e-12, way
        with torch.no_grad():  # torch takes other kernels where something asks for a gradient
            assert same_bits(real(case, model.train(), mask), real(case, base, mask))


WITH_MASKS = {"encoder-layer-all", "encoder-mlp"}


def _compilations() -> Iterator[Any]:
    for case in TRANSFORMERS:
        if case.name not in WITH_MASKS and not case.name.endswith("-all"):
            continue
        for which, mask in enumerate(("no-mask", "padding", "causal") if case.name in WITH_MASKS else ("no-mask",)):
            yield pytest.param(case, which, id=f"{case.name}-{mask}")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from torch, at graph breaks
@pytest.mark.slow
@pytest.mark.parametrize(("case", "which"), list(_compilations()))
def test_compiled_it_computes_the_same(case: ParameterCase, which: int) -> None:
    mask, (args, _) = masks(case)[which], case.input()
    for mode in (True, False):
        fullgraph = True
        try:
            torch._dynamo.reset()
            torch.compile(case.model().train(mode), backend="aot_eager", fullgraph=True)(*args, **mask)
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError):  # as the plain module itself, with a mask
            fullgraph = False
        torch._dynamo.reset()
        model = case.adapted().train(mode)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        assert_close(tensors(compiled(*args, **mask)), tensors(model(*args, **mask)))
        with torch.no_grad():
            assert_close(tensors(compiled(*args, **mask)), tensors(model(*args, **mask)))


@pytest.mark.parametrize("targets", [["linear1"], ["self_attn"], "all-linear"], ids=str)
def test_one_layer_used_twice_is_adapted_once(targets: Any) -> None:
    def make() -> nn.Module:
        encoder = _encoder()
        encoder.layers[1] = encoder.layers[0]
        return encoder

    names = {"linear1": ("linear1",), "self_attn": ("self_attn",)}.get(targets[0], ENCODER)
    case = ParameterCase("twice", make, _inputs(1), targets, _all(("layers.0.",), names))
    model = case.adapted()
    wanted = case.run(case.explicit(model).train())
    assert distance(wanted, case.run(case.model())) > 1e-3
    for way in ways(model):
        assert distance(case.run(model), wanted) < 1e-12, way
    assert_close(case.run(lora_plus.merge_and_unload(model.train())), wanted)


@pytest.mark.parametrize("tied", ["linear1.weight", "self_attn.in_proj_weight", "self_attn.out_proj.weight"])
def test_two_layers_with_one_weight_have_adapters_of_their_own(tied: str) -> None:
    def make(tie: bool) -> nn.Module:
        encoder = _encoder()
        first, second = encoder.layers
        owner, _, name = tied.rpartition(".")
        weight = first.get_parameter(tied)
        setattr(second.get_submodule(owner), name, weight if tie else nn.Parameter(weight.detach().clone()))
        return encoder

    case = ParameterCase("tied", lambda: make(True), _inputs(1), "all-linear", _all(TWO, ENCODER))
    untied = ParameterCase("untied", lambda: make(False), _inputs(1), "all-linear", case.places)
    model = case.adapted()
    wanted = untied.run(untied.explicit(model).train())
    assert distance(wanted, untied.run(untied.model())) > 1e-3
    for way in ways(model):
        assert distance(case.run(model), wanted) < 1e-12, way
    with pytest.warns(UserWarning, match="is shared with"), lora_plus.merged(model):
        assert distance(case.run(model), wanted) < 1e-12
    lora_plus.remove_lora(model)
    first, second = model.part.layers
    assert first.get_parameter(tied) is second.get_parameter(tied)


@pytest.mark.parametrize("targets", [["linear1"], ["layers.1.self_attn"], ["layers.1.linear1.weight"], "all-linear"])
@pytest.mark.parametrize("end", [lora_plus.remove_lora, lora_plus.merge_and_unload,
                                 lambda model: lora_plus.delete_adapter(model, "default")])  # fmt: skip
def test_nested_tensors_are_used_again_afterwards(targets: Any, end: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    encoder, x = _encoder().double().eval(), torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    for given in (True, False):
        encoder.use_nested_tensor = given
        lora_plus.inject_lora(encoder, targets, r=2)
        output = encoder(x, src_key_padding_mask=PADDING)
        assert torch.isfinite(output).all()
        end(encoder)
        assert encoder.use_nested_tensor is given
        with torch.no_grad():
            padded = encoder(x, src_key_padding_mask=PADDING)[PADDING]
        assert bool(padded.eq(0).all()) is given
        assert not [key for module in encoder.modules() for key in module.__dict__ if "lora" in key]
        assert not any(module._forward_pre_hooks for module in encoder.modules())


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["self_attn"]], ids=str)
def test_an_encoder_reaches_adapters_that_were_put_into_one_of_its_layers_alone(targets: list[str]) -> None:
    torch.manual_seed(0)
    encoder, x = _encoder().double().requires_grad_(False), torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    base = encoder(x, src_key_padding_mask=PADDING)[~PADDING]
    randomise(lora_plus.inject_lora(encoder.layers[1], targets, r=2))
    wanted = encoder(x, src_key_padding_mask=PADDING)[~PADDING]
    assert (wanted - base).abs().max() > 1e-3
    encoder.eval()  # now it packs the batch into nested tensors, since nothing told it not to
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, src_key_padding_mask=PADDING)[~PADDING], wanted)
    if targets == ["self_attn"]:
        with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
            encoder(x, src_key_padding_mask=PADDING)
    else:
        torch.testing.assert_close(encoder(x, src_key_padding_mask=PADDING)[~PADDING], wanted)
