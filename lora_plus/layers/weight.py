"""A frozen weight with adapters: which of them are active, the weight that contains them, and the merged state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lora_plus.tensors.matrix import from_matrix, to_matrix
from lora_plus.tensors.merged_weight import joined
from lora_plus.tensors.variant import VARIANTS

from .adapter import ActiveAdapter, RowsAdapter, summands
from .merge_state import Key, Merge, Slot, versions
from .site import AdapterSite, Holders, RowBlock

if TYPE_CHECKING:
    from typing_extensions import Self

BLOCKS = "lora_blocks"


class Override(Protocol):
    """What adds to a layer's output for the length of a block, in the place of its active adapters."""

    def output(self, layer: Any, x: Tensor, y: Tensor) -> Tensor: ...  # for its input x and the base's output y
    def shared(self, x: Tensor) -> tuple[ActiveAdapter, ...]: ...  # those of all samples alike; none if they differ


class AdaptedWeight(AdapterSite):
    """A module whose ``weight`` has adapters: on the whole matrix, or on blocks of its rows."""

    nesting: ClassVar[int] = 0
    """How many modules of ours are between the user's own module and this one, itself included."""
    weight_name: str = "weight"
    """What the weight is called in the user's own module."""
    stored_quantized: ClassVar[bool] = False
    """Whether the weight is stored in a way that an update cannot be added to."""
    layout: str
    """einops pattern from the stored weight to its matrix view ``(out, in)``, or ``(stack, out, in)``."""
    lora_state: ClassVar[dict[str, Any]] = {
        "lora_adapters": {},
        "lora_active": (),
        "lora_disabled": 0,
        "lora_override": None,
        "lora_merge": None,
    }
    """The attributes of a weight that has adapters, and what they are while it has none."""
    weight: Tensor
    lora_active: tuple[ActiveAdapter, ...]
    """The adapters that take part in the forward, in the order in which they apply."""
    lora_disabled: int
    """How many ``disabled`` blocks are open: above zero, the base is computed."""
    lora_override: Override | None
    """What a block computes with in the place of the active adapters; None outside of such a block."""
    lora_merge: Merge | None
    """What unmerging needs, while the model is merged; None otherwise."""

    def begin(self) -> None:
        """Have no adapter yet."""
        self.__dict__.update(self.lora_state, lora_adapters={})

    def title(self) -> str:
        """What messages call it."""
        return type(self).__name__

    def weight_matrix(self) -> Tensor:
        """The stored weight in its matrix view."""
        return to_matrix(self.weight, self.layout)

    def dense_weight(self) -> tuple[Tensor, torch.dtype]:
        """The stored weight as numbers, and the dtype that a merged one gets."""
        return self.weight, self.weight.dtype

    def weight_slot(self) -> Slot | None:
        """Where the weight is held; None if it is computed, by a parametrization or a hook."""
        name = self.weight_name
        return next((Slot(table, name) for table in (self._parameters, self._buffers) if name in table), None)

    def holders(self) -> list[nn.Module]:
        """The modules that hold the weight and its adapters."""
        return list(self.modules())

    # ---- its adapters ------------------------------------------------------------------------------------------

    def adapter_sites(self) -> Iterator[AdapterSite]:
        """Where adapters can be: the whole weight, and blocks of its rows."""
        yield self
        yield from self.row_blocks()

    def row_blocks(self) -> list[RowBlock]:
        """The blocks of rows that have adapters, from the top."""
        blocks: Any = self._modules.get(BLOCKS)
        return [] if blocks is None else sorted(blocks.children(), key=lambda block: block.rows)

    def row_block(self, label: str, rows: tuple[int, int], total: int) -> RowBlock:
        """The block of these rows out of ``total``, which is made if it is not there."""
        blocks: Any = self._modules.setdefault(BLOCKS, Holders())
        block: RowBlock = blocks._modules.setdefault(label, RowBlock(label, rows, total))
        assert block.rows == rows
        return block

    def adapter_names(self) -> list[str]:
        """The names of the adapters that this weight has, whole or on blocks."""
        if BLOCKS not in self._modules:
            return list(self.lora_adapters)
        return list(dict.fromkeys(name for site in self.adapter_sites() for name in site.lora_adapters))

    def active_names(self) -> list[str]:
        """The names of the adapters that take part in the forward, in their order there."""
        return [adapter.name for adapter in self.lora_active]

    def adapter_named(self, name: str) -> ActiveAdapter:
        """One adapter of the whole weight; those of row blocks are put together to one."""
        if name in self.lora_adapters:
            return self.lora_adapters[name]
        blocks = [block for block in self.row_blocks() if name in block.lora_adapters]
        return RowsAdapter([(block.rows[0], block.lora_adapters[name]) for block in blocks], blocks[0].total)

    def delete_adapter(self, name: str) -> None:
        """Drop an adapter of this weight, and the blocks that have none left."""
        assert self.lora_merge is None
        self.lora_active = tuple(adapter for adapter in self.lora_active if adapter.name != name)
        blocks: Any = self._modules.get(BLOCKS)
        for site in self.adapter_sites():
            site.lora_adapters.pop(name, None)
            for container in site.tensor_containers().values():
                container._parameters.pop(name, None)
            if site is not self and not site.lora_adapters:
                del blocks._modules[site.lora_label]
        if blocks is not None and not blocks._modules:
            del self._modules[BLOCKS]

    def rename_everywhere(self, old: str, new: str) -> None:
        """Call an adapter by another name, in every state; its parameters and its place in the order stay."""
        for site in self.adapter_sites():
            if old not in site.lora_adapters:
                continue
            site.lora_adapters[old].name = new
            site.lora_adapters = {adapter.name: adapter for adapter in site.lora_adapters.values()}
            for container in site.tensor_containers().values():
                container.rename(old, new)
        if self.lora_merge is not None:
            self.lora_merge.rename(old, new)

    def activate(self, names: Sequence[str], strengths: Mapping[str, float] | None = None) -> None:
        """Let just these adapters take part, if they are here; ``strengths`` are factors of their scales."""
        active = self.in_order(names)
        for adapter in self.lora_active:
            adapter.strength = 1.0
        for adapter in active:
            adapter.strength = 1.0 if strengths is None else strengths.get(adapter.name, 1.0)
        self.__dict__["lora_active"] = active  # nn.Module's own __setattr__ is slow

    def in_order(self, names: Sequence[str]) -> tuple[ActiveAdapter, ...]:
        """Those of these adapters that the weight has, in the order in which they apply.

        Raises:
            ValueError: if they have no agreed sum.
        """
        there = self.adapter_names()
        adapters = [self.adapter_named(name) for name in dict.fromkeys(names) if name in there]
        if len(adapters) < 2:
            return tuple(adapters)
        rescaling = [adapter for adapter in adapters if VARIANTS[adapter.spec.variant].rescales]
        if len(rescaling) > 1:
            same = [adapter.name for adapter in rescaling]
            raise ValueError(
                f"adapters {same} each rescale the weight (DoRA), and two rescalings of one weight are not defined; "
                "use one of them at a time"
            )
        # a rescaling acts on the base; sums come after it
        return (*rescaling, *(adapter for adapter in adapters if adapter not in rescaling))

    def acting(self) -> tuple[ActiveAdapter, ...]:
        """The adapters that act on all samples now, in the order in which they are applied."""
        return () if self.lora_disabled or self.lora_override is not None else self.lora_active

    # ---- the weight that contains them -------------------------------------------------------------------------

    def effective_weight(self, adapters: Sequence[ActiveAdapter], base: Tensor | None = None) -> Tensor:
        """A weight, the stored one or ``base``, with these adapters in it: float32 or better, not yet rounded."""
        matrix = self.weight_matrix() if base is None else to_matrix(base, self.layout)
        return from_matrix(joined(matrix, summands(adapters)), self.layout, self.weight.shape)

    # ---- disabled, merged --------------------------------------------------------------------------------------

    def own_weight(self) -> Tensor:
        """The base's own weight, also while another one is bound in its place."""
        merge = self.lora_merge
        return self.weight if merge is None or merge.own is None else merge.own

    def bind_merged(self, merge: Merge) -> None:
        """Become merged."""
        merge.show(self.weight_slot())
        self.lora_merge = merge

    def unmerge(self) -> None:
        """Have the base's own parameter again, as it was."""
        assert self.lora_merge is not None
        self.lora_merge.hide(self.weight_slot())
        self.lora_merge = None

    def disable(self) -> None:
        """Compute what the base computes until `enable` has been called as often."""
        if not self.lora_disabled and self.lora_merge is not None:
            self.lora_merge.hide(self.weight_slot())
        self.lora_disabled += 1

    def enable(self) -> None:
        """Undo one `disable`."""
        self.lora_disabled -= 1
        if not self.lora_disabled and self.lora_merge is not None:
            self.lora_merge.show(self.weight_slot())

    def is_merged_now(self) -> bool:
        """Whether the weight as it is bound contains the adapters.

        Raises:
            ValueError: if the adapters were to be trained or have been changed, or the weight has been replaced.
        """
        merge = self.lora_merge
        if merge is None or self.lora_disabled:
            return False
        trained = (p.requires_grad for p in self.noted_tensors(self.adapter_names()).values())
        if self.training and torch.is_grad_enabled() and any(trained):
            raise ValueError(
                f"this {self.title()} is merged, so its adapters would get no gradient; call "
                "unmerge_lora(model) before training, or model.eval() or torch.no_grad() to run the merged model"
            )
        if not torch.compiler.is_compiling():
            self.check_unchanged(merge)
        return True

    def why_unmergeable(self) -> str | None:
        """Why the base's own weight cannot be bound back: the merged one has become a computed one. None if it can."""
        if self.lora_merge is None or self.lora_merge.own is None or self.weight_slot() is not None:
            return None
        return (
            f"the merged weight of this {self.title()} was parametrized or pruned; undo that first, with "
            "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
        )

    def check_unchanged(self, merge: Merge, *, by_value: bool = False) -> None:
        """Raise if an adapter has been changed, or the weight been replaced, since it was merged."""
        if merge.is_stale(self.noted_tensors(merge.adapters), by_value=by_value):
            raise ValueError(
                f"an adapter of this {self.title()} was changed while it was merged, so the merged weight is "
                "out of date; call unmerge_lora(model), then merge_lora(model) to merge it again"
            )
        if (why := self.why_unmergeable()) is not None:
            raise ValueError(why)
        if not self.lora_disabled and not merge.is_shown(self.weight_slot()):
            raise ValueError(
                f"the weight of this {self.title()} was replaced while it was merged (by tying or sharding), so "
                "it lacks the adapters; unmerge_lora(model) before that, and merge after it"
            )

    def noted_tensors(self, names: Sequence[str]) -> dict[Key, Tensor]:
        """The tensors of the adapters of these names: by the label of their rows, their container and the name."""
        return {
            (site.lora_label, container, name): tensor
            for site in self.adapter_sites()
            for name in names
            if name in site.lora_adapters
            for container, tensor in site.lora_adapters[name].tensors().items()
        }

    # ---- its state ---------------------------------------------------------------------------------------------

    def own_children(self) -> dict[str, nn.Module]:
        """The submodules that hold adapters."""
        blocks = self._modules.get(BLOCKS)
        return {**self.tensor_containers(), **({} if blocks is None else {BLOCKS: blocks})}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As ever; while merged, that of the plain module with the merged weight, without adapter keys."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        if self.lora_merge is not None:
            for child_name, child in self.own_children().items():
                for name, _ in child.named_parameters():
                    state.pop(f"{kwargs.get('prefix', '')}{child_name}.{name}", None)
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.lora_merge is not None:
            args[-1].append(f"layer {prefix.rstrip('.')!r} is merged; call unmerge_lora(model) before loading")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # one that several modules have is met several times
        if self.weight.is_meta or vars(self.weight).get("lora_empty") == versions({("", "", ""): self.weight}):
            self._apply_without_values(fn, recurse)
            return self
        super()._apply(fn, recurse)
        merge = self.lora_merge
        if merge is not None:
            merge.follow(fn, self.weight, self.noted_tensors(merge.adapters), shown=not self.lora_disabled)
        return self

    def _apply_without_values(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        # to_empty() on a base that has no values yet must not empty the adapters that have theirs
        children = self.own_children()
        held = {name: child for name, child in children.items() if not any(p.is_meta for p in child.parameters())}
        for name in held:
            del self._modules[name]
        super()._apply(fn, recurse)
        self._modules.update(held)
        if self.weight.is_meta:
            return
        vars(self.weight)["lora_empty"] = versions({("", "", ""): self.weight})  # until somebody writes into it
        for child in held.values():
            child.to(self.weight.device)
        for name in children.keys() - held.keys():  # not what was in the memory: that they have no values must show
            for parameter in children[name].parameters():
                nn.init.constant_(parameter, math.nan)

    def own_adapters(self) -> None:
        """Read this module's own containers: called on a shallow copy, whose adapters read those of the original."""
        active = self.active_names()
        for site in self.adapter_sites():
            own = {name: replace(adapter, modules=site._modules) for name, adapter in site.lora_adapters.items()}
            site.__dict__["lora_adapters"] = own
        self.__dict__["lora_active"] = tuple(map(self.adapter_named, active))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.lora_merge is not None:
            self.lora_merge.versions = None  # a copy's counters begin anew
            if self.lora_disabled:
                self.lora_merge.show(self.weight_slot())
        self.__dict__.update(lora_disabled=0, lora_override=None)  # no block that was open is the copy's
