"""Which weights adapted as parameters a model reads in a way that makes the dense W + s B A."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_plus.tensors.weight_sum import noting_sums

from .dry_run import copied, left_as_it_was
from .state import Need, require
from .tree import unwrap


def dense_reads(model: nn.Module, *inputs: Any, **keywords: Any) -> dict[str, list[str]]:
    """Run the model on these inputs, and list the operations for which the full matrix W + s B A was computed.

    Products with an adapted parameter are computed from W, A and B. Other operations need the full matrix, which costs
    time and as much memory as the weight.

    The model is left as it was, as by `check_adapters`.

    Args:
        model: the model with adapters, not merged and not sharded; a compiled model is run without compilation.
        *inputs: arguments of the model.
        **keywords: keyword arguments of the model.

    Returns:
        Name of the parameter -> the operations that needed the full matrix, in order; only parameters with such an
        operation. Torch's modules that read their weights in C++ (``nn.MultiheadAttention``, ``nn.LSTM``) and variants
        that rescale the weight always need it, and are not listed.
    """
    model = unwrap(model)
    state = require(model, "looking for dense weights", Need.UNSHARDED | Need.WHOLE | Need.CHANGEABLE)
    names = {id(weight): name for name, _, weight in state.adapters()}
    eagerly = torch.compiler.set_stance("force_eager")
    with left_as_it_was(model), torch.no_grad(), eagerly, noting_sums() as found:
        model(*copied(inputs, {}), **copied(keywords, {}))
    reads: dict[str, list[str]] = {}
    for source, operation in found:
        reads.setdefault(names[id(source)], []).append(operation)
    return {name: list(dict.fromkeys(operations)) for name, operations in reads.items()}
