"""What users do in an odd order: nested blocks, changes in between, ties, second adapters, wrappers."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomise
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lora_plus
from lora_plus import disabled, inject_lora, merge_and_unload, merge_lora, merged, remove_lora, unmerge_lora
from lora_plus.files import adapter_state_dict
from lora_plus.model import adapter_names
from lora_plus.surgery import resize_adapter


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.q = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.q(self.embed(tokens)))


TOKENS = torch.arange(9)
X = torch.linspace(-1, 1, 12).reshape(3, 4)


def two(**options: Any) -> nn.Module:
    return randomise(inject_lora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0", "1"], r=2, **options)).eval()


@pytest.mark.parametrize("train_also", [["embed", "head"], ["head", "q"], [""]], ids=str)
def test_disabled_restores_tied_modules_trained_in_full(train_also: list[str]) -> None:
    model = Tied()
    base = model(TOKENS)
    extra = nn.ModuleDict({"body": model, "side": nn.Linear(2, 2)})
    inject_lora(extra, ["side"], train_also=[f"body.{name}" if name else "body" for name in train_also])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.ones_like(parameter))
    trained = model(TOKENS)
    with disabled(extra):
        shown = model(TOKENS)
    assert torch.equal(model(TOKENS), trained)
    assert not torch.equal(shown, trained)
    remove_lora(extra)
    untouched = "q" in train_also or "" in train_also
    assert not untouched or torch.equal(model(TOKENS), base)


@pytest.mark.parametrize("block", [disabled, lambda model: lora_plus.disabled(model[1])], ids=["model", "part"])
def test_what_is_written_inside_disabled_is_gone_afterwards(block: Any) -> None:
    head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = nn.Sequential(nn.Linear(4, 4), head).double()
    base = copy.deepcopy(model.state_dict())
    inject_lora(model, ["0"], train_also=["1"])
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(5, 4, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    trained = copy.deepcopy(model.state_dict())
    with block(model):
        model(x).sum().backward()  # the mode is train: BatchNorm goes on collecting
        optimizer.step()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in trained.items())
    remove_lora(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.items())


def by_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "file": by_file,
}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_made_inside_disabled_is_not_disabled(way: str, merge: bool) -> None:
    head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    model = nn.Sequential(OrderedDict(q=nn.Linear(4, 4), cell=nn.GRUCell(4, 4), head=head)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    randomise(inject_lora(model, ["q", "cell"], r=2, train_also=["head"]))
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    model(x)
    model.eval()
    if merge:
        merge_lora(model)
    parts = ["", "q", "cell", "head"]
    wanted = {part: model.get_submodule(part)(x) for part in parts}
    with disabled(model), disabled(model.q):
        base = model(x)
        twins = {part: COPIES[way](model.get_submodule(part)) for part in parts}
        assert torch.equal(model(x), base)
    assert all(torch.equal(twins[part](x), wanted[part]) for part in parts)
    assert torch.equal(model(x), wanted[""])
    twin = twins[""]
    with disabled(twin):
        assert torch.equal(twin(x), base)
    if merge:
        unmerge_lora(twin)
    torch.testing.assert_close(twin(x), wanted[""], rtol=1e-12, atol=1e-12)
    randomise(twin, seed=3)
    assert not torch.equal(twin(x), wanted[""]) and torch.equal(model(x), wanted[""])
    states = [remove_lora(each).state_dict() for each in (twin, model)]
    assert all(map(torch.equal, states[0].values(), states[1].values()))


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_made_inside_a_block_for_samples_is_not_in_it(way: str) -> None:
    model = two()
    wanted = model(X)
    with lora_plus.adapter_per_sample(model, ["default", None, None]), torch.no_grad():
        mixed = model(X)
        twin = COPIES[way](model)
        assert torch.equal(twin(X), wanted) and not torch.equal(mixed, wanted)
        assert torch.equal(model(X), mixed)
    with lora_plus.adapter_per_sample(twin, ["default", None, None]):
        assert torch.equal(twin(X), mixed)


@pytest.mark.parametrize(
    "block", [disabled, lambda model: lora_plus.adapter_per_sample(model, [None, None])], ids=["disabled", "samples"]
)
def test_a_block_is_not_opened_on_a_model_without_adapters(block: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with (
        pytest.raises(ValueError, match=r"needs an adapter: .* call inject_lora before"),
        block(model),
    ):
        pass
    inject_lora(model, ["0"])
    for part in (model, model[0]):
        with block(part):
            pass


def test_nothing_can_be_changed_inside_disabled(tmp_path: Path) -> None:
    model = two()
    y = model(X)
    calls = [
        lambda: merge_lora(model),
        lambda: inject_lora(model, ["0"], adapter="b"),
        lambda: lora_plus.set_adapter(model, []),
        lambda: lora_plus.delete_adapter(model, "default"),
        lambda: remove_lora(model),
        lambda: merge_and_unload(model),
    ]
    for call in calls:
        with disabled(model), pytest.raises(ValueError, match=r"leave the disabled\(model\) block first"):
            call()
    merge_lora(model)
    for call in (lambda: unmerge_lora(model), lambda: merge_and_unload(model)):
        with disabled(model), pytest.raises(ValueError, match=r"leave the disabled\(model\) block first"):
            call()
    unmerge_lora(model)
    assert torch.equal(model(X), y)


def test_a_large_head_is_copied_for_the_first_disabled_block_only() -> None:
    model = lora_plus.inject_lora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), ["0"], train_also=["1"])
    weight, before = model[1].weight, model[1].weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
    shown = []
    for change in (0, 0, 2, 0):
        with lora_plus.disabled(model), torch.no_grad():
            assert torch.equal(weight, before)
            shown.append(weight.data_ptr())
            if change:
                weight.add_(change)
        assert torch.equal(weight, before + 1)
    assert shown[0] == shown[1] == shown[2] != weight.data_ptr()
    lora_plus.remove_lora(model)
    assert torch.equal(weight, before)


def test_disabled_blocks_may_overlap() -> None:
    model = two()
    y = model(X)
    base = remove_lora(copy.deepcopy(model))(X)
    for merge in (False, True):
        if merge:
            merge_lora(model)
        adapted = model(X)
        first, second = disabled(model), disabled(model)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.equal(model(X), base)
        second.__exit__(None, None, None)
        assert torch.equal(model(X), adapted)
    unmerge_lora(model)
    assert torch.equal(model(X), y)


def test_a_model_that_is_merged_otherwise_is_refused() -> None:
    model = two()
    merge_lora(model[0])
    for call in (lambda: merge_and_unload(model), lambda: merged(model).__enter__(), lambda: merge_lora(model)):
        with pytest.raises(ValueError, match="merged"):
            call()
    unmerge_lora(model)
    randomise(inject_lora(model, ["0", "1"], r=2, adapter="b"))
    merge_lora(model, adapters=["default"])
    for call in (lambda: merge_and_unload(model, adapters=["b"]), lambda: merged(model, adapters=["b"]).__enter__()):
        with pytest.raises(ValueError, match=r"'0' is merged with \['default'\], not with \['b'\]"):
            call()
    with pytest.raises(KeyError, match="nope"):
        merge_and_unload(model, adapters=["nope"])


def test_a_stale_merge_is_not_kept_for_good() -> None:
    model = two()
    merge_lora(model)
    with torch.no_grad():
        model[1].lora_B["default"].add_(1)
    with pytest.raises(ValueError, match="was changed while it was merged"):
        merge_and_unload(model)


def test_unloading_inside_merged_is_fine() -> None:
    model = two()
    y = model(X)
    with merged(model):
        merge_and_unload(model)
    torch.testing.assert_close(model(X), y)


def test_merging_under_autocast_is_not_in_half_precision() -> None:
    for variant in ("lora", "dora"):
        model = two(variant=variant)
        y = model(X)
        with torch.autocast("cpu", torch.bfloat16):
            merge_lora(model)
        torch.testing.assert_close(model(X), y)


def test_a_tie_survives_merging_and_moving() -> None:
    model = Tied().eval()
    randomise(inject_lora(model, ["head"], r=2))
    with pytest.warns(UserWarning, match="is shared with embed"):
        merge_lora(model)
    model.double()
    unmerge_lora(model)
    assert model.head.weight is model.embed.weight and model.head.weight.dtype == torch.float64


def test_every_holder_of_a_shared_parameter_gets_its_flag_back() -> None:
    model = randomise(inject_lora(Tied(), ["head"], r=2))
    with pytest.warns(UserWarning, match="is shared with embed"):
        merge_and_unload(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.head.weight is not model.embed.weight


@pytest.mark.parametrize("how", ["constructed", "injected alone", "injected in another model"])
def test_a_layer_put_into_an_encoder_by_hand_is_not_inert(how: str) -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    if how == "constructed":
        encoder.linear1 = lora_plus.LoRALinear(8, 16)
    elif how == "injected alone":
        inject_lora(encoder.linear1, "")
    else:
        inject_lora(nn.Sequential(encoder.linear1), ["0"])
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        base = encoder(x)
        randomise(encoder)
        assert not torch.allclose(encoder(x), base, atol=1e-3)
        remove_lora(encoder)
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_removing_from_a_layer_injected_alone_gives_back_the_flags() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject_lora(model[0], "")
    assert all(p.requires_grad for p in remove_lora(model).parameters())
    inject_lora(model, ["0"])
    lora_plus.delete_adapter(model, "default")
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_the_attention_s_projection_alone_is_refused() -> None:
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match=r"the output projection of an nn\.MultiheadAttention"):
        inject_lora(attention.out_proj, "")


@pytest.mark.parametrize("harm", ["view", "in place"])
def test_an_init_cannot_reach_the_base(harm: str) -> None:
    def init(weight: torch.Tensor, r: int, generator: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if harm == "in place":
            weight.mul_(2)
        return weight[:r], weight.new_zeros(weight.shape[0], r)

    for layer in (nn.Linear(4, 4), nn.Embedding(4, 4, padding_idx=1)):
        model = nn.Sequential(layer)
        bits = layer.weight.detach().clone()
        inject_lora(model, ["0"], r=2, init=init)
        with torch.no_grad():
            model[0].lora_A["default"].add_(1)
        assert torch.equal(model[0].weight, bits)


def test_an_init_must_return_finite_numbers() -> None:
    def init(weight: torch.Tensor, r: int, generator: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((r, weight.shape[1]), torch.nan), weight.new_zeros(weight.shape[0], r)

    with pytest.raises(ValueError, match="returned values that are not finite floating-point numbers"):
        inject_lora(nn.Linear(4, 4), "", init=init)


def test_adding_an_adapter_freezes_what_was_trained_before() -> None:
    model = inject_lora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), ["0"], adapter="a", train_also=["1"])
    inject_lora(model, ["0"], adapter="b")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.lora_A.b", "0.lora_B.b"]
    assert all(p.requires_grad for p in remove_lora(model).parameters())


def test_dora_refuses_rows_of_zeros() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    with pytest.raises(ValueError, match="this weight has rows of zeros"):
        inject_lora(model, ["0"], variant="dora")


class NoChildren(nn.Linear):
    def __init_subclass__(cls, *, kind: str) -> None: ...


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


class Busy(nn.Linear):
    def activate(self) -> None: ...


@pytest.mark.parametrize(
    ("layer", "error", "text"),
    [
        (NoChildren, TypeError, "kind"),
        (Busy, ValueError, r"attributes of a LoRA layer already: \['activate'\]"),
    ],
)
def test_a_class_that_cannot_be_adapted_fails_before_anything_is_changed(layer: Any, error: Any, text: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer(4, 4), nn.Linear(4, 4))
    with pytest.raises(error, match=text):
        inject_lora(model, ["0", "1"], train_also=["2"])
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())
    assert not [key for module in model.modules() for key in module.__dict__ if "lora" in key]


def test_a_class_that_cannot_be_adapted_fails_a_loading_before_anything_is_changed(tmp_path: Path) -> None:
    lora_plus.save_adapter(inject_lora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0", "1"]), tmp_path / "a")
    model = nn.Sequential(nn.Linear(4, 4), NoChildren(4, 4))
    with pytest.raises(TypeError, match="kind"):
        lora_plus.load_adapter(model, tmp_path / "a")
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())
    assert not [key for module in model.modules() for key in module.__dict__ if "lora" in key]


def test_state_that_is_no_tensor_is_refused_before_anything_is_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Extra(4, 4))
    with pytest.raises(ValueError, match="'2' has state that is not a tensor"):
        inject_lora(model, ["0"], train_also=["1", "2"])
    assert not [key for module in model.modules() for key in module.__dict__ if "lora" in key]


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compiled", "dp"])
def test_wrappers_leave_no_mark_in_files(wrap: Any, tmp_path: Path) -> None:
    model = two()
    lora_plus.save_adapter(wrap(model), tmp_path / "a.safetensors")
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lora_plus.load_adapter(wrap(fresh), tmp_path / "a.safetensors")
    assert set(adapter_state_dict(wrap(fresh))) == {f"{n}.lora_{part}" for n in "01" for part in "AB"}
    assert torch.equal(fresh[0].lora_B["default"], model[0].lora_B["default"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_other_weights_are_refused_by_name(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"Linear whose weight is {dtype}, expected one of"):
        inject_lora(nn.Sequential(layer), ["0"])


class Halved(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * 0.5, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Gated(nn.Linear):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * gate


class Shifted(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            Halved(4, 4),
            "its own forward changes its weight before using it, so merging would change the result",
        ),
        (Standardised(2, 3, 3), "its own forward changes its weight before using it"),
        (Gated(4, 4), "its own forward could not be tried out on one input"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_forward_that_merging_would_change_is_not_merged(layer: nn.Module, text: str) -> None:
    model = randomise(inject_lora(nn.Sequential(layer), ["0"], r=2))
    weight = model[0].weight
    with pytest.raises(ValueError, match=text):
        merge_lora(model)
    assert model[0].weight is weight and model[0].active_names() == ["default"] and model[0].training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_forward_that_merging_keeps_is_merged(dtype: torch.dtype) -> None:
    model = randomise(inject_lora(nn.Sequential(Shifted(4, 4)).to(dtype), ["0"], r=2)).eval()
    y = model(X.to(dtype))
    with merged(model):
        torch.testing.assert_close(model(X.to(dtype)), y, rtol=0.05, atol=0.05)


def test_a_head_tied_to_the_rest_is_not_written_for_peft(tmp_path: Path) -> None:
    model = inject_lora(Tied(), ["q"], train_also=["head"])
    with pytest.raises(ValueError, match=r"train_also 'head.weight' is tied to 'embed.weight', and PEFT would untie"):
        lora_plus.save_adapter(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    lora_plus.save_adapter(model, tmp_path / "a.safetensors")
    assert lora_plus.load_adapter(Tied(), tmp_path / "a.safetensors").q.lora_adapters["default"].spec.r == 8


def test_no_adapter_is_added_or_renamed_behind_fully_shard_s_back(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        lora_plus.save_adapter(inject_lora(nn.Sequential(nn.Linear(4, 4)), ["0"]), tmp_path / "a.safetensors")
        mesh = init_device_mesh("cpu", (1,))
        plain = fully_shard(nn.Sequential(nn.Linear(4, 4)), mesh=mesh)
        model = randomise(inject_lora(nn.Sequential(nn.Linear(4, 4)), ["0"], r=2))
        y, state = model(X), adapter_state_dict(model)
        for part in (model[0], model):
            fully_shard(part, mesh=mesh)
        for change in (
            lambda: inject_lora(plain, ["0"]),
            lambda: lora_plus.load_adapter(plain, tmp_path / "a.safetensors"),
            lambda: lora_plus.add_adapter(model, "b"),
            lambda: lora_plus.load_adapter(model, tmp_path / "a.safetensors", adapter="b"),
            lambda: resize_adapter(model, r=1),
            lambda: lora_plus.rename_adapter(model, "default", "b"),
        ):
            with pytest.raises(ValueError, match=r"is sharded by fully_shard.*before the model is sharded"):
                change()
        assert type(plain[0]) is nn.Linear and adapter_names(model) == ["default"]
        torch.testing.assert_close(model(X), y)
        torch.testing.assert_close(adapter_state_dict(model), state)
    finally:
        torch.distributed.destroy_process_group()


def test_an_adapter_is_not_added_behind_ddp_s_back(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        plain = nn.Sequential(nn.Linear(4, 4))
        wrapped = nn.parallel.DistributedDataParallel(plain)
        with pytest.raises(ValueError, match="wrapped in DistributedDataParallel, which would not reduce"):
            inject_lora(wrapped, ["0"])
        assert type(plain[0]) is nn.Linear
        before = inject_lora(plain, ["0"])
        wrapped = nn.parallel.DistributedDataParallel(before)
        optimizer = lora_plus.create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=1e-2)
        wrapped(X).square().mean().backward()
        optimizer.step()
        assert torch.count_nonzero(plain[0].lora_B["default"])
        lora_plus.save_adapter(wrapped, tmp_path / "a.safetensors")
        assert set(adapter_state_dict(wrapped)) == {"0.lora_A", "0.lora_B"}
    finally:
        torch.distributed.destroy_process_group()
