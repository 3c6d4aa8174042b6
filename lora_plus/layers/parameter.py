"""A parameter with adapters on its own, because no layer that computes with it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_plus.tensors import weight_operations as weight_operations  # makes entries
from lora_plus.tensors.weight_sum import Term, WeightSum, can_stand

from .merge_state import Slot
from .site import BaseParameters
from .weight import AdaptedWeight

if TYPE_CHECKING:
    from typing_extensions import Self


class LoRAParameter(AdaptedWeight):
    """A parameter with adapters: called, it returns the weight to compute with, in the parameter's shape and dtype.

    ``label`` is the adapters' name inside the module that owns the parameter. ``of`` is that module's class, if it
    reads the parameter in a special way.
    """

    nesting = 2
    base: BaseParameters

    def __init__(self, base: BaseParameters, name: str, layout: str, label: str, of: str | None = None) -> None:
        super().__init__()
        self.__dict__["base"] = base  # and not as a submodule: it has its place in the model
        self.weight_name = name
        self.layout, self.lora_label, self.of = layout, label, of
        self.begin()

    def forward(self, weight: Tensor | None = None) -> Tensor:
        """The weight to compute with; from another one than the parameter, if one is given.

        It is a `WeightSum` where it can be: products with it cost no matrix of the weight's size.
        """
        base = self.weight if weight is None else weight
        if self.is_merged_now() or not self.computes():
            return base
        terms = self.terms()
        if terms is not None and can_stand(base):
            return WeightSum.of(base, terms, self)
        return self.effective_weight(self.acting(), base).to(base.dtype)

    def terms(self) -> list[Term] | None:
        """The updates of the parameter as it is stored; None where the weight must be a plain tensor.

        That is so where the parameter is no matrix, or the module is one of torch's that reads it in C++, or an adapter
        does more than add to it; and where hooks run around this module's call, since engines gather the values by them
        for the length of the call.
        """
        if self._forward_pre_hooks or self._forward_hooks or "forward" in self.__dict__:
            return None
        stored, viewed = (side.split() for side in self.layout.split(" -> "))
        straight = stored == viewed
        if self.of is not None or not (straight or [*viewed[:-2], viewed[-1], viewed[-2]] == stored):
            return None
        terms = []
        for adapter in self.acting():
            if not adapter.spec.only_adds:
                return None
            A, B = adapter.factors()
            terms.append(Term(B, A, adapter.scale) if straight else Term(A.mT, B.mT, adapter.scale))
        return terms

    def computes(self) -> bool:
        """Whether the weight to compute with is made from the parameter and adapters, and not the parameter itself."""
        return self.lora_merge is None and len(self.acting()) > 0

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The parameter that is bound now."""
        held, name = self.weight_slot()
        return held[name]  # type: ignore[return-value]  # and not by the slot's property: torch 2.8 compiles no such

    def weight_slot(self) -> Slot:
        here = self.weight_name in self._parameters
        return Slot(self._parameters if here else self.base._parameters, self.weight_name)

    def holders(self) -> list[nn.Module]:
        return [self.base, *super().holders()]

    def freeze_adapters(self) -> None:
        """The adapters, and the parameter that they are added to."""
        super().freeze_adapters()
        self.weight.requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._parameters[self.weight_name] = self.weight  # what is done to a module's own is done to it
        try:
            return super()._apply(fn, recurse)
        finally:
            self.base._parameters[self.weight_name] = self._parameters.pop(self.weight_name)

    def title(self) -> str:
        return f"parameter {self.lora_label!r}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing of its own: the owner saves the parameter, under the name that it always had."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.lora_merge is not None:
            super()._load_from_state_dict(state_dict, prefix, *args)
