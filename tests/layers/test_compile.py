"""What adapters cost under ``torch.compile``: the number of graphs, never a graph break, and what a graph holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import CASES, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize("name", ["own-linear", "embedding-max-norm"])
def test_the_first_calls_of_a_thread_are_the_compiled_ones(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model, x = case.adapted(), case.input()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with ThreadPoolExecutor(1) as fresh:
        for _ in range(3):
            y = fresh.submit(compiled, x).result()
    torch.testing.assert_close(y, model(x), rtol=1e-12, atol=1e-12)


# ---- what the graphs hold --------------------------------------------------------------------------------------------

ROWS, IN, OUT, R = 40, 12, 20, 3


class Pasted(nn.Module):
    """What is pasted into projects, for comparison."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(R, IN)), nn.Parameter(torch.randn(OUT, R))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + (x @ self.A.to(x.dtype).T @ self.B.to(x.dtype).T) * 2.0
        return y


def held(model: nn.Module, dtype: torch.dtype) -> list[tuple[str, tuple[int, ...]]]:
    """The operations in the forward and the backward graph of a step, each with the shape of its result."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    operations: list[tuple[str, tuple[int, ...]]] = []

    def note(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            if node.op == "call_function":
                operations.append((node.target._opname, tuple(node.meta["val"].shape)))
        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]

    backend = aot_autograd(fw_compiler=note, decompositions=select_decomp_table())
    x = torch.randn(2, ROWS // 2, IN, dtype=dtype, requires_grad=True)
    torch.compile(model, backend=backend, fullgraph=True)(x).square().sum().backward()
    return operations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_holds_what_a_pasted_wrapper_needs_and_the_rank_leads_in_its_products(dtype: torch.dtype) -> None:
    ours = held(inject_lora(nn.Linear(IN, OUT, dtype=dtype), "all-linear", r=R, alpha=2 * R), dtype)
    pasted = held(Pasted(nn.Linear(IN, OUT, dtype=dtype)), dtype)
    products = [shape for name, shape in ours if name in ("mm", "addmm")]
    assert len(products) == sum(name in ("mm", "addmm") for name, _ in pasted)
    # A x and its gradient, the gradients of A and B; with and without the adapter: the output, the input's gradient
    assert Counter(products) == {(R, ROWS): 2, (R, IN): 1, (R, OUT): 1, (ROWS, OUT): 2, (ROWS, IN): 2}

    def large(operations: list[tuple[str, tuple[int, ...]]]) -> int:
        others = [shape for name, shape in operations if name not in ("mm", "addmm", "view", "permute", "t")]
        return sum(torch.Size(shape).numel() >= ROWS * IN for shape in others)

    assert large(ours) < large(pasted)  # scaling is done to B, and nothing of an activation's size is copied


# ---- values ----------------------------------------------------------------------------------------------------------


def step(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output of a step, and the gradients of the input and the adapters."""
    x = x.clone().requires_grad_()
    y = run(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *trained])]


def assert_same_step(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(step(run, model, x), step(model, model, x), rtol=1e-12, atol=1e-12)


def adapted(*names: str) -> nn.Module:
    """With these of the adapters "a" and "b", all of which are trained."""
    model = Compiled().model
    lora_plus.set_adapter(model, list(names))
    for layer in (model[0], model[2]):
        for name, adapter in layer.lora_adapters.items():
            adapter.set_trainable(name in names)
    return model


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, 6, dtype=torch.float64)


@pytest.mark.parametrize("names", ["a", "ab"])
def test_gradients_are_right_at_every_length_without_another_graph(names: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model, counter = adapted(*names), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 3, 8):
        assert_same_step(compiled, model, draw(2, length))
        assert counter.frame_count == 1


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (2, 1, 3)], ids=str)
def test_any_shape_of_input(shape: tuple[int, ...]) -> None:
    model = adapted("a")
    assert_same_step(torch.compile(model, backend="aot_eager", fullgraph=True), model, draw(*shape))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["of the compiled model", "inside of it"])
def test_activation_checkpointing(inside: bool, use_reentrant: bool) -> None:
    model = adapted("a")

    def within(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(run, x, use_reentrant=use_reentrant)

    def compiled(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.compile(run, backend="aot_eager", fullgraph=True)

    run = compiled(within(model)) if inside else within(compiled(model))
    x, trained = draw(3).requires_grad_(), [p for p in model.parameters() if p.requires_grad]
    run(x).square().sum().backward()  # the reentrant form has no torch.autograd.grad
    torch.testing.assert_close([x.grad, *(p.grad for p in trained)], step(model, model, x.detach())[1:])


def test_autocast() -> None:
    model = adapted("a").float()
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        got = step(torch.compile(model, backend="aot_eager", fullgraph=True), model, x)
        assert got[0].dtype is torch.bfloat16 and got[1].dtype is torch.float32
    for tensor, wanted in zip(got, step(model, model, x), strict=True):
        assert (tensor - wanted).norm() < 0.02 * wanted.norm()


def test_gradients_of_each_sample() -> None:
    model, x = adapted("a"), draw(3)
    each = torch.func.vmap(torch.func.grad(lambda row: model(row).square().sum()))
    torch.testing.assert_close(torch.compile(each, backend="aot_eager")(x), each(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_a_free_length(strict: bool) -> None:
    model = adapted("a")
    free = {"input": {0: torch.export.Dim("length")}}
    exported = torch.export.export(model, (draw(3),), dynamic_shapes=free, strict=strict).module()
    for length in (3, 5):
        x = draw(length)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-12, atol=1e-12)
