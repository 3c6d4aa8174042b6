"""A forward assigned to a layer object, by a hook or by hand, before or after the injection: adapters stay live."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CASES, Case, randomise
from torch import Tensor, nn

import lora_plus
from lora_plus import inject_lora, merge_and_unload, merge_lora, remove_lora, unmerge_lora


class Tool:
    """Something that puts itself around a layer's forward, counts its calls, and takes itself back."""

    def __init__(self) -> None:
        self.calls = 0

    def add(self, model: nn.Module) -> None:
        self.replaced = model.layer.forward
        model.layer.forward = self.around(self.replaced)

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return forward(*args, **kwargs)

        return functools.wraps(forward)(counted)

    def remove(self, model: nn.Module) -> None:
        model.layer.forward = self.replaced


class Deleting(Tool):
    """One that takes itself back by deleting what it assigned."""

    def remove(self, model: nn.Module) -> None:
        del model.layer.forward


class Hook(Tool):
    """accelerate's hooks."""

    def add(self, model: nn.Module) -> None:
        hooks = pytest.importorskip("accelerate.hooks")
        tool = self

        class Counting(hooks.ModelHook):  # type: ignore[misc, name-defined]
            def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                tool.calls += 1
                return args, kwargs

        hooks.add_hook_to_module(model.layer, Counting())

    def remove(self, model: nn.Module) -> None:
        pytest.importorskip("accelerate.hooks").remove_hook_from_module(model.layer)


AFTER = {
    "plain": {"inject": "live"},
    "live": {"merge": "merged", "remove": "plain", "unload": "unloaded"},
    "merged": {"unmerge": "live", "remove": "plain", "unload": "unloaded"},
    "unloaded": {},
}
"""By state of a model, what can be done with it, and the state that it is in then."""
STEPS: dict[str, Callable[[nn.Module], Any]] = {
    "merge": merge_lora,
    "unmerge": unmerge_lora,
    "remove": remove_lora,
    "unload": merge_and_unload,
}


def orders(length: int) -> Iterator[list[tuple[str, str, bool]]]:
    """Every order of this many steps: each with the state after it, and whether there is a hook then."""

    def further(done: list[tuple[str, str, bool]], state: str, hooked: bool) -> Iterator[list[tuple[str, str, bool]]]:
        if len(done) == length:
            yield done
            return
        yield from further([*done, ("unhook" if hooked else "hook", state, not hooked)], state, not hooked)
        for step, after in AFTER[state].items():
            yield from further([*done, (step, after, hooked)], after, hooked)

    return further([], "plain", False)


def check_orders(case: Case, make_tool: Callable[[], Tool], length: int) -> None:
    def inject(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(3)
        return randomise(inject_lora(model, ["layer"], generator=generator, **case.settings))

    x = case.input()
    base, adapted = case.model()(x).detach(), inject(case.model())(x).detach()
    assert not torch.allclose(base, adapted)
    for order in orders(length):
        model, tool = case.model(), make_tool()
        steps = STEPS | {"inject": inject, "hook": tool.add, "unhook": tool.remove}
        for step, state, hooked in order:
            steps[step](model)
            tool.calls = 0
            with torch.no_grad():
                y = model(x)
            told = f"after {[name for name, _, _ in order]}, at {step!r}"
            torch.testing.assert_close(y, base if state == "plain" else adapted, rtol=1e-12, atol=1e-12, msg=told)
            assert tool.calls == hooked, told


@pytest.mark.parametrize("make_tool", [Tool, Deleting, Hook])
def test_the_adapter_is_live_in_every_order_of_steps(make_tool: Callable[[], Tool]) -> None:
    check_orders(CASES[0], make_tool, length=5)


# torch rescales the stored rows in place when the plain layer is called
CALLABLE = [case for case in CASES if not getattr(case.layer(), "max_norm", None)]


@pytest.mark.parametrize("case", CALLABLE, ids=lambda case: case.name)
def test_of_every_layer(case: Case) -> None:
    check_orders(case, Hook, length=3)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x, x)[0]
        return y


class AttentionCase(Case):
    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        return Attention().to(dtype)


def test_of_adapted_parameters() -> None:
    make_input = lambda generator, dtype: torch.randn(2, 3, 8, generator=generator, dtype=dtype)  # noqa: E731
    check_orders(AttentionCase("attention", Attention, make_input), Hook, length=3)


@pytest.mark.parametrize("first", ["inject", "assign"])
@pytest.mark.parametrize("declared", [True, False], ids=["wraps", "closure"])
def test_a_forward_that_changes_the_result(declared: bool, first: str) -> None:
    """Before the injection it changes the base, afterwards what the layer computes with its adapter."""
    case = CASES[0]
    x, base, adapted = case.input(), case.model(), case.adapted()
    model = adapted if first == "inject" else case.model()
    own = model.layer.forward
    doubled: Callable[[Tensor], Tensor] = lambda x: 2 * own(x)  # noqa: E731
    model.layer.forward = functools.wraps(own)(doubled) if declared else doubled
    if first == "assign":
        inject_lora(model, ["layer"], **case.settings)
        model.load_state_dict(adapted.state_dict())
        expected = base(x) + adapted(x)  # 2 base(x) and the update
    elif declared:
        with torch.no_grad():
            expected = 2 * case.adapted()(x)
    else:
        with pytest.raises(ValueError, match=r"calls the one that it replaced.*functools.wraps\(layer.forward\)"):
            model(x)
        return
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


def test_a_forward_that_replaces_the_layers_own_becomes_the_base_computation() -> None:
    model, x = CASES[0].adapted(), CASES[0].input()
    y, base = model(x), CASES[0].model()(x)
    model.layer.forward = lambda x: torch.zeros(4, 5, dtype=x.dtype)
    torch.testing.assert_close(model(x), y - base, rtol=1e-12, atol=1e-12)
    assert lora_plus.check_adapters(model, x) == ["layer"]
    with lora_plus.disabled(model):
        assert not model(x).any()


def test_adapters_follow_a_base_that_computes_on_another_device() -> None:
    model = CASES[0].adapted()
    model.layer.forward = lambda x: torch.empty(4, 5, dtype=x.dtype, device="meta")
    assert model(CASES[0].input()).is_meta


def test_forwards_from_before_and_after_that_could_not_be_told_apart_are_refused() -> None:
    model, x, before, after = CASES[0].model(), CASES[0].input(), Tool(), Tool()
    before.add(model)
    inject_lora(model, ["layer"], **CASES[0].settings)
    randomise(model)
    y = model(x)
    after.add(model)
    for take_out in (remove_lora, merge_and_unload):
        with pytest.raises(ValueError, match=r"'layer' cannot be restored: .* remove the later one first$"):
            take_out(model)
        assert torch.equal(model(x), y)
    before.calls = after.calls = 0
    model(x)
    assert (before.calls, after.calls) == (1, 1)
    after.remove(model)
    before.calls = after.calls = 0
    assert torch.equal(remove_lora(model)(x), CASES[0].model()(x)) and (before.calls, after.calls) == (1, 0)
