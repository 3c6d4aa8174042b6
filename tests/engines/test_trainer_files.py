"""What the Trainer with LoRA+ has on disk: small checkpoints that open everywhere, runs resumed, the best model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_model import (
    BEST,
    OF_OTHERS,
    SAVED,
    SETTINGS,
    STEPS,
    examples,
    llama,
    lora_llama,
    randomised,
    run_state,
    same,
    trainer,
    transformers,
)

import lora_plus as lp
from lora_plus.files import adapter_state_dict

RATIO, LR = SETTINGS["loraplus_lr_ratio"], SETTINGS["learning_rate"]


@pytest.mark.filterwarnings(*OF_OTHERS)
def test_a_checkpoint_is_small_and_opens_everywhere(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = lora_llama()
    run = trainer(model, tmp_path, **SAVED)
    run.train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "run.safetensors", "optimizer.pt", "scheduler.pt",
        "rng_state.pth", "trainer_state.json", "training_args.bin",
    }  # fmt: skip
    tokens = examples()[0]["input_ids"][None]
    wanted = model.eval()(tokens).logits
    ours = lp.load_adapter(llama(), folder).eval()
    theirs = peft.PeftModel.from_pretrained(llama(), str(folder)).eval()
    assert torch.equal(ours(tokens).logits, wanted)
    assert (theirs(tokens).logits - wanted).abs().max() <= 1e-6
    run.save_model(str(tmp_path / "last"))
    assert {path.name for path in (tmp_path / "last").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "run.safetensors", "training_args.bin"
    }  # fmt: skip


class Bilinear(nn.Module):
    """No model of transformers; PEFT's format has no such layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.pairs = nn.Embedding(64, 4), nn.Bilinear(4, 4, 2)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.words(input_ids)
        return {"loss": self.pairs(x, x).square().mean()}


def test_other_adapters_and_those_that_peft_cannot_express(tmp_path: Path) -> None:
    model = lora_llama()
    lp.add_adapter(model, "second", r=2)
    trainer(model, tmp_path).save_model()
    assert same(adapter_state_dict(lp.load_adapter(llama(), tmp_path / "second")),
                adapter_state_dict(model, adapter="second"))  # fmt: skip
    model = lp.inject_lora(Bilinear(), ["pairs"])
    run = trainer(model, tmp_path / "pairs", **SAVED)
    run.train()
    saved = tmp_path / "pairs" / f"checkpoint-{STEPS}" / "default.adapter.safetensors"
    assert same(adapter_state_dict(lp.load_adapter(Bilinear(), saved)), adapter_state_dict(model))


def test_an_adapter_of_an_earlier_save_does_not_stay_beside_the_new_one(tmp_path: Path) -> None:
    run = trainer(lora_llama(), tmp_path)
    lp.add_adapter(run.model, "second", r=2)
    peft_files = {"adapter_config.json", "adapter_model.safetensors"}
    run.save_model()
    layer = run.model.model.layers[0].self_attn.q_proj
    for settings, native in ({"dropout": 0.5}, True), ({"dropout": 0.0}, False):
        adapter = layer.lora_adapters["second"]
        adapter.spec = replace(adapter.spec, **settings)  # PEFT has one for all layers
        run.save_model()
        there = {path.name for path in tmp_path.iterdir()}
        assert ("second.adapter.safetensors" in there) == native and peft_files <= there
        assert (peft_files <= {path.name for path in (tmp_path / "second").iterdir()}) != native
        path = tmp_path / ("second.adapter.safetensors" if native else "second")
        assert same(adapter_state_dict(lp.load_adapter(llama(), path)), adapter_state_dict(run.model, adapter="second"))


def test_only_what_peft_cannot_express_is_saved_in_another_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(lora_llama(), tmp_path)
    tried: list[Path] = []
    monkeypatch.setattr(
        "lora_plus.engines.transformers.save_adapter",
        lambda model, path, **settings: (tried.append(path), lp.save_adapter(model, path, **settings)),
    )
    with torch.no_grad():
        run.model.model.layers[0].self_attn.q_proj.lora_A["default"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"q_proj\.lora_A' has values that are not finite"):
        run.save_model()
    assert tried == [tmp_path] and not any(tmp_path.glob("*.safetensors"))


STARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pissa": {"init": "pissa", "targets": ["q_proj", "down_proj"]},
    "frozen A": {"variant": "lora_fa"},
    "dora": {"variant": "dora"},
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS.keys())
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(start: dict[str, Any], tmp_path: Path) -> None:
    whole, half = lora_llama(**start), lora_llama(seed=9, **start)
    trainer(whole, tmp_path, **SAVED).train()
    run = trainer(half, tmp_path / "other")
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(run_state(half), run_state(whole))
    assert {group["name"]: group["initial_lr"] for group in run.optimizer.param_groups}["lora_B"] == RATIO * LR


def test_parameters_trained_by_hand_are_resumed_too(tmp_path: Path) -> None:
    models = [lora_llama(), lora_llama(seed=9)]
    for model in models:
        model.lm_head.weight.requires_grad_(True)
    whole, half = models
    with pytest.warns(UserWarning, match="trained, but saved with no adapter: 'lm_head.weight'; name the modules in"):
        trainer(whole, tmp_path, **SAVED).train()
    with pytest.warns(UserWarning, match="trained, but saved with no adapter: 'lm_head.weight';"):
        trainer(half, tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not torch.equal(whole.lm_head.weight, llama().lm_head.weight)
    assert torch.equal(whole.lm_head.weight, half.lm_head.weight) and same(run_state(whole), run_state(half))


@pytest.mark.parametrize("ratio", [None, RATIO])
def test_a_run_that_could_not_be_saved_does_not_start(ratio: float | None, tmp_path: Path) -> None:
    model = lora_llama()
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"q_proj\.weight', .*: base weights under an adapter"):
        trainer(model, tmp_path, loraplus_lr_ratio=ratio, **SAVED).train()
    assert not list(tmp_path.glob("checkpoint*"))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer(lora_llama(), tmp_path, **SAVED).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio is 4.0, but the optimizer's groups note \[1.0, 16.0\]"):
        trainer(lora_llama(), tmp_path, loraplus_lr_ratio=4.0).train(resume_from_checkpoint=checkpoint)
    other = lora_llama(r=2, targets=["q_proj", "k_proj"])
    before = run_state(other)
    with pytest.raises(ValueError, match="does not fit the model, whose adapters must be those of its run") as caught:
        trainer(other, tmp_path).train(resume_from_checkpoint=checkpoint)
    text = str(caught.value)
    for line in (
        "'model.layers.0.self_attn.k_proj.lora_A.default' is in the model, and not in the file",
        "'model.layers.0.self_attn.v_proj.lora_A.default' is in the file, and not in the model",
        "'model.layers.0.self_attn.q_proj.lora_A.default' is ((4, 32), torch.float32) in the file",
    ):
        assert line in text
    assert same(run_state(other), before)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    best, last = lora_llama(), lora_llama()
    run = trainer(best, tmp_path, **SAVED, **BEST)
    run.train()
    assert Path(run.state.best_model_checkpoint).name == "checkpoint-2"
    trainer(last, tmp_path / "other").train()
    half = lp.load_adapter(llama(), tmp_path / "checkpoint-2")
    assert same(adapter_state_dict(best), adapter_state_dict(half)) and not same(run_state(best), run_state(last))


def test_the_base_that_save_pretrained_writes_is_whole(tmp_path: Path) -> None:
    model = randomised(lora_llama())
    model.save_pretrained(tmp_path)
    base, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert set(report["unexpected_keys"]) == {name for name in model.state_dict() if ".lora_" in name}
    assert same(base.state_dict(), llama().state_dict())
    lp.merge_and_unload(model).save_pretrained(tmp_path / "merged")
    tokens = examples()[0]["input_ids"][None]
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)
