"""What of the LoRA+ paper can be seen on a CPU in minutes? All experiments of this folder, written as one page.

Each script beside this one answers one question and runs alone.

    python benchmarks/studies/paper/reproduce.py
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

import coordinate_check
import curves
import heat_map
import linear_check
import lr_transfer
import own_toy
import torch
import two_starts
from page import Section, lines_of_table, markdown, save_pictures

import lora_plus

sys.path.append(str(Path(__file__).parents[2]))  # where the other benchmarks are
from report import processor

EXPERIMENTS = (linear_check, coordinate_check, heat_map, curves, lr_transfer, own_toy, two_starts)
"""In the order of the page."""


RESULTS = Path(__file__).parents[2] / "results"


def page(done: list[tuple[Section, float]], folder: str) -> str:
    """The results page; ``done`` are the sections with the CPU seconds that each took, pictures lie in ``folder``."""
    total = sum(seconds for _, seconds in done)
    parts = [
        [section.title, f"{sum(f.agrees for f in section.findings)} of {len(section.findings)}", f"{seconds:.0f}"]
        for section, seconds in done
    ]
    head = [
        "# The LoRA+ paper, reproduced",
        "",
        "Hayou, Ghosh and Yu 2024, *LoRA+: Efficient Low Rank Adaptation of Large Models* (arXiv:2402.12354). Each",
        "part compares a statement of the paper with a measurement.",
        "`python benchmarks/studies/paper/reproduce.py` (`make paper`) writes this page from what it measures.",
        "",
        f"torch {torch.__version__}, lora_plus {lora_plus.__version__}, Python {platform.python_version()}; "
        f"{processor('cpu')}, {torch.get_num_threads()} thread, {total:.0f} CPU seconds. Toys of one adapted "
        "layer, in float32 unless a part says otherwise. At the edge of stability another processor gives other "
        "digits.",
        "",
        *lines_of_table(("part", "statements that agree", "CPU seconds"), parts),
    ]
    return "\n".join([*head, *(markdown(section, folder) for section, _ in done)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "paper.md", help="the Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures = options.out.with_suffix("")
    done = []
    for experiment in EXPERIMENTS:
        start = time.process_time()
        section = experiment.run()
        done.append((section, time.process_time() - start))
        save_pictures(section, pictures)
        print(f"{section.title}: {done[-1][1]:.0f} CPU seconds", flush=True)
    options.out.write_text(page(done, pictures.name), encoding="utf-8")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
