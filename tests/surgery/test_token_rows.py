"""Rows of tokens without training: merged into checkpoints, looked at, and refused where they have no meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_plus
from lora_plus import inject_lora, load_adapter, merge_checkpoint, save_adapter
from lora_plus.files import read_adapter
from lora_plus.surgery import combine_adapters, diff_saved, measure, resize_adapter

IDS = [7, 2, 8]
TOKENS = torch.tensor([[7, 1, 2, 0, 5], [4, 8, 3, 6, 7]])


class Language(nn.Module):
    """An embedding and a head, tied or not."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.mid, self.lm_head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.mid(self.embed_tokens(tokens))))


def adapted(rows: dict[str, list[int]], tied: bool = False, seed: int = 1) -> nn.Module:
    model = inject_lora(Language(tied), ["mid"], r=2, train_rows=rows)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


BOTH = {"embed_tokens": IDS, "lm_head": [0, 5]}


@pytest.mark.parametrize("path", ["adapter.safetensors", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_a_file_gives_the_bits_of_merging_in_the_model(path: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(BOTH).to(dtype)
    save_file(Language().to(dtype).state_dict(), tmp_path / "base.safetensors")
    save_adapter(model, tmp_path / path)
    merge_checkpoint(tmp_path / "base.safetensors", tmp_path / path, tmp_path / "out.safetensors")
    merged, expected = load_file(tmp_path / "out.safetensors"), lora_plus.merge_and_unload(model).state_dict()
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in merged)


def test_rows_of_another_base_come_out_as_they_are_in_the_file(tmp_path: Path) -> None:
    save_adapter(adapted(BOTH), tmp_path / "a.safetensors")
    base = {name: torch.randn_like(value) for name, value in Language().state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    merged, rows = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "a.safetensors")
    for name, ids in BOTH.items():
        torch.testing.assert_close(merged[f"{name}.weight"][ids], rows[f"{name}.lora_rows"])
        others = [each for each in range(9) if each not in ids]
        assert torch.equal(merged[f"{name}.weight"][others], base[f"{name}.weight"][others])


def test_a_checkpoint_has_one_tensor_for_a_tied_weight(tmp_path: Path) -> None:
    model = adapted({"embed_tokens": IDS}, tied=True)
    state = Language(tied=True).state_dict()
    del state["lm_head.weight"]
    save_file(state, tmp_path / "base.safetensors")
    save_adapter(model, tmp_path / "a.safetensors")
    merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    plain = Language(tied=True)
    plain.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=False)
    assert torch.equal(plain(TOKENS), lora_plus.merge_and_unload(model)(TOKENS))


def test_a_checkpoint_that_stores_tied_weights_apart_is_refused(tmp_path: Path) -> None:
    save_file(Language().state_dict(), tmp_path / "base.safetensors")
    save_adapter(adapted({"embed_tokens": IDS}, tied=True), tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"'embed_tokens.weight' and 'lm_head.weight', which the checkpoint stores apart"
    ):
        merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_factor_moves_rows_in_part(tmp_path: Path) -> None:
    model = adapted(BOTH)
    save_adapter(model, tmp_path / "a.safetensors")
    save_file(Language().state_dict(), tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "a.safetensors", out, weights=[0.5])
    lora_plus.set_adapter(model, {"default": 0.5})
    for name, value in lora_plus.merge_and_unload(model).state_dict().items():
        torch.testing.assert_close(load_file(out)[name], value)


def test_figures_and_differences(tmp_path: Path) -> None:
    save_adapter(adapted(BOTH), tmp_path / "a.safetensors")
    save_adapter(adapted(BOTH, seed=2), tmp_path / "b.safetensors")
    a, b = (read_adapter(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    rows, others = (each.layers["embed_tokens"].tensors["lora_rows"] for each in (a, b))
    told = measure("embed_tokens", a.layers["embed_tokens"])
    assert (told.r, told.dtype, told.norm) == (3, "float32", pytest.approx(float(rows.norm()), rel=1e-6))
    differences = {each.name: each.relative for each in diff_saved(a, b).layers}
    assert differences["embed_tokens"] == pytest.approx(float((rows - others).norm() / rows.norm()), rel=1e-6)
    assert diff_saved(a, a).equal


def test_another_rank_leaves_rows_as_they_are() -> None:
    model = adapted(BOTH)
    y, rows = model(TOKENS), model.embed_tokens.lora_rows["default"]
    resize_adapter(model, r=5)
    assert model.embed_tokens.lora_rows["default"] is rows and model.mid.lora_A["default"].shape == (5, 4)
    torch.testing.assert_close(model(TOKENS), y)


def test_rows_are_not_combined() -> None:
    model = adapted({"embed_tokens": IDS})
    inject_lora(model, ["mid"], r=2, train_rows={"embed_tokens": IDS}, adapter="b")
    with pytest.raises(ValueError, match="'embed_tokens': 'default' has rows of tokens there, which cannot be added"):
        combine_adapters(model, ["default", "b"])


WRITERS: dict[str, Any] = {
    "kohya": lambda model, path: save_adapter(model, path / "a.safetensors", format="kohya"),
    "diffusers": lambda model, path: save_adapter(model, path / "a.safetensors", format="diffusers"),
    "vllm": lambda model, path: lora_plus.export_adapter(model, path / "a", for_="vllm"),
    "llama.cpp": lambda model, path: lora_plus.export_adapter(model, path / "a", for_="llama.cpp", base_model="x"),
}


@pytest.mark.parametrize("program", WRITERS)
def test_formats_and_programs_without_rows_are_refused(program: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'embed_tokens': .*rows of tokens"):
        WRITERS[program](adapted({"embed_tokens": IDS}), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_converted_file_says_the_same(tmp_path: Path) -> None:
    save_adapter(adapted(BOTH), tmp_path / "a.safetensors")
    lora_plus.files.write_adapter(read_adapter(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert torch.equal(load_adapter(Language(), tmp_path / "b.safetensors")(TOKENS), adapted(BOTH)(TOKENS))
