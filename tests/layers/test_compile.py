"""What switching adapters costs under ``torch.compile``: the number of graphs, and never a graph break."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import randomise
from torch import nn

import lora_plus
from lora_plus import inject_lora


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """A compiled model with adapters "a" and "b" of one shape, its eager twin, and a count of graphs."""

    def __init__(self, **settings: object) -> None:
        from torch._dynamo.testing import CompileCounter

        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)).double()
        for name in "ab":
            inject_lora(self.model, "all-linear", r=2, adapter=name, **settings)
        lora_plus.set_adapter(self.model, "a")
        randomise(self.model)
        self.counter = CompileCounter()
        self.compiled = torch.compile(self.model, backend=self.counter, fullgraph=True)

    def graphs(self) -> int:
        """How many graphs one more call compiles; what it computes is compared with the eager model."""
        before = self.counter.frame_count
        x = torch.randn(3, 6, dtype=torch.float64)
        torch.testing.assert_close(self.compiled(x), self.model(x), rtol=1e-12, atol=1e-12)
        return self.counter.frame_count - before


def test_each_state_costs_one_graph_once() -> None:
    run = Compiled()
    assert run.graphs() == 1
    assert run.graphs() == 0

    def disabled() -> int:
        with lora_plus.disabled(run.model):
            return run.graphs()

    def switched(*names: str) -> int:
        lora_plus.set_adapter(run.model, list(names))
        return run.graphs()

    def merged() -> int:
        with lora_plus.merged(run.model.eval()):
            return run.graphs()

    assert [disabled(), run.graphs(), disabled()] == [1, 0, 0]
    assert [switched("b"), switched("a"), switched("b")] == [1, 0, 0]
    assert [switched("a", "b"), switched("a"), switched("a", "b")] == [1, 0, 0]
    assert [merged(), run.graphs(), merged()] == [1, 0, 0]
    switched("b")
    assert merged() == 0  # a merged model computes what any other does


def test_training_and_evaluation_share_a_graph_without_dropout() -> None:
    run = Compiled()
    assert run.graphs() == 1
    run.model.eval()
    assert run.graphs() == 0


def test_training_with_dropout_and_evaluation_are_two_graphs() -> None:
    run = Compiled(dropout=0.5)
    run.model.eval()
    assert run.graphs() == 1
    run.compiled.train()
    run.compiled(torch.randn(3, 6, dtype=torch.float64))
    assert run.counter.frame_count == 2


def test_another_adapter_of_the_same_shape_loaded_in_place_costs_no_graph() -> None:
    run = Compiled()
    run.graphs()
    state = {name: torch.randn_like(value) for name, value in run.model.state_dict().items() if name.endswith(".a")}
    run.model.load_state_dict(state, strict=False)
    assert run.graphs() == 0


def test_shapes_and_scales_can_be_dynamic() -> None:
    run = Compiled()
    run.compiled = torch.compile(run.model, backend=run.counter, fullgraph=True, dynamic=True)
    assert run.graphs() == 1
    for length in (5, 3):
        x = torch.randn(2, length, 6, dtype=torch.float64)
        torch.testing.assert_close(run.compiled(x), run.model(x), rtol=1e-12, atol=1e-12)
    assert run.counter.frame_count == 2  # another number of dimensions; lengths are free


def test_training_a_compiled_model_costs_one_graph() -> None:
    run = Compiled()
    lora_plus.set_adapter(run.model, "b")  # the last one added is the trainable one
    optimizer = lora_plus.create_loraplus_optimizer(run.model, torch.optim.AdamW, lr=1e-2)
    for _ in range(3):
        run.compiled(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert run.counter.frame_count == 1
