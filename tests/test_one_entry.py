"""What is new is one entry in one table: each is made here, outside of the package, and lives through everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_plus
from lora_plus.files import FORMATS, Contents, Files, Format, SavedAdapter, SavedLayer, Target
from lora_plus.layers import LoRALayer, adapts
from lora_plus.layers.kinds import KINDS
from lora_plus.layers.quantized import STORES, Store
from lora_plus.layers.weight import AdaptedWeight
from lora_plus.model import dense_reads
from lora_plus.model.storage import FINDERS, Storage
from lora_plus.model.tree import Tree
from lora_plus.tensors.init import INITS
from lora_plus.tensors.matrix import add_delta
from lora_plus.tensors.variant import SCALINGS, VARIANTS, AdapterSpec, HasFactors, HasWeight, LoRA, TensorSpec
from lora_plus.tensors.weight_sum import OPERATIONS


class Net(nn.Module):
    """Two layers, one of which gets the adapter."""

    def __init__(self, q: Callable[[], nn.Module] = lambda: nn.Linear(4, 4)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.out = q(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.q(x).tanh())
        return y


def live(
    path: Path, build: Callable[[], nn.Module] = Net, format: Any = None, dequantize: bool = False, **options: Any
) -> nn.Module:
    """Inject, train, save, load, merge and remove; the trained model is returned."""
    x, model = torch.linspace(-1, 1, 12).reshape(3, 4), build()
    before = model(x)
    keys, kind = list(model.state_dict()), type(model.q)
    lora_plus.inject_lora(model, ["q"], r=2, **options)
    start = model(x)
    optimizer = lora_plus.create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    trained = model(x)
    assert not torch.allclose(trained, start, atol=1e-4)
    lora_plus.save_adapter(model, path, format=format)
    torch.testing.assert_close(lora_plus.load_adapter(build(), path)(x), trained)
    if not dequantize:
        with lora_plus.merged(model), torch.no_grad():
            torch.testing.assert_close(model(x), trained)
    torch.testing.assert_close(
        lora_plus.merge_and_unload(lora_plus.load_adapter(build(), path), dequantize=dequantize)(x), trained
    )
    plain = lora_plus.remove_lora(lora_plus.load_adapter(build(), path))
    assert torch.equal(plain(x), before) and list(plain.state_dict()) == keys and type(plain.q) is kind
    return model


def test_a_kind_of_layer(tmp_path: Path) -> None:
    class Outer(nn.Module):
        """``x W`` with a weight ``(in, out)``."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    @adapts(Outer)
    class LoRAOuter(LoRALayer):
        layout = "i o -> o i"

        def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, shape: torch.Size) -> Tensor:
            return x @ A.T @ B.T * scale

    try:
        assert isinstance(live(tmp_path / "a.safetensors", lambda: Net(Outer)).q, LoRAOuter)
    finally:
        del KINDS[Outer]


def test_an_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(weight: Tensor, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        return weight.new_ones(r, weight.shape[1]), weight.new_zeros(weight.shape[0], r)

    monkeypatch.setitem(INITS, "ones", ones)
    model = lora_plus.inject_lora(Net(), ["q"], r=2, init="ones")  # type: ignore[arg-type]
    assert bool((model.q.lora_A["default"] == 1).all())
    live(tmp_path / "a.safetensors", init="ones")


def test_a_variant_with_a_tensor_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gain(LoRA):
        """``W + s diag(gain) B A``."""

        tensors = (TensorSpec("lora_gain", ("out",), role="gain", group="gain", decays=False),)

        def extra(self, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> dict[str, Tensor]:
            return {"lora_gain": B.new_ones(B.shape[:-1])}

        def join(self, layer: HasWeight, adapter: HasFactors, x: Tensor, y: Tensor, update: Tensor) -> Tensor:
            return y + layer.per_channel(adapter.tensors()["lora_gain"]) * update

        def merge(self, weight: Tensor, A: Tensor, B: Tensor, scale: float, tensors: Mapping[str, Tensor]) -> Tensor:
            return add_delta(weight, A, tensors["lora_gain"].unsqueeze(-1) * B, scale)

    monkeypatch.setitem(VARIANTS, "gain", Gain())
    model = live(tmp_path / "a.safetensors", variant="gain")
    assert not torch.equal(model.q.lora_gain["default"], torch.ones(4))
    assert "lora_gain" in {group["name"] for group in lora_plus.loraplus_param_groups(model, lr=1e-3)}


def test_a_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALINGS, "flat", lambda alpha, r: alpha)
    model = live(tmp_path / "a.safetensors", scaling="flat", alpha=0.5)
    assert model.q.lora_adapters["default"].scale == 0.5


def test_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(files: Files, target: Target, problems: list[str]) -> SavedAdapter:
        layers = {}
        for name, delta in files[""].tensors.items():
            base = target.base(name)
            assert base is not None
            spec, tensors = AdapterSpec(4, 4), {"lora_A": torch.eye(4), "lora_B": delta + 0}
            layers[name] = SavedLayer(base, spec, tensors)
        return SavedAdapter(layers, {})

    def write(adapter: SavedAdapter, target: Target, problems: list[str]) -> Files:
        deltas = {
            name: layer.spec.scale * layer.tensors["lora_B"] @ layer.tensors["lora_A"]
            for name, layer in adapter.layers.items()
        }
        return {"": Contents(deltas, {"is": "deltas"})}

    deltas = Format("deltas", "W - W0", read, write, lambda contents: contents.metadata.get("is") == "deltas")
    monkeypatch.setitem(FORMATS, "deltas", deltas)
    live(tmp_path / "a.safetensors", format="deltas")


def test_a_quantized_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tenths(nn.Parameter):
        """Integers that count tenths."""

    class TenthsLinear(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.requires_grad_(False)
            self.weight = Tenths((self.weight * 10).round().to(torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.as_subclass(Tensor) / 10, self.bias)

    def dense(layer: Any) -> Tensor:
        numbers: Tensor = layer.weight.as_subclass(Tensor) / 10
        return numbers

    monkeypatch.setitem(STORES, "tenths", Store(lambda weight: isinstance(weight, Tenths), dense, ()))
    live(tmp_path / "a.safetensors", lambda: Net(TenthsLinear), dequantize=True)


def test_the_storage_of_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Offloaded(Storage):
        """Of an engine that puts the values of a parameter aside wherever no forward needs them."""

        engine = "an offloader"

        @contextmanager
        def gathered(self, tensors: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
            offloaded: list[Any] = [tensor for tensor in tensors if hasattr(tensor, "aside")]
            for tensor in offloaded:
                tensor.data.copy_(tensor.aside)
            yield
            for tensor in offloaded:
                tensor.aside.copy_(tensor.data)
                tensor.data.fill_(torch.nan)

        @contextmanager
        def exposed(self, weight: AdaptedWeight) -> Iterator[None]:
            with self.gathered([weight.own_weight()]):
                yield

    class Layer(nn.Linear):
        """One that the engine has taken over."""

        def __init__(self) -> None:
            super().__init__(4, 4)
            weight: Any = self.weight
            weight.aside = self.weight.detach().clone()
            self.weight.data.fill_(torch.nan)
            self.register_forward_pre_hook(lambda layer, inputs: fetch(layer.weight))
            self.register_forward_hook(lambda layer, inputs, output: release(layer.weight))

    def fetch(weight: Any) -> None:
        weight.data.copy_(getattr(weight, "aside", weight.data))

    def release(weight: Any) -> None:
        if hasattr(weight, "aside"):
            weight.data.fill_(torch.nan)

    def find(tree: Tree) -> Storage | None:
        return Offloaded() if any(hasattr(parameter, "aside") for parameter in tree.parameters()) else None

    monkeypatch.setattr("lora_plus.model.storage.FINDERS", {"torch": find, **FINDERS})
    live(tmp_path / "a.safetensors", lambda: Net(Layer), init="pissa")


def test_an_operation_that_needs_no_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(9, 4))

        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, self.rows)

    def embedding(func: Any, args: Any, kwargs: Any) -> Tensor:
        ids, weight = args[:2]
        rows = func(ids, weight.base, *args[2:], **kwargs)
        return rows + sum(scale * func(ids, left) @ right for left, right, scale in weight.terms)

    model, ids = lora_plus.inject_lora(Table(), ["rows"], r=2, init="orthogonal"), torch.tensor([[0, 3], [8, 8]])
    for adapter in model.lora_parameters.rows.lora_adapters.values():
        nn.init.normal_(adapter.tensors()["lora_B"])
    wanted = model(ids)
    assert dense_reads(model, ids) == {"rows": ["torch.nn.functional.embedding"]}
    monkeypatch.setitem(OPERATIONS, F.embedding, embedding)
    assert dense_reads(model, ids) == {}
    torch.testing.assert_close(model(ids), wanted)
