"""What the results page says in words."""

from __future__ import annotations

HEAD = """\
# Fine-tuning pretrained models: LoRA, LoRA+, and rules of thumb

{headline}

`python benchmarks/studies/finetune/sweep.py` (`make finetune`) does the runs, keeps each in `finetune.jsonl`, and
writes this page from them. Models and data come from package registries and are checked by their SHA-256.

{total} runs, {minutes:.0f} CPU minutes, on one thread each; {machines}.

Where nothing else is said, r = {rank}; alpha is {scale:g} r, also at other ranks. "5 % of the weights" is the rank
whose A and B hold 5 % of the weights that they are on; "q and v, as many" has as many parameters as LoRA has on all
layers. Full fine-tuning trains all weights of the adapted blocks, and the head. All methods have AdamW without decay,
no dropout, rates that fall linearly to zero, and the same batches for the same seed. Classifiers start from the linear
probe: a head that was fitted to the frozen features first (its penalty chosen on validation examples), and that is
trained along.

The rate of a method is the geometric mean of A's and B's rate; head and magnitudes learn at it. It is chosen by the
mean validation loss over the seeds of the sweep, on grids of the same number of rates for every method, which lie lower
for full fine-tuning and rank 64; where the best rate is at an end of the grid, further ones are tried there. The
figures are on test examples, with fresh seeds. The gradient init looks at {batches} more batches; it is paired with
LoRA by its batches, not by its A. Methods of another rank are paired by their batches too.
Ratio 64 was added when the plane of the phonemes had been seen.
"""
LEGEND = """\
Mean ± standard error over seeds. "Difference" is that of the test loss to LoRA's with the same seed, below zero where
the method is better. "Steps" is when the mean validation loss first comes down to LoRA's final one, interpolated
between a few checks. "Time" is the median CPU time of a training step over LoRA's; it is left out where the runs did
not take turns with LoRA's, for the machine was not equally busy. A rate in *italics* is at an end of what was tried: a
better one may lie outside.
"""
CAVEATS = """\
## What may be said, and what not

- {judged} comparisons were made, each at the 95 % level of Student's t and without a correction for their
  number: about one in twenty separates by chance.
- The spread is that of A's start and the batches. Training, validation and test examples are the same for all seeds, so
  it says nothing about other examples, and a difference says nothing about other tasks.
- The runs are short ({steps} steps), the models small, and only their upper part is adapted. Nothing here speaks about
  long runs or large models.
- The grid has steps of a factor of two and the sweep has {sweeps} seeds: a method can be off its best rate by as much
  as the differences shown. A method that the table ranks above LoRA and the sweep below it has not been shown to be
  better, whatever its t.
- A plane has one seed and many cells, so that its least loss is partly luck: fresh seeds, in the tables, show less.
- A comparison at one rate for all methods, taken from LoRA or from LoRA+, is not shown, because it says which rate was
  tuned and nothing about the methods."""
