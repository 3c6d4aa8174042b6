"""Over a whole model: a different adapter for each sample of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lora_plus.layers.layer import LoRALayer
from lora_plus.layers.sample_adapters import SampleAdapters, group_samples

from .adapters import check_adapter, check_any_adapter, check_unmerged
from .train_also import trained_modules
from .tree import adapted_weights


@contextmanager
def adapter_per_sample(model: nn.Module, adapters: Sequence[str | None]) -> Iterator[nn.Module]:
    """For the length of a ``with`` block, sample i of a batch is computed with adapter i, or with none.

    A sample is index i of the first dimension of each adapted layer's input and output. What it gets is what it would
    get alone with its adapter chosen by `set_adapter`, in training and in evaluation, with gradients for the adapters
    that have ``requires_grad``; where its name is None, or a layer lacks the adapter, it is what the base computes,
    bit for bit. Which adapters are active makes no difference, and is as before afterwards; modules trained in full
    with another adapter keep their values. Adapters may differ in everything, rank and variant too; linear layers
    compute all in two batched products, whatever their number.

    In activation checkpointing layers are computed again in the backward pass, so that has to be inside the block.
    Without gradients the factors are stacked once for each layer and block, and again if one of them is changed or a
    forward with gradients comes between; what is written through ``.data``, as engines do, counts from then or from the
    next block on.

    Example:
        >>> from lora_plus import inject_lora
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("a", "b"):
        ...     _ = inject_lora(model, ["0"], r=2, adapter=name)
        >>> with adapter_per_sample(model, ["a", "b", None]):
        ...     y = model(torch.randn(3, 4))

    Args:
        model: a model with adapters.
        adapters: for each sample of the batch the name of its adapter, or None for the base alone.

    Raises:
        TypeError: if that is not a list of names.
        KeyError: if the model holds no adapter of such a name.
        ValueError: if the list is empty, the model has no adapter, it is merged or its adapters are disabled, or a
            whole batch shares what differs between adapters: an adapted parameter, or a module trained in full
            (``train_also``). Inside the block: if a layer gets another number of samples, or adapters are chosen,
            added, deleted or merged.
    """
    names = _checked_names(model, adapters)
    weights = list(adapted_weights(model))
    made: list[SampleAdapters] = []
    groupings = {}
    for path, weight in weights:
        weight.check_not_disabled()
        check_unmerged(path, weight, "choosing an adapter for each sample")
        there = weight.lora_adapters()
        here = tuple(name if name in there else None for name in names)
        key = (here, weight.weight.device)
        if key not in groupings:
            groupings[key] = group_samples(here, [name for name in there if name in here], weight.weight.device)
        grouping = groupings[key]
        if grouping.adapters and not isinstance(weight, LoRALayer):
            raise ValueError(
                f"{path!r} is adapted in the weight, which a batch has only one of, by {list(grouping.adapters)}; run "
                "the samples of each adapter on their own, with set_adapter"
            )
        made.append(SampleAdapters(weight, path, grouping))
    outer = [weight.lora_samples for _, weight in weights]
    try:
        for (_, weight), samples in zip(weights, made, strict=True):
            weight.lora_samples = samples
        yield model
    finally:
        for (_, weight), before in zip(weights, outer, strict=True):
            weight.lora_samples = before


def _checked_names(model: nn.Module, adapters: Sequence[str | None]) -> tuple[str | None, ...]:
    if isinstance(adapters, str) or not all(name is None or isinstance(name, str) for name in adapters):
        raise TypeError(f"expected a list with the name of an adapter, or None, for each sample, got {adapters!r}")
    names = tuple(adapters)
    if not names:
        raise ValueError("expected the name of an adapter, or None, for each sample of the batch, got an empty list")
    distinct = [name for name in dict.fromkeys(names) if name is not None]
    check_adapter(model, *distinct)
    check_any_adapter(model, "adapter_per_sample")
    for path, _, record in trained_modules(model):
        if record.adapter in distinct:
            raise ValueError(
                f"{path!r} is trained in full with the adapter {record.adapter!r}, and a batch has only one {path!r}; "
                "run the samples of each adapter on their own, with set_adapter"
            )
    return names
