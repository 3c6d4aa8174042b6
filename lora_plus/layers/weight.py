"""A frozen weight with adapters: which of them are active, the weight that contains them, and the merged state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lora_plus.tensors import matrix as functional
from lora_plus.tensors.merged import Summand, joined
from lora_plus.tensors.variant import VARIANTS, AdapterSpec
from lora_plus.text import join

from .adapter import AdapterSite, RowBlock
from .merged import Merge
from .sample_adapters import SampleAdapters

if TYPE_CHECKING:
    from typing_extensions import Self

BLOCKS = "lora_blocks"


class Holders(nn.Module):
    """Holds, inside of a module of the model, what has adapters of blocks of rows or of parameters."""


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
    weight: Tensor
    lora_active: tuple[str, ...]
    """The adapters that take part in the forward, in the order in which they are applied."""
    lora_strengths: dict[str, float]
    """By active adapter, the factor of its scale while it is active, where that is not 1."""
    lora_disabled: int
    """How many ``disabled`` blocks are open: above zero, the base is computed."""
    lora_samples: SampleAdapters | None
    """Which adapter each sample of a batch has, inside an ``adapter_per_sample`` block; None elsewhere."""
    lora_merge: Merge | None
    """What unmerging needs, while the model is merged; None otherwise."""

    def start(self) -> None:
        """The state of a weight that has no adapter yet."""
        self.__dict__.update(lora_specs={}, lora_active=(), lora_strengths={})
        self.__dict__.update(lora_disabled=0, lora_samples=None, lora_merge=None)

    def _described(self) -> str:
        """What messages call it."""
        return type(self).__name__

    def weight_matrix(self) -> Tensor:
        """The stored weight in its matrix view."""
        return functional.to_matrix(self.weight, self.layout)

    def dense_weight(self) -> tuple[Tensor, torch.dtype]:
        """The stored weight as numbers, and the dtype that a merged one gets."""
        return self.weight, self.weight.dtype

    def parts(self) -> list[nn.Module]:
        """The modules that hold the weight and its adapters."""
        return list(self.modules())

    # ---- its adapters ------------------------------------------------------------------------------------------

    def adapter_sites(self) -> Iterator[AdapterSite]:
        """Where adapters can be: the whole weight, and blocks of its rows."""
        yield self
        yield from self.row_blocks()

    def row_blocks(self) -> list[RowBlock]:
        """The blocks of rows that have adapters, from the top."""
        container = self._modules.get(BLOCKS)
        if container is None:
            return []
        blocks = [block for block in container.children() if isinstance(block, RowBlock)]
        return sorted(blocks, key=lambda block: block.start)

    def row_block(self, label: str, start: int, stop: int, total: int) -> RowBlock:
        """The block of these rows out of ``total``, which is made if it is not there."""
        container = self._modules.setdefault(BLOCKS, Holders())
        assert container is not None
        block = container._modules.setdefault(label, RowBlock(label, start, stop, total))
        assert isinstance(block, RowBlock) and (block.start, block.stop) == (start, stop)
        return block

    def lora_adapters(self) -> list[str]:
        """The adapters that this weight has, whole or on blocks."""
        if BLOCKS not in self._modules:
            return list(self.lora_specs)
        return list(dict.fromkeys(name for site in self.adapter_sites() for name in site.lora_specs))

    def lora_spec(self, adapter: str) -> AdapterSpec:
        """An adapter's settings; r and alpha are those of its first block where it has several."""
        if adapter in self.lora_specs:
            return self.lora_specs[adapter]
        return next(block.lora_specs[adapter] for block in self.row_blocks() if adapter in block.lora_specs)

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """A, B and the scale of an adapter now; those of row blocks are put together, with B block-structured."""
        spec, strength = self.lora_specs.get(adapter), self.lora_strength(adapter)
        if spec is not None:
            return *self.factors(adapter), spec.scale * strength
        blocks = [block for block in self.row_blocks() if adapter in block.lora_specs]
        parts = [(block.start, *block.factors(adapter), block.lora_specs[adapter].scale) for block in blocks]
        return *functional.joined_rows(parts, blocks[0].total), strength

    def delete_adapter(self, name: str) -> None:
        """Drop an adapter of this weight, and the blocks that have none left."""
        assert self.lora_merge is None
        for site in list(self.adapter_sites()):
            if name in site.lora_specs:
                site.drop_adapter(name)
        container = self._modules.get(BLOCKS)
        for block in self.row_blocks():
            if container is not None and not block.lora_specs:
                del container._modules[block.lora_label]
        if container is not None and not container._modules:
            del self._modules[BLOCKS]
        self.activate(tuple(other for other in self.lora_active if other != name), self.lora_strengths)

    def rename_everywhere(self, old: str, new: str) -> None:
        """Call an adapter of this weight by another name, in every state that it is in."""
        for site in self.adapter_sites():
            if old in site.lora_specs:
                site.rename_adapter(old, new)
        self.lora_active = tuple(new if name == old else name for name in self.lora_active)
        self.lora_strengths = {new if name == old else name: factor for name, factor in self.lora_strengths.items()}
        if self.lora_merge is not None:
            self.lora_merge.rename(self, old, new)

    def activate(self, names: tuple[str, ...], strengths: Mapping[str, float] | None = None) -> None:
        """Let just these adapters take part in the forward; names that this weight lacks are passed over.

        ``strengths`` are factors of their scales; 1 for an adapter that has none.
        """
        active = self.in_order(names)
        self.__dict__["lora_active"] = active  # nn.Module's own __setattr__ is slow
        given = {} if strengths is None else strengths
        self.__dict__["lora_strengths"] = {name: given[name] for name in active if given.get(name, 1.0) != 1.0}

    def lora_strength(self, adapter: str) -> float:
        """The factor of an adapter's scale; it goes with being active, and is 1 where samples choose their own."""
        return 1.0 if self.lora_samples is not None else self.lora_strengths.get(adapter, 1.0)

    def in_order(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of these adapters that the weight has, in the order in which they apply.

        Raises:
            ValueError: if they have no agreed sum.
        """
        there = self.lora_adapters()
        here = [name for name in dict.fromkeys(names) if name in there]
        if len(here) < 2:
            return tuple(here)
        rescaling = [name for name in here if VARIANTS[self.lora_spec(name).variant].rescales]
        if len(rescaling) > 1:
            raise ValueError(
                f"adapters {rescaling} each rescale the weight (DoRA), and two rescalings of one weight have no agreed "
                "meaning; use one of them at a time"
            )
        # a rescaling acts on the base; sums come after it
        return (*rescaling, *(name for name in here if name not in rescaling))

    # ---- the weight that contains them -------------------------------------------------------------------------

    def effective_weight(self, adapters: tuple[str, ...], base: Tensor | None = None) -> Tensor:
        """The weight with these adapters in it: in the stored layout, float32 or better, not yet rounded.

        ``base`` is what they are added to, if it is not the stored weight.
        """
        matrix = self.weight_matrix() if base is None else functional.to_matrix(base, self.layout)
        return functional.from_matrix(joined(matrix, self.summands(adapters)), self.layout, self.weight.shape)

    def summands(self, adapters: tuple[str, ...]) -> list[Summand]:
        """These adapters, as merging takes them."""
        summands = []
        for name in adapters:
            variant = VARIANTS[self.lora_spec(name).variant]
            summands.append(Summand(variant, *self.lora_factors(name), self.adapter_tensors(name)))
        return summands

    def bind_weight(self, weight: Tensor) -> None:
        """Make this the weight; the one that it had is left as it is, for whoever shares it."""
        place = self.weight_place()
        assert place is not None
        place["weight"] = weight

    def weight_place(self) -> dict[str, Any] | None:
        """Where the weight is held: among parameters or buffers; None if it is computed."""
        return next((held for held in (self._parameters, self._buffers) if "weight" in held), None)

    def bind_merged(self, merge: Merge) -> None:
        """Become merged."""
        merge.show(self)
        self.lora_merge = merge

    def unmerge(self) -> None:
        """Have the base's own parameter again, as it was."""
        assert self.lora_merge is not None
        self.lora_merge.hide(self)
        self.lora_merge = None

    def disable(self) -> None:
        """Compute what the base computes until `enable` has been called as often."""
        if not self.lora_disabled and self.lora_merge is not None:
            self.lora_merge.hide(self)
        self.lora_disabled += 1

    def enable(self) -> None:
        """Undo one `disable`."""
        self.lora_disabled -= 1
        if not self.lora_disabled and self.lora_merge is not None:
            self.lora_merge.show(self)

    def in_force(self) -> tuple[str, ...]:
        """The adapters that act on all samples now, in the order in which they are applied."""
        return () if self.lora_disabled or self.lora_samples is not None else self.lora_active

    def check_not_disabled(self) -> None:
        """Raise inside a ``disabled`` block."""
        if self.lora_disabled:
            raise ValueError("the adapters are disabled; leave the disabled(model) block first")

    def check_enabled(self) -> None:
        """Raise inside a block at whose end a state is restored, with which changes to adapters would be mixed up."""
        self.check_not_disabled()
        if self.lora_samples is not None:
            raise ValueError("each sample has an adapter of its own; leave the adapter_per_sample block first")

    def is_merged_now(self) -> bool:
        """Whether the weight as it is bound contains the adapters; raises where that would mislead.

        Raises:
            ValueError: if the adapters were to be trained or have been changed, or the weight has been replaced.
        """
        merge = self.lora_merge
        if merge is None or self.lora_disabled:
            return False
        trained = (p.requires_grad for site in self.adapter_sites() for _, _, p in site.lora_parameters())
        if self.training and torch.is_grad_enabled() and any(trained):
            raise ValueError(
                f"this {self._described()} is merged, so its adapters would get no gradient; call "
                "unmerge_lora(model) before training, or model.eval() or torch.no_grad() to run the merged model"
            )
        if not torch.compiler.is_compiling():
            self.check_unchanged(merge)
        return True

    def check_unmergeable(self) -> None:
        """Raise if the base's own weight cannot be bound back, because the merged one has become a computed one."""
        if self.lora_merge is not None and not self.lora_merge.can_be_hidden(self):
            raise ValueError(
                f"the merged weight of this {self._described()} was parametrized or pruned; undo that first, with "
                "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
            )

    def check_unchanged(self, merge: Merge, *, by_value: bool = False) -> None:
        """Raise if an adapter has been changed, or the weight been replaced, since it was merged."""
        if merge.is_stale(self, by_value=by_value):
            raise ValueError(
                f"an adapter of this {self._described()} was changed while it was merged, which the merged weight "
                "does not follow; call unmerge_lora(model), and merge_lora(model) again if it shall be merged"
            )
        self.check_unmergeable()
        if not self.lora_disabled and not merge.is_shown(self):
            raise ValueError(
                f"the weight of this {self._described()} was replaced while it was merged (by tying weights again, or "
                "by sharding), so the adapters are not in it any more; call unmerge_lora(model) before, and merge after"
            )

    def fixed_tensors(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """``(adapter, name, tensor)`` for what training leaves as it is, by the name inside the user's own module."""
        for site in self.adapter_sites():
            for adapter, spec in site.lora_specs.items():
                for container, tensor in site.adapter_tensors(adapter).items():
                    if not site.is_trained(container, spec):
                        yield adapter, join(site.lora_label, f"{container}.{adapter}"), tensor

    def noted_tensors(self, adapters: tuple[str, ...]) -> dict[str, Tensor]:
        """These adapters' tensors, by names that are theirs inside this weight."""
        return {
            f"{site.lora_label}.{container}.{name}": tensor
            for site in self.adapter_sites()
            for name in adapters
            for container, tensor in site.adapter_tensors(name).items()
        }

    # ---- its state ---------------------------------------------------------------------------------------------

    def own_children(self) -> dict[str, nn.Module]:
        """The submodules that hold adapters."""
        own = dict[str, nn.Module](self.tensor_containers())
        return own | {name: child for name, child in self._modules.items() if name == BLOCKS and child is not None}

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
            errors = args[-1]
            errors.append(f"layer {prefix.rstrip('.')!r} is merged; call unmerge_lora(model) before loading")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.weight.is_meta:
            self._apply_without_values(fn, recurse)
            return self
        super()._apply(fn, recurse)
        merge = self.lora_merge
        if merge is not None:
            merge.follow(self, fn)
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
        for child in held.values():
            child.to(self.weight.device)
        for name in children.keys() - held.keys():  # not what was in the memory: that they have no values must show
            for parameter in children[name].parameters():
                nn.init.constant_(parameter, math.nan)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.lora_merge is not None:
            self.lora_merge.versions = None  # a copy's counters begin anew
            if self.lora_disabled:
                self.lora_merge.show(self)
        self.__dict__.update(lora_disabled=0, lora_samples=None)  # no block that was open is the copy's
