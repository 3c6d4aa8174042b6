"""The linear probe: a head fitted to frozen features, the baseline that an adapter has to beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DECAYS = (1e-3, 1e-2, 3e-2, 1e-1)
"""Weights of the squared norm that are tried."""


def fit_head(
    train: Tensor, train_labels: Tensor, validation: Tensor, validation_labels: Tensor, classes: int
) -> nn.Linear:
    """The head with the least cross-entropy on the validation examples, one fit for each of `DECAYS`.

    The penalty is on the weight for features of unit scale (their root mean square over all training examples).

    Args:
        train: features ``(n, width)``.
        train_labels: ``(n,)``.
        validation: features of other examples.
        validation_labels: theirs.
        classes: number of classes.
    """
    scale = train.square().mean().sqrt()
    heads = [_fit(train / scale, train_labels, classes, decay) for decay in DECAYS]
    losses = [F.cross_entropy(head(validation / scale), validation_labels).item() for head in heads]
    best = heads[losses.index(min(losses))]
    with torch.no_grad():
        best.weight /= scale
    return best


def _fit(features: Tensor, labels: Tensor, classes: int, decay: float) -> nn.Linear:
    head = nn.utils.skip_init(nn.Linear, features.shape[1], classes, dtype=features.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + decay / 2 * head.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return head
