"""Tensor parallelism: styles that cut layers together with their adapters, for plans of ``parallelize_module``.

Adapters come first, then the plan, then the optimizer::

    inject_lora(model, ["q", "k", "v", "o", "up", "down"])
    column, row = ColwiseLoRA(), RowwiseLoRA()
    plan = {f"blocks.*.{name}": column for name in ("q", "k", "v", "up")}
    parallelize_module(model, mesh["tp"], plan | {f"blocks.*.{name}": row for name in ("o", "down")})
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4)

An adapter on a layer outside the plan is computed whole by every rank, and nothing makes its start the same on all of
them: give `inject_lora` a ``generator`` of the same seed on every rank.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from lora_plus.layers.kinds import lora_class
from lora_plus.layers.layer import LoRALayer
from lora_plus.model.tied import SharedAdapter
from lora_plus.tensors.variant import VARIANTS, known_tensors

_OUT, _IN = 0, 1
"""The dimensions of a weight's matrix view."""

_AXES: dict[str, int | None] = {"out": _OUT, "in": _IN, "r": None}
"""By what a dimension of an adapter's tensor lies along: the dimension of the matrix view."""


class _MatrixCut(ParallelStyle):
    """A layer whose weight is a matrix, cut along one dimension of that."""

    cut: ClassVar[int]
    """The dimension of the matrix view of which each rank has a part."""
    output: ClassVar[Placement]
    """How the output lies on the mesh unless the style is told otherwise."""

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts, self.output_layouts = input_layouts, output_layouts or self.output
        self.use_local_output = use_local_output

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        kind = self._kind_of(module, device_mesh)
        # the input of an embedding is indices, of which every rank needs all
        needed = Shard(-1) if self.cut == _IN and kind.linear_low_rank else Replicate()
        given = self.input_layouts or needed
        stored, matrix = (side.split() for side in kind.layout.split(" -> "))
        # by parameter, or container of an adapter's tensors: the dimension of the matrix view that each of its own is
        lies_along = {name: tuple(_AXES[axis] for axis in tensor.axes) for name, tensor in known_tensors().items()}
        lies_along |= {"bias": (_OUT,), "weight": tuple(matrix.index(axis) for axis in stored)}

        def distribute(path: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for name, parameter in part._parameters.items():
                dimensions = lies_along.get(path.rpartition(".")[2] or name, ())
                placement = Shard(dimensions.index(self.cut)) if self.cut in dimensions else Replicate()
                if parameter is not None:
                    part._parameters[name] = self._distributed(parameter, mesh, placement)

        def enter(layer: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            x, *others = inputs
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, mesh, (given,), run_check=False)
            return _laid(x, needed), *others

        def leave(layer: nn.Module, y: DTensor, mesh: DeviceMesh) -> Tensor:
            y = _laid(y, self.output_layouts)
            return y.to_local() if self.use_local_output else y

        return distribute_module(module, device_mesh, distribute, enter, leave)  # type: ignore[arg-type]

    def _kind_of(self, module: nn.Module, mesh: DeviceMesh) -> type[LoRALayer]:
        """The kind of LoRA layer that a layer is, or would become.

        Raises:
            TypeError: if the layer has no weight that is a matrix and stored as one.
            ValueError: if it is in a state, or has an adapter, with which it cannot be cut.
        """
        subject, kind = f"{type(self).__name__} cannot shard a {type(module).__name__}", lora_class(module)
        if kind is None or len(kind.layout.split(" -> ")[0].split()) != 2:
            raise TypeError(f"{subject}, only linear layers and embeddings")
        if kind.stored_quantized or module._parameters.get("weight") is None:
            raise TypeError(f"{subject} whose weight is quantized or computed (parametrized, pruned)")
        if not isinstance(module, LoRALayer):
            return kind
        if module.lora_merge is not None:
            raise ValueError(f"{subject} that is merged; call unmerge_lora(model) first")
        adapters = [adapter for site in module.adapter_sites() for adapter in site.lora_adapters.values()]
        if any(isinstance(adapter, SharedAdapter) or not adapter.held for adapter in adapters):
            raise ValueError(f"{subject} that has one adapter with another layer; inject with tied='named'")
        common_numbers = hasattr(torch.get_device_module(mesh.device_type), "set_rng_state")  # what DTensor asks, too
        if any(adapter.spec.dropout for adapter in adapters) and not common_numbers:
            raise ValueError(
                f"{subject} whose adapters have dropout on a {mesh.device_type} mesh, where each rank would drop "
                "different entries of the same input; inject with dropout=0"
            )
        if not all(VARIANTS[adapter.spec.variant].factors for adapter in adapters):
            raise ValueError(
                f"{subject} with rows of tokens (train_rows), which are not sharded; leave it out of the plan"
            )
        rescaled = any(VARIANTS[adapter.spec.variant].rescales for adapter in adapters)
        reused = rescaled or getattr(module, "max_norm", None) is not None
        if self.cut == _IN and not kind.linear_low_rank and reused:
            raise ValueError(
                f"{subject} with a DoRA adapter or max_norm, which need the looked-up rows twice, but torch can gather "
                "them only once; use ColwiseLoRA"
            )
        return kind

    def _distributed(self, parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
        whole = parameter.detach()
        new = nn.Parameter(distribute_tensor(whole, mesh, (placement,), src_data_rank=self.src_data_rank))
        # the gradient of a whole factor is a sum over the ranks, which each operation of an optimizer would form anew
        new.register_hook(lambda grad: grad.redistribute(placements=(placement,)))
        new.requires_grad_(parameter.requires_grad)
        return new


def _laid(x: DTensor, placement: Placement) -> DTensor:
    """The tensor as it shall lie on the mesh; itself if it lies so."""
    if isinstance(placement, Shard):
        placement = Shard(placement.dim % x.ndim)
    return x if x.placements == (placement,) else x.redistribute(placements=(placement,), async_op=True)


class ColwiseLoRA(_MatrixCut):
    """Shard a linear layer or embedding by its outputs, plain or with adapters.

    Like torch's ``ColwiseParallel``, with the same arguments. The weight, bias, B and DoRA's magnitudes are sharded
    along the output. A is whole on every rank, so r can be less than the number of ranks.

    Args:
        input_layouts: placement of a plain input tensor; None for ``Replicate()``. ``Shard(1)`` for sequences that are
            sharded by ``SequenceParallel``.
        output_layouts: placement of the output; None for ``Shard(-1)``. ``Replicate()`` for a head whose loss is
            computed from whole outputs.
        use_local_output: whether to return this rank's plain tensor instead of a DTensor.

    Raises:
        TypeError: by ``parallelize_module``, for anything but a linear layer (also GPT-2's transposed one) or an
            embedding, and for quantized and computed weights.
        ValueError: by ``parallelize_module``, for a merged layer, and for adapters with dropout on a CPU, where DTensor
            has no common random numbers.
    """

    cut = _OUT
    output = Shard(-1)


class RowwiseLoRA(_MatrixCut):
    """Shard a linear layer or embedding by its inputs, plain or with adapters.

    Like torch's ``RowwiseParallel``. The weight and A are sharded along the input (an embedding's along its
    vocabulary). B, DoRA's magnitudes and the bias are whole on every rank. One reduction over the mesh adds up the
    layer's output and its updates.

    Args:
        input_layouts: as in `ColwiseLoRA`; None for ``Shard(-1)``, or ``Replicate()`` for an embedding.
        output_layouts: as in `ColwiseLoRA`; None for ``Replicate()``. ``Shard(1)`` for sequences that are sharded by
            ``SequenceParallel``.
        use_local_output: as in `ColwiseLoRA`.

    Raises:
        TypeError, ValueError: as `ColwiseLoRA`, and for an embedding with a DoRA adapter or ``max_norm``.
    """

    cut = _IN
    output = Replicate()
