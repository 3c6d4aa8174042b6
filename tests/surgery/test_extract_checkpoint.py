"""Extracting from checkpoints on the disk gives what extracting from the models gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Conv1D, randomise
from safetensors.torch import load_file
from test_checkpoint import replace_file, save, shard, written_to
from torch import nn

import lora_plus
from lora_plus.files import adapter_state_dict
from lora_plus.surgery import extract_adapter, extract_checkpoint


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 6), "c": Conv1D(5, 6)}) for _ in range(2))
        self.conv = nn.Conv1d(6, 4, 3)
        self.norm = nn.LayerNorm(6)


KINDS = {"embed": "Embedding", "c": "TransposedLinear", "conv": "Conv1d"}


def base(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Base().to(dtype)


def tuned(*names: str, seed: int = 3) -> nn.Module:
    """The base with noise on these tensors."""
    model, generator = base(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


ADAPTED = ["embed.weight", "layers.0.q.weight", "layers.1.c.weight", "conv.weight"]


def files(folder: Path, *names: str) -> tuple[Path, Path]:
    return save(base(), folder / "base.safetensors"), save(tuned(*names), folder / "tuned.safetensors")


def problems(*arguments: Any, **options: Any) -> list[str]:
    with pytest.raises(ValueError) as error:
        extract_checkpoint(*arguments, **options)
    assert not Path(arguments[2]).exists()
    return [line.removeprefix("  ") for line in str(error.value).split("\n")[1:]]


@pytest.mark.parametrize("r", [2, 6])
def test_equals_extracting_in_the_model(r: int, tmp_path: Path) -> None:
    report = extract_checkpoint(*files(tmp_path, *ADAPTED, "norm.bias"), tmp_path / "a.safetensors", r=r, kinds=KINDS)
    model = base()
    targets = [name.removesuffix(".weight") for name in ADAPTED]
    wanted = extract_adapter(model, tuned(*ADAPTED, "norm.bias"), targets=targets, r=r)
    assert report.errors == wanted.errors
    assert report.ranks == wanted.ranks
    assert report.ignored == wanted.ignored == ["norm.bias"]
    loaded = lora_plus.load_adapter(base(), tmp_path / "a.safetensors")
    ours, theirs = (adapter_state_dict(each) for each in (loaded, model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_at_full_rank_merging_gives_the_tuned_checkpoint(tmp_path: Path) -> None:
    before, after = files(tmp_path, *ADAPTED)
    extract_checkpoint(before, after, tmp_path / "a", r=9, kinds=KINDS, format="native")
    lora_plus.merge_checkpoint(before, tmp_path / "a", tmp_path / "again.safetensors")
    for name, tensor in load_file(tmp_path / "again.safetensors").items():
        torch.testing.assert_close(tensor, load_file(after)[name], rtol=1e-12, atol=1e-12)


def test_shards_and_other_dtypes_are_read(tmp_path: Path) -> None:
    before, after = (
        shard(base().state_dict(), tmp_path / "base"),
        shard(tuned(*ADAPTED).float().state_dict(), tmp_path / "t", 2),
    )
    steps = []
    report = extract_checkpoint(
        before,
        after,
        tmp_path / "a.safetensors",
        r=2,
        targets="q",
        progress=lambda done, total: steps.append((done, total)),
    )
    count = len(base().state_dict())
    assert steps == [(step, count) for step in range(1, count + 1)]
    assert set(report.ranks) == {"layers.0.q"}
    assert "layers.1.c.weight" in report.ignored


def test_targets_and_exclude_choose(tmp_path: Path) -> None:
    paths = files(tmp_path, *ADAPTED, "layers.1.q.weight")
    report = extract_checkpoint(
        *paths, tmp_path / "a.safetensors", r=1, targets="layers.*", exclude=["c", "layers.1.*"]
    )
    assert set(report.ranks) == {"layers.0.q"}
    assert report.ignored == ["conv.weight", "embed.weight", "layers.1.c.weight", "layers.1.q.weight"]


def test_a_tensor_that_one_lacks_or_that_changed_its_shape_is_reported(tmp_path: Path) -> None:
    state = tuned("layers.0.q.weight").state_dict()
    state["extra"], state["embed.weight"] = torch.ones(2), torch.ones(10, 6)
    del state["norm.bias"]
    before, after = save(base(), tmp_path / "base.safetensors"), save(state, tmp_path / "t.safetensors")
    report = extract_checkpoint(before, after, tmp_path / "a.safetensors", r=1)
    assert sorted(report.ignored) == ["embed.weight", "extra", "norm.bias"]
    lines = problems(before, after, tmp_path / "b.safetensors", r=1, targets=["embed", "q"])
    assert lines == ["'embed.weight' is F32 of shape (10, 6) in the tuned checkpoint, expected (9, 6)"]


def test_the_base_can_be_half_precision(tmp_path: Path) -> None:
    model = lora_plus.inject_lora(base(torch.bfloat16), ["q"], r=2)
    before = save(base(torch.bfloat16), tmp_path / "base.safetensors")
    lora_plus.merge_and_unload(randomise(model, size=1.0))
    report = extract_checkpoint(before, save(model, tmp_path / "t.safetensors"), tmp_path / "a.safetensors", r=2)
    assert all(error < 0.05 for error in report.errors.values())
    assert {tensor.dtype for tensor in load_file(tmp_path / "a.safetensors").values()} == {torch.float32}


def test_all_that_is_wrong_is_listed(tmp_path: Path) -> None:
    before, after = files(tmp_path, *ADAPTED)
    out = tmp_path / "a.safetensors"
    assert problems(
        before, after, out, r=1, targets=["layer.0.q", "norm"], exclude="z", kinds={"embd": "Embedding"}
    ) == [
        "kinds 'embd' matches no weight that can have an adapter (did you mean 'embed'?)",
        "exclude 'z' matches no weight that can have an adapter",
        "target 'layer.0.q' matches no weight that can have an adapter "
        "(did you mean 'layers.0.q' or 'layers.1.q' or 'layers.0.c'?)",
        "target 'norm' matches no weight that can have an adapter",
    ]
    assert problems(before, before, out, r=1) == [f"it is equal to {str(before)!r} in all targets"]
    other = save({"head.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    nothing = "no weight that can have an adapter is in both checkpoints with one shape, and not excluded"
    assert problems(before, other, out, r=1) == problems(before, after, out, r=1, exclude="*") == [nothing]
    with pytest.raises(ValueError, match="unknown kind of layer 'Dense'; choose one of"):
        extract_checkpoint(before, after, out, r=1, kinds={"embed": "Dense"})
    with pytest.raises(ValueError, match="r must be positive, got 0"):
        extract_checkpoint(before, after, out, r=0)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        extract_checkpoint(before, tmp_path / "none", out, r=1)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    before, after = files(tmp_path, *ADAPTED)
    state = load_file(after)
    state["layers.0.q.weight"][0, 0] = torch.nan
    save(state, after)
    assert problems(before, after, tmp_path / "a.safetensors", r=1) == [
        "'layers.0.q.weight' of the tuned checkpoint has values that are not finite"
    ]


@pytest.mark.parametrize("change", [replace_file, written_to])
@pytest.mark.parametrize("index", [0, 1])
def test_a_checkpoint_that_changes_meanwhile_is_an_error_that_names_the_file(
    index: int, change: Any, tmp_path: Path
) -> None:
    paths = files(tmp_path, *ADAPTED)

    def progress(done: int, total: int) -> None:
        if done == total - 1:
            change(paths[index])

    with pytest.raises(OSError, match=f"{paths[index].name}' was replaced or written to"):
        extract_checkpoint(*paths, tmp_path / "a.safetensors", r=1, kinds=KINDS, progress=progress)
    assert not (tmp_path / "a.safetensors").exists()


def test_what_is_equal_to_the_bit_is_equal_also_where_it_is_no_number(tmp_path: Path) -> None:
    states = base().state_dict(), tuned("layers.0.q.weight").state_dict()
    for state in states:
        state["norm.bias"][0] = state["embed.weight"][1, 1] = torch.nan
    states[1]["norm.weight"] = states[0]["norm.weight"].clone()
    states[0]["zero"], states[1]["zero"] = torch.zeros(()), -torch.zeros(())
    paths = [save(state, tmp_path / f"{number}.safetensors") for number, state in enumerate(states)]
    report = extract_checkpoint(*paths, tmp_path / "a.safetensors", r=1)
    assert set(report.ranks) == {"layers.0.q"}
    assert report.ignored == []


def test_embeddings_with_the_usual_names_are_extracted_as_embeddings(tmp_path: Path) -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        inner = nn.ModuleDict({"embed_tokens": nn.Embedding(9, 6), "q": nn.Linear(6, 6), "wte": nn.Linear(6, 6)})
        return nn.ModuleDict({"model": inner}).double()

    paths = [save(model(seed), tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    extract_checkpoint(*paths, tmp_path / "a.safetensors", r=6, kinds={"wte": "Linear"})
    loaded = lora_plus.merge_and_unload(lora_plus.load_adapter(model(0), tmp_path / "a.safetensors"))
    for name, tensor in model(1).state_dict().items():
        if name.endswith("weight"):
            torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=1e-12)
