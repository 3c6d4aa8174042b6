"""Fine-tune a plain PyTorch model with LoRA+: the part of the demo to read, and to copy into an own project."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from lora_plus import create_loraplus_optimizer, inject_lora, load_adapter, lora_summary, merge_and_unload, save_adapter

from . import phonemes, show
from .llama import Llama
from .settings import Settings
from .smollm2 import generate


def train(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[phonemes.Batch],
    steps: int,
    report: Callable[[float, int], None],
) -> int:
    """A plain training loop; the rates fall linearly to zero. Returns the steps done: Ctrl-C ends it early.

    ``report(loss, tokens)`` is called after every step.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    done = 0
    model.train()
    try:
        for batch in islice(batches, steps):
            loss = phonemes.token_losses(model, batch).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            done += 1
            report(loss.item(), batch.tokens.numel())
    except KeyboardInterrupt:
        pass  # what has been learnt so far is worth saving
    model.eval()
    return done


def run(
    settings: Settings,
    load_base: Callable[[], Llama],
    tokenizer: Tokenizer,
    entries: Sequence[phonemes.Entry],
    console: Console,
) -> bool:
    """The whole story: before, training, after, saved and reloaded, merged.

    Args:
        settings: See `Settings`.
        load_base: Makes the pretrained model; called twice, so that the adapter is reloaded into a fresh one.
        tokenizer: Of that model.
        entries: The dictionary; `Settings.held_out` of it are never trained on.
        console: Where the report is printed.

    Returns:
        Whether the trained, the reloaded and the merged model agree.
    """
    training, held_out = phonemes.split(entries, held_out=settings.held_out, seed=settings.seed)
    shown = held_out[: settings.samples]

    def losses(model: Llama) -> Tensor:
        return phonemes.evaluate(model, held_out, tokenizer)

    def answers(model: Llama) -> list[str]:
        prompts = [tokenizer.encode(phonemes.prompt(entry.word)).ids for entry in shown]
        texts = generate(model, prompts, new_tokens=settings.answer_tokens, end=phonemes.end_token(tokenizer))
        return [tokenizer.decode(text) for text in texts]

    with console.status("asking the base model"):
        model = load_base()
        before, answered = losses(model), answers(model)
    show.samples(console, "before", before, shown, answered)

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
    batches = phonemes.batches(training, tokenizer, settings.batch)
    with show.progress(console, settings.steps) as report:
        done = train(model, optimizer, batches, settings.steps, report)
    with console.status("asking the trained model"):
        trained, answered = losses(model), answers(model)
    show.samples(console, f"after {done} of {settings.steps} steps", trained, shown, answered)

    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "adapter.safetensors"
    with console.status("saving, reloading into a fresh model, merging"):
        save_adapter(model, path)
        model = load_base()
        load_adapter(model, path)
        reloaded = losses(model)
        merge_and_unload(model)
        merged = losses(model)
    return show.agreement(console, path, next(model.parameters()).dtype, trained, reloaded, merged)
