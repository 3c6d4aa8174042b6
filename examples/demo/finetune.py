"""Fine-tune a plain PyTorch model with LoRA+: the part of the demo to read, and to copy into an own project."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from lora_plus import create_loraplus_optimizer, inject_lora, load_adapter, lora_summary, merge_and_unload, save_adapter

from . import answers, show
from .answers import Batch, Example, Verdict
from .llama import Llama
from .settings import Settings
from .smollm2 import generate


def train(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    steps: int,
    report: Callable[[float, int], None],
) -> None:
    """A plain training loop; the rates fall linearly to zero. Ctrl-C ends it early.

    ``report(loss, tokens)`` is called after every step.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    try:
        for batch in islice(batches, steps):
            loss = answers.mean_loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            report(loss.item(), batch.tokens.numel())
    except KeyboardInterrupt:
        pass  # what has been learnt so far is worth saving
    model.eval()


def run(
    settings: Settings,
    load_base: Callable[[], Llama],
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    console: Console,
) -> bool:
    """The whole story: before, training, after, saved and reloaded, merged.

    Args:
        settings: See `Settings`.
        load_base: Makes the pretrained model; called twice, so that the adapter is reloaded into a fresh one.
        tokenizer: Of that model.
        examples: All different; the first `Settings.held_out` are never trained on.
        console: Where the report is printed.

    Returns:
        Whether the trained, the reloaded and the merged model agree.
    """
    held_out, training = examples[: settings.held_out], examples[settings.held_out :]
    end = answers.end_token(tokenizer)

    def losses(model: Llama) -> Tensor:
        return answers.judge(model, held_out, tokenizer).losses

    def examine(model: Llama) -> tuple[Verdict, list[str]]:
        prompts = [tokenizer.encode(example.prompt).ids for example in held_out[: settings.samples]]
        texts = generate(model, prompts, new_tokens=settings.answer_tokens, end=end)
        return answers.judge(model, held_out, tokenizer), [tokenizer.decode(text) for text in texts]

    with console.status("asking the base model"):
        model = load_base()
        before = examine(model)

    inject_lora(
        model,
        settings.targets,
        r=settings.r,
        alpha=settings.alpha,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    summary = lora_summary(model)
    console.print(f"{len(summary.rows)} layers adapted, {summary.trainable:,} of {summary.total:,} parameters")
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=settings.lr, lr_ratio=settings.lr_ratio, weight_decay=0.0
    )
    with show.progress(console, settings.steps) as report:
        train(model, optimizer, answers.batches(training, tokenizer, settings.batch), settings.steps, report)
    with console.status("asking the trained model"):
        after = examine(model)
    show.comparison(console, held_out, before, after)

    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "adapter.safetensors"
    with console.status("saving, reloading into a fresh model, merging"):
        save_adapter(model, path)
        model = load_base()
        load_adapter(model, path)
        reloaded = losses(model)
        merge_and_unload(model)
        merged = losses(model)
    return show.agreement(console, path, next(model.parameters()).dtype, after[0].losses, reloaded, merged)
