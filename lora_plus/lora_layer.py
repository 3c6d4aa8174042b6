"""What all LoRA layers share: how a plain layer becomes one, what it computes, what it holds, how it is restored.

A layer object is turned into a LoRA layer in place, by assigning its ``__class__``, so that references, hooks, tied
weights, base parameter names and ``isinstance`` stay as they were. The kinds of layer are in `layers`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import functional
from .adapter_tensors import AdapterTensors, check_adapter_name
from .freezing import set_requires_grad
from .functional import accumulation_dtype
from .init import Init, resolve
from .variants import VARIANTS, AdapterSpec

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class Merge:
    """The state of a merged layer: what unmerging needs."""

    weight: Tensor
    """The base's own parameter, bound back by unmerging."""
    adapters: tuple[str, ...]
    """The adapters that the bound weight contains."""
    versions: dict[str, int]
    """The version counter of each of their tensors when they were merged."""
    hidden: nn.Parameter | None
    """The merged weight while a ``disabled`` block shows the base's."""
    lost: float | None
    """Relative error of the applied update after rounding to the weight's dtype; None at float32 and above."""


class LoRALayer(nn.Module):
    """Adapters beside a frozen base layer, and a forward that adds them to what the base computes.

    Abstract: a kind derives from this class and from its base layer, in this order.

    Constructed directly, a LoRA layer takes the arguments of its base layer (``device`` and ``dtype`` are those of the
    base's parameters, which are frozen) and r, alpha, dropout, scaling, init, variant, adapter and generator as in
    `inject_lora`.
    """

    base_class: ClassVar[type[nn.Module]]
    """The class that the layer has without adapters."""
    layout: ClassVar[str]
    """einops pattern from the stored weight to its matrix view ``(out, in)``."""
    roles: ClassVar[dict[str, str]] = {"lora_A": "A", "lora_B": "B", "lora_magnitude": "magnitude"}
    """What the tensors of each container are to the optimizer."""
    _derived_from: ClassVar[type[LoRALayer] | None] = None
    """The kind, for a class that was made for a user's own layer class."""
    channel: ClassVar[int] = -1
    """The dimension of the output that the matrix's rows lie along."""

    weight: Tensor
    lora_A: AdapterTensors
    lora_B: AdapterTensors
    lora_specs: dict[str, AdapterSpec]
    """The settings of each adapter, by its name."""
    lora_active: tuple[str, ...]
    """The adapters that take part in the forward, in the order in which they are applied."""
    lora_disabled: int
    """How many ``disabled`` blocks are open: above zero, the layer computes what its base computes."""
    lora_merge: Merge | None
    """What unmerging needs; None while the layer is not merged."""
    lora_base_forward: Callable[..., Tensor] | None
    """A forward that had been assigned to the layer object, as offloading hooks do: it stays the base computation."""

    # ---- what a kind states ------------------------------------------------------------------------------------

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float) -> Tensor:
        """The update ``scale * B A`` applied to the layer's input; A and B come in the compute dtype."""
        raise NotImplementedError

    def trial_input(self) -> Tensor | None:
        """A small input for trying out a forward that is not torch's; None if the kind has no idea of one."""
        return None

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether this kind can adapt the layer."""
        return isinstance(module, cls.base_class)

    @classmethod
    def adjust(cls, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Change freshly initialised tensors in place where the layer asks for it."""

    @classmethod
    def kind_name(cls) -> str:
        """What files call this kind of layer."""
        return next(parent for parent in cls.__mro__ if "layout" in parent.__dict__).__name__.removeprefix("LoRA")

    @classmethod
    def base_facts(cls, module: nn.Module) -> dict[str, Any]:
        """What a file must say of the base layer, besides layout and shape, to be read without the model."""
        return {}

    # ---- how a layer becomes one -------------------------------------------------------------------------------

    def __init__(
        self,
        *base_args: Any,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        scaling: str = "standard",
        init: str | Init = "kaiming",
        variant: str = "lora",
        adapter: str = "default",
        generator: torch.Generator | None = None,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(*base_args, **base_kwargs)
        check_adapter_name(adapter)
        spec = AdapterSpec(r=r, alpha=alpha, scaling=scaling, variant=variant, dropout=dropout)
        self.start()
        self.stand_alone()
        self.add_adapter(adapter, spec, self.new_tensors(self, spec, init=init, generator=generator))

    @classmethod
    def from_layer(
        cls,
        layer: nn.Module,
        *,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        scaling: str = "standard",
        init: str | Init = "kaiming",
        variant: str = "lora",
        adapter: str = "default",
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Turn ``layer`` itself into a LoRA layer with one adapter; its own parameters are frozen.

        Args:
            layer: a layer of the kind's base class.
            r, alpha, dropout, scaling, init, variant, adapter, dtype, generator: as in `inject_lora`.

        Returns:
            The same object.

        Raises:
            TypeError: if the layer is of another kind, or a LoRA layer already.
        """
        if not cls.fits(layer) or isinstance(layer, LoRALayer):
            raise TypeError(f"{cls.__name__} cannot adapt a {type(layer).__name__}")
        check_adapter_name(adapter)
        spec = AdapterSpec(r=r, alpha=alpha, scaling=scaling, variant=variant, dropout=dropout)
        tensors = cls.new_tensors(layer, spec, init=init, dtype=dtype, generator=generator)
        adopted = cls.adopt(layer)
        adopted.stand_alone()
        adopted.add_adapter(adapter, spec, tensors)
        assert isinstance(adopted, cls)
        return adopted

    @classmethod
    def new_tensors(
        cls,
        layer: nn.Module,
        spec: AdapterSpec,
        *,
        init: str | Init = "kaiming",
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The tensors of a new adapter for the layer, by the name of their container; the layer is not touched."""
        assert isinstance(layer.weight, Tensor)
        weight = functional.to_matrix(layer.weight.detach(), cls.layout)
        out_features, in_features = weight.shape
        # a function that is not ours gets a copy: what it does to the weight must not reach the base
        A, B = resolve(init)(weight.clone() if callable(init) else weight, spec.r, generator)
        if A.shape != (spec.r, in_features) or B.shape != (out_features, spec.r):
            raise ValueError(
                f"init {init!r} returned A {tuple(A.shape)} and B {tuple(B.shape)}; "
                f"expected {(spec.r, in_features)} and {(out_features, spec.r)}"
            )
        if callable(init) and not all(t.is_floating_point() and bool(t.isfinite().all()) for t in (A, B)):
            raise ValueError(f"init {init!r} returned values that are not finite floating-point numbers")
        tensors = {"lora_A": A, "lora_B": B}
        cls.adjust(layer, tensors)
        tensors |= VARIANTS[spec.variant].extra(weight, A, B, spec.scale)
        wanted = accumulation_dtype(weight.dtype) if dtype is None else dtype
        return {name: tensor.to(wanted, copy=callable(init)).contiguous() for name, tensor in tensors.items()}

    @classmethod
    def class_for(cls, layer_class: type[nn.Module]) -> type[LoRALayer]:
        """The LoRA class of a layer class that this kind serves; one is made for a user's own subclass."""
        return cls if issubclass(cls, layer_class) else _derive(cls, layer_class)  # type: ignore[arg-type]

    @classmethod
    def adopt(cls, module: nn.Module) -> LoRALayer:
        """Turn the layer object into one of this kind, in place and still without adapters."""
        module.__class__ = cls.class_for(type(module))
        base_forward = module.__dict__.pop("forward", None)
        assert isinstance(module, LoRALayer)
        module.start(base_forward)
        return module

    def start(self, base_forward: Callable[..., Tensor] | None = None) -> None:
        """The state of a LoRA layer that has no adapter yet."""
        self.__dict__.update(
            lora_specs={}, lora_active=(), lora_disabled=0, lora_merge=None, lora_base_forward=base_forward
        )

    def stand_alone(self) -> None:
        """Do what an injection does around its layers: freeze the base, and be called wherever the layer is put."""
        set_requires_grad([self], False)
        self.stay_off_fast_path()

    def stay_off_fast_path(self) -> None:
        """Keep nn.TransformerEncoderLayer from reading the weight in its fused kernel instead of calling the layer."""
        if _stay_off_fast_path not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(_stay_off_fast_path)

    def restore(self) -> nn.Module:
        """Turn the layer object back into the plain layer it was, in place; its adapters are dropped."""
        base_forward, base_class = self.lora_base_forward, self.base_class
        for name in self.roles:
            self._modules.pop(name, None)
        for name in ("lora_specs", "lora_active", "lora_disabled", "lora_merge", "lora_base_forward"):
            del self.__dict__[name]
        for key, hook in list(self._forward_pre_hooks.items()):
            if hook is _stay_off_fast_path:
                del self._forward_pre_hooks[key]
        plain: nn.Module = self
        plain.__class__ = base_class
        if base_forward is not None:
            plain.__dict__["forward"] = base_forward
        return plain

    # ---- what it computes --------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.lora_merge is not None and not self.lora_disabled:
            self._check_merged_call(self.lora_merge)
            return self.base_forward(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        return self.adapted(x, self.base_forward(*args, **kwargs))

    def base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer computed before it was adapted."""
        if self.lora_base_forward is not None:
            return self.lora_base_forward(*args, **kwargs)
        y: Tensor = super().forward(*args, **kwargs)
        return y

    def adapted(self, x: Tensor, y: Tensor) -> Tensor:
        """The base's output ``y`` for the input ``x`` with the active adapters joined to it."""
        if not isinstance(y, Tensor):
            raise TypeError(
                f"the forward of {self.base_class.__name__} returns a {type(y).__name__}, and an update can only be "
                "added to a tensor; exclude this layer"
            )
        # the arithmetic runs in the input's dtype; an embedding's input has none
        dtype = x.dtype if x.is_floating_point() else y.dtype
        for name in () if self.lora_disabled else self.lora_active:
            spec = self.lora_specs[name]
            A, B = self.lora_A[name].to(dtype), self.lora_B[name].to(dtype)
            update = self.low_rank(x, A, B, spec.scale, spec.dropout if self.training else 0.0)
            y = VARIANTS[spec.variant].join(self, name, y, update)
        return y

    def per_channel(self, values: Tensor) -> Tensor:
        """A value for each output channel ``(out,)``, shaped to broadcast over the layer's output."""
        return values.reshape(-1, *[1] * (-1 - self.channel))

    def merged_weight(self, adapters: tuple[str, ...]) -> Tensor:
        """The weight that contains these adapters: in the layer's layout, float32 or better, not yet rounded."""
        matrix = functional.to_matrix(self.weight.detach(), self.layout)
        matrix = matrix.to(accumulation_dtype(matrix.dtype))
        for name in adapters:
            spec = self.lora_specs[name]
            tensors = {key: tensor.detach() for key, tensor in self.adapter_tensors(name).items()}
            matrix = VARIANTS[spec.variant].merge(matrix, tensors, spec.scale)
        return functional.from_matrix(matrix, self.layout, self.weight.shape)

    # ---- what it holds -----------------------------------------------------------------------------------------

    def add_adapter(self, name: str, spec: AdapterSpec, tensors: dict[str, Tensor], *, trainable: bool = True) -> None:
        """Give the layer an adapter with these tensors and make it the active one."""
        assert name not in self.lora_specs and self.lora_merge is None
        for container, tensor in tensors.items():
            if container not in self._modules:
                self._modules[container] = AdapterTensors()
            self._container(container)[name] = nn.Parameter(tensor, requires_grad=trainable)
        self.lora_specs[name] = spec
        self.activate((name,))

    def delete_adapter(self, name: str) -> None:
        """Drop an adapter of this layer."""
        assert self.lora_merge is None
        for container in self.adapter_tensors(name):
            del self._container(container)[name]
        del self.lora_specs[name]
        self.activate(tuple(other for other in self.lora_active if other != name))

    def activate(self, names: tuple[str, ...]) -> None:
        """Let just these adapters take part in the forward; names that this layer lacks are passed over."""
        self.lora_active = self.in_order(names)

    def in_order(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of these adapters that the layer has, in the order in which they apply.

        Raises:
            ValueError: if they have no agreed sum.
        """
        here = [name for name in dict.fromkeys(names) if name in self.lora_specs]
        if len(here) < 2:
            return tuple(here)
        exclusive = [name for name in here if VARIANTS[self.lora_specs[name].variant].exclusive]
        if len(exclusive) > 1:
            raise ValueError(
                f"adapters {exclusive} each rescale the weight (DoRA), and two rescalings of one weight have no agreed "
                "meaning; use one of them at a time"
            )
        # a rescaling acts on the base; sums come after it
        return (*exclusive, *(name for name in here if name not in exclusive))

    def adapter_tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter by the name of their container: lora_A, lora_B, ..."""
        present = (name for name in self.roles if name in self._modules)
        return {name: self._container(name)[adapter] for name in present if adapter in self._container(name)}

    def lora_parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """``(adapter, role, parameter)`` for every adapter parameter of this layer.

        Freezing, optimizer groups, saving and deleting go by this, never by names.
        """
        for adapter in self.lora_specs:
            for container, parameter in self.adapter_tensors(adapter).items():
                yield adapter, self.roles[container], parameter

    def reset_lora_parameters(
        self, adapter: str = "default", *, init: str | Init = "kaiming", generator: torch.Generator | None = None
    ) -> None:
        """Draw an adapter's tensors anew, in place."""
        current = self.adapter_tensors(adapter)
        fresh = self.new_tensors(self, self.lora_specs[adapter], init=init, generator=generator)
        with torch.no_grad():
            for name, parameter in current.items():
                parameter.copy_(fresh[name])

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={spec.r}, alpha={spec.alpha:g}" for name, spec in self.lora_specs.items())
        base = super().extra_repr()
        return f"{base}, lora=({adapters})" if base else f"lora=({adapters})"

    def _container(self, name: str) -> AdapterTensors:
        container = self._modules[name]
        assert isinstance(container, AdapterTensors)
        return container

    # ---- while merged ------------------------------------------------------------------------------------------

    def _check_merged_call(self, merge: Merge) -> None:
        if self.training and torch.is_grad_enabled() and any(p.requires_grad for _, _, p in self.lora_parameters()):
            raise ValueError(
                f"this {type(self).__name__} is merged, so its adapters would get no gradient; call "
                "unmerge_lora(model) before training, or model.eval() or torch.no_grad() to run the merged model"
            )
        if not torch.compiler.is_compiling():
            self.check_unchanged(merge)

    def check_unchanged(self, merge: Merge) -> None:
        """Raise if an adapter has been changed in place since it was merged."""
        if self.adapter_versions(merge.adapters) != merge.versions:
            raise ValueError(
                f"an adapter of this {type(self).__name__} was changed while it was merged, which the merged weight "
                "does not follow; call unmerge_lora(model), and merge_lora(model) again if it shall be merged"
            )

    def disable(self) -> None:
        """Compute what the base computes until `enable` has been called as often."""
        self.lora_disabled += 1
        if self.lora_merge is not None and self.lora_merge.hidden is None:
            assert isinstance(self.weight, nn.Parameter)
            self.lora_merge.hidden = self.weight
            self.bind_weight(self.lora_merge.weight)

    def enable(self) -> None:
        """Undo one `disable`."""
        self.lora_disabled -= 1
        if not self.lora_disabled and self.lora_merge is not None and self.lora_merge.hidden is not None:
            self.bind_weight(self.lora_merge.hidden)
            self.lora_merge.hidden = None

    def check_enabled(self) -> None:
        """Raise inside a ``disabled`` block, where changes to adapters would be mixed up with what it restores."""
        if self.lora_disabled:
            raise ValueError("the adapters are disabled; leave the disabled(model) block first")

    def bind_weight(self, weight: Tensor) -> None:
        """Make this parameter the layer's weight; the one it had is left as it is, for whoever shares it."""
        assert isinstance(weight, nn.Parameter)
        self._parameters["weight"] = weight

    @property
    def has_own_forward(self) -> bool:
        """Whether the base computation is a user's, which need not be what the update assumes."""
        kind = self._derived_from
        overridden = kind is not None and self.base_class.forward is not kind.base_class.forward
        return overridden or self.lora_base_forward is not None

    def adapter_versions(self, adapters: tuple[str, ...]) -> dict[str, int]:
        """The version counters of these adapters' tensors: they differ after any change in place."""
        return {
            f"{container}.{name}": 0 if tensor.is_inference() else tensor._version
            for name in adapters
            for container, tensor in self.adapter_tensors(name).items()
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As ever; while merged, that of the plain layer with the merged weight, without adapter keys."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        if self.lora_merge is not None:
            for adapter in self.lora_specs:
                for container in self.adapter_tensors(adapter):
                    state.pop(f"{kwargs.get('prefix', '')}{container}.{adapter}", None)
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.lora_merge is not None:
            errors = args[-1]
            errors.append(f"layer {prefix.rstrip('.')!r} is merged; call unmerge_lora(model) before loading")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- moving and copying ------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.weight.is_meta:
            self._apply_without_values(fn, recurse)
            return self
        super()._apply(fn, recurse)
        if self.lora_merge is not None:
            self.lora_merge.weight.data = fn(self.lora_merge.weight.data)  # the same object: it may be tied
            self.lora_merge.versions = self.adapter_versions(self.lora_merge.adapters)
        return self

    def _apply_without_values(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        # to_empty() on a base that has no values yet must not empty the adapters, which have theirs
        containers = {name: self._modules.pop(name) for name in self.roles if name in self._modules}
        super()._apply(fn, recurse)
        self._modules.update(containers)
        if not self.weight.is_meta:
            for container in containers.values():
                assert container is not None
                container.to(self.weight.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.lora_merge is not None:  # a copy's version counters start anew
            self.lora_merge.versions = self.adapter_versions(self.lora_merge.adapters)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        kind = type(self).__dict__.get("_derived_from")
        # a class made on the fly has no name to be found by: pickle what it was made from
        return reduced if kind is None else (_new_derived, (kind, self.base_class), *reduced[2:])


def _stay_off_fast_path(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing: where there is one, nn.TransformerEncoderLayer takes its normal path."""


@functools.cache
def _derive(kind: type[Any], layer_class: type[Any]) -> type[LoRALayer]:
    body = {"base_class": layer_class, "_derived_from": kind, "__module__": layer_class.__module__}
    return type(f"LoRA{layer_class.__name__}", (kind, layer_class), body | {"__doc__": kind.__doc__})


def _new_derived(kind: type[LoRALayer], layer_class: type[nn.Module]) -> LoRALayer:
    derived = _derive(kind, layer_class)  # type: ignore[arg-type]
    return derived.__new__(derived)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """``(name, layer)`` for every LoRA layer of a model, each once, under its first name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer))
