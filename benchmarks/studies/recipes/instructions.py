"""Instructions and responses as DeepSeek-Coder's instruction models read them, with the loss on the response only."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

IGNORED = -100
END_OF_TURN = "<|EOT|>"
SYSTEM = (
    "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer."
)
"""What those models were trained with, as github.com/deepseek-ai/DeepSeek-Coder has it (MIT licence)."""


def prompt(instruction: str, system: str = SYSTEM) -> str:
    """The text that a model continues with the response; an empty ``system`` leaves no line."""
    lines = [system, "### Instruction:", instruction.strip(), "### Response:", ""]
    return "\n".join(lines if system else lines[1:])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that ends a response: DeepSeek's, or the tokenizer's own end where it does not know that one."""
    return END_OF_TURN if END_OF_TURN in tokenizer.get_vocab() else tokenizer.eos_token


def examples(rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, system: str = SYSTEM) -> Dataset:
    """Rows with ``instruction`` and ``output`` as ``input_ids``, ``attention_mask`` and ``labels``.

    A label is the token itself where the token begins in the response or after it, and ``IGNORED`` in the prompt. What
    is longer than ``length`` tokens is cut at its end; an example of which no response is left is dropped.

    Raises:
        ValueError: if a column is missing, or no example is left.
    """
    if missing := {"instruction", "output"} - set(rows.column_names):
        raise ValueError(f"the data have no column {sorted(missing)}, only {rows.column_names}")
    end = end_of_turn(tokenizer)

    def encoded(batch: dict[str, list[str]]) -> dict[str, Any]:
        prompts = [prompt(instruction, system) for instruction in batch["instruction"]]
        texts = [f"{asked}{answer}\n{end}" for asked, answer in zip(prompts, batch["output"], strict=True)]
        found = dict(tokenizer(texts, truncation=True, max_length=length, return_offsets_mapping=True))
        labels = [
            [token if start >= len(asked) else IGNORED for token, (start, _) in zip(tokens, places, strict=True)]
            for tokens, places, asked in zip(found["input_ids"], found.pop("offset_mapping"), prompts, strict=True)
        ]
        return found | {"labels": labels}

    tokens = rows.map(encoded, batched=True, remove_columns=rows.column_names)
    answered = tokens.filter(lambda row: any(label != IGNORED for label in row["labels"]))
    if not len(answered):
        raise ValueError(
            f"none of {len(rows)} examples has a response within {length} tokens; raise --model_max_length"
        )
    return answered
