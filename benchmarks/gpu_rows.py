"""What does LoRA cost on a GPU, in time and in memory, beside the frozen model and PEFT?

The rows of `gpu.py`, which runs each in a process of its own, and says how to read them.

    python benchmarks/gpu_rows.py experts --device cuda
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comparing import NORMS, Contenders, Setting, backward_once, contenders, norms, show, why
from measuring import interleaved
from options import common_parser, parse
from peers import FLOOR, build, trainable
from report import Cell, Report
from torch import Tensor, nn
from workloads import LLAMA_TARGETS, Workload, language_model, placed

import lora_plus
from examples.demo.llama import TINY, Block, Config, Llama


class Experts(nn.Module):
    """Stacked matrices ``(experts, out, in)``, each for an equal share of the tokens, which come in order."""

    grouped = False
    """Whether one product of torch does it that takes shares of any size."""

    def __init__(self, experts: int, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, outputs, inputs) * inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, tokens = self.weight, x.flatten(0, 1)
        share = len(tokens) // len(weight)
        if not self.grouped:
            return torch.bmm(tokens.unflatten(0, (-1, share)), weight.mT).view(*x.shape[:2], -1)
        ends = torch.arange(share, len(tokens) + 1, share, device=x.device, dtype=torch.int32)
        return F.grouped_mm(tokens, weight.mT, offs=ends).view(*x.shape[:2], -1)


def grouped(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Experts):
            module.grouped = True


def experts(options: argparse.Namespace) -> list[Setting]:
    sizes, tokens = ((4, 32, 16), 32) if options.tiny else ((128, 2048, 768), 4096)
    among = contenders(theirs={"target_modules": [], "target_parameters": ["0.weight"]})
    make = lambda: nn.Sequential(Experts(*sizes))  # noqa: E731
    workload = Workload(make, lambda *shape: torch.randn(*shape, sizes[2]), ("0.weight",))
    title = f"{' x '.join(map(str, sizes))}, {tokens} tokens, r = 16, by "
    by_bmm = Setting(title + "torch.bmm", workload, (1, tokens), 16, among, replay=True)
    of_torch = hasattr(F, "grouped_mm")  # which older versions lack
    return [by_bmm, replace(by_bmm, title=title + "F.grouped_mm", prepare=grouped)] if of_torch else [by_bmm]


def stack(options: argparse.Namespace) -> tuple[Workload, int, int]:
    """Equal layers one after the other, their number, and their width."""
    layers, width = (2, 32) if options.tiny else (8, 4096)
    make = lambda: nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])  # noqa: E731
    embedded = lambda *shape: torch.randn(*shape, width)  # noqa: E731
    return Workload(make, embedded, tuple(map(str, range(layers)))), layers, width


def layers(options: argparse.Namespace) -> list[Setting]:
    workload, parts, width = stack(options)
    settings = []
    for tokens in (16,) if options.tiny else (2048, 4096, 8192):
        for p in (0.0, 0.1):
            title = f"{width} x {width}, {tokens} tokens, r = 16, dropout {p}; one of {parts} layers"
            among = contenders({"dropout": p}, {"lora_dropout": p})
            settings.append(Setting(title, workload, (1, tokens), 16, among, parts, replay=True))
    return settings


def dora(options: argparse.Namespace) -> list[Setting]:
    workload, parts, width = stack(options)
    tokens = 16 if options.tiny else 4096
    among: Contenders = {
        FLOOR: (FLOOR, {}),
        "lora_plus": ("lora_plus", {}),
        "lora_plus, DoRA": ("lora_plus", {"variant": "dora"}),
        "peft": ("peft", {}),
        "peft, DoRA": ("peft", {"use_dora": True}),
    }
    title = f"{width} x {width}, {tokens} tokens, r = 16; one of {parts} layers"
    return [Setting(title, workload, (1, tokens), 16, among, parts, replay=True)]


def llama(options: argparse.Namespace, targets: Sequence[str], r: int) -> Setting:
    """A Llama of the sizes of Llama-3.2-3B with random weights, and the loss of all positions."""
    config = Config(vocab=128256, width=3072, hidden=8192, layers=28, heads=24, kv_heads=8, rope_base=5e5)
    config, tokens = (TINY, (2, 8)) if options.tiny else (config, (4, 768))
    made = language_model(lambda: Llama(config), config, 0)
    workload = Workload(made.make, made.input, tuple(targets), output=made.output)
    title = f"{', '.join(targets)}, r = {r}, {tokens[0]} x {tokens[1]} tokens"
    return Setting(title, workload, tokens, r, optimizer=True)


def compiled(options: argparse.Namespace) -> list[Setting]:
    backend = "aot_eager" if options.tiny else "inductor"
    torch._dynamo.config.recompile_limit = 64  # all implementations share the code of a block

    def by_block(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(backend=backend)

    cases = ((LLAMA_TARGETS, 16), (("q", "v"), 32))
    return [replace(llama(options, *case), prepare=by_block) for case in cases]


def optimizer_step(report: Report, options: argparse.Namespace) -> None:
    """AdamW's step on the adapters of all linear layers, in one group and in LoRA+'s."""
    setting = llama(options, LLAMA_TARGETS, 16)
    base, x = placed(setting.workload, setting.tokens, options.dtype[0], options.device)
    models, lines = dict[str, nn.Module](), list[list[Cell]]()
    for peer in ("lora_plus", "peft"):
        try:
            models[peer] = build(peer, base, setting.workload.targets, setting.r)
            backward_once(setting.workload, models[peer], x)
        except Exception as error:
            lines.append([peer, why(error), *[""] * 4])
    for kernel in ("foreach", "fused"):
        own: Any = {kernel: True, "lr": 1e-6}
        made = {}
        for peer, model in models.items():
            if peer == "lora_plus":
                made[f"{kernel}, one group"] = (model, torch.optim.AdamW(trainable(model), **own))
                made[f"{kernel}, LoRA+"] = (
                    model, lora_plus.create_loraplus_optimizer(model, torch.optim.AdamW, lr_ratio=4, **own)
                )  # fmt: skip
            else:
                from peft.optimizers import create_loraplus_optimizer

                theirs: Any = create_loraplus_optimizer(model, torch.optim.AdamW, loraplus_lr_ratio=4, **own)
                made[f"{kernel}, LoRA+ of PEFT"] = (model, theirs)
        seconds = interleaved({label: optimizer.step for label, (_, optimizer) in made.items()}, options)
        for label, (model, optimizer) in made.items():
            ratio = seconds[label].over(seconds[f"{kernel}, one group"])
            lines.append([label, str(len(optimizer.param_groups)), seconds[label], ratio, *norms(model)])
    title = f"AdamW on {len(trainable(models['lora_plus']))} tensors of float32"
    report.table(title, ("optimizer", "groups", "step", "step / one group (quartiles)", *NORMS), lines)


@dataclass(frozen=True)
class Row:
    """What one process measures."""

    title: str
    about: str
    """Its sizes, and what to read it beside."""
    seconds: float
    """At most."""
    measure: Callable[[Report, argparse.Namespace], None]


def _tables(*of: Callable[[argparse.Namespace], list[Setting]]) -> Callable[[Report, argparse.Namespace], None]:
    return lambda report, options: show(report, [setting for each in of for setting in each(options)], options)


ROWS = {
    "experts": Row(
        "Stacked experts",
        "128 experts of 2048 x 768, r = 16, 4096 tokens in equal shares. PEFT's own figures on an H100, in its pull\n"
        "request 3577: 2.56 ms and 1.30 GB, from 4.97 ms and 2.02 GB.",
        60,
        _tables(experts),
    ),
    "attention": Row(
        "The shape of Llama-3.2-3B, q and v",
        "r = 32, 4 x 768 tokens, the loss of all positions, AdamW's step included. PEFT's MetaMathQA table, on an\n"
        "L40S with sequences of up to 768 tokens, has 7,245 tokens/s and 20.76 GB.",
        80,
        _tables(lambda options: [llama(options, ("q", "v"), 32)]),
    ),
    "layers": Row(
        "One linear layer",
        "4096 x 4096, r = 16, 2048 to 8192 tokens, without dropout and with. LoRAFusion (arXiv:2510.00206) names up\n"
        "to 1.39 times the speed of PEFT on an H100, as CUDA graphs, dropout 0.1.",
        80,
        _tables(layers),
    ),
    "all-linear": Row(
        "The shape of Llama-3.2-3B, all linear layers",
        "r = 16, and all else as with q and v.",
        80,
        _tables(lambda options: [llama(options, LLAMA_TARGETS, 16)]),
    ),
    "dora": Row("DoRA", "4096 x 4096, r = 16, 4096 tokens: LoRA and DoRA.", 50, _tables(dora)),
    "optimizer": Row(
        "The optimizer's step",
        "AdamW on the adapters of all linear layers of the Llama, r = 16, in one group and in the groups of LoRA+.",
        50,
        optimizer_step,
    ),
    "compiled": Row(
        "The shape of Llama-3.2-3B, compiled",
        "All linear layers with r = 16, and q and v with r = 32, through Inductor one block at a time: all blocks of\n"
        "a model share one graph.",
        180,
        _tables(compiled),
    ),
}
"""By name, what tells most first."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiny", action="store_true", help="sizes that show that it runs, and nothing else")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("rows", nargs="+", choices=ROWS)
    parser.add_argument("--into", type=Path, help="a folder for a JSON of each row")
    add_options(parser)
    options = parse(parser)
    if options.tiny:
        options.short, options.rounds = True, 2
    for name in options.rows:
        if options.into:
            options.json = options.into / f"{name}.json"
        report = Report(__doc__, options)
        ROWS[name].measure(report, options)
        report.close()


if __name__ == "__main__":
    main()
