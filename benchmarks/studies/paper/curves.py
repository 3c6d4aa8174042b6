"""How does the loss fall with tuned LoRA, with LoRA+ at its best pair of rates, and after a switch to ratio 16?

Two ways to switch are shown: raising B's rate alone, and keeping the geometric mean of both rates.

    python benchmarks/studies/paper/curves.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import heat_map
import page
import torch
from heat_map import SEEDS, WIDTHS, Sweep, mean_and_least, speed_up
from page import COLOURS, Finding, Picture, Section, Table, power
from torch import Tensor
from toy import draw_problem, tail, train

from lora_plus.training.groups import LR_MODES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAD = "µP"
RATIO = 16.0
RUNS = (
    "LoRA, tuned",
    "LoRA+, best cell",
    f"ratio {RATIO:g}, η_A kept",
    f"ratio {RATIO:g}, geometric mean kept",
)


def rates(swept: Sweep) -> Tensor:
    """The rates of `RUNS`, ``(runs, 2)``."""
    a, b = swept.best()
    tuned = swept.best_diagonal()
    best = (float(swept.rates_A[a]), float(swept.rates_B[b]))
    return torch.tensor([(tuned, tuned), best, LR_MODES["A"](tuned, RATIO), LR_MODES["geometric"](tuned, RATIO)])


def run() -> Section:
    """Train `RUNS` at the rates that the sweeps find."""
    used = {n: rates(heat_map.sweep(n, HEAD)) for n in WIDTHS}
    losses = {
        n: torch.stack([train(draw_problem(n, seed, head=HEAD), used[n]) for seed in range(SEEDS)]) for n in WIDTHS
    }  # (seeds, runs, steps + 1)
    rows, speeds = [], []
    for n, runs in losses.items():
        for index, name in enumerate(RUNS):
            speed = speed_up(runs[:, :1], runs[:, index : index + 1])
            final = tail(runs[:, index]).mean()
            reached = bool((final <= tail(runs[:, 0]).mean()) & speed.isfinite().all())
            pair = ", ".join(power(rate) for rate in used[n][index].tolist())
            rows.append([str(n), name, pair, f"{final:.2f}", mean_and_least(speed) if reached and index else ""])
            speeds += [float(speed.mean())] if reached else []
    return Section(
        "Learning curves",
        f"The task and the widths of the plane of learning rates, {HEAD} head, {SEEDS} seeds. LoRA's rate is the best "
        "of the fine diagonal; all rates are chosen on the mean over seeds. Speed-up: as there, for runs that "
        "reach the loss.",
        [
            Finding(
                "Fig. 7: with η_B = 2^4 η_A training takes half the steps",
                f"the largest speed-up, mean over seeds, of any run over tuned LoRA is {max(speeds):.2f}",
                max(speeds) >= 2,
                "against a finely tuned rate; a rate that is too low gives larger ones",
            )
        ],
        [Table("Runs", ("n", "run", "η_A, η_B", "S, mean over seeds", "speed-up, mean (least)"), rows)],
        {
            "curves": Picture(
                "Training loss, geometric mean over seeds; bands from the least to the largest", lambda: _draw(losses)
            )
        },
    )


def _draw(losses: Mapping[int, Tensor]) -> Figure:
    """One panel for each width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, len(losses), sharey=True)
    for panel, (n, runs) in zip(panels, losses.items(), strict=True):
        steps = range(runs.shape[-1])
        for index, name in enumerate(RUNS):
            logs = runs[:, index].log2()
            panel.fill_between(steps, logs.amin(0), logs.amax(0), color=COLOURS[index], alpha=0.15, linewidth=0)
            panel.plot(steps, logs.mean(0), color=COLOURS[index], linestyle=("-", "--", ":", "-.")[index], label=name)
        panel.set_title(f"n = {n}")
        panel.set_xlabel("step")
        panel.set_ylim(-14, 4)
    panels[0].set_ylabel("log2 of the training loss")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(RUNS))
    return figure


if __name__ == "__main__":
    page.main(__doc__, run)
