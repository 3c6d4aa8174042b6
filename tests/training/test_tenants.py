"""Several adapters that train on their own samples of one batch, each with an optimizer, a rate and a schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Conv1D
from torch import Tensor, nn

import lora_plus as lp
from lora_plus.training import check_lr_ratio


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.mix = nn.Embedding(9, 8), nn.Linear(8, 12), Conv1D(8, 12)
        self.conv, self.head = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)  # (samples, 5) -> (samples, 5, 8)
        x = x + self.mix(F.gelu(self.up(x)))
        y: Tensor = self.head(self.conv(x.mT).mean(-1))
        return y


Schedule = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass(frozen=True)
class Tenant:
    """An adapter, and how it is trained."""

    settings: dict[str, Any]
    rates: dict[str, Any]
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    schedule: Schedule = lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    targets: Sequence[str] = field(default=("up", "mix", "head"))


TENANTS = {
    "a": Tenant({"r": 2}, {"lr": 1e-2, "lr_ratio": 8}),
    "b": Tenant(
        {"r": 3, "alpha": 3, "scaling": "rslora"},
        {"lr": 3e-3, "lr_ratio": 2, "lr_mode": "geometric", "weight_decay": 0.1},
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12),
        targets=("embed", "up", "mix", "conv", "head"),
    ),
    "c": Tenant(
        {"r": 1, "variant": "dora"},
        {"lr": 5e-2, "lr_ratio": 1, "momentum": 0.9},
        torch.optim.SGD,
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5),
        ("up", "conv"),
    ),
}


class Run:
    """A model, some of the tenants, and the optimizer and schedule of each."""

    def __init__(self, names: Sequence[str], dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.model = Net().to(dtype)
        self.optimizers, self.schedules = dict[str, torch.optim.Optimizer](), dict[str, Any]()
        for name in names:
            generator, tenant = torch.Generator().manual_seed(ord(name)), TENANTS[name]
            lp.inject_lora(
                self.model, tenant.targets, adapter=name, dtype=dtype, generator=generator, **tenant.settings
            )
        self.train_all(names)
        for name in names:
            self.start(name)

    def train_all(self, names: Sequence[str]) -> None:
        lp.set_adapter(self.model, list(names), trainable=True)

    def start(self, name: str) -> None:
        tenant = TENANTS[name]
        made = lp.create_loraplus_optimizer(self.model, tenant.optimizer, adapter=name, **tenant.rates)
        self.optimizers[name], self.schedules[name] = made, tenant.schedule(made)

    def step(self, names: Sequence[str], tokens: Tensor, labels: Tensor) -> None:
        """A step of those that have samples in the batch: the sum of their losses, each the mean of its samples."""
        with lp.adapter_per_sample(self.model, names):
            losses = F.cross_entropy(self.model(tokens), labels, reduction="none")
        own = [torch.tensor([name == each for each in names]) for name in dict.fromkeys(names)]
        sum(losses[mine].mean() for mine in own).backward()  # type: ignore[union-attr]
        self.move(dict.fromkeys(names))

    def step_alone(self, tokens: Tensor, labels: Tensor) -> None:
        """A step of the only tenant, without names for samples."""
        F.cross_entropy(self.model(tokens), labels).backward()
        self.move(self.optimizers)

    def move(self, names: Any) -> None:
        for name in names:
            self.optimizers[name].step()
            self.schedules[name].step()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {key: held.detach().clone() for key, held in self.model.named_parameters() if key.endswith(f".{name}")}


def batch(step: int, names: Sequence[str] = "abcabbca") -> tuple[Sequence[str], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    size = len(names)
    return list(names), torch.randint(9, (size, 5), generator=generator), torch.randint(4, (size,), generator=generator)


def own_part(name: str, names: Sequence[str], tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    mine = torch.tensor([name == each for each in names])
    return tokens[mine], labels[mine]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- what it is to train together --------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("names", ["abcabbca", "aab", "cba"])
def test_each_tenant_follows_the_run_that_it_has_alone(names: str, dtype: torch.dtype, tolerance: float) -> None:
    chosen = sorted(set(names))
    together, alone = Run("abc", dtype), {name: Run(name, dtype) for name in chosen}
    before = {name: together.tensors(name) for name in "abc"}
    for name in "abc":
        lp.check_optimizer(together.optimizers[name], together.model, adapter=name)
        check_lr_ratio(together.optimizers[name], together.schedules[name])
    for step in range(10):
        together.step(*batch(step, names))
        for name in chosen:
            alone[name].step_alone(*own_part(name, *batch(step, names)))
    for name in "abc":
        tensors = together.tensors(name)
        if name not in chosen:  # no samples, no step: not by decay or momentum either
            assert_equal(tensors, before[name])
            continue
        wanted = alone[name].tensors(name)
        torch.testing.assert_close(tensors, wanted, rtol=tolerance, atol=tolerance)
        assert any(not torch.allclose(tensors[key], before[name][key], rtol=1e-2) for key in tensors)
        rates = [[group["lr"] for group in run.optimizers[name].param_groups] for run in (together, alone[name])]
        assert rates[0] == rates[1]


# ---- coming and going --------------------------------------------------------------------------------------------


def test_a_tenant_that_leaves_leaves_the_others_bit_for_bit_as_they_are() -> None:
    run, other = Run("abc"), Run("abc")
    for step in range(3):
        for each in (run, other):
            each.step(*batch(step))
    lp.delete_adapter(run.model, "c")
    del run.optimizers["c"]
    lp.check_optimizer(list(run.optimizers.values()), run.model)
    for step in range(3, 6):
        for each in (run, other):
            each.step(*batch(step, "abab"))
    for name in "ab":
        assert_equal(run.tensors(name), other.tensors(name))
    with pytest.raises(KeyError, match="no adapter 'c'"):
        run.step(*batch(6))


def test_a_tenant_is_saved_and_goes_on_later_in_another_model(tmp_path: Path) -> None:
    whole, first, second = Run("abc"), Run("abc"), Run("a")
    for step in range(3):
        for run in (whole, first):
            run.step(*batch(step))
    lp.save_adapter(first.model, tmp_path / "b.safetensors", adapter="b")
    torch.save([first.optimizers["b"].state_dict(), first.schedules["b"].state_dict()], tmp_path / "b.pt")
    before = second.tensors("a")
    lp.load_adapter(second.model, tmp_path / "b.safetensors", adapter="b")
    second.train_all("ab")
    second.start("b")
    for held, state in zip((second.optimizers, second.schedules), torch.load(tmp_path / "b.pt"), strict=True):
        held["b"].load_state_dict(state)
    lp.check_optimizer(second.optimizers["b"], second.model, adapter="b")
    assert_equal(second.tensors("a"), before)
    assert_equal(second.tensors("b"), first.tensors("b"))
    for step in range(3, 8):
        whole.step(*batch(step))
        names, tokens, labels = batch(step)
        tokens, labels = own_part("b", names, tokens, labels)
        second.step(["b"] * len(labels), tokens, labels)
    torch.testing.assert_close(second.tensors("b"), whole.tensors("b"), rtol=1e-10, atol=1e-10)
    assert_equal(second.tensors("a"), before)


def test_a_tenant_that_joins_starts_while_others_go_on() -> None:
    run, alone = Run("ab"), Run("a")
    for step in range(6):
        if step == 3:
            generator = torch.Generator().manual_seed(ord("c"))
            lp.add_adapter(run.model, "c", like="a", dtype=torch.float64, generator=generator)
            run.train_all("abc")
            run.start("c")
        run.step(*batch(step, "abab" if step < 3 else "abcab"))
        alone.step_alone(*own_part("a", *batch(step, "abab" if step < 3 else "abcab")))
    torch.testing.assert_close(run.tensors("a"), alone.tensors("a"), rtol=1e-10, atol=1e-10)


# ---- what is checked ---------------------------------------------------------------------------------------------


def test_the_optimizer_of_one_tenant_is_checked_for_that_tenant() -> None:
    run = Run("abc")
    of_a, of_b = run.optimizers["a"], run.optimizers["b"]
    lp.check_optimizer(of_a, run.model, adapter="a", lr_ratio=8)
    lp.check_optimizer([of_a, of_b, run.optimizers["c"]], run.model)
    with pytest.raises(ValueError, match=r"'embed.lora_A.b', .* would not be trained"):
        lp.check_optimizer(of_a, run.model)
    with pytest.raises(KeyError, match="the model has no adapter 'd'"):
        lp.check_optimizer(of_a, run.model, adapter="d")
    with pytest.raises(ValueError) as caught:
        lp.check_optimizer([of_a, of_b], run.model, adapter="a")
    assert str(caught.value).splitlines()[1:] == [
        "  'up.lora_A.b', 'mix.lora_A.b', 'conv.lora_A.b' and 7 more would be trained too, which adapter 'a' does not "
        "have: build the optimizer with create_loraplus_optimizer(model, ..., adapter='a')"
    ]
    groups = copy.copy(of_a.param_groups)
    groups[1]["lr"] = groups[0]["lr"]
    with pytest.raises(ValueError, match=r"a ratio of 1, where 8 is expected"):
        lp.check_optimizer(of_a, run.model, adapter="a")
    groups[1]["lr"] = 8 * groups[0]["lr"]
    with pytest.raises(ValueError, match=r"'mix.lora_B.a', 'head.lora_B.a' would not be trained"):
        lp.check_optimizer(torch.optim.AdamW([run.model.up.lora_A["a"], *some_of(run, "a")]), run.model, adapter="a")
    run.train_all("bc")
    with pytest.raises(ValueError, match="the adapter 'a' is frozen: choose what is trained with"):
        lp.check_optimizer(of_a, run.model, adapter="a")


def some_of(run: Run, name: str) -> list[nn.Parameter]:
    return [run.model.up.lora_B[name], run.model.mix.lora_A[name], run.model.head.lora_A[name]]


def test_modules_trained_in_full_belong_to_their_tenant() -> None:
    model = lp.inject_lora(Net(), ["up"], adapter="a", train_also=["head"])
    lp.inject_lora(model, ["up"], adapter="b")
    lp.set_adapter(model, ["a", "b"], trainable=True)
    of = {name: lp.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, adapter=name) for name in "ab"}
    for name in "ab":
        lp.check_optimizer(of[name], model, adapter=name)
    of["b"].add_param_group({"params": list(model.head.parameters())})
    with pytest.raises(ValueError, match=r"'head.weight', 'head.bias' would be trained too"):
        lp.check_optimizer(of["b"], model, adapter="b")


def test_two_tenants_that_could_not_be_active_together_train_in_one_batch() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).double()
    for name in "ab":
        lp.inject_lora(model, ["0"], r=2, variant="dora", adapter=name, dtype=torch.float64)
    with pytest.raises(ValueError, match="each rescale the weight"):
        lp.set_adapter(model, ["a", "b"], trainable=True)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.endswith((".a", ".b")))
    of = {name: lp.create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-2, adapter=name) for name in "ab"}
    twin, x = copy.deepcopy(model), torch.randn(4, 6, dtype=torch.float64)
    with lp.adapter_per_sample(model, ["b", "a", "a", "b"]):
        for name in "ab":
            lp.check_optimizer(of[name], model, adapter=name)
        model(x).square().sum().backward()
    for name, own in (("a", x[1:3]), ("b", x[[0, 3]])):
        lp.set_adapter(twin, name)
        twin(own).square().sum().backward()
    for (key, ours), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if key.endswith((".a", ".b")):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="the adapter 'a' is trainable but not active"):
        lp.check_optimizer(of["a"], model, adapter="a")
