"""SmolLM2, a small Llama: how to load it from a GGUF file, its tokenizer, and how it continues prompts."""

from collections.abc import Sequence

import gguf
import torch
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from .llama import Config, Llama


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo the row order that GGUF files of Llama models use for q and k.

    There each head's rotary pairs lie side by side (rows 0 and 1, 2 and 3, ...); ``rotate`` pairs the two halves.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


GGUF_NAMES = {  # name in a block of the file -> name in Block
    "attn_norm": "attn_norm",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_output": "attn.o",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
}


def load_model(reader: gguf.GGUFReader, dtype: torch.dtype = torch.float32) -> Llama:
    """The model in an open GGUF file of the Llama architecture, dequantised to ``dtype``, in eval mode."""

    def field(name: str) -> float:
        return reader.fields[f"llama.{name}"].contents()

    config = Config(
        vocab=len(reader.fields["tokenizer.ggml.tokens"].data),
        width=int(field("embedding_length")),
        hidden=int(field("feed_forward_length")),
        layers=int(field("block_count")),
        heads=int(field("attention.head_count")),
        kv_heads=int(field("attention.head_count_kv")),
        rope_base=field("rope.freq_base"),
        norm_eps=field("attention.layer_norm_rms_epsilon"),
    )
    names = {"token_embd": "embed", "output_norm": "norm"}
    for n in range(config.layers):
        names |= {f"blk.{n}.{theirs}": f"layers.{n}.{ours}" for theirs, ours in GGUF_NAMES.items()}
    heads = {".attn_q.weight": config.heads, ".attn_k.weight": config.kv_heads}

    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        permuted = next((count for end, count in heads.items() if tensor.name.endswith(end)), None)
        if permuted:
            weight = unpermute(weight, permuted)
        state[f"{names[tensor.name.removesuffix('.weight')]}.weight"] = nn.Parameter(weight.to(dtype))
    state["head.weight"] = state["embed.weight"]  # the very same Parameter, so assigning keeps the two tied

    with torch.device("meta"):  # no time spent on random weights that are replaced at once
        model = Llama(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def make_tokenizer(tokens: Sequence[str], merges: Sequence[str], special: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer that splits numbers into digits, as SmolLM2's does."""
    bpe = models.BPE(
        {token: n for n, token in enumerate(tokens)},
        [(left, right) for left, right in (pair.split(" ") for pair in merges)],
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def load_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """The tokenizer described in an open GGUF file's metadata."""
    fields = reader.fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    return make_tokenizer(tokens, fields["tokenizer.ggml.merges"].contents(), special)


@torch.no_grad()
def generate(model: Llama, prompts: Sequence[Sequence[int]], *, new_tokens: int, end: int) -> list[list[int]]:
    """Greedy continuations of a batch of prompts, each cut before its first ``end`` token.

    Prompts of different length are padded on the right and each is continued at its own end: attention is
    causal, so no position sees the padding behind it. Everything is recomputed for every token, which is fine
    for short texts.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    rows = torch.arange(len(prompts))
    tokens = torch.full((len(prompts), int(lengths.max()) + new_tokens), end)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for step in range(new_tokens):
        last = torch.zeros_like(tokens, dtype=torch.bool)
        last[rows, lengths + step - 1] = True
        following = model(tokens, last).argmax(-1)
        tokens[rows, lengths + step] = following
        done |= following == end
        if done.all():
            break
    texts = [tokens[row, length : length + new_tokens].tolist() for row, length in enumerate(lengths.tolist())]
    return [text[: text.index(end)] if end in text else text for text in texts]
