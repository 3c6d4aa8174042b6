"""The loops of the page on loops train what loops by hand train, which use nothing of the library."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from doc_blocks import block_under
from torch import Tensor, nn

import lora_plus
from lora_plus import check_optimizer, create_loraplus_optimizer, inject_lora

PAGE = Path(__file__).parent.parent.parent / "docs" / "training-loop.md"
LR, RATIO = 1e-2, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"variant": "dora"},
    "LoRA-FA": {"variant": "lora_fa"},
    "PiSSA": {"init": "pissa"},
    "with a module": {"targets": ["0"], "train_also": ["2"]},
}


def random_factors(weight: Tensor, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    return torch.randn(r, weight.shape[1], dtype=weight.dtype), torch.randn(weight.shape[0], r, dtype=weight.dtype)


def adapted(dtype: torch.dtype = torch.float64, dropout: float = 0.0, **settings: Any) -> nn.Module:
    """A model whose adapters have learnt something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)
    return inject_lora(model, **{"targets": ["0", "2"], "r": 2, "alpha": 4, "init": random_factors, **settings})


def names(model: nn.Module, optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW) -> dict[str, Any]:
    """What the page's blocks go on from."""
    dtype = model[0].weight.dtype
    batches = [(torch.randn(4, 6, dtype=dtype), torch.randint(3, (4,))) for _ in range(12)]
    return {
        "torch": torch,
        "nn": nn,
        "lp": lora_plus,
        "model": model,
        "optimizer": create_loraplus_optimizer(model, optimizer_cls, lr=LR, lr_ratio=RATIO),
        "parameters": [p for p in model.parameters() if p.requires_grad],
        "batches": batches,
        "x": batches[0][0],
        "y": batches[0][1],
        "loss_of": nn.CrossEntropyLoss(),
        "device": "cpu",
    }


def run(heading: str, given: dict[str, Any]) -> None:
    exec(compile(block_under(PAGE, heading), heading, "exec"), given)


class ByHand:
    """The same model in float64, as matrices W + s B A, and an optimizer with a rate for A and another for B."""

    def __init__(self, model: nn.Module, optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW) -> None:
        tensors = {name: tensor.double() for name, tensor in copy.deepcopy(model.state_dict()).items()}
        self.base = [tensors[f"{i}.{part}"] for i in (0, 2) for part in ("weight", "bias")]
        self.factors = [tensors[f"{i}.lora_{part}.default"].requires_grad_() for i in (0, 2) for part in "AB"]
        groups = [{"params": self.factors[::2], "lr": LR}, {"params": self.factors[1::2], "lr": RATIO * LR}]
        self.optimizer = optimizer_cls(groups, weight_decay=0.0)

    def step(self, x: Tensor, y: Tensor, max_norm: float | None = None) -> tuple[Tensor, Tensor]:
        """Train on a batch; the loss, and the norm of all gradients."""
        W0, b0, W1, b1 = self.base
        A0, B0, A1, B1 = self.factors
        hidden = F.gelu(x.double() @ (W0 + 2 * B0 @ A0).T + b0)
        loss = F.cross_entropy(hidden @ (W1 + 2 * B1 @ A1).T + b1, y)
        gradients = torch.autograd.grad(loss, self.factors)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).square().sum().sqrt()
        factor = 1.0 if max_norm is None else min(1.0, max_norm / (norm.item() + 1e-6))
        for p, gradient in zip(self.factors, gradients, strict=True):
            p.grad = factor * gradient
        self.optimizer.step()
        return loss, norm

    def agrees(self, given: dict[str, Any], tolerance: float = 1e-12) -> None:
        trained = [p.double() for p in given["model"].parameters() if p.requires_grad]
        torch.testing.assert_close(trained, self.factors, rtol=tolerance, atol=tolerance)


def test_pieces_are_the_large_batch() -> None:
    given = names(adapted())
    hand = ByHand(given["model"])
    run("Accumulate gradients", given)
    for start in range(0, 12, 4):
        xs, ys = zip(*given["batches"][start : start + 4], strict=True)
        hand.step(torch.cat(xs), torch.cat(ys))
    hand.agrees(given)


def test_all_gradients_are_clipped_by_one_factor() -> None:
    given = names(adapted(), torch.optim.SGD)
    hand = ByHand(given["model"], torch.optim.SGD)
    run("Clip gradients", given)
    _, norm = hand.step(given["x"], given["y"], max_norm=1.0)
    assert norm > 1.5
    torch.testing.assert_close(given["norm"], norm, rtol=1e-12, atol=0)
    hand.agrees(given)


def test_under_autocast_steps_are_those_of_float64_to_the_rounding() -> None:
    given = names(adapted(torch.float32), torch.optim.SGD)
    hand = ByHand(given["model"], torch.optim.SGD)
    before = copy.deepcopy(hand.factors)
    run("Autocast: bfloat16 arithmetic", given)
    loss, norm = hand.step(given["x"], given["y"])
    torch.testing.assert_close(given["loss"].double(), loss, rtol=0.03, atol=0.03)
    hand.agrees(given, 0.03 * LR * RATIO * norm.item())
    assert all(not torch.equal(p, old) for p, old in zip(hand.factors, before, strict=True))


def test_a_scaler_leaves_nothing_of_its_factor() -> None:
    given = names(adapted(torch.float32), torch.optim.SGD)
    hand = ByHand(given["model"], torch.optim.SGD)
    stepped = list[tuple[Tensor, Tensor]]()
    given["optimizer"].register_step_post_hook(lambda *_: stepped.append((given["x"], given["y"])))
    run("Float16 with a gradient scaler", given)
    norms = [hand.step(x, y, max_norm=1.0)[1] for x, y in stepped]
    assert len(stepped) >= 6 and max(norms) > 1.5
    hand.agrees(given, 2e-3)


def test_a_scaler_leaves_out_a_step_without_a_gradient() -> None:
    given = names(adapted(torch.float32))
    given["batches"] = [(torch.full_like(x, torch.inf), y) for x, y in given["batches"]]
    hand = ByHand(given["model"])
    run("Float16 with a gradient scaler", given)
    hand.agrees(given, 0)
    assert given["scaler"].get_scale() == 2.0 ** (16 - 12)


@pytest.mark.slow
def test_a_compiled_loop_takes_the_step_of_a_plain_one() -> None:
    given = names(adapted())
    hand = ByHand(given["model"])
    torch._dynamo.reset()
    run("Compile", given)
    hand.step(given["x"], given["y"])
    hand.agrees(given)


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_average_is_the_closed_form_and_takes_the_memory_of_what_is_trained(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = names(adapted(**SETTINGS[setting]))
    model, seen = given["model"], list[list[Tensor]]()
    given["optimizer"].register_step_post_hook(
        lambda *_: seen.append([p.detach().clone() for p in given["parameters"]])
    )
    run("An average of the weights", given)
    for p, last in zip(given["parameters"], seen[-1], strict=True):
        assert torch.equal(p, last)
    assert len(seen) == 12
    for i, mean in enumerate(given["average"].module.parameters()):
        wanted = 0.99**11 * seen[0][i] + sum(0.01 * 0.99 ** (11 - n) * seen[n][i] for n in range(1, 12))
        torch.testing.assert_close(mean, wanted, rtol=1e-12, atol=1e-12)
    held = sum(p.numel() for p in given["average"].parameters())
    assert held == sum(p.numel() for p in model.parameters() if p.requires_grad)
    check_optimizer(given["optimizer"], model)

    loaded = lora_plus.load_adapter(lora_plus.remove_lora(copy.deepcopy(model)), "average.safetensors")
    given["exchange"]()
    torch.testing.assert_close(loaded(given["x"]), model(given["x"]), rtol=1e-12, atol=1e-12)
    assert any(not torch.equal(p, last) for p, last in zip(given["parameters"], seen[-1], strict=True))


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_best_values_come_back_into_the_same_parameters(setting: str) -> None:
    model = adapted(**SETTINGS[setting])
    given = names(model)
    seen: list[tuple[float, dict[str, Tensor]]] = []

    def evaluated(module: nn.Module, training: bool = True) -> nn.Module:
        if training:
            with torch.no_grad():
                loss = sum(given["loss_of"](module(x), y).item() for x, y in given["batches"][-2:])
            seen.append((loss, copy.deepcopy(module.state_dict())))
        return type(module).train(module, training)

    model.train = evaluated.__get__(model)  # type: ignore[method-assign]
    run("Stop early, and bring the best adapter back", given)
    losses = [loss for loss, _ in seen]
    best = losses.index(min(losses))
    assert len(seen) == min(20, best + 4) and best + 1 < len(seen)
    for name, value in model.state_dict().items():
        assert torch.equal(value, seen[best][1][name])
    assert any(not torch.equal(value, seen[-1][1][name]) for name, value in model.state_dict().items())
    check_optimizer(given["optimizer"], model)


def steps(given: dict[str, Any], scheduler: Any, first: int, last: int) -> None:
    for x, y in given["batches"][first:last]:
        given["optimizer"].zero_grad()
        given["loss_of"](F.dropout(given["model"](x), 0.2), y).backward()
        given["optimizer"].step()
        scheduler.step()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_resumed_run_has_the_bits_of_one_without_a_break(setting: str, tmp_path: Path) -> None:
    def begun() -> tuple[dict[str, Any], Any]:
        given = names(adapted(dropout=0.1, **SETTINGS[setting]))
        run("Resume to the bit", given)
        return given, torch.optim.lr_scheduler.CosineAnnealingLR(given["optimizer"], T_max=12)

    whole, scheduler = begun()
    steps(whole, scheduler, 0, 12)

    broken, scheduler = begun()
    steps(broken, scheduler, 0, 5)
    broken["save"](tmp_path / "run", broken["model"], broken["optimizer"], scheduler, 5)

    resumed, scheduler = begun()
    with torch.no_grad():
        for p in resumed["parameters"]:
            p.normal_()
    torch.rand(7)
    done = resumed["resume"](tmp_path / "run", resumed["model"], resumed["optimizer"], scheduler)
    steps(resumed, scheduler, done, 12)
    for name, value in whole["model"].state_dict().items():
        assert torch.equal(value, resumed["model"].state_dict()[name])
