"""A file is refused for what its header says, whatever it says, before its data is read."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from files_support import Parts, assemble, net, parts, refused
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import lora_plus
from lora_plus.files import read_adapter
from lora_plus.files.tensor_file import LONGEST_NAME, TensorFile, open_safetensors

ABSURD: dict[str, Any] = {
    "2**63": [2**63, 6], "2**63 - 1 twice": [2**63 - 1, 2**63 - 1], "10**30": [10**30, 6],
    "10**10 twice": [10**10, 10**10],
    "true": [True, 6], "negative": [-5, -6], "zero": [0, 6], "a number with a point": [5.0, 6], "nested": [[5], 6],
    "one": [30], "an object": [{}, 6],
}  # fmt: skip
WEIGHT = {"parameter": "proj.weight"}
FACTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"groups {value!r}": ("conv", {"groups": value}) for value in ("x", 0, -2, True, 4, 2.0, [], None)},
    **{f"max_norm {value!r}": ("embed", {"max_norm": value}) for value in ("x", -1, True, [], 10**400)},
    **{f"of {value!r}": ("proj", {"kind": "Parameter", **WEIGHT, "of": value}) for value in ([], "x", 1)},
    **{f"rows {value!r}": ("proj", {**WEIGHT, "rows": value}) for value in ([True, 2], "x", [0, 1.0])},
    "groups of a linear layer": ("proj", {"groups": 1}),
    "rows of no parameter": ("proj", {"rows": [0, 5]}),
    "a parameter without its name": ("proj", {"kind": "Parameter"}),
    "the parameter of a layer": ("proj", {"parameter": "proj.weight"}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(net().state_dict(), path)
    return path


def everywhere(path: Path, checkpoint: Path) -> list[str]:
    """What each reader of adapters says of a file, after checking that it names it and says it at once."""
    texts = []
    for read in (
        lambda: lora_plus.load_adapter(net(), path),
        lambda: read_adapter(path),
        lambda: lora_plus.merge_checkpoint(checkpoint, path, path.parent / "out.safetensors"),
    ):
        started = time.process_time()
        with pytest.raises((ValueError, OSError)) as error:
            read()
        assert time.process_time() - started < 2
        texts.append(str(error.value))
    assert all(path.name in text for text in texts[:2])
    return texts


@pytest.mark.parametrize("case", [*ABSURD, *FACTS])
def test_a_layer_that_cannot_be_is_refused_by_every_reader(
    case: str, native_bytes: bytes, tmp_path: Path, checkpoint: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(native_bytes)
    file = parts(path)
    name, changes = FACTS[case] if case in FACTS else ("proj", {"shape": ABSURD[case]})
    file.document["layers"][name].update(changes)
    path.write_bytes(file.bytes())
    assert all(f"{name!r}" in text for text in everywhere(path, checkpoint))


def test_a_shape_that_equals_the_model_s_is_one_of_integers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_plus.save_adapter(lora_plus.inject_lora(nn.Sequential(nn.Linear(3, 1)), ["0"], r=1), path)
    file = parts(path)
    file.document["layers"]["0"]["shape"] = [True, 3]
    path.write_bytes(file.bytes())
    assert refused(nn.Sequential(nn.Linear(3, 1)), path) == ["'0': its weight has shape (True, 3), which is not 'o i'"]


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**63 - 1, 2], [2**60, 0]])
def test_a_tensor_without_elements_has_a_shape_too(shape: list[int], native_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(native_bytes)
    file = parts(path)
    file.tensors["proj.lora_A"] = ("F32", shape, b"")
    path.write_bytes(file.bytes())
    assert refused(net(), path) in (
        [f"tensor 'proj.lora_A' has shape {tuple(shape)}, which no tensor can have"],
        [line for line in refused(net(), path) if "not a whole safetensors file" in line],
    )


def test_a_shape_of_many_dimensions_is_refused_at_once(native_bytes: bytes, tmp_path: Path, checkpoint: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(native_bytes)
    file = parts(path)
    file.tensors["proj.lora_A"] = ("F32", [2**63 - 1] * 40_000, b"")
    path.write_bytes(file.bytes())
    assert all("has 40,000 dimensions, expected at most 64" in text for text in everywhere(path, checkpoint))


def test_a_name_has_a_length(native_bytes: bytes, tmp_path: Path) -> None:
    path, name = tmp_path / "a.safetensors", "a." * LONGEST_NAME
    path.write_bytes(native_bytes)
    file = parts(path)
    file.put(name, torch.ones(1))
    path.write_bytes(file.bytes())
    (line,) = refused(net(), path)
    assert line.startswith("tensor 'a.a.a.") and len(line) < 1000
    assert line.endswith(f".a.' has a name of {2 * LONGEST_NAME} characters, expected at most {LONGEST_NAME}")


ALPHAS = {
    "F4": ("F4", [2], b"\x11"), "F8_E4M3": ("F8_E4M3", [], b"\x11"), "BOOL": ("BOOL", [], b"\x01"),
    "C64": ("C64", [], bytes(8)), "U64": ("U64", [], bytes(8)), "F8_E8M0": ("F8_E8M0", [1], b"\x7f"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ALPHAS)
@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
def test_an_alpha_is_a_number(dtype: str, spelling: str, tmp_path: Path, checkpoint: Path) -> None:
    path, module = tmp_path / "a.safetensors", {"kohya": "lora_unet_proj", "diffusers": "proj"}[spelling]
    down, up = {"kohya": ("lora_down", "lora_up"), "diffusers": ("lora_A", "lora_B")}[spelling]
    file = Parts({}, None)
    file.put(f"{module}.{down}.weight", torch.ones(2, 6))
    file.put(f"{module}.{up}.weight", torch.ones(5, 2))
    file.tensors[f"{module}.alpha"] = ALPHAS[dtype]
    path.write_bytes(assemble(file.tensors, {}))
    for text in everywhere(path, checkpoint)[::2]:
        assert "alpha" in text and ("a number" in text or "is not read" in text)


def test_an_alpha_may_be_an_integer(tmp_path: Path) -> None:
    file, path = Parts({}, None), tmp_path / "a.safetensors"
    file.put("lora_unet_proj.lora_down.weight", torch.ones(2, 6))
    file.put("lora_unet_proj.lora_up.weight", torch.ones(5, 2))
    file.put("lora_unet_proj.alpha", torch.tensor(8))
    path.write_bytes(assemble(file.tensors, {}))
    assert lora_plus.load_adapter(net(), path).proj.lora_adapters["default"].spec.alpha == 8


# ---- texts that no other text can have -------------------------------------------------------------------------------


def surrogate_in_a_document(folder: Path, native_bytes: bytes) -> Path:
    path = folder / "a.safetensors"
    path.write_bytes(native_bytes)
    file = parts(path)
    file.document["metadata"] = {"note": "\ud800"}
    path.write_bytes(file.bytes())
    return path


def surrogate_in_a_config(folder: Path, native_bytes: bytes) -> Path:
    lora_plus.save_adapter(lora_plus.inject_lora(net(), ["proj"], r=1), folder / "a")
    config = folder / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "\udfff"}))
    return folder / "a"


@pytest.mark.parametrize("write", [surrogate_in_a_document, surrogate_in_a_config])
def test_half_of_a_pair_of_surrogates_is_refused(
    write: Callable[[Path, bytes], Path], native_bytes: bytes, tmp_path: Path, checkpoint: Path
) -> None:
    path = write(tmp_path, native_bytes)
    assert all("half of a pair of surrogates" in text for text in everywhere(path, checkpoint))


def test_a_text_outside_of_the_basic_plane_is_read(tmp_path: Path) -> None:
    model = lora_plus.inject_lora(nn.ModuleDict({"😀": nn.Linear(2, 2)}), ["😀"], r=1)
    lora_plus.save_adapter(model, tmp_path / "a.safetensors", metadata={"note": "😀"})
    lora_plus.load_adapter(nn.ModuleDict({"😀": nn.Linear(2, 2)}), tmp_path / "a.safetensors")


# ---- files of any size -----------------------------------------------------------------------------------------------

HUGE = 20 * 2**30


def sparse(path: Path, tensors: dict[str, list[int]], metadata: dict[str, str]) -> None:
    """A file that says it has these float32 tensors, and takes no room on the disk."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    stop = 0
    for name, shape in tensors.items():
        start, stop = stop, stop + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + stop)


SETTINGS = {"format_version": 1, "r": 2, "alpha": 2, "scaling": "standard", "variant": "lora", "dropout": 0.0}
WIDE = HUGE // 8


def native(layers: dict[str, Any], **more: Any) -> dict[str, str]:
    return {"lora_plus": json.dumps({**SETTINGS, "layers": layers, **more})}


def linear(*shape: int) -> dict[str, Any]:
    return {"kind": "Linear", "layout": "o i -> o i", "shape": shape}


FILES: dict[str, tuple[dict[str, list[int]], dict[str, str]]] = {
    "a base shard": ({"model.layers.0.weight": [2, WIDE]}, {"format": "pt"}),
    "another shape than the document's": (
        {"proj.lora_A": [2, WIDE], "proj.lora_B": [5, 2]}, native({"proj": linear(5, 6)})
    ),
    "another base than the model's": (
        {"proj.lora_A": [2, WIDE], "proj.lora_B": [5, 2]}, native({"proj": linear(5, WIDE)})
    ),
    "a layer that the model has not": (
        {"other.lora_A": [2, WIDE], "other.lora_B": [5, 2]}, native({"other": linear(5, WIDE)})
    ),
    "a tensor of no layer": (
        {"proj.lora_A": [2, 6], "proj.lora_B": [5, 2], "x": [2, WIDE]}, native({"proj": linear(5, 6)})
    ),
    "a head of another shape": (
        {"proj.lora_A": [2, 6], "proj.lora_B": [5, 2], "head.0.weight": [2, WIDE]},
        native({"proj": linear(5, 6)}, train_also={"head": ["0.weight"]}),
    ),
    "kohya's": ({"lora_unet_proj.lora_down.weight": [2, WIDE], "lora_unet_proj.lora_up.weight": [5, 2]}, {}),
    "diffusers'": ({"proj.lora_A.weight": [2, WIDE], "proj.lora_B.weight": [5, 2]}, {}),
    "kohya's convolution": (
        {"lora_unet_conv.lora_down.weight": [2, WIDE], "lora_unet_conv.lora_up.weight": [6, 2]}, {}
    ),
}  # fmt: skip

PEAK = """
def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])  # KiB
"""
SCRIPT = f"""
import resource, sys, time
{PEAK}
resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30,) * 2)  # or a reader that reads all may take the machine
import torch, lora_plus
from files_support import net
lora_plus.load_adapter
for path in sys.argv[2:]:
    for read in (lambda: lora_plus.load_adapter(net(), path),
                 lambda: lora_plus.merge_checkpoint(sys.argv[1], path, path + ".out.safetensors")):
        before, started = peak(), time.process_time()
        try:
            read()
            text = "read"
        except (ValueError, OSError) as error:
            text = str(error)
        named = (path in text or sys.argv[1] in text) and "memory" not in text
        print(named, peak() - before < 50_000, time.process_time() - started < 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_a_file_that_says_it_has_20_gigabytes_is_refused_for_its_header(tmp_path: Path, checkpoint: Path) -> None:
    paths = []
    for name, (tensors, metadata) in FILES.items():
        paths.append(tmp_path / f"{name.replace(' ', '-')}.safetensors")
        sparse(paths[-1], tensors, metadata)
    for name, field in (("layer", "lora_A.weight"), ("base", "base_layer.weight"), ("trained", "x")):
        folder = tmp_path / name
        lora_plus.save_adapter(lora_plus.inject_lora(net(), ["proj"], r=2), folder)
        shapes = {"lora_A.weight": [2, 6], "lora_B.weight": [5, 2], field: [2, WIDE]}
        tensors = {f"base_model.model.proj.{part}": shape for part, shape in shapes.items()}
        sparse(folder / "adapter_model.safetensors", tensors, {})
        paths.append(folder)
    (tmp_path / "config").mkdir()
    sparse(tmp_path / "config" / "adapter_model.safetensors", {}, {"format": "pt"})
    (tmp_path / "config" / "adapter_config.json").touch()
    os.truncate(tmp_path / "config" / "adapter_config.json", HUGE)
    paths.append(tmp_path / "config")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint), *map(str, paths)], env=environment, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True True True"] * 2 * len(paths)


LOADING = f"""
import sys
{PEAK}
import torch, lora_plus
from torch import nn
model = nn.ModuleDict(dict(a=nn.Linear(10_000, 10_000, bias=False, device="meta")))
small = nn.ModuleDict(dict(a=nn.Linear(4, 4)))
lora_plus.load_adapter(small, sys.argv[2])  # which brings in code
before = peak()
lora_plus.load_adapter(model, sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_loading_takes_the_memory_of_the_file_and_no_more(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(10_000, 10_000, bias=False, device="meta")})
    lora_plus.save_adapter(lora_plus.inject_lora(model, ["a"], r=2_000), tmp_path / "a.safetensors")
    small = lora_plus.inject_lora(nn.ModuleDict({"a": nn.Linear(4, 4)}), ["a"], r=2)
    lora_plus.save_adapter(small, tmp_path / "small.safetensors")
    files = [str(tmp_path / name) for name in ("a.safetensors", "small.safetensors")]
    done = subprocess.run([sys.executable, "-c", LOADING, *files], capture_output=True, text=True, check=True)
    kibibytes = (tmp_path / "a.safetensors").stat().st_size / 1024
    assert 0.8 * kibibytes < int(done.stdout) < 1.2 * kibibytes


@pytest.mark.parametrize("name", ["a.safetensors", "a"])
def test_what_is_loaded_has_memory_of_its_own(name: str, tmp_path: Path) -> None:
    model = lora_plus.inject_lora(net(), ["embed", "proj"], r=2, train_also=["head"])
    lora_plus.save_adapter(model, tmp_path / name)
    loaded = lora_plus.load_adapter(net(), tmp_path / name, trainable=True)
    tensors = [parameter for parameter in loaded.parameters() if parameter.requires_grad]
    assert len(tensors) > 6
    assert all(type(tensor.data) is torch.Tensor for tensor in tensors)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS: dict[str, tuple[Any, bytes]] = {
    "a gap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [9, 17]}}, bytes(17)),
    "an overlap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
    "more data": ({"a": ENTRY}, bytes(9)),
    "less data": ({"a": ENTRY}, bytes(7)),
    "data that does not begin": ({"a": {**ENTRY, "data_offsets": [1, 9]}}, bytes(9)),
    "the end before the beginning": ({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8)),
    "negative offsets": ({"a": {**ENTRY, "data_offsets": [-8, 0]}}, bytes(8)),
    "offsets of booleans": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}}, bytes(1)),
    "three offsets": ({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, bytes(8)),
    "another size than the shape's": ({"a": {**ENTRY, "shape": [3]}}, bytes(8)),
    "a negative shape": ({"a": {**ENTRY, "shape": [-2]}}, bytes(8)),
    "two negative numbers": ({"a": {**ENTRY, "shape": [-2, -1]}}, bytes(8)),
    "a shape of booleans": ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, bytes(1)),
    "an unknown dtype": ({"a": {**ENTRY, "dtype": "F31"}}, bytes(8)),
    "an unknown dtype without data": ({"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 0]}}, b""),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "no object": ([], b""),
    "an entry that is no object": ({"a": 1}, b""),
    "metadata that is no object": ({"__metadata__": [1]}, b""),
    "metadata that is no text": ({"__metadata__": {"a": 1}}, b""),
    "half of a pair of surrogates": ({"\ud800": ENTRY}, bytes(8)),
    "half a number": ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, bytes(1)),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_safetensors_refuses_is_refused(case: str, tmp_path: Path) -> None:
    header, data = HEADERS[case]
    text, path = json.dumps(header).encode(), tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    with pytest.raises(SafetensorError), safe_open(str(path), framework="pt"):
        pass
    with pytest.raises(ValueError):
        open_safetensors(path, [])


# ---- what is no file -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
@pytest.mark.parametrize("name", ["a.safetensors", "adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_is_refused_and_not_waited_for(name: str, tmp_path: Path, checkpoint: Path) -> None:
    path = tmp_path / "a"
    lora_plus.save_adapter(lora_plus.inject_lora(net(), ["proj"], r=1), path)
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    for text in everywhere(path / name if name == "a.safetensors" else path, checkpoint):
        assert "not a regular file" in text


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="has no devices")
def test_a_device_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to("/dev/zero")
    for text in everywhere(tmp_path / "a.safetensors", checkpoint):
        assert "not a regular file" in text


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_refused(name: str, tmp_path: Path, checkpoint: Path) -> None:
    lora_plus.save_adapter(lora_plus.inject_lora(net(), ["proj"], r=1), tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / name).mkdir()
    for text in everywhere(tmp_path / "a", checkpoint):
        assert f"{name} is a folder, not a regular file" in text


@pytest.mark.parametrize("name", ["a.safetensors", "a"])
def test_a_file_is_opened_as_often_for_many_layers_as_for_few(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, own = list[Path](), TensorFile.opened
    monkeypatch.setattr(TensorFile, "opened", lambda file: (opened.append(file.path), own(file))[1])
    counts = []
    for layers in (2, 20):
        model, path = nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers)]), tmp_path / f"{layers} {name}"
        lora_plus.save_adapter(lora_plus.inject_lora(model, "all-linear", r=1), path)
        lora_plus.remove_lora(model)
        for replace in (False, True):
            opened.clear()
            lora_plus.load_adapter(model, path, replace=replace)
            counts.append(len(opened))
    assert set(counts) == {1}
