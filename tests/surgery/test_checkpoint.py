"""Merging into a checkpoint on the disk gives what merging in the model and saving it gives, bit for bit."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, Conv1D, randomise
from files_support import adapted_net, contents, finish, net, parts, start
from parameter_cases import PARAMETER_CASES, ParameterCase
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_plus
from lora_plus import merge_checkpoint
from lora_plus.files import tensor_file
from lora_plus.files.tensor_file import StoredTensor
from lora_plus.surgery.checkpoint import merge as checkpoint_merge
from lora_plus.surgery.checkpoint.folder import INDEX, WEIGHTS
from lora_plus.surgery.checkpoint.stream import stretches
from lora_plus.tensors import matrix as functional

Models = dict[str, Tensor]


def save(model: nn.Module | Models, path: Path, **metadata: str) -> Path:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, {"format": "pt", **metadata})
    return path


def shard(state: Models, folder: Path, count: int = 3) -> Path:
    """A folder as transformers writes it, with other files too."""
    folder.mkdir(parents=True)
    names = sorted(state)
    files = {name: f"model-{1 + index % count:05}-of-{count:05}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save({name: state[name] for name in names if files[name] == file}, folder / file)
    size = sum(tensor.nbytes for tensor in state.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size, "x": 1}, "weight_map": files}))
    (folder / "config.json").write_text("{}")
    return folder


def read(folder: Path) -> Models:
    """All tensors of a checkpoint folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(one: Models, other: Models, tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        torch.testing.assert_close(
            tensor, other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def merged_in_model(adapted: nn.Module) -> tuple[Models, dict[str, float]]:
    report = lora_plus.merge_lora(adapted)
    return {name: tensor.clone() for name, tensor in adapted.state_dict().items()}, report.lost


def refused(*arguments: Any, **options: Any) -> list[str]:
    """The problems of a merge, after checking that it left nothing behind."""
    folder = Path(arguments[2]).parent
    before = contents(folder)
    with pytest.raises(ValueError) as error:
        merge_checkpoint(*arguments, **options)
    assert contents(folder) == before
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return [line.removeprefix("  ") for line in str(error.value).split("\n")[1:]]


# ---- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *PARAMETER_CASES], ids=lambda case: case.name)
def test_equals_merging_in_the_model(case: Case | ParameterCase, dtype: torch.dtype, tmp_path: Path) -> None:
    adapted = case.adapted(dtype)
    base = save(case.model(dtype), tmp_path / "base.safetensors")
    lora_plus.save_adapter(adapted, tmp_path / "a.safetensors")
    report = merge_checkpoint(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    wanted, lost = merged_in_model(adapted)
    assert_same(load_file(tmp_path / "out.safetensors"), wanted)
    assert sorted(report.lost.values()) == sorted(lost.values())
    assert bool(lost) == (dtype != torch.float64)
    plain = load_file(base)
    changed = {name for name, tensor in wanted.items() if not torch.equal(tensor, plain[name])}
    assert set(report.merged) == changed
    assert set(report.copied) == plain.keys() - changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *PARAMETER_CASES], ids=lambda case: case.name)
def test_blocks_of_a_file_have_the_bits_that_merging_in_the_model_gives(
    case: Case | ParameterCase, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows at a time, with the adapter as it is and as DoRA, where that can be."""
    monkeypatch.setattr(functional, "block_elements", lambda device: 1)
    monkeypatch.setattr(functional, "_LEAST_ROWS", 2)
    base = save(case.model(dtype), tmp_path / "base.safetensors")
    adapters = [case.adapted(dtype)]
    with suppress(ValueError):
        adapters.append(case.adapted(dtype, variant="dora"))
    for number, adapted in enumerate(adapters):
        lora_plus.save_adapter(adapted, tmp_path / f"{number}.safetensors")
        report = merge_checkpoint(base, tmp_path / f"{number}.safetensors", tmp_path / f"out{number}.safetensors")
        wanted, lost = merged_in_model(adapted)
        assert_same(load_file(tmp_path / f"out{number}.safetensors"), wanted)
        assert sorted(report.lost.values()) == sorted(lost.values())


@pytest.mark.parametrize(
    ("layout", "shape", "starts", "wanted"),
    [
        # a block of rows is a stretch of its own
        ("o i -> o i", (5, 3), [0, 6, 12], (2, 3)),
        ("o i h w -> o (i h w)", (4, 3, 2, 2), [0, 24], (2, 3, 2, 2)),
        ("e o i -> e o i", (2, 4, 3), [0, 6, 12, 18], (1, 2, 3)),
        # of what lies across, the matrix is
        ("i o -> o i", (3, 5), [0], (3, 5)),
        ("e i o -> e o i", (2, 3, 4), [0, 12], (1, 3, 4)),
        ("i o h w -> o (i h w)", (3, 4, 2, 2), [0], (3, 4, 2, 2)),
    ],
)
def test_what_is_read_at_once_is_as_short_as_can_be(
    layout: str, shape: tuple[int, ...], starts: list[int], wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "_LEAST_ROWS", 2)
    weight, seen = torch.arange(math.prod(shape)).view(shape), []
    found = list(stretches(shape, functional.blocks(layout, shape, 1)))
    assert [first for first, _, _ in found] == starts
    assert found[0][1] == wanted
    for first, extent, blocks in found:
        part = weight.flatten()[first : first + math.prod(extent)].view(extent)
        for index, rows in blocks:
            inside = functional.to_matrix(part[index], layout)
            assert torch.equal(inside, functional.to_matrix(weight, layout)[rows])
            seen += inside.flatten().tolist()
    assert sorted(seen) == list(range(weight.numel()))


@pytest.mark.peers
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_merging_in_the_model_from_a_peft_folder(case: Case, tmp_path: Path) -> None:
    adapted = case.adapted()
    try:
        lora_plus.save_adapter(adapted, tmp_path / "a")
    except ValueError:
        pytest.skip("PEFT cannot express it")
    base = save(case.model(), tmp_path / "base.safetensors")
    merge_checkpoint(base, tmp_path / "a", tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), merged_in_model(adapted)[0], 1e-12)


def test_modules_trained_in_full_replace_the_bases(tmp_path: Path) -> None:
    adapted = adapted_net()
    base = save(net().bfloat16(), tmp_path / "base.safetensors")
    lora_plus.save_adapter(adapted, tmp_path / "a.safetensors")
    report = merge_checkpoint(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    model = lora_plus.load_adapter(net().bfloat16(), tmp_path / "a.safetensors")
    wanted = lora_plus.merge_and_unload(model).state_dict()
    assert_same(load_file(tmp_path / "out.safetensors"), wanted)
    assert {name.partition(".")[0] for name in report.replaced} == {"head"}
    assert len(report.replaced) == 7
    assert "replaced 7 tensors" in str(report)
    assert "merged 3 layers" in str(report)


def test_a_float64_adapter_is_merged_in_float64(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).bfloat16()
    base = save(model, tmp_path / "base.safetensors")
    randomise(lora_plus.inject_lora(model, ["0"], dtype=torch.float64))
    lora_plus.save_adapter(model, tmp_path / "a.safetensors")
    merge_checkpoint(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors", dtype=torch.float64)
    A, B = model[0].lora_A["default"], model[0].lora_B["default"]
    exact = load_file(base)["0.weight"].double() + 2 * B @ A
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["0.weight"], exact, rtol=0, atol=1e-15)


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
@pytest.mark.parametrize("dora", [False, True])
def test_equals_pefts_merge_on_a_llama(dora: bool, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double()
    model.save_pretrained(tmp_path / "base", max_shard_size="50KB")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]
    settings = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=targets, use_dora=dora, modules_to_save=["lm_head"],
        rank_pattern={"q_proj": 3}, alpha_pattern={"layers.1.mlp.up_proj": 5}, use_rslora=True,
    )  # fmt: skip
    theirs = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    report = merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert len(report.merged) == 15
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert_same(opened.state_dict(), theirs.merge_and_unload().state_dict(), 1e-12)


# ---- folders, dtypes, several adapters -------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a sharded base, the same as a file, and an adapter in both formats."""
    state = net().state_dict()
    shard(state, tmp_path / "base")
    save(state, tmp_path / "base.safetensors")
    adapted = adapted_net()
    lora_plus.save_adapter(adapted, tmp_path / "a.safetensors")
    lora_plus.save_adapter(adapted, tmp_path / "peft")
    return tmp_path


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_shards_give_what_one_file_gives(dtype: torch.dtype | None, files: Path) -> None:
    adapter = files / "a.safetensors"
    one = merge_checkpoint(files / "base.safetensors", adapter, files / "one.safetensors", dtype=dtype)
    several = merge_checkpoint(files / "base", adapter, files / "several", dtype=dtype)
    assert_same(read(files / "several"), load_file(files / "one.safetensors"))
    assert one.lost == several.lost
    assert {*one.merged} == {*several.merged}
    assert sorted(path.name for path in (files / "several").iterdir()) == sorted(
        path.name for path in (files / "base").iterdir()
    )
    index = json.loads((files / "several" / INDEX).read_text())
    before = json.loads((files / "base" / INDEX).read_text())
    size = sum(tensor.nbytes for tensor in read(files / "several").values())
    assert index == {"metadata": {"total_size": size, "x": 1}, "weight_map": before["weight_map"]}
    if dtype is None:
        assert contents(files / "several")[INDEX] == contents(files / "base")[INDEX]
    for path in (files / "several").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_shards_may_be_called_as_diffusers_calls_them(dtype: torch.dtype | None, files: Path) -> None:
    merge_checkpoint(files / "base", files / "a.safetensors", files / "out", dtype=dtype)
    index, name = files / "base" / INDEX, "diffusion_pytorch_model.safetensors.index.json"
    index.rename(index.with_name(name))
    merge_checkpoint(files / "base", files / "a.safetensors", files / "other", dtype=dtype)
    wanted = contents(files / "out")
    assert contents(files / "other") == {name if file == INDEX else file: data for file, data in wanted.items()}
    shutil.copy(index.with_name(name), index)
    line = f"the folder has both {name} and {INDEX}; remove what is not used"
    assert refused(files / "base", files / "a.safetensors", files / "more") == [line]


def test_many_missing_tensors_are_looked_for_in_a_table(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in all tensors of the checkpoint for each of them."""
    count, looked = 100, 0
    model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(count))
    base = save({f"x.{name}": tensor for name, tensor in model.state_dict().items()}, files / "many.safetensors")
    lora_plus.save_adapter(randomise(lora_plus.inject_lora(model, "all-linear", r=1)), files / "many-a.safetensors")

    class Counting(StoredTensor):
        def __getattribute__(self, name: str) -> Any:
            nonlocal looked
            looked += name == "shape"
            return super().__getattribute__(name)

    monkeypatch.setattr(tensor_file, "StoredTensor", Counting)
    assert refused(base, files / "many-a.safetensors", files / "out.safetensors")
    assert looked < 10 * count


def test_a_new_dtype_converts_all_floats_and_rounds_once(files: Path) -> None:
    out = files / "out.safetensors"
    merge_checkpoint(files / "base.safetensors", files / "a.safetensors", out, dtype=torch.bfloat16)
    exact, _ = merged_in_model(lora_plus.load_adapter(net(), files / "a.safetensors"))
    wanted = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in exact.items()}
    assert_same(load_file(out), wanted)


def test_tensors_lie_at_multiples_of_their_size(tmp_path: Path) -> None:
    """Readers map the file into memory; a new dtype changes where everything is."""
    model = nn.Sequential(nn.Linear(3, 1))
    model.register_buffer("count", torch.tensor([7], dtype=torch.int32))
    model.register_buffer("odd", torch.zeros(1))
    base = save(model, tmp_path / "base.safetensors")
    lora_plus.save_adapter(lora_plus.inject_lora(model, ["0"], r=1), tmp_path / "a.safetensors")
    merge_checkpoint(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors", dtype=torch.bfloat16)
    raw = (tmp_path / "out.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"]: entry["data_offsets"][0] % 4 for entry in header.values()}["I32"] == 0
    assert load_file(tmp_path / "out.safetensors")["count"] == 7


def test_the_same_input_gives_the_same_bytes(files: Path) -> None:
    for out in ("one", "two"):
        merge_checkpoint(files / "base", files / "a.safetensors", files / out)
    assert contents(files / "one") == contents(files / "two")


def test_shards_without_changes_are_copied_and_unchanged_tensors_keep_their_bits(files: Path) -> None:
    state = net().state_dict()
    state["head.0.bias"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 1.0])
    shutil.rmtree(files / "base")
    shard(state, files / "base", count=11)
    lora_plus.save_adapter(adapted_net(train_also=[]), files / "b.safetensors")
    report = merge_checkpoint(files / "base", files / "b.safetensors", files / "out")
    before, after = contents(files / "base"), contents(files / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    index = json.loads((files / "base" / INDEX).read_text())["weight_map"]
    assert changed == {index[name] for name in report.merged}
    assert len(report.merged) == 3


def test_two_adapters_are_the_explicit_sum(tmp_path: Path) -> None:
    base = save(net().double(), tmp_path / "base.safetensors")
    wanted = load_file(base)
    for seed, factor in ((1, 0.7), (2, -0.3)):
        changes = {"r": 1 + seed, "train_also": [], "rank_pattern": None}
        adapted = adapted_net(seed, **changes).double()
        lora_plus.save_adapter(adapted, tmp_path / f"{seed}.safetensors")
        plain = net().double().state_dict()
        for name, tensor in merged_in_model(adapted)[0].items():
            if tensor.is_floating_point():
                wanted[name] = wanted[name] + factor * (tensor - plain[name])
    paths = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    merge_checkpoint(base, paths, tmp_path / "out.safetensors", weights=[0.7, -0.3])
    assert_same(load_file(tmp_path / "out.safetensors"), wanted, 1e-12)


def test_two_adapters_on_rows_of_one_weight(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 12)).double()
    base, wanted = save(model, tmp_path / "base.safetensors"), model[0].weight.detach().clone()
    for seed, names in enumerate((["q", "k"], ["x", "y", "z"])):
        adapted = lora_plus.inject_lora(nn.Sequential(nn.Linear(6, 12)).double(), ["0"], r=2, fused={"0": names})
        randomise(adapted, seed)
        lora_plus.save_adapter(adapted, tmp_path / f"{seed}.safetensors")
        adapter = adapted[0].adapter_named("default")
        (A, B), scale = adapter.factors(), adapter.scale
        wanted += (seed + 1) * scale * (B @ A).detach()
    paths = [tmp_path / f"{seed}.safetensors" for seed in (0, 1)]
    merge_checkpoint(base, paths, tmp_path / "out.safetensors", weights=[1, 2])
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["0.weight"], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("format", ["a.safetensors", "peft"])
def test_names_are_mapped_by_prefix_or_function(format: str, files: Path) -> None:
    merge_checkpoint(files / "base.safetensors", files / format, files / "out.safetensors")
    wanted = load_file(files / "out.safetensors")
    inner = {f"body.net.{name}": tensor for name, tensor in net().state_dict().items()}
    save(inner, files / "inner.safetensors")
    several = {name: f"body.net.{name}" for name in ("embed", "conv", "proj")}
    for number, names in enumerate(
        ({"": "body.net"}, {"": "x", "head.": "body.net.head.", **several}, "body.net.{}".format)
    ):
        out = files / f"{number}.safetensors"
        merge_checkpoint(files / "inner.safetensors", files / format, out, names=names)
        assert_same(load_file(out), {f"body.net.{name}": tensor for name, tensor in wanted.items()})


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_pefts_square_matrices_follow_fan_in_fan_out(tmp_path: Path) -> None:
    """GPT-2: which way round a square weight is stored can be told if all others agree with the config."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8)
    for number, targets in enumerate((["c_attn", "c_proj"], ["c_attn", "c_proj", "lm_head"])):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).double()
        base = save(
            {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"} if not number
            else {n: t.clone() for n, t in model.state_dict().items()}, tmp_path / f"{number}.safetensors",
        )  # fmt: skip
        model.config.tie_word_embeddings = False
        settings = peft.LoraConfig(target_modules=targets, fan_in_fan_out=True)
        with pytest.warns(UserWarning) if number else pytest.MonkeyPatch.context():
            theirs = peft.get_peft_model(model, settings)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        theirs.save_pretrained(tmp_path / f"a{number}", save_embedding_layers=False)
        out = tmp_path / f"out{number}.safetensors"
        if number:
            lines = refused(base, tmp_path / "a1", out)
            assert lines == [
                "'transformer.h.0.attn.c_proj': whether its square weight is stored as (out, in) or as (in, out) "
                "cannot be told, because other layers differ from fan_in_fan_out, False; load the adapter into its "
                "model and save it as a .safetensors file"
            ]
        else:
            merge_checkpoint(base, tmp_path / "a0", out)
            wanted = {n: t for n, t in theirs.merge_and_unload().state_dict().items() if n != "lm_head.weight"}
            assert_same(load_file(out), wanted, 1e-12)


def test_a_square_weight_that_nothing_shows_to_be_transposed_is_named(tmp_path: Path) -> None:
    model = nn.ModuleDict({"extra": nn.Linear(6, 6), "c_attn": Conv1D(18, 6)})
    base = save(model.state_dict(), tmp_path / "base.safetensors")
    lora_plus.save_adapter(randomise(lora_plus.inject_lora(model, ["c_attn", "extra"], r=2)), tmp_path / "a")
    with pytest.warns(UserWarning, match=r"the square weights of 'extra' are taken as stored \(in, out\)"):
        merge_checkpoint(base, tmp_path / "a", tmp_path / "out.safetensors")


# ---- other files -----------------------------------------------------------------------------------------------------


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def side_files(folder: Path) -> dict[str, bytes]:
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    return {name: data for name, data in contents(folder).items() if not name.startswith("model")}


LEFT_OUT = [
    ".gitattributes", "adapter_config.json", "onnx/Model.ONNX", "original/consolidated.00.pth", "pytorch_model.bin",
    "sub/2.safetensors", "sub/adapter_config.json", "sub/deep/.key",
]  # fmt: skip
COPIED = ["config.json", "original/params.json", "sub/deep/x.txt", "tokenizer.json"]


def test_other_files_are_copied_but_no_weights_without_the_update_and_nothing_hidden(files: Path) -> None:
    base = files / "base"
    put(base, *LEFT_OUT, *COPIED, ".git/object", ".git/more/object", "sub/.cache/x")
    report = merge_checkpoint(base, files / "a.safetensors", files / "out")
    assert report.left_out == sorted([*LEFT_OUT, ".git", "sub/.cache"])
    assert f"left out {', '.join(report.left_out)}: " in str(report)
    assert side_files(files / "out") == {name: name.encode() for name in COPIED}


def test_links_are_followed_only_to_files_inside(files: Path) -> None:
    base = files / "base"
    put(base, "tokenizer.json", ".hidden", "weights.bin", "sub/x.txt")
    put(files, "secret.txt", "private/key.txt", "base-too/x.txt")
    links = {
        "link.json": "tokenizer.json", "sub/up.json": "../tokenizer.json", "twice.json": "link.json",
        "absolute.json": str(base / "sub" / "x.txt"),
    }  # fmt: skip
    bad = {
        "out.json": "../secret.txt", "out-absolute.json": str(files / "secret.txt"), "through.json": "out.json",
        "private": "../private", "too.json": "../base-too/x.txt", "sub/out.txt": "../../secret.txt", "loop": ".",
        "sub/loop": "..", "inside": "sub", "broken.json": "nothing", "round.json": "round.json",
        "hidden.json": ".hidden", "weights.json": "weights.bin", "by-folder.json": "private/key.txt",
    }  # fmt: skip
    for name, target in {**links, **bad}.items():
        (base / name).symlink_to(target)
    os.mkfifo(base / "fifo")
    report = merge_checkpoint(base, files / "a.safetensors", files / "out")
    assert report.left_out == sorted([*bad, ".hidden", "weights.bin", "fifo"])
    assert side_files(files / "out") == {
        "config.json": b"{}", "tokenizer.json": b"tokenizer.json", "sub/x.txt": b"sub/x.txt",
        "link.json": b"tokenizer.json", "sub/up.json": b"tokenizer.json", "twice.json": b"tokenizer.json",
        "absolute.json": b"sub/x.txt",
    }  # fmt: skip


@pytest.mark.parametrize("through", [False, True])
def test_links_into_a_model_cache_are_followed(through: bool, files: Path) -> None:
    snapshot, blobs = files / "models--a--b" / "snapshots" / "123", files / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    put(files / "base", "tokenizer.json", "sub/x.txt", "pytorch_model.bin")
    for number, path in enumerate(sorted(path for path in (files / "base").rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(files / "base")
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    put(files / "models--a--b", "refs/main")
    (snapshot / "main").symlink_to("../../refs/main")
    (files / "link").symlink_to(snapshot)
    report = merge_checkpoint(files / "link" if through else snapshot, files / "a.safetensors", files / "out")
    assert report.left_out == ["main", "pytorch_model.bin"]
    assert side_files(files / "out").keys() == {"config.json", "tokenizer.json", "sub/x.txt"}
    assert read(files / "out").keys() == net().state_dict().keys()


def test_other_files_are_copied_before_the_work(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copyfile, steps = shutil.copyfile, []

    def unreadable(source: Any, target: Any) -> None:
        if Path(source).name == "config.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", unreadable)
    with pytest.raises(PermissionError, match=r"base/config\.json"):
        merge_checkpoint(files / "base", files / "a.safetensors", files / "out", progress=lambda *_: steps.append(1))
    assert not steps
    assert not (files / "out").exists()


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_in_one_error(files: Path) -> None:
    state = net().state_dict()
    state["embed.weights"] = state.pop("embed.weight")
    state["proj.weight"] = torch.zeros(5, 7)
    state["conv.weight"] = state["conv.weight"].to(torch.float8_e4m3fn)
    state["head.0.extra"] = torch.zeros(1)
    state["head.1.num_batches_tracked"] = torch.zeros(())
    base = save(state, files / "bad.safetensors")
    assert refused(base, files / "a.safetensors", files / "out.safetensors") == [
        "'conv': 'conv.weight' is stored as F8_E4M3, to which an update cannot be added (it may be quantized); merge "
        "into the checkpoint in floating point that it was made from",
        "'proj': its weight has shape (5, 6) in the adapter, (5, 7) in the checkpoint",
        "'head' is trained in full, but 'head.0.extra' of the checkpoint is not in it",
        "'head.1.num_batches_tracked' is torch.int64 in the adapter, F32 in the checkpoint",
        "the checkpoint has no tensor 'embed.weight' (did you mean 'embed.weights' or 'head.1.weight' or "
        "'head.0.weight'?); if it is tied to 'embed.weights', which has the same shape, there is one tensor for both: "
        "save the base with the two untied first",
    ]


def test_problems_of_several_adapters_name_the_adapter(files: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in net().state_dict().items()}
    base = save(state, files / "bad.safetensors")
    lora_plus.save_adapter(adapted_net(train_also=[]), files / "b.safetensors")
    lines = refused(base, [files / "b.safetensors", files / "b.safetensors"], files / "out.safetensors")
    where = f"adapter {str(files / 'b.safetensors')!r}: the checkpoint has no tensor "
    assert len(lines) == 7
    assert all(line.startswith(where) for line in lines[1:])
    assert "'conv.weight' (did you mean 'model.conv.weight'" in lines[1]


@pytest.mark.parametrize(("old", "new"), [("", "net"), ("", "a.b"), ("model", ""), ("a.b", "")])
def test_a_prefix_that_all_names_lack_or_have_is_proposed_first(old: str, new: str, tmp_path: Path) -> None:
    def build(prefix: str) -> nn.Module:
        torch.manual_seed(0)
        return under(prefix, nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))

    base, out = save(build(new), tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    adapted = randomise(lora_plus.inject_lora(build(old), "all-linear"))
    lora_plus.save_adapter(adapted, tmp_path / "a.safetensors")
    first, *others = refused(base, tmp_path / "a.safetensors", out)
    assert first == f"did you mean names={{{old!r}: {new!r}}}, or --rename {old}={new}? So all are in the checkpoint"
    assert len(others) == 2 and not any("tied" in line for line in others)
    merge_checkpoint(base, tmp_path / "a.safetensors", out, names={old: new})
    merged = lora_plus.merge_and_unload(adapted).state_dict()
    wanted = {f"{new}.{name.removeprefix(f'{old}.')}".removeprefix("."): tensor for name, tensor in merged.items()}
    assert_same(load_file(out), wanted)


def under(prefix: str, model: nn.Module) -> nn.Module:
    for name in reversed(prefix.split(".") if prefix else []):
        model = nn.ModuleDict({name: model})
    return model


@pytest.mark.parametrize(
    "state",
    [
        {"a.0.weight": (6, 6), "b.0.weight": (6, 6)},  # two of them
        {"a.0.weight": (6, 6), "1.weight": (6, 6)},  # of one name only
        {"a.0.weight": (6, 6), "b.1.weight": (6, 6)},
        {"a0.weight": (6, 6)},  # no prefix
    ],
)
def test_no_prefix_is_proposed_where_it_is_not_the_one_answer(state: dict[str, Any], tmp_path: Path) -> None:
    base = save({name: torch.zeros(shape) for name, shape in state.items()}, tmp_path / "base.safetensors")
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(1 + any("1.weight" in name for name in state))))
    lora_plus.save_adapter(lora_plus.inject_lora(model, "all-linear"), tmp_path / "a.safetensors")
    lines = refused(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    assert lines[0].startswith("the checkpoint has no tensor '0.weight'") and "--rename" not in "".join(lines)


def test_a_base_that_was_saved_with_adapters_in_it_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"q": nn.Linear(6, 6), "lora_A": nn.ModuleDict({"x": nn.Linear(6, 6)})})
    model["lora_B"] = nn.Linear(6, 6)  # the base's own
    randomise(lora_plus.inject_lora(model, ["q"], variant="dora"))
    lora_plus.save_adapter(model, tmp_path / "a.safetensors")
    line = (
        "'q.lora_A.default' and 2 more: the base was saved with adapters in it; save it after remove_lora(model), or "
        "after merge_and_unload(model) to keep them"
    )
    base, out = save(model, tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    assert refused(base, tmp_path / "a.safetensors", out) == [line] and not out.exists()
    lora_plus.remove_lora(model)
    assert merge_checkpoint(save(model, tmp_path / "b.safetensors"), tmp_path / "a.safetensors", out).merged == [
        "q.weight"
    ]


def test_tied_weights_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(6, 5))
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "1.weight"}
    base = save(state, tmp_path / "base.safetensors", **{"1.weight": "0.weight"})
    for name in ("0", "1"):
        adapted = randomise(lora_plus.inject_lora(nn.Sequential(nn.Linear(6, 5), nn.Linear(6, 5)), [name]))
        lora_plus.save_adapter(adapted, tmp_path / f"{name}.safetensors")
    assert refused(base, tmp_path / "1.safetensors", tmp_path / "out.safetensors") == [
        "the checkpoint has no tensor '1.weight': it is tied to '0.weight', and the checkpoint has one tensor for "
        "both; save the base with the two untied first"
    ]
    assert refused(base, tmp_path / "0.safetensors", tmp_path / "out.safetensors") == [
        "'0': '0.weight' is also '1.weight', which its update would change too; save the base with the two untied first"
    ]


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {"model_type": "gpt2"}])
def test_an_embedding_that_may_be_the_head_too_is_warned_of(config: dict[str, Any], tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 5)})
    save(model, tmp_path / "base" / WEIGHTS)
    randomise(lora_plus.inject_lora(model, ["embed"]))
    lora_plus.save_adapter(model, tmp_path / "a.safetensors")
    merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "without")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="'embed.weight' may be the weight of the head too") as caught:
        merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "with")
    assert caught[0].filename == __file__


def test_dora_is_merged_alone_with_weight_one(files: Path) -> None:
    lora_plus.save_adapter(adapted_net(train_also=[], variant="dora"), files / "dora.safetensors")
    lora_plus.save_adapter(adapted_net(train_also=[]), files / "lora.safetensors")
    base, out = files / "base.safetensors", files / "out.safetensors"
    for paths, weights in ((["dora", "lora"], None), (["lora", "dora"], None), (["dora"], [0.5])):
        lines = refused(base, [files / f"{name}.safetensors" for name in paths], out, weights=weights)
        assert len(lines) == 3
        assert all("so a factor or a sum with another adapter is not defined" in line for line in lines)


def test_what_cannot_be_added_up_is_refused(files: Path) -> None:
    base, out = files / "base.safetensors", files / "out.safetensors"
    lora_plus.save_adapter(randomise(lora_plus.inject_lora(net(), ["head.0"])), files / "inside.safetensors")
    adapter = files / "a.safetensors"
    assert refused(base, adapter, out, weights=[2]) == ["weight 2 does not apply to ['head'], which it trains in full"]
    assert refused(base, [adapter, files / "inside.safetensors"], out) == [
        "'head.0.weight' is both adapted and trained in full"
    ]
    twice = refused(base, [adapter, adapter], out)
    assert len(twice) == 7
    assert all("is trained in full by another adapter too" in line for line in twice)
    one = lambda name: "proj.weight"  # noqa: E731
    lora_plus.save_adapter(randomise(lora_plus.inject_lora(nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5)}),
                                                           ["a", "b"])), files / "ab.safetensors")  # fmt: skip
    assert refused(base, files / "ab.safetensors", out, names=one) == [
        "'b': it changes rows of 'proj.weight' that another layer of the same adapter changes too"
    ]


def _of_layer(name: str, **changes: Any) -> Any:
    return lambda file: file.document["layers"][name].update(changes)


@pytest.mark.parametrize(
    ("edit", "lines"),
    [
        (_of_layer("proj", layout="i o -> o i"), ["'proj': unknown kind of layer 'Linear' with layout 'i o -> o i'"]),
        (_of_layer("proj", kind="Nothing"), ["'proj': unknown kind of layer 'Nothing' with layout 'o i -> o i'"]),
        (_of_layer("conv", kind="Conv2d", layout="o i h w -> o (i h w)"),
         ["'conv': its weight has shape (6, 2, 3), which is not 'o i h w'"]),
        (_of_layer("proj", rows=[3, 9]), ["'proj': rows [3, 9] of a weight that has 5"]),
        (_of_layer("proj", r=2),
         ["'proj': lora_A has shape (3, 6), expected (2, 6)", "'proj': lora_B has shape (5, 3), expected (5, 2)"]),
        (lambda file: file.put("proj.lora_A", torch.full((3, 6), float("nan"))),
         ["'proj.lora_A' has values that are not finite"]),
        (lambda file: file.put("head.0.bias", torch.zeros(6)),
         ["'head.0.bias' has shape (6,) in the adapter, (5,) in the checkpoint"]),
        (lambda file: file.put("head.0.bias", torch.full((5,), float("inf"))),
         ["'head.0.bias' has values that are not finite"]),
    ],
)  # fmt: skip
def test_a_file_that_says_something_else_is_refused(edit: Any, lines: list[str], files: Path) -> None:
    file = parts(files / "a.safetensors")
    edit(file)
    (files / "a.safetensors").write_bytes(file.bytes())
    assert refused(files / "base", files / "a.safetensors", files / "out") == lines


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"adapter": []}, ValueError, "no adapter given"),
        ({"weights": [1, 2]}, ValueError, "weights has 2 factors for 1 adapter$"),
        ({"weights": [0]}, ValueError, "weights must be finite and not zero"),
        ({"weights": [float("nan")]}, ValueError, "weights must be finite"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of"),
        ({"base": "nowhere"}, FileNotFoundError, "there is no checkpoint at"),
        ({"adapter": "nowhere"}, FileNotFoundError, "there is no adapter at"),
        ({"out": "base/new"}, ValueError, "out lies inside of base"),
        ({"out": "peft"}, FileExistsError, "exists already"),
        ({"base": "base.safetensors", "out": "a.safetensors"}, FileExistsError, "exists already"),
        ({"base": "base.safetensors", "out": "new"}, ValueError, "out must end in '.safetensors'"),
        ({"adapter": "base.safetensors"}, ValueError, "its header does not describe an adapter"),
        ({"adapter": "base"}, ValueError, "the folder has no adapter_config.json"),
        ({"base": "peft"}, ValueError, "peft' is an adapter, and a checkpoint was expected; give the checkpoint first"),
        ({"base": "a.safetensors", "adapter": "peft", "out": "b.safetensors"}, ValueError, "' is an adapter, and a "),
        ({"base": "peft", "adapter": "base"}, ValueError, "peft' is an adapter, and .*base' is none: the two seem"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str, files: Path) -> None:
    arguments = {"base": "base", "adapter": "a.safetensors", "out": "new", **options}
    paths = {name: files / value if isinstance(value, str) else value for name, value in arguments.items()}
    before = contents(files)
    with pytest.raises(error, match=message):
        merge_checkpoint(paths.pop("base"), paths.pop("adapter"), paths.pop("out"), **paths)
    assert contents(files) == before
    assert not (files / "new").exists()


@pytest.mark.skipif(os.name != "posix", reason="makes FIFOs")
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("base.safetensors", "it is a FIFO, neither a file nor a folder"),
        (f"base/{INDEX}", f"{INDEX} is a FIFO"),
        ("base/model-00002-of-00003.safetensors",
         "model-00002-of-00003.safetensors is not a whole safetensors file: {path!r} is a FIFO, not a regular file"),
    ],
)  # fmt: skip
def test_what_is_no_regular_file_is_refused_and_not_waited_for(name: str, line: str, files: Path) -> None:
    (files / name).unlink()
    os.mkfifo(files / name)
    told = [line.format(path=str(files / name))]
    assert refused(files / Path(name).parts[0], files / "a.safetensors", files / "out.safetensors") == told


@pytest.mark.parametrize("single", [True, False])
def test_errors_of_the_file_system_name_out(single: bool, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = files / ("out.safetensors" if single else "out"), os.link if single else os.rename

    def denied(*arguments: Any, **keywords: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(arguments[0]), None, str(arguments[1]))

    monkeypatch.setattr(os, rename.__name__, denied)
    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(PermissionError) as error:
        merge_checkpoint(files / out.name.replace("out", "base"), files / "a.safetensors", out)
    assert str(error.value) == f"[Errno 13] Permission denied: {str(out)!r}"
    assert not out.exists()


SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def _index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())


def _put_index(folder: Path, **changes: Any) -> None:
    index = _index(folder)
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **changes}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / INDEX).write_text("{"), "is not valid JSON"),
        (lambda f: (f / INDEX).write_text("[]"), "weight_map must give the name of a file"),
        (lambda f: _put_index(f, **{"embed.weight": "../base.safetensors"}), "got '../base.safetensors'"),
        (lambda f: _put_index(f, more=SHARDS[0]), "'more' is in no file, and"),
        (lambda f: _put_index(f, **{"embed.weight": SHARDS[0]}), "'embed.weight' is in model-"),
        (lambda f: shutil.copy(f / SHARDS[0], f / WEIGHTS), "has both model.safetensors and"),
        (lambda f: (f / SHARDS[1]).unlink(), "model-00002-of-00003.safetensors is not"),
        (lambda f: _put_index(f, **{"embed.weight": "\ud800.safetensors"}), "half of a pair of surrogates"),
        (lambda f: _put_index(f, **{"embed.weight": ""}), "got ''"),
        (lambda f: os.truncate(f / "model-00002-of-00003.safetensors", 300), "is not a whole safetensors file"),
        (lambda f: shutil.copy(f / SHARDS[0], f / SHARDS[1]),
         "is both in model-00001-of-00003.safetensors and model-00002"),
    ],
)  # fmt: skip
def test_a_broken_checkpoint_is_refused(damage: Any, message: str, files: Path) -> None:
    damage(files / "base")
    lines = refused(files / "base", files / "a.safetensors", files / "out")
    assert any(message in line for line in lines), lines


def test_what_pefts_format_does_not_say_is_refused(files: Path) -> None:
    config = json.loads((files / "peft" / "adapter_config.json").read_text())
    (files / "peft" / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": ["proj.weight"]}))
    assert refused(files / "base", files / "peft", files / "out") == [
        "how target_parameters are stored cannot be told without the model; load the adapter into its model and "
        "save it as a .safetensors file"
    ]
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)})
    base = save(model, files / "attention.safetensors")
    randomise(lora_plus.inject_lora(model, ["attn.q"]))
    lora_plus.save_adapter(model, files / "attention")
    assert refused(base, files / "attention", files / "out.safetensors") == [
        "'attn' is an attention module, whose parts cannot be told without the model; load the adapter into its model "
        "and save it as a .safetensors file"
    ]


# ---- what is read and written ----------------------------------------------------------------------------------------


def wide_checkpoint(folder: Path) -> Path:
    """Two shards of 8 MB in bfloat16, and an adapter on one of four weights in each."""
    state = {f"{index}.weight": torch.randn(1024, 1024).bfloat16() for index in range(8)}
    shard(state, folder / "base", count=2)
    model = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(8)).bfloat16()
    adapted = randomise(lora_plus.inject_lora(model, ["2", "5"], r=2))
    lora_plus.save_adapter(adapted, folder / "a.safetensors")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kernel", [True, False])
def test_each_byte_of_the_base_is_read_once_and_each_of_the_result_written_once(
    kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide_checkpoint(tmp_path)
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")
    merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "first")  # imports what it needs

    def counts() -> list[int]:
        lines = Path("/proc/self/io").read_text().splitlines()[:2]
        return [int(line.split()[1]) for line in lines]

    before = counts()
    merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    read_bytes, written = (after - start for after, start in zip(counts(), before, strict=True))
    size = sum(path.stat().st_size for path in (tmp_path / "base").iterdir())
    headers = 3 * 2**20  # a file's first megabyte is read for its header
    assert size <= read_bytes < size + headers + 2**19
    assert size <= written < size + 2**12


def test_neighbours_that_stay_are_copied_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the header, if they are the first."""
    if not hasattr(os, "copy_file_range"):
        pytest.skip("the system has no copy_file_range")
    wide_checkpoint(tmp_path)
    copy, copied = os.copy_file_range, []

    def noted(source: int, target: int, count: int, **offsets: int) -> int:
        done = copy(source, target, count, **offsets)
        copied.append(done)
        return done

    monkeypatch.setattr(os, "copy_file_range", noted)
    merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    assert sum(copied) == size - 2 * 2**21
    assert len([count for count in copied if count]) == 4


def refused_copy(*arguments: Any, **keywords: Any) -> int:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the system has no copy_file_range")
def test_the_bytes_are_the_same_however_the_system_copies(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, calls = os.copy_file_range, 0

    def part(source: int, target: int, count: int, **offsets: int) -> int:
        nonlocal calls
        calls += 1
        return copy(source, target, min(count, 100), **offsets) if calls % 3 else refused_copy()

    merge_checkpoint(files / "base", files / "a.safetensors", files / "out")
    for number, other in enumerate((refused_copy, lambda *_, **__: 0, part, None)):
        monkeypatch.delattr(os, "copy_file_range", raising=False)
        if other is not None:
            monkeypatch.setattr(os, "copy_file_range", other, raising=False)
        merge_checkpoint(files / "base", files / "a.safetensors", files / f"out{number}")
        assert contents(files / f"out{number}") == contents(files / "out")
    assert calls > 10


def test_all_but_the_changed_weights_stays_byte_for_byte(files: Path) -> None:
    """Also the header, whoever wrote it."""
    raw = (files / "base.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(dict(sorted(header.items(), reverse=True)), indent=1).encode()
    raw = len(text).to_bytes(8, "little") + text + raw[8 + length :]
    (files / "base.safetensors").write_bytes(raw)
    report = merge_checkpoint(files / "base.safetensors", files / "a.safetensors", files / "out.safetensors")
    changed = [header[name]["data_offsets"] for name in (*report.merged, *report.replaced)]
    start = 8 + len(text)
    out = (files / "out.safetensors").read_bytes()
    assert len(out) == len(raw)
    inside = {start + byte for begin, end in changed for byte in range(begin, end)}
    assert {at for at, (one, other) in enumerate(zip(raw, out, strict=True)) if one != other} <= inside


def test_a_finished_shard_is_flushed_beside_the_next_ones_arithmetic(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, last_begun, waited = checkpoint_merge.flush, threading.Event(), []

    def noted(path: Path) -> None:
        waited.append((path.name, last_begun.wait(20) if path.name == SHARDS[0] else True))
        flush(path)

    def progress(done: int, total: int) -> None:
        if done == total:
            last_begun.set()

    monkeypatch.setattr(checkpoint_merge, "flush", noted)
    merge_checkpoint(files / "base", files / "a.safetensors", files / "out", progress=progress)
    assert waited == [("config.json", True), (INDEX, True), *((name, True) for name in SHARDS)]


# ---- other processes at the same time --------------------------------------------------------------------------------


def replace_file(path: Path) -> None:
    """Put another file of the same size in its place, as downloads and git do."""
    written_to(shutil.copy(path, path.with_suffix(".new")))
    os.replace(path.with_suffix(".new"), path)


def written_to(path: Path) -> None:
    """Turn a bit of the last byte."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(0, 0))  # clocks of file systems are coarse


def shortened(path: Path) -> None:
    path.with_suffix(".new").write_bytes(b"short")
    os.replace(path.with_suffix(".new"), path)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("change", [replace_file, written_to, shortened, cut_short, Path.unlink])
@pytest.mark.parametrize(
    ("base", "moment"),
    [("base.safetensors", 0), ("base.safetensors", 3), ("base.safetensors", 10), ("base", 0), ("base", 3), ("many", 3)],
)
@pytest.mark.parametrize("adapter", ["a.safetensors", "embed.safetensors"])
def test_a_base_that_changes_meanwhile_is_an_error_that_names_the_file(
    base: str, moment: int, change: Any, adapter: str, files: Path
) -> None:
    """Whether its tensors are changed or copied, one by one or as a whole file."""
    shard(net().state_dict(), files / "many", count=11)
    lora_plus.save_adapter(randomise(lora_plus.inject_lora(net(), ["embed"], r=1)), files / "embed.safetensors")
    last = files / base if base.endswith(".safetensors") else sorted((files / base).glob("*.safetensors"))[-1]
    out = files / f"out{Path(base).suffix}"

    def progress(done: int, total: int) -> None:
        nonlocal moment
        if done > moment:
            change(last)
            moment = total

    with pytest.raises(OSError) as error:
        merge_checkpoint(files / base, files / adapter, out, progress=progress)
    assert str(last) in str(error.value)
    told = "became shorter" if change is cut_short and "became" in str(error.value) else "replaced or written to"
    assert told in str(error.value) or change is Path.unlink
    assert not out.exists()
    assert not list(files.glob(".*"))


def no_links(*arguments: Any, **keywords: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


def state_of(path: Path) -> Any:
    return os.readlink(path) if path.is_symlink() else contents(path) if path.is_dir() else path.read_bytes()


APPEARING = {
    "a file": lambda path: path.write_text("mine"),
    "an empty file": Path.touch,
    "a folder": make_folder,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to an empty folder": lambda path: ((path.parent / "empty").mkdir(), path.symlink_to("empty")),
}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("what", APPEARING)
@pytest.mark.parametrize("base", ["base.safetensors", "base"])
def test_what_appears_at_out_meanwhile_stays(
    base: str, what: str, links: bool, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = files / base.replace("base", "out")
    if not links:
        monkeypatch.setattr(os, "link", no_links)

    def progress(done: int, total: int) -> None:
        if done == total:
            APPEARING[what](out)

    for time in ("meanwhile", "before"):
        with pytest.raises(FileExistsError, match=rf"'{out}' .*; give another name"):
            merge_checkpoint(files / base, files / "a.safetensors", out, progress=progress)
        if time == "meanwhile":
            there = state_of(out)
        assert state_of(out) == there
        assert not list(files.glob(".*"))


@pytest.mark.parametrize("links", [True, False])
def test_an_empty_folder_may_be_there(links: bool, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    merge_checkpoint(files / "base", files / "a.safetensors", files / "one")
    (files / "two").mkdir()
    merge_checkpoint(files / "base", files / "a.safetensors", files / "two")
    merge_checkpoint(files / "base.safetensors", files / "a.safetensors", files / "three.safetensors")
    merge_checkpoint(files / "base.safetensors", files / "a.safetensors", files / "new" / "four.safetensors")
    assert contents(files / "one") == contents(files / "two")
    assert (files / "three.safetensors").read_bytes() == (files / "new" / "four.safetensors").read_bytes()
    assert not list(files.rglob(".*"))


def test_a_file_that_appears_in_an_empty_folder_meanwhile_stays(files: Path) -> None:
    """Though the merge has a file of that name, too."""
    (files / "out").mkdir()

    def progress(done: int, total: int) -> None:
        (files / "out" / "config.json").write_text("mine")

    with pytest.raises(FileExistsError, match=r"out' appeared meanwhile and was left as it is; give another name"):
        merge_checkpoint(files / "base", files / "a.safetensors", files / "out", progress=progress)
    assert contents(files / "out") == {"config.json": b"mine"}
    assert not list(files.glob(".*"))


def test_a_merge_that_fails_leaves_no_new_folders(files: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(files / "base", files / "a.safetensors", files / "new" / "more" / "out", progress=stop)
    assert not (files / "new").exists()


def stop(done: int, total: int) -> None:
    raise KeyboardInterrupt


# ---- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("single", [True, False])
def test_an_overflow_leaves_nothing(single: bool, files: Path) -> None:
    state = net().state_dict()
    state["proj.weight"][0, 0] = 1e6
    lora_plus.save_adapter(adapted_net(train_also=[]), files / "b.safetensors")
    base = save(state, files / "large.safetensors") if single else shard(state, files / "large")
    before = contents(files)
    with pytest.raises(
        ValueError, match=r"'proj.weight': the merged weight is not finite in torch.float16; nothing.*large"
    ):
        merge_checkpoint(base, files / "b.safetensors", files / "out.safetensors", dtype=torch.float16)
    state["proj.weight"][0, 0], state["proj.bias"][0] = 1, 1e6
    shutil.rmtree(base, ignore_errors=True)
    base = save(state, files / "large.safetensors") if single else shard(state, files / "large")
    with pytest.raises(
        ValueError, match=r"'proj.bias' is not finite in torch.float16; nothing was merged into .*large"
    ):
        merge_checkpoint(base, files / "b.safetensors", files / "out.safetensors", dtype=torch.float16)
    assert contents(files).keys() == before.keys()
    assert not (files / "out.safetensors").exists()


@pytest.mark.parametrize("calls", range(8))
@pytest.mark.parametrize("function", ["fsync", "rename", "link"])
@pytest.mark.parametrize("base", ["base", "base.safetensors"])
def test_an_interruption_anywhere_leaves_nothing(
    base: str, function: str, calls: int, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = files / base.replace("base", "out")
    before, left, real = contents(files), calls, getattr(os, function)

    def interrupted(*arguments: Any) -> Any:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return real(*arguments)

    monkeypatch.setattr(os, function, interrupted)
    try:
        merge_checkpoint(files / base, files / "a.safetensors", out)
    except KeyboardInterrupt:
        if not out.exists():
            assert contents(files) == before
            assert not list(files.glob(".*"))
            return
    monkeypatch.undo()
    # it was in its place already, and whole
    again = files / base.replace("base", "again")
    merge_checkpoint(files / base, files / "a.safetensors", again)
    compare = contents if out.is_dir() else Path.read_bytes
    assert compare(out) == compare(again)
    assert not list(files.glob(".*"))


DISK_FULL = """
import pathlib, resource, signal, sys, lora_plus
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
for base, out in (("base", "out"), ("base.safetensors", "out.safetensors")):
    try:
        lora_plus.merge_checkpoint(folder / base, folder / "a.safetensors", folder / out)
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_leaves_nothing(files: Path) -> None:
    before = contents(files)
    folder, file = finish(start(DISK_FULL, str(files))).splitlines()
    assert folder == f"[Errno 27] File too large: {str(files / 'out')!r}"
    assert file == f"[Errno 27] File too large: {str(files / 'out.safetensors')!r}"
    assert contents(files) == before
    assert not list(files.glob(".*"))


KILLED = """
import os, pathlib, signal, sys, lora_plus
from lora_plus.tensors.merged_weight import BlockMerge
folder, written, write = pathlib.Path(sys.argv[1]), 0, BlockMerge.write
def killed(*arguments):
    global written
    written += 1
    if written == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
BlockMerge.write = killed
for base, out in (("base", "out"), ("base.safetensors", "out.safetensors")):
    child = os.fork()
    if not child:
        lora_plus.merge_checkpoint(folder / base, folder / "a.safetensors", folder / out)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
def test_a_killed_run_leaves_no_result_and_the_next_one_clears_up(files: Path) -> None:
    before = contents(files)
    assert finish(start(KILLED, str(files))).split() == ["-9", "-9"]
    assert len(list(files.glob(".out.*.tmp"))) == 2  # one of each
    assert {name for name in contents(files) if not name.startswith(".")} == before.keys()
    for base, out in (("base", "out"), ("base.safetensors", "out.safetensors")):
        other = files / f".{out}.more.{'0' * 32}.tmp"  # of a run that writes another file
        other.mkdir()
        merge_checkpoint(files / base, files / "a.safetensors", files / out)
        other.rmdir()
    assert not list(files.glob(".*"))


# ---- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import pathlib, sys, torch, lora_plus
folder = pathlib.Path(sys.argv[1])
peak = lambda: int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
dtype = torch.float32 if sys.argv[2] == "convert" else None
for base in ("small", "base"):  # what torch loads when it computes for the first time is twice as much as a merge takes
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    lora_plus.merge_checkpoint(folder / base, folder / f"{base}.safetensors", folder / f"{base}-out", dtype=dtype)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("convert", ["keep", "convert"])
def test_memory_is_a_few_megabytes(convert: str, tmp_path: Path) -> None:
    """However large a weight is: here 64 MB, of which an allocator's habits are less than half."""
    for base, rows in (("small", 2**10), ("base", 2**14)):
        save({f"{i}.weight": torch.randn(rows, 2048).bfloat16() for i in range(2)}, tmp_path / base / WEIGHTS)
        model = nn.ModuleList(nn.Linear(2048, rows, bias=False, device="meta") for _ in range(2))
        targets = ["0", "1"] if convert == "keep" else ["0"]
        lora_plus.save_adapter(lora_plus.inject_lora(model, targets, r=1), tmp_path / f"{base}.safetensors")
    peak = int(finish(start(PEAK, str(tmp_path), convert))) * 1024
    assert (tmp_path / "base-out" / WEIGHTS).stat().st_size > 128e6
    assert peak < 32e6
