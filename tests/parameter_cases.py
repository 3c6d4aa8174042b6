"""The table of weights that are adapted as parameters or as blocks of rows, and what W + s B A is by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from cases import Conv1D, randomise
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lora_plus
from lora_plus.files import adapter_state_dict

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Around(nn.Module):
    """A model around one module."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(*args, **kwargs)


class Bare(nn.Module):
    """A product with a matrix that no layer owns."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix if x.shape[-1] == len(self.matrix) else x @ self.matrix.T


class Reader(nn.Module):
    """A module that reads the weight of its layer and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.l.weight, self.l.bias)


class Experts(nn.Module):
    """Two experts whose matrices are stacked as (expert, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 6, 4))
        self.down_proj = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("ti,eoi->eto", x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("eti,eoi->to", F.silu(gate) * up, self.down_proj)


class TransposedExperts(nn.Module):
    """Two experts whose matrices are stacked as (expert, in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 4, 6))
        self.down_proj = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("ti,eio->eto", x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("eti,eio->to", F.silu(gate) * up, self.down_proj)


class IndexedExperts(Experts):
    """The same as `Experts`, one expert after the other."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.stack([F.linear(x, each) for each in (self.gate_up_proj[0], self.gate_up_proj[1])]).chunk(
            2, -1
        )
        h = F.silu(gate) * up
        return sum(h[e] @ self.down_proj[e].T for e in range(2))


class BatchedExperts(TransposedExperts):
    """The same as `TransposedExperts`, all experts in one product."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.bmm(x.expand(2, -1, -1), self.gate_up_proj).chunk(2, dim=-1)
        return torch.bmm(self.down_proj.transpose(1, 2), (F.silu(gate) * up).mT).sum(0).T


class MarkedExperts(TransposedExperts):
    """The same, and it says so."""

    is_transposed = True


@dataclass(frozen=True)
class At:
    """Where the update of a place belongs: some rows of a tensor of the base, in the order of its axes."""

    key: str
    rows: tuple[int, int | None] = (0, None)
    order: str = "oi"
    """``"oi"`` or ``"io"`` (further axes belong to the inputs), ``"eoi"`` or ``"eio"`` (a stack)."""

    @property
    def stacked(self) -> bool:
        return self.order.startswith("e")

    @property
    def swapped(self) -> tuple[int, int] | None:
        """The axes of outputs and inputs, if they are the other way round."""
        return {"io": (0, 1), "eio": (1, 2)}.get(self.order)


class Source:
    """Draws inputs: numbers in the dtype asked for, indices, masks."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def indices(self, count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, generator=self.generator)


@dataclass(frozen=True, repr=False)
class ParameterCase:
    """One module with adapters on its parameters or on blocks of its rows."""

    name: str
    make: Callable[[], nn.Module]
    """The module; the model has it as ``part``."""
    inputs: Callable[[Source], Inputs]
    targets: Any
    places: Mapping[str, At]
    """The places that the targets must select, with what their updates change."""
    options: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.name

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `inject_lora` for this case."""
        return {"r": 2, "alpha": 3, **self.options}

    @property
    def dora(self) -> bool:
        return self.options.get("variant") == "dora"

    @property
    def blocks(self) -> bool:
        """Whether rows of a weight have adapters of their own."""
        return any(at.rows != (0, None) for at in self.places.values())

    @property
    def dense(self) -> bool:
        """Whether the weight is only read, so that the update is a matrix."""
        return "fused" not in self.options

    def model(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """The plain model."""
        torch.manual_seed(seed)
        return Around(self.make()).to(dtype)

    def frozen(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The plain model, frozen: torch chooses its kernels by what is trained."""
        return self.model(dtype).requires_grad_(False)

    def input(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> Inputs:
        return self.inputs(Source(dtype, seed))

    def inject(self, model: nn.Module, **changes: Any) -> nn.Module:
        return lora_plus.inject_lora(model, self.targets, **{**self.settings, **changes})

    def adapted(self, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
        """The model with an adapter whose B is not zero."""
        return randomise(self.inject(self.model(dtype), **changes))

    def run(self, model: nn.Module, inputs: Inputs | None = None) -> list[Tensor]:
        """All tensors that the model returns for the inputs."""
        args, kwargs = self.input() if inputs is None else inputs
        return tensors(model(*args, **kwargs))

    def explicit_weights(self, base: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W + s B A, or DoRA's, for each tensor of the base that has adapters.

        Args:
            base: the plain model's tensors by name.
            adapter: what `adapter_state_dict` returns.
        """
        factors = {"lora_A", "lora_B"} | ({"lora_magnitude"} if self.dora else set())
        assert set(adapter) == {f"{place}.{factor}" for place in self.places for factor in factors}
        weights: dict[str, Tensor] = {}
        for place, at in self.places.items():
            stored = weights.get(at.key, base[at.key])
            turned = stored.transpose(*at.swapped) if at.swapped else stored
            matrix = (turned if at.stacked else turned.flatten(1)).clone()
            A, B = adapter[f"{place}.lora_A"], adapter[f"{place}.lora_B"]
            rank = A.shape[-2] ** (0.5 if self.options.get("scaling") == "rslora" else 1)
            matrix[..., slice(*at.rows), :] += self.settings["alpha"] / rank * torch.einsum("...or,...ri->...oi", B, A)
            if self.dora:
                norm = matrix.detach().square().sum(-1).sqrt()
                matrix = matrix * (adapter[f"{place}.lora_magnitude"] / norm).unsqueeze(-1)
            matrix = matrix.reshape(turned.shape)
            weights[at.key] = matrix.transpose(*at.swapped) if at.swapped else matrix
        return weights

    def explicit(self, model: nn.Module, dtype: torch.dtype = torch.float64, adapter: str = "default") -> nn.Module:
        """A plain float64 model with the weights that the adapter of ``model``, of this dtype, shall give."""
        plain = self.model(dtype).double().train(model.training)
        state = {name: value.double() for name, value in adapter_state_dict(model, adapter=adapter).items()}
        plain.load_state_dict(self.explicit_weights(plain.state_dict(), state), strict=False)
        return plain


def tensors(output: Any) -> list[Tensor]:
    """The tensors in whatever a module returned."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def loss(output: list[Tensor]) -> Tensor:
    """A number that depends on every element of the output."""
    return torch.stack([(leaf.double() - 0.5).square().sum() for leaf in output]).sum()


def double(inputs: Inputs) -> Inputs:
    """The same inputs in float64."""
    return pytree.tree_map(  # type: ignore[no-any-return]
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, inputs
    )


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def assert_close(one: list[Tensor], other: list[Tensor], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two outputs, in float64."""
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(one, other, strict=True))


# ---- the table -------------------------------------------------------------------------------------------------------


def _attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(4, 2, **options)


def _self(*shape: int, **kwargs: Any) -> Callable[[Source], Inputs]:
    def inputs(source: Source) -> Inputs:
        x = source.floats(*shape)
        return (x, x, x), kwargs

    return inputs


def _cross(source: Source) -> Inputs:
    return (source.floats(3, 2, 4), source.floats(5, 2, 3), source.floats(5, 2, 6)), {}


def _one(*shape: int) -> Callable[[Source], Inputs]:
    return lambda source: ((source.floats(*shape),), {})


def _pair(*widths: int) -> Callable[[Source], Inputs]:
    return lambda source: (tuple(source.floats(2, width) for width in widths), {})


def _bag(source: Source) -> Inputs:
    return (source.indices(7, 3, 4),), {}


def _offsets(source: Source) -> Inputs:
    return (source.indices(7, 6), torch.tensor([0, 2, 3])), {}


def _weighted(source: Source) -> Inputs:
    return (source.indices(7, 3, 4),), {"per_sample_weights": source.floats(3, 4)}


def _whole(*names: str, order: str = "oi") -> dict[str, At]:
    return {f"part.{name}": At(f"part.{name}", order=order) for name in names}


def _blocks(order: str = "oi", **rows: tuple[int, int]) -> dict[str, At]:
    return {f"part.{name}": At("part.weight", chosen, order) for name, chosen in rows.items()}


Q, K, V = ({f"part.{name}": At("part.in_proj_weight", (4 * i, 4 * i + 4))} for i, name in enumerate("qkv"))
OUT = {"part.out_proj": At("part.out_proj.weight")}
ALL = {**Q, **K, **V, **OUT}
CROSS = {f"part.{name}": At(f"part.{name}_proj_weight") for name in "qkv"}
MASKS = {"attn_mask": torch.ones(3, 3, dtype=torch.bool).triu(1), "is_causal": False}
PADDING = {"key_padding_mask": torch.tensor([[False, False, False], [False, False, True]])}
LSTM = [f"weight_{kind}_l{layer}{way}" for layer in (0, 1) for way in ("", "_reverse") for kind in ("ih", "hh", "hr")]
CELL = ("weight_ih", "weight_hh")
FUSED = {"fused": {"part": {"q": 6, "k": 2, "v": 4}}}
ROWS = {"q": (0, 6), "k": (6, 8), "v": (8, 12)}
EXPERTS = ["gate_up_proj", "down_proj"]
TRANSPOSED = {"layouts": {"*_proj": "e i o -> e o i"}}
DORA = {"variant": "dora"}

PARAMETER_CASES = [
    ParameterCase("attention", _attention(), _self(3, 2, 4), ["part"], ALL),
    ParameterCase("attention-type", _attention(batch_first=True), _self(2, 3, 4), nn.MultiheadAttention, ALL),
    ParameterCase("attention-all-linear", _attention(batch_first=True), _self(2, 3, 4, **PADDING), "all-linear", ALL),
    ParameterCase("attention-q-v", _attention(batch_first=True), _self(2, 3, 4), ["part.q", "part.v"], {**Q, **V},
                  {"rank_pattern": {"part.v": 1}}),
    ParameterCase("attention-out", _attention(), _self(3, 2, 4, need_weights=False), ["part.out"], OUT),
    ParameterCase("attention-in-proj", _attention(batch_first=True), _self(2, 3, 4, **MASKS), ["part.in_proj"],
                  {**Q, **K, **V}),
    ParameterCase("attention-k-rslora", _attention(), _self(3, 4), ["part.k"], K, {"scaling": "rslora"}),
    ParameterCase("attention-widths", _attention(kdim=3, vdim=6), _cross, ["part"], {**CROSS, **OUT}),
    ParameterCase("attention-no-bias", _attention(bias=False, batch_first=True), _self(2, 3, 4, need_weights=False),
                  ["part"], ALL),
    ParameterCase("attention-bias-kv", _attention(add_bias_kv=True, add_zero_attn=True), _self(3, 2, 4), ["part"], ALL),
    ParameterCase("attention-masks", _attention(batch_first=True),
                  _self(2, 3, 4, **MASKS, **PADDING, average_attn_weights=False), ["part"], ALL),
    ParameterCase("attention-out-dora", _attention(), _self(3, 2, 4), ["part.out_proj"], OUT, DORA),
    ParameterCase("lstm", lambda: nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2), _one(3, 2, 3), [nn.LSTM],
                  _whole(*LSTM), {"r": 1}),
    ParameterCase("lstm-one-matrix", lambda: nn.LSTM(3, 4, batch_first=True), _one(2, 5, 3), ["part.weight_ih_l0"],
                  _whole("weight_ih_l0")),
    ParameterCase("gru", lambda: nn.GRU(3, 4), _one(5, 2, 3), ["part"], _whole("weight_ih_l0", "weight_hh_l0")),
    ParameterCase("rnn", lambda: nn.RNN(3, 4, bias=False), _one(5, 3), ["part"],
                  _whole("weight_ih_l0", "weight_hh_l0")),
    ParameterCase("lstm-cell", lambda: nn.LSTMCell(3, 4),
                  lambda s: ((s.floats(2, 3), (s.floats(2, 4), s.floats(2, 4))), {}), ["part"], _whole(*CELL)),
    ParameterCase("gru-cell", lambda: nn.GRUCell(3, 4), _pair(3, 4), [nn.GRUCell], _whole(*CELL)),
    ParameterCase("rnn-cell", lambda: nn.RNNCell(3, 4), _pair(3, 4), [nn.RNNCellBase], _whole(*CELL)),
    ParameterCase("bag-sum", lambda: nn.EmbeddingBag(7, 4, mode="sum"), _bag, ["part"], _whole("weight", order="io")),
    ParameterCase("bag-mean", lambda: nn.EmbeddingBag(7, 4, padding_idx=2), _offsets, ["part"],
                  _whole("weight", order="io")),
    ParameterCase("bag-max", lambda: nn.EmbeddingBag(7, 4, mode="max"), _bag, ["part"], _whole("weight", order="io")),
    ParameterCase("bag-weights", lambda: nn.EmbeddingBag(7, 4, mode="sum"), _weighted, ["part.weight"],
                  _whole("weight", order="io")),
    ParameterCase("bilinear", lambda: nn.Bilinear(3, 4, 5), _pair(3, 4), ["part"], _whole("weight")),
    ParameterCase("experts", Experts, _one(3, 4), EXPERTS, _whole(*EXPERTS, order="eoi")),
    ParameterCase("experts-indexed", IndexedExperts, _one(3, 4), EXPERTS, _whole(*EXPERTS, order="eoi")),
    ParameterCase("experts-batched", BatchedExperts, _one(3, 4), EXPERTS, _whole(*EXPERTS, order="eio"), TRANSPOSED),
    ParameterCase("experts-one-dora", Experts, _one(3, 4), ["gate_up_proj"], _whole("gate_up_proj", order="eoi"), DORA),
    ParameterCase("experts-layouts", TransposedExperts, _one(3, 4), EXPERTS, _whole(*EXPERTS, order="eio"),
                  TRANSPOSED),
    ParameterCase("experts-marked", MarkedExperts, _one(3, 4), EXPERTS, _whole(*EXPERTS, order="eio")),
    ParameterCase("bare", lambda: Bare(5, 6), _one(4, 6), ["matrix"], _whole("matrix")),
    ParameterCase("bare-transposed", lambda: Bare(6, 5), _one(2, 4, 6), ["part.matrix"], _whole("matrix", order="io"),
                  {"layouts": {"matrix": "i o -> o i"}}),
    ParameterCase("bare-dora", lambda: Bare(5, 6), _one(4, 6), ["matrix"], _whole("matrix"), DORA),
    ParameterCase("bare-rslora", lambda: Bare(5, 6), _one(6), ["matrix"], _whole("matrix"),
                  {"scaling": "rslora", "r": 4}),
    ParameterCase("reader", Reader, _one(4, 6), ["l.weight"], _whole("l.weight")),
    ParameterCase("fused-linear", lambda: nn.Linear(6, 12), _one(4, 6), ["part.q", "part.v"],
                  _blocks(q=ROWS["q"], v=ROWS["v"]), {**FUSED, "rank_pattern": {"part.v": 1}}),
    ParameterCase("fused-linear-all", lambda: nn.Linear(6, 12, bias=False), _one(2, 4, 6), ["part"], _blocks(**ROWS),
                  FUSED),
    ParameterCase("fused-conv1d-gpt2", lambda: Conv1D(12, 6), _one(2, 4, 6), ["part.k", "part.v"],
                  _blocks("io", k=(4, 8), v=(8, 12)), {"fused": {"part": ["q", "k", "v"]}}),
    ParameterCase("fused-conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1), _one(2, 4, 5), ["part.b"],
                  _blocks(b=(3, 6)), {"fused": {"part": ["a", "b"]}}),
]  # fmt: skip
