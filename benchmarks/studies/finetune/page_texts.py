"""What the results page says in words."""

from __future__ import annotations

HEAD = """\
# Fine-tuning pretrained models: LoRA, LoRA+, and rules of thumb

{headline}

`python benchmarks/studies/finetune/sweep.py` (`make finetune`) does the runs, saves each in `finetune.jsonl`, and
writes this page from them. Models and data come from package registries and are checked by their SHA-256.

{total} runs, {minutes:.0f} CPU minutes, on one thread each; {machines}.

## How it was measured

**Methods.** r = {rank} unless a row says otherwise. Alpha is {scale:g} r, also at other ranks. "5 % of the weights" is
the rank at which A and B have 5 % as many parameters as the weights that they adapt. "q and v, as many" has as many
parameters as LoRA on all layers. Full fine-tuning trains all weights of the adapted blocks, and the head.

**Training.** All methods use AdamW without decay, no dropout, rates that fall linearly to zero, and the same batches
for the same seed. Classifiers start from a linear probe: the head is fitted to the frozen features first (its penalty
is chosen on validation examples), and is then trained with the adapters.

**Rates.** The rate of a method is the geometric mean of A's and B's rate; the head and the magnitudes learn at it. The
rate with the least mean validation loss over the seeds of the sweep is chosen. Every method has a grid with the same
number of rates; the grids of full fine-tuning and rank 64 lie lower. If the best rate is at an end of the grid, further
rates are tried there.

**Figures** are on test examples, with fresh seeds. Differences are paired by seed. The gradient init uses {batches}
more batches; it and the methods of another rank share LoRA's batches, but not its A. Ratio 64 was added after the plane
of the phonemes had been seen.
"""
LEGEND = """\
The tables show the mean ± standard error over seeds.

- **Difference**: the test loss minus LoRA's with the same seed. Below zero the method is better.
- **Steps**: the step at which the mean validation loss first reaches LoRA's final one, interpolated between checks.
- **Time**: the median CPU time of a training step, divided by LoRA's. It is left out for runs that did not take turns
  with LoRA's, because the machine was not equally busy.
- A rate in *italics* is at an end of the rates that were tried. A better one may lie outside.
"""
CAVEATS = """\
## Limits

- {judged} comparisons were made, each at the 95 % level of Student's t, without a correction for their number.
  About one in twenty differs by chance.
- The spread comes from A's start and the batches. Training, validation and test examples are the same for all seeds, so
  the spread does not cover other examples or other tasks.
- The runs are short ({steps} steps), the models small, and only their upper part is adapted. The results say nothing
  about long runs or large models.
- Rates in the grid differ by a factor of two, and the sweep has {sweeps} seeds. A method can be off its best rate by as
  much as the differences shown. If the table ranks a method above LoRA but the sweep ranks it below, it has not been
  shown to be better, whatever its t.
- A plane has one seed and many cells, so its least loss is partly luck. Fresh seeds, in the tables, show less.
- No comparison at one rate for all methods is shown: it would depend on the method whose rate was tuned."""
