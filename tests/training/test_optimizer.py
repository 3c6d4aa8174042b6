"""An optimizer that would train something else than LoRA+ on a model is found, with all that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from lora_plus import (
    adapter_per_sample,
    add_adapter,
    check_optimizer,
    create_loraplus_optimizer,
    disabled,
    inject_lora,
    loraplus_param_groups,
    merged,
    remove_lora,
    set_adapter,
)
from lora_plus.engines.ranks import checksum
from lora_plus.training import rebind_optimizer, split_loraplus_groups
from lora_plus.training.rounding import lost_entries

AdamW = torch.optim.AdamW


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.up, self.gate = nn.Linear(4, 4), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = torch.tanh(self.up(x)) * self.gate(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


TARGETS = ["embed", "up", "gate", "attention.in_proj_weight"]


def net(**settings: Any) -> nn.Module:
    """With an A and a B each on two layers, rows of an attention's weight and an embedding, and a trained head."""
    return inject_lora(Net(), TARGETS, **{"r": 2, "train_also": ["head"], **settings})


def plus(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model, AdamW, **{"lr": 1e-3, "lr_ratio": 8, **settings})


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, float]:
    """How far one step moves each parameter."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):  # at B = 0 the first moves no A
        for parameter in model.parameters():
            parameter.grad = None
        model(torch.arange(6)[None]).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    return {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}


# ---- what is right -------------------------------------------------------------------------------------------------


def by_layer(model: nn.Module) -> torch.optim.Optimizer:
    layers = [model.up, model.gate, model.attention, model.embed, model.head]
    trained = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
    groups = [{"params": own, "lr": 1e-3 * 0.5**depth} for depth, own in enumerate(trained)]
    return AdamW(split_loraplus_groups(groups, model, lr_ratio=8, lr_mode="geometric"), lr=1e-3)


RIGHT: dict[str, Callable[[nn.Module], Any]] = {
    "LoRA+": plus,
    "ratio 1": lambda model: plus(model, lr_ratio=1),
    "geometric": lambda model: plus(model, lr_mode="geometric"),
    "split by layer": by_layer,
    "plain LoRA": lambda model: AdamW([p for p in model.parameters() if p.requires_grad]),
    "frozen ones too": lambda model: AdamW(model.parameters()),
    "several": lambda model: [
        AdamW([group]) for group in loraplus_param_groups(model, lr=1e-3, lr_ratio=8, weight_decay=0.1)
    ],
    "rates in tensors": lambda model: AdamW(
        [{**group, "lr": torch.tensor(group["lr"])} for group in loraplus_param_groups(model, lr=1e-3, lr_ratio=8)]
    ),
    "at the start of a warm-up": lambda model: (
        torch.optim.lr_scheduler.LambdaLR(optimizer := plus(model), lambda step: step / 10),
        optimizer,
    )[1],
}


@pytest.mark.parametrize("build", RIGHT.values(), ids=RIGHT)
@pytest.mark.parametrize("variant", ["lora", "dora", "lora_fa"])
def test_an_optimizer_that_fits_passes(build: Callable[[nn.Module], Any], variant: str) -> None:
    model = inject_lora(Net(), ["up", "gate"], r=2, variant=variant, train_also=["head", "embed"])
    model = inject_lora(model, ["attention.in_proj_weight"], r=2, adapter="rows")
    set_adapter(model, ["default", "rows"], trainable=True)
    check_optimizer(build(model), model)
    check_optimizer(build(model), torch.compile(model, backend="eager"))


@pytest.mark.parametrize(("build", "ratio"), [("LoRA+", 8), ("geometric", 8), ("split by layer", 8), ("ratio 1", 1)])
def test_the_ratio_that_is_expected(build: str, ratio: float) -> None:
    model = net()
    optimizer = RIGHT[build](model)
    check_optimizer(optimizer, model, lr_ratio=ratio)
    with pytest.raises(ValueError, match=rf"a ratio of {ratio}, where 3 is expected"):
        check_optimizer(optimizer, model, lr_ratio=3)


def test_a_frozen_A_has_no_rate_to_compare() -> None:
    model = inject_lora(Net(), ["up", "gate"], r=2, variant="lora_fa")
    check_optimizer(AdamW(model.parameters()), model, lr_ratio=8)


def test_adapters_that_samples_choose_take_part() -> None:
    model = add_adapter(inject_lora(Net(), ["up"], r=2), "other", r=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    optimizer = plus(model)
    with adapter_per_sample(model, ["default", "other"]):
        check_optimizer(optimizer, model)
    with pytest.raises(ValueError, match=r"the adapter 'default' is trainable but not active"):
        check_optimizer(optimizer, model)


def test_peft_adapters_by_their_roles() -> None:
    peft = pytest.importorskip("peft")
    from lora_plus.engines.peft import peft_roles

    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["up", "gate", "embed"]))
    optimizer = create_loraplus_optimizer(model, AdamW, lr=1e-3, lr_ratio=8, roles=peft_roles(model))
    check_optimizer(optimizer, model, roles=peft_roles(model), lr_ratio=8)
    with pytest.raises(ValueError, match=r"a ratio of 8, where 4 is expected"):
        check_optimizer(optimizer, model, roles=peft_roles(model), lr_ratio=4)
    with pytest.raises(ValueError, match=r"the model has no LoRA adapter"):
        check_optimizer(optimizer, model)


# ---- what is wrong, and what it would do silently ------------------------------------------------------------------


def stale(model: nn.Module) -> torch.optim.Optimizer:
    """Built before the parameters were exchanged."""
    optimizer = plus(model)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return optimizer


def test_stale_parameters_are_found() -> None:
    model = net()
    optimizer = stale(model)
    assert set(step(model, optimizer).values()) == {0.0}  # trains nothing
    with pytest.raises(ValueError) as caught:
        check_optimizer(optimizer, model)
    assert str(caught.value) == (
        "training would not do what the optimizer is set up for:\n"
        "  the optimizer holds parameters that are not the model's (5 of 5 in group 'lora_A', 5 of 5 in group "
        "'lora_B', 2 of 2 in group 'lora_embedding', 1 of 1 in group 'other', 1 of 1 in group 'other_no_decay'): build "
        "it after they are replaced (sharding, to_empty), or replace them inside `with rebind_optimizer(optimizer, "
        "model):`\n"
        "  'embed.lora_A.default', 'embed.lora_B.default', 'up.lora_A.default' and 11 more would not be trained, being "
        "in no group of the optimizer: build its groups with loraplus_param_groups(model, ...), or freeze them"
    )


def test_what_is_left_out_is_found() -> None:
    model = net()
    groups = [group for group in loraplus_param_groups(model, lr=1e-3) if group["name"] != "lora_embedding"]
    optimizer = AdamW(groups, lr=1e-3)
    moved = step(model, optimizer)
    assert {name for name in moved if "embed.lora" in name and moved[name] == 0} == {
        "embed.lora_A.default",
        "embed.lora_B.default",
    }
    with pytest.raises(ValueError, match=r"'embed.lora_A.default', 'embed.lora_B.default' would not be trained"):
        check_optimizer(optimizer, model)


def test_what_two_optimizers_hold_is_found() -> None:
    model = net()
    one, other = plus(model), AdamW(model.head.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=r"'head.weight', 'head.bias' would be trained twice a step"):
        check_optimizer([one, other], model)


def reversed_state(model: nn.Module) -> torch.optim.Optimizer:
    """With the state of an optimizer whose groups stood in another order, each as long as the one in its place."""
    saved = AdamW(loraplus_param_groups(model, lr=1e-3, lr_ratio=8)[:2], lr=1e-3)
    optimizer = AdamW(loraplus_param_groups(model, lr=1e-3, lr_ratio=8)[1::-1], lr=1e-3)
    optimizer.load_state_dict(saved.state_dict())
    return optimizer


def test_groups_in_another_order_than_their_state_are_found() -> None:
    model = inject_lora(Net(), ["up", "gate"], r=2)
    optimizer = reversed_state(model)
    moved = step(model, optimizer)
    assert moved["up.lora_A.default"] > 2 * moved["up.lora_B.default"]  # the opposite of LoRA+
    with pytest.raises(ValueError) as caught:
        check_optimizer(optimizer, model)
    assert [line.split(":")[0].split(";")[0] for line in str(caught.value).splitlines()[1:]] == [
        "  group 'lora_A' holds 'up.lora_B.default', 'gate.lora_B.default', which do not fit its name",
        "  group 'lora_B' holds 'up.lora_A.default', 'gate.lora_A.default', which do not fit its name",
        "  'up.lora_B.default', 'gate.lora_B.default' learns at 0.001 in group 'lora_A', and the A beside it at "
        "0.008 in group 'lora_B'",
    ]
    assert "a ratio of 0.125, where 8 is expected" in str(caught.value)


def test_an_adapter_in_a_group_of_the_rest_is_found() -> None:
    model = inject_lora(Net(), ["embed"], r=2, train_also=["head"])
    groups = loraplus_param_groups(model, lr=1e-3)
    groups[0]["name"], groups[1]["name"] = groups[1]["name"], groups[0]["name"]
    with pytest.raises(ValueError, match=r"group 'other' holds 'embed.lora_A.default', 'embed.lora_B.default', which"):
        check_optimizer(AdamW(groups, lr=1e-3), model)


def one_group(model: nn.Module) -> torch.optim.Optimizer:
    """LoRA+ groups whose B has been put to A."""
    optimizer = plus(model)
    slow, fast = optimizer.param_groups
    slow["params"] += fast["params"]
    fast["params"] = []
    return optimizer


def flat_rates(model: nn.Module) -> torch.optim.Optimizer:
    """What a loop over the groups leaves."""
    optimizer = plus(model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    return optimizer


@pytest.mark.parametrize("build", [one_group, flat_rates])
def test_a_lost_ratio_is_found(build: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    model = inject_lora(Net(), ["up", "gate"], r=2)
    with pytest.raises(ValueError, match=r"'up.lora_B.default', 'gate.lora_B.default' learns at .* ratio of 1, where"):
        check_optimizer(build(model), model)


def test_a_rate_of_zero_beside_one_is_another_ratio() -> None:
    model = inject_lora(Net(), ["up"], r=2)
    optimizer = plus(model)
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(ValueError, match=r"a ratio of infinite, where 8 is expected"):
        check_optimizer(optimizer, model)


def test_plain_lora_where_lora_plus_is_expected_is_found() -> None:
    model = net()
    optimizer = RIGHT["plain LoRA"](model)
    check_optimizer(optimizer, model, lr_ratio=1)
    with pytest.raises(ValueError, match=r"and 2 more learns at 0.001 in group 0, .* of 1, where 8 is expected"):
        check_optimizer(optimizer, model, lr_ratio=8)


def test_adapters_without_gradient_are_found() -> None:
    model = net()
    optimizer = plus(model)
    add_adapter(model, "other", r=2)
    set_adapter(model, "other", trainable=True)
    set_adapter(model, "default")
    with pytest.raises(ValueError, match=r"the adapter 'other' is trainable but not active, and would get no gradient"):
        check_optimizer(optimizer, model)

    model = net()
    optimizer = plus(model)
    with (
        disabled(model),
        pytest.raises(ValueError, match=r"'default' is trainable but disabled, .* leave the disabled"),
    ):
        check_optimizer(optimizer, model)
    with merged(model), pytest.raises(ValueError, match=r"trainable but merged, .*: call unmerge_lora\(model\)$"):
        check_optimizer(optimizer, model)
    check_optimizer(optimizer, model)


def test_a_model_without_adapters_or_with_frozen_ones_is_found() -> None:
    model = net()
    optimizer = plus(model)
    set_adapter(model, "default", trainable=False)
    with pytest.raises(ValueError, match=r"every adapter of the model is frozen"):
        check_optimizer(optimizer, model)
    remove_lora(model)
    with pytest.raises(ValueError, match=r"the model has no LoRA adapter"):
        check_optimizer(optimizer, model)


class Flat:
    """As DeepSpeed's: not a torch optimizer, with groups of flat copies."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = []


def test_what_is_no_torch_optimizer_cannot_be_checked() -> None:
    model = net()
    wrapper = plus(model)
    wrapper.optimizer = Flat()  # type: ignore[attr-defined]
    for optimizer in (Flat(), wrapper, [plus(model), Flat()]):
        with pytest.raises(TypeError, match=r"^Flat is not a torch optimizer .*check_engine\(engine\)$"):
            check_optimizer(optimizer, model)
    wrapper.optimizer = plus(model)  # type: ignore[attr-defined]
    check_optimizer(wrapper, model)


def test_a_bad_ratio_is_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"lr_ratio must be finite and positive, got 0"):
        check_optimizer(plus(model), model, lr_ratio=0)


# ---- checksums -----------------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tensors_and_only_those_have_one_checksum(dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert checksum(tensor.t().contiguous().t()) == checksum(tensor.clone()) == checksum(tensor)
    for element in range(tensor.numel()):
        other = tensor.clone()
        other.view(torch.uint8).view(tensor.numel(), -1)[element, 0] ^= 1  # the last bit
        assert checksum(other) != checksum(tensor)
    assert checksum(tensor[:0]) == 0
    assert checksum(torch.tensor(1.5)) == checksum(torch.tensor([1.5]))


# ---- an optimizer that stays bound ---------------------------------------------------------------------------------


def exchanged(model: nn.Module) -> None:
    """Other parameters of the same values, as loading, sharding and materialising put in."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def wrapped(model: nn.Module) -> None:
    """Other parameters, in modules that have other names, too."""
    exchanged(model)
    apply_activation_checkpointing(model, check_fn=lambda module: module is model.up)


@pytest.mark.parametrize("change", [exchanged, wrapped])
def test_a_rebound_optimizer_trains_what_the_model_has(change: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    model = net()
    torch.manual_seed(0)
    other = net()
    optimizer, reference = plus(model), plus(other)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    with rebind_optimizer(optimizer, model) as bound:
        change(model)
    assert bound is optimizer
    check_optimizer(optimizer, model, lr_ratio=8)
    assert list(step(model, optimizer).values()) == list(step(other, reference).values())
    names = {id(p): name.replace("_checkpoint_wrapped_module.", "") for name, p in model.named_parameters()}
    others = {id(p): name for name, p in other.named_parameters()}
    for group, like in zip(optimizer.param_groups, reference.param_groups, strict=True):
        assert [names[id(p)] for p in group["params"]] == [others[id(p)] for p in like["params"]]
        assert {**group, "params": 0, "initial_lr": 0} == {**like, "params": 0, "initial_lr": 0}
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] / 2 for g in reference.param_groups]


def test_an_optimizer_with_state_is_not_rebound() -> None:
    model = net()
    optimizer = plus(model)
    step(model, optimizer)
    with (
        pytest.raises(ValueError, match=r"the AdamW has state, which cannot be moved to other parameters; build a new"),
        rebind_optimizer(optimizer, model),
    ):
        raise AssertionError("the block was entered")


def test_an_optimizer_of_another_model_is_not_rebound() -> None:
    with (
        pytest.raises(ValueError, match=r"the optimizer holds 14 parameters that are not the model's; build it from"),
        rebind_optimizer(plus(net()), net()),
    ):
        raise AssertionError("the block was entered")


def test_a_wrapper_is_not_rebound() -> None:
    model = net()
    wrapper = plus(model)
    wrapper.optimizer = plus(model)  # type: ignore[attr-defined]
    with (
        pytest.raises(ValueError, match=r"the AdamW wraps the AdamW, which has groups of its own; rebind before"),
        rebind_optimizer(wrapper, model),
    ):
        raise AssertionError("the block was entered")


def held(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def gone(model: nn.Module) -> None:
    exchanged(model)
    model.up = nn.Linear(4, 4)


def failed(model: nn.Module) -> None:
    exchanged(model)
    raise RuntimeError("in the block")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (gone, ValueError, r"no longer has the parameters \['up.lora_A.default', 'up.lora_B.default'\]"),
        (failed, RuntimeError, "in the block"),
    ],
)
def test_groups_stay_as_they_were_where_rebinding_fails(
    change: Callable[[nn.Module], None], error: type[Exception], message: str
) -> None:
    model = net()
    optimizer = plus(model)
    before = held(optimizer)
    with pytest.raises(error, match=message), rebind_optimizer(optimizer, model):
        change(model)
    assert held(optimizer) == before


def test_tied_parameters_stay_one() -> None:
    model = nn.Sequential(inject_lora(nn.Sequential(nn.Linear(4, 4)), ["0"], r=2), nn.Identity())
    model[1] = model[0]
    optimizer = plus(model)
    with rebind_optimizer(optimizer, model):
        exchanged(model)
    check_optimizer(optimizer, model)


# ---- steps that are rounded away ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [1e-5, 1e-4, 1e-3, 1e-2])
def test_the_entries_that_a_step_leaves_as_they_are_are_counted(dtype: torch.dtype, step: float) -> None:
    tensor = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[:10] = 0
    unchanged = ((tensor.double() + step).to(dtype) == tensor).sum()  # all ties but one in thousands fall the same way
    assert abs(int(lost_entries(tensor, step)) - int(unchanged)) <= 0.02 * len(tensor)


def test_half_precision_without_values_is_named_too() -> None:
    model = inject_lora(nn.Sequential(nn.Linear(4, 4)), ["0"], r=2, dtype=torch.bfloat16).to("meta")
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3)
    with pytest.warns(UserWarning, match="in bfloat16: small steps round away; cast"):
        check_optimizer(optimizer, model)


def test_adapters_in_half_precision_are_named_with_the_share_that_a_step_can_change() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    inject_lora(model, ["0"], r=4)
    optimizer = create_loraplus_optimizer(model.to(torch.bfloat16), torch.optim.AdamW, lr=1e-5, lr_ratio=4)
    with pytest.warns(UserWarning, match=r"0\.lora_A\.default.*bfloat16.*changes 5\d% of the entries.*before"):
        check_optimizer(optimizer, model)
    with pytest.warns(UserWarning, match=r"'0\.lora_B\.default' in bfloat16: small steps round away; cast"):
        check_optimizer(create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-5), model)


def test_adapters_that_are_injected_after_the_cast_move_and_are_not_named() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)).to(torch.bfloat16)
    inject_lora(model, ["0"], r=4)
    check_optimizer(create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-5, lr_ratio=4), model)
