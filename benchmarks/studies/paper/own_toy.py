"""Does the paper's own toy, rebuilt from its text, show the optimum of the paper's figure 2?

Appendix C.1.1 of Hayou et al. 2024 (arXiv:2402.12354): ``f = w_out . relu(B A relu(W_in x))`` with 5 inputs, width 100
and rank 4, targets ``sin`` of the inputs' mean, gradient descent on A and B alone.

    python benchmarks/studies/paper/own_toy.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import page
import torch
from page import Finding, Picture, Section, Table
from torch import Tensor
from toy import Problem, gradient_descent, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INPUTS, WIDTH, RANK, SAMPLES = 5, 100, 4, 1000
SEEDS = 3
RATES = 10 ** (torch.arange(-12, 4) / 3)
"""From 1e-4 to 10, three in a decade, for A and for B."""
READ_AT = (10, 200)
CAPTION = (2.78, 1.29e-4)
"""The best (eta_A, eta_B) that the caption of figure 2 gives, for t = 200."""

DIVERGED = 100.0
"""A loss that no longer says anything."""

Start = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
AS_STATED = "A and B normal"
STARTS: dict[str, Start] = {
    AS_STATED: lambda A, B: (A, B),
    "B = 0 (Init[1])": lambda A, B: (A, torch.zeros_like(B)),
    "A = 0 (Init[2])": lambda A, B: (torch.zeros_like(A), B),
}


def draw_problem(seed: int, start: Start, samples: int = SAMPLES) -> Problem:
    """The toy as the appendix states it, in float32; nothing is added to ``B A``, so Z0 is zero."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(samples, INPUTS, generator=generator)
    torch.randn(100, INPUTS, generator=generator)  # the test inputs, which are not used here
    W_in = torch.randn(WIDTH, INPUTS, generator=generator)
    head = torch.randn(WIDTH, generator=generator) / math.sqrt(WIDTH)
    A = torch.randn(RANK, WIDTH, generator=generator) / math.sqrt(WIDTH)
    B = torch.randn(WIDTH, RANK, generator=generator)
    H = torch.relu(X @ W_in.T)
    return Problem(H, torch.zeros(samples, WIDTH), head, X.mean(1).sin(), *start(A, B))


def losses(start: Start, *, steps: int, seeds: int = SEEDS) -> Tensor:
    """Mean over seeds of the training loss, ``(rates of A, rates of B, steps + 1)``."""
    cells = torch.cartesian_prod(RATES, RATES)
    runs = [train(draw_problem(seed, start), cells, steps=steps, rule=gradient_descent) for seed in range(seeds)]
    return torch.stack(runs).mean(0).unflatten(0, (len(RATES), len(RATES)))


def written(loss: float) -> str:
    """A mean over seeds."""
    return f"{loss:.3g}" if loss < DIVERGED else "it diverges in at least one seed"


def best_cell(loss: Tensor) -> tuple[int, int]:
    """Where the loss ``(rates of A, rates of B)`` is least."""
    return divmod(int(loss.argmin()), loss.shape[1])


def cell_of(rates: tuple[float, float]) -> tuple[int, int]:
    """The cell of the grid that is nearest to a pair of rates, on a log scale."""
    nearest = [int((RATES.log() - math.log(rate)).abs().argmin()) for rate in rates]
    return nearest[0], nearest[1]


def run() -> Section:
    """All cells of the toy as stated, and the starts of the theory."""
    found = losses(STARTS[AS_STATED], steps=READ_AT[-1])
    zero = sum(float(draw_problem(seed, STARTS[AS_STATED]).y.square().mean()) for seed in range(SEEDS)) / SEEDS
    rows = []
    for step in READ_AT:
        loss = found[..., step]
        a, b = best_cell(loss)
        equal = loss.diagonal()
        rows.append([
            str(step), f"{RATES[a]:.2g}, {RATES[b]:.2g}", f"{RATES[b] / RATES[a]:.2g}", f"{loss.min():.3g}",
            f"{RATES[equal.argmin()]:.2g}", f"{equal.min():.3g}",
        ])  # fmt: skip
    last = found[..., READ_AT[-1]]
    a, b = best_cell(last)
    best, at_caption = float(last.min()), float(last[cell_of(CAPTION)])
    at_swapped_A, swapped_B = last[cell_of(CAPTION[::-1])[0]], cell_of(CAPTION[::-1])[1]
    swapped, edge = float(at_swapped_A[swapped_B]), int((at_swapped_A < zero).nonzero().max())
    learns = last < zero
    reach_A, reach_B = (float(RATES[learns.any(dim)].max()) for dim in (1, 0))
    idle = {
        name: not bool((losses(start, steps=READ_AT[0], seeds=1).diff() != 0).any())
        for name, start in STARTS.items()
        if name != AS_STATED
    }
    shown = f"best (η_A, η_B) = ({RATES[a]:.2g}, {RATES[b]:.2g}) with loss {best:.3g}"
    return Section(
        "The paper's own toy",
        f"Appendix C.1.1 as stated: {INPUTS} inputs, width {WIDTH}, rank {RANK}, {SAMPLES} samples, y = sin(mean of x)"
        f"; A ~ N(0, 1/n), B ~ N(0, 1), gradient descent on A and B; mean squared error; {SEEDS} seeds; rates from "
        "1e-4 to 10, three in a decade.",
        [
            Finding(
                f"Fig. 2, caption: at t = {READ_AT[-1]} the best (η_A, η_B) is ({CAPTION[0]}, {CAPTION[1]:.3g})",
                f"{shown}; at the caption's pair {written(at_caption)}",
                at_caption < 1.1 * best,
                "the text and the theory want η_B to be the larger one, so the names seem to be swapped",
            ),
            Finding(
                "The same with the names swapped",
                f"{written(swapped)}; with the same η_A and the largest η_B that learns, {RATES[edge]:.2g}: "
                f"{at_swapped_A[edge]:.3g}",
                swapped < 1.1 * best,
                "the toy as stated has its optimum near equal rates",
            ),
            Finding(
                f"The best pair has η_B ≫ η_A (t = {READ_AT[-1]})",
                f"η_B / η_A = {RATES[b] / RATES[a]:.2g}; at t = {READ_AT[0]} {rows[0][2]}",
                float(RATES[b] / RATES[a]) > 4,
                "it holds early in training only",
            ),
            Finding(
                "Fig. 2: η_B may be much larger than η_A before training fails",
                f"better than the zero predictor up to η_B = {reach_B:.2g}, but η_A = {reach_A:.2g}",
                reach_B > 10 * reach_A,
            ),
            Finding(
                "Fig. 2: losses of .18 to .30 at t = 200",
                f"the zero predictor has {zero:.3f}, the best pair {best:.3g}",
                best > 0.17,
                "the targets or the loss of the figure are not those of the text",
            ),
            Finding(
                "The starts of the theory, Init[1] (B = 0) and Init[2] (A = 0)",
                "; ".join(f"{name}: {'no' if still else 'some'} pair learns" for name, still in idle.items()),
                not any(idle.values()),
                "in f = w_out·relu(B A relu(W_in x)) the relu has no slope where B A = 0",
            ),
        ],
        [Table("Best pairs", ("step", "η_A, η_B", "η_B / η_A", "loss", "best equal rate", "its loss"), rows)],
        {
            "own_toy": Picture(
                "log2 of the training loss, mean over seeds. Star: best pair; circle: best of equal rates; cross: the "
                "caption's pair, and the same with the names swapped. White: diverged",
                lambda: _draw(found),
            )
        },
    )


def _draw(found: Tensor) -> Figure:
    """One panel for each step at which the loss is read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, len(READ_AT))
    logs = RATES.log2().tolist()
    for panel, step in zip(panels, READ_AT, strict=True):
        loss = found[..., step]
        values = loss.log2().where(loss < DIVERGED, torch.nan)
        mesh = panel.pcolormesh(logs, logs, values.T.numpy(), cmap="viridis", vmin=-6, vmax=0, shading="nearest")
        panel.plot(logs, logs, color="white", linewidth=1)
        a, b = best_cell(loss)
        equal = logs[int(loss.diagonal().argmin())]
        panel.plot(equal, equal, "o", markersize=8, markerfacecolor="none", markeredgecolor="white")
        panel.plot(logs[a], logs[b], "*", markersize=11, color="white", markeredgecolor="black", markeredgewidth=0.5)
        for x, y in (CAPTION, CAPTION[::-1]):
            panel.plot(math.log2(x), math.log2(y), "x", color="#D55E00", markeredgewidth=2)
        panel.set_title(f"step {step}")
        panel.set_xlabel("log2 η_A")
        panel.set_ylabel("log2 η_B")
    figure.colorbar(mesh, ax=panels, label="log2 of the loss", extend="both")
    return figure


if __name__ == "__main__":
    page.main(__doc__, run)
