"""What all LoRA layers share: how a plain layer becomes one in place, and what it computes. `kinds` has the kinds."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_plus.tensors.init import Init, InitName, Lookup, Start
from lora_plus.tensors.matrix import to_matrix
from lora_plus.tensors.random_state import draws
from lora_plus.tensors.variant import VARIANTS, AdapterSpec, Scaling, VariantName

from .adapter import ActiveAdapter, check_adapter_name
from .assigned_forward import AssignedForward
from .calls import Calls
from .class_swap import derived_class, shallow_copy, swap_class
from .freezing import set_requires_grad
from .weight import AdaptedWeight

if TYPE_CHECKING:
    from typing_extensions import Self


_OWN_FORWARDS = Calls()
"""The layers whose own forward runs in this thread: where it calls its layer, as on parts of x, that is the base's."""


class LoRALayer(AssignedForward, AdaptedWeight):
    """The abstract base class of all adapted layers: a frozen layer, its adapters, and a forward that adds them.

    A kind of layer derives from this class and from its base layer, in this order.

    To construct a LoRA layer directly, pass the arguments of its base layer and r, alpha, dropout, scaling, init,
    variant, adapter and generator as in `inject_lora`. ``device`` and ``dtype`` are those of the base's parameters,
    which are frozen.
    """

    lora_arguments: ClassVar[tuple[str, ...]] = ()
    """The names of the forward's arguments; the first one is what the update acts on."""
    channel: ClassVar[int] = -1
    """The dimension of the output that the matrix's rows lie along."""
    computed_by: ClassVar[tuple[str, ...]] = ("forward",)
    """The methods of the base layer that compute ``W x`` and the bias."""
    linear_low_rank: ClassVar[bool] = False
    """Whether the layer is a linear map of its input's last dimension."""

    lora_state = AdaptedWeight.lora_state | {"lora_base_forward": None}

    # ---- what a kind states ------------------------------------------------------------------------------------

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, y: Tensor) -> Tensor:
        """The update ``scale * B A x``; A and B come in the compute dtype, the base's output for its shape."""
        raise NotImplementedError

    @classmethod
    def plain_classes(cls) -> tuple[Any, ...]:
        """The layer classes that compute ``W x`` and the bias, and nothing else."""
        return (cls.base_class,)

    def trial_input(self) -> Tensor | None:
        """A small input for trying out a forward that is not torch's; None if the kind has no idea of one."""
        return None

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether this kind can adapt the layer."""
        return isinstance(module, cls.base_class)

    @classmethod
    def unfit(cls, layer: nn.Module) -> str | None:
        """Why this layer of the kind cannot be adapted, as a noun phrase; None if it can."""
        return None

    @classmethod
    def matrix_of(cls, layer: Any, *, values: bool = True) -> Tensor:
        """The layer's weight, detached, in its matrix view; without values only shape, dtype and device count."""
        return to_matrix(layer.weight.detach(), cls.layout)

    @classmethod
    def stored_shape(cls, layer: Any) -> tuple[int, ...]:
        """The shape of the weight as the layer's class stores it."""
        return tuple(layer.weight.shape)

    @classmethod
    def lookup(cls, layer: nn.Module) -> Lookup | None:
        """How the weight is read by index; None if it is multiplied with."""
        return None

    @classmethod
    def kind_name(cls) -> str:
        """What files call this kind of layer."""
        return next(parent for parent in cls.__mro__ if "layout" in parent.__dict__).__name__.removeprefix("LoRA")

    @classmethod
    def base_facts(cls, module: nn.Module) -> dict[str, Any]:
        """What a file must say of the base layer, besides layout and shape, to be read without the model."""
        return {}

    # ---- how a layer becomes one -------------------------------------------------------------------------------

    @draws
    def __init__(
        self,
        *base_args: Any,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        scaling: Scaling = "standard",
        init: InitName | Init = "kaiming",
        variant: VariantName = "lora",
        adapter: str = "default",
        generator: torch.Generator | None = None,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(*base_args, **base_kwargs)
        check_adapter_name(adapter)
        spec = AdapterSpec(r=r, alpha=alpha, scaling=scaling, variant=variant, dropout=dropout)
        start = Start(init, generator=generator)
        matrix = self.matrix_of(self, values=start.needs_values(spec))
        tensors = start.tensors(matrix, spec, self.lookup(self))
        self.begin()
        set_requires_grad([self], False)
        self.add_adapter(adapter, spec, tensors)
        self.activate((adapter,))

    @classmethod
    def class_body(cls, base_class: type[Any], names: tuple[str, ...]) -> dict[str, Any]:
        return {"__doc__": cls.__doc__, "lora_arguments": argument_names(base_class)}

    @classmethod
    def class_for(cls, layer_class: type[nn.Module]) -> type[LoRALayer]:
        """The LoRA class of a layer class that this kind serves; one is made for a user's own subclass."""
        return cls if issubclass(cls, layer_class) else derived_class(cls, layer_class)

    @classmethod
    def adopt(cls, module: nn.Module) -> LoRALayer:
        """Turn the layer object into one of this kind, in place and still without adapters."""
        swap_class(module, cls.class_for)
        assert isinstance(module, LoRALayer)
        module.begin()
        if "forward" in module.__dict__:
            module.__setattr__("forward", module.__dict__["forward"])  # the base computation from now on
        return module

    def take_out(self) -> None:
        for name in self.own_children():
            del self._modules[name]
        state = {name: self.__dict__.pop(name) for name in self.lora_state}
        if state["lora_base_forward"] is not None:
            self.__dict__["forward"] = state["lora_base_forward"]

    def drop_everywhere(self, adapter: str) -> None:
        if adapter in self.adapter_names():
            self.delete_adapter(adapter)
        if not self.adapter_names():
            self.restore()

    # ---- what it computes --------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, LoRALayer):  # a hook can hold this method for longer than the layer has adapters
            return type(self).forward(self, *args, **kwargs)
        inside = self.overrides() and _OWN_FORWARDS.noted(self) is not None
        compute = self.base_forward if inside or self.is_merged_now() else self.adapted_forward
        return compute(*args, **kwargs)

    def adapted_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer computes from its stored weight and its active adapters."""
        x, y = self.input_of(args, kwargs), self.base_forward(*args, **kwargs)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"the forward of {self.base_class.__name__} returns a {type(y).__name__}, and an update can only be "
                "added to a tensor; exclude this layer"
            )
        if self.lora_override is None or self.lora_disabled:
            return self.adapted(x, y, self.acting())
        return self.lora_override.output(self, x, y)

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The first argument of the layer's forward, however it is given."""
        given = args or [kwargs[name] for name in self.lora_arguments if name in kwargs] or [*kwargs.values()]
        return given[0]  # type: ignore[no-any-return]

    def base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer computed before it was adapted."""
        if self.lora_base_forward is not None:
            return self.run_assigned_forward(*args, **kwargs)
        if not self.overrides():
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        outer = _OWN_FORWARDS.begin(self)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        finally:
            _OWN_FORWARDS.end(outer)

    def adapted(self, x: Tensor, y: Tensor, adapters: Sequence[ActiveAdapter]) -> Tensor:
        """The base's output ``y`` for the input ``x`` with these adapters joined to it."""
        # the arithmetic runs in the input's dtype; an embedding's input has none
        dtype = x.dtype if x.is_floating_point() else y.dtype
        # a hook can compute the base on another device than where its weight is kept
        device = None if self.lora_base_forward is None else y.device
        x = x.to(device=device)
        for adapter in adapters:
            A, B = adapter.factors()
            A, B = A.to(device=device, dtype=dtype), B.to(device=device, dtype=dtype)
            update = self.low_rank(x, A, B, adapter.scale, self.dropout_of(adapter.spec), y)
            y = VARIANTS[adapter.spec.variant].join(self, adapter, x, y, update)
        return y

    def dropout_of(self, spec: AdapterSpec) -> float:
        """The probability that is in force now."""
        # without dropout the mode is not asked for, so that a compiled layer serves both
        return spec.dropout if spec.drops and self.training else 0.0

    def per_channel(self, values: Tensor) -> Tensor:
        """A value for each output channel ``(out,)``, shaped to broadcast over the layer's output."""
        return values.reshape(-1, *[1] * (-1 - self.channel))

    def beside_weight(self, x: Tensor, y: Tensor) -> Tensor | None:
        """What the base's output ``y`` for the input ``x`` has besides ``W x``, as the bias; None for nothing."""
        if self.has_own_forward:  # what that adds to W x is not known
            return y - self.product(x, y)
        bias = getattr(self, "bias", None)
        return None if bias is None else self.per_channel(bias.to(y.dtype))

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """``W x`` by the stored weight, in the dtype of the base's output ``y``."""
        matrix = self.weight_matrix().to(y.device, y.dtype)
        if self.linear_low_rank:
            return F.linear(x.to(y.dtype), matrix)
        return self.low_rank(x, matrix, matrix.new_ones(matrix.shape[0]).diag(), 1.0, 0.0, y)

    def weight_matrix(self) -> Tensor:
        return self.matrix_of(self)

    @property
    def has_own_forward(self) -> bool:
        """Whether the base computation is a user's, which need not be what the update assumes."""
        return self.overrides() or self.lora_base_forward is not None

    @classmethod
    def overrides(cls) -> bool:
        """Whether the layer's class is a user's with a forward of its own."""
        if cls.made_from is None:
            return False
        own, kind = cls.base_class, cls.made_from[0]
        for plain in kind.plain_classes():
            for name in cls.computed_by:
                if getattr(own, name, None) is not getattr(plain, name, None):
                    break
            else:
                return False
        return True

    def __copy__(self) -> Self:
        copied = shallow_copy(self, self.own_children())
        copied.own_adapters()
        copied.__setstate__(copied.__dict__)  # as other copies are told that they are one
        return copied


def argument_names(layer_class: type[Any]) -> tuple[str, ...]:
    """The names of the arguments of a layer's forward, in their order."""
    return tuple(inspect.signature(layer_class.forward).parameters)[1:]
