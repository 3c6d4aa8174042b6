"""SmolLM2, a small Llama, as a plain PyTorch module, and how to load it from a GGUF file.

The architecture is Touvron et al. 2023 (arXiv:2302.13971) with grouped-query attention: RMSNorm, rotary
positions, SwiGLU, and a head that shares the embedding's weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import gguf
import torch
import torch.nn.functional as F
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of a model. ``TINY`` below is one for tests."""

    vocab: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    rope_base: float = 1e5
    norm_eps: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.heads


TINY = Config(vocab=260, width=32, hidden=48, layers=2, heads=4, kv_heads=2)


def rotary_angles(length: int, config: Config, device: torch.device) -> Tensor:
    """Angles of the rotary embedding, ``(length, head_width / 2)``, in float32 whatever the model's dtype."""
    exponents = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32) / config.head_width
    return torch.outer(torch.arange(length, device=device), config.rope_base**-exponents)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn ``x (b, heads, t, head_width)`` by ``angles (t, head_width / 2)``, pairing its two halves."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention, ``(b, t, width) -> (b, t, width)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.q = nn.Linear(config.width, config.heads * config.head_width, bias=False)
        self.k = nn.Linear(config.width, config.kv_heads * config.head_width, bias=False)
        self.v = nn.Linear(config.width, config.kv_heads * config.head_width, bias=False)
        self.o = nn.Linear(config.heads * config.head_width, config.width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (b, heads, t, head_width)
            for layer in (self.q, self.k, self.v)
        )
        group = q.shape[1] // k.shape[1]  # query heads that share one head of k and v
        q, k, v = rotate(q, angles), rotate(k, angles).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU, ``(..., width) -> (..., width)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), angles)
        return x + self.mlp(self.mlp_norm(x))


class SmolLM2(nn.Module):
    """The language model; randomly initialised until weights are loaded."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, at: Tensor | None = None) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: ``(b, t)`` token numbers.
            at: ``(b, t)`` bool, the positions whose logits are wanted. The vocabulary is large: leaving out the
                rest saves a good part of the work.

        Returns:
            ``(b, t, vocab)``, or ``(positions, vocab)`` with ``at``.
        """
        angles = rotary_angles(tokens.shape[1], self.config, tokens.device)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, angles)
        return self.head(self.norm(x if at is None else x[at]))


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


def load_model(reader: gguf.GGUFReader, dtype: torch.dtype = torch.float32) -> SmolLM2:
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
        model = SmolLM2(config)
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
def generate(model: SmolLM2, prompts: Sequence[Sequence[int]], *, new_tokens: int, end: int) -> list[list[int]]:
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
