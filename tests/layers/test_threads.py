"""Any number of threads may run a model: a forward changes nothing on a module, and calls share nothing."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, randomise
from parameter_cases import PARAMETER_CASES, Bare, ParameterCase, assert_close, loss, tensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_plus
from lora_plus import inject_lora

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

Result = Any
SECONDS = 20
"""After which a thread that waits for another one fails."""


def at_once(*calls: Callable[[], Result]) -> list[Result]:
    """What these calls return, each in a thread of its own."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


class Noted(TorchDispatchMode):
    """Notes the attributes of a model's modules at each operation; `states` has each state that was seen, once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.states = model, [self.state(model)]

    @staticmethod
    def state(model: nn.Module) -> list[Any]:
        held = [part for m in model.modules() for part in (m.__dict__, m._parameters, m._buffers, m._modules)]
        return [{name: id(value) for name, value in part.items()} for part in held]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        state = self.state(self.model)
        if state != self.states[-1]:
            self.states.append(state)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("case", [*CASES, *PARAMETER_CASES], ids=lambda case: case.name)
def test_a_forward_changes_no_attribute_of_a_module(case: Case | ParameterCase, merge: bool) -> None:
    model = case.adapted().eval()
    if merge:
        lora_plus.merge_lora(model)
    bits = [tensor.detach().clone() for tensor in model.state_dict().values()]
    run = functools.partial(case.run if isinstance(case, ParameterCase) else lambda each: each(case.input()), model)
    run()  # torch's recurrent layers note once which weights they have
    with Noted(model) as noted:
        run()
    assert len(noted.states) == 1 and Noted.state(model) == noted.states[0]
    assert all(map(torch.equal, model.state_dict().values(), bits))


@pytest.mark.parametrize("merge", [False, True])
def test_an_embedding_with_a_norm_runs_in_two_threads(monkeypatch: pytest.MonkeyPatch, merge: bool) -> None:
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0)).double()
    randomise(inject_lora(model, ["0"], r=2), size=2.0).eval()
    if merge:
        lora_plus.merge_lora(model)
    x, bits = torch.arange(9), model[0].weight.detach().clone()
    wanted = model(x)
    assert torch.allclose(wanted.norm(dim=-1).max(), torch.ones((), dtype=torch.float64))
    inside, done, embedding = threading.Event(), threading.Event(), F.embedding

    def first() -> Tensor:
        return model(x)

    def second() -> Tensor:
        assert inside.wait(SECONDS)
        try:
            return model(x)
        finally:
            done.set()

    def waiting(*args: Any, **kwargs: Any) -> Tensor:
        if not inside.is_set():
            inside.set()
            assert done.wait(SECONDS)
        return embedding(*args, **kwargs)

    monkeypatch.setattr(F, "embedding", waiting)
    for output in at_once(first, second):
        assert torch.equal(output, wanted)
    assert torch.equal(model[0].weight, bits) and model[0].max_norm == 1.0


def overlapping(part: nn.Module, run: Callable[[], Result]) -> list[Result]:
    """What two threads get, of which the first enters the module before the second, and leaves it before it, too."""
    entered, second_entered, left = threading.Event(), threading.Event(), threading.Event()

    def enter(module: nn.Module, args: Any) -> None:
        if not entered.is_set():
            entered.set()
            assert second_entered.wait(SECONDS)
        else:
            second_entered.set()
            assert left.wait(SECONDS)

    def first() -> Result:
        result = run()
        left.set()
        return result

    def second() -> Result:
        assert entered.wait(SECONDS)
        return run()

    with part.register_forward_pre_hook(enter):
        return at_once(first, second)


class Between(nn.Module):
    """A module whose part is read outside of the part's own calls, as torch's encoder layers read their attention."""

    def __init__(self, part: nn.Module, name: str) -> None:
        super().__init__()
        self.part, self.name = part, name

    def forward(self, x: Tensor) -> Tensor:
        return x @ getattr(self.part, self.name)[:4].T


@pytest.mark.parametrize(
    ("make", "name"), [(lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"), (lambda: nn.LSTM(4, 4), "weight_hh_l0")]
)
def test_what_a_call_has_read_ends_with_it(make: Callable[[], nn.Module], name: str) -> None:
    model = Between(make().double(), name).eval()
    randomise(inject_lora(model, type(model.part), r=2))
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    inputs = (x,) if isinstance(model.part, nn.LSTM) else (x, x, x)
    wanted = tensors(model.part(*inputs))
    for output in overlapping(model.part, lambda: tensors(model.part(*inputs))):
        assert all(map(torch.equal, output, wanted))
    with torch.no_grad():
        model(x)
        randomise(model, seed=3)
        plain = lora_plus.merge_and_unload(copy.deepcopy(model))
        assert_close([model(x)], [plain(x)])
        assert_close(tensors(model.part(*inputs)), tensors(plain.part(*inputs)))


class Nested(nn.Module):
    """A module that reads its matrix around a call of another one, which has a matrix too."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.inner = Bare(4, 4)
        self.read: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.read = [self.matrix]
        y = self.inner(x) @ self.matrix
        self.read.append(self.matrix)
        return y


def test_a_call_reads_one_tensor_also_around_another_call() -> None:
    model = randomise(inject_lora(Nested(), ["matrix", "inner.matrix"], r=2))
    model(torch.randn(3, 4)).sum().backward()
    assert model.read[0] is model.read[1] and model.matrix is not model.read[0]


class Meeting(nn.LSTM):
    """An LSTM whose calls in two threads meet after they have found their weights and before they compute."""

    def check_forward_args(self, *args: Any) -> None:
        super().check_forward_args(*args)
        if threading.current_thread() is not threading.main_thread():
            MEETING.wait(SECONDS)


MEETING = threading.Barrier(2)


@pytest.mark.parametrize("targets", [["weight_ih_l0"], [nn.LSTM]], ids=str)
def test_two_threads_train_a_recurrent_layer(targets: list[Any]) -> None:
    model = randomise(inject_lora(Meeting(3, 4, 2).double(), targets, r=2))
    inputs = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(tensors(model(x))), trained)

    wanted = [gradients(x) for x in inputs]
    found = at_once(*[lambda x=x: gradients(x) for x in inputs])  # type: ignore[misc]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", PARAMETER_CASES, ids=lambda case: case.name)
def test_a_copy_made_in_a_call_keeps_nothing_of_it(case: ParameterCase) -> None:
    model, copies = case.adapted().eval(), []
    with torch.no_grad():
        hook = model.part.register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
        case.run(model)
    hook.remove()
    (twin,) = copies
    for each in (model, twin):
        randomise(each, seed=3)
        each.part._forward_hooks.clear()
    for one, other in zip(case.run(twin), case.run(model), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        for name in getattr(model.part, "adapted_names", ()):
            assert torch.equal(getattr(twin.part, name), getattr(model.part, name))
