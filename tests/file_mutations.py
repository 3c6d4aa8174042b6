"""Adapters and checkpoints as bytes, and random changes of them: the material of a fuzzer."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from cases import randomise
from files_support import contents
from safetensors.torch import save_file
from torch import nn

import lora_plus

Files = dict[str, bytes]
"""The files of a folder by their path in it; one without a name is the thing itself."""


# ---- what is changed -------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """A module whose own parameters can be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


class Experts(nn.Module):
    """Two experts in stacked parameters, as version 5 of transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(2, *shape)) for shape in ((8, 6), (6, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("bi,eoi->ebo", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("ebi,eoi->bo", gate.sigmoid() * up, self.down_proj)


class Model(nn.ModuleDict):
    """With what PEFT asks a model for its ties."""

    config = SimpleNamespace(tie_word_embeddings=True)

    def get_input_embeddings(self) -> nn.Module:
        return self["embed_tokens"]


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 4)])
    found = {"layers": layers, "embed": nn.Embedding(9, 6), "conv": nn.Conv2d(2, 3, 3), "own": Rows()}
    found |= {"top": nn.Linear(4, 5), "experts": Experts(), "embed_tokens": nn.Embedding(9, 6)}
    found["lm_head"] = nn.Linear(6, 9, bias=False)
    found["lm_head"].weight = found["embed_tokens"].weight
    return Model(found)


def adapted(targets: list[str], **options: Any) -> nn.Module:
    return randomise(lora_plus.inject_lora(model(), targets, r=2, alpha=3, **options), 1)


OTHER_KINDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "rows": (["layers.0"], {"train_rows": {"embed": [2, 5, 7]}}),
    "tied rows": (["layers.0"], {"train_rows": {"embed_tokens": [1, 8]}}),
    "tied": (["embed_tokens", "layers.*"], {"tied": "both"}),
    "pissa": (["layers.*", "conv"], {"init": "pissa"}),
    "parts": (
        ["layers.0.q", "attention.q", "attention.v"],
        {"init": "pissa", "fused": {"layers.0": ["q", "v"]}, "rank_pattern": {"q": 1}},
    ),
    "experts": (["gate_up_proj", "down_proj"], {}),
    "biases": (["layers.*"], {"train_also": ["layers.0.bias", "layers.1.bias"]}),
}  # fmt: skip
"""What is neither a whole layer's A and B nor a module trained in full."""


@cache
def adapters() -> dict[str, Files]:
    """An adapter in each format."""
    plain, linear = ["layers.*", "embed", "conv"], ["layers.*", "conv"]
    made = {
        "native": (adapted(plain, rank_pattern={"layers.0": 3}, train_also=["top"]), "native"),
        "native other": (adapted(["layers.*", "embed"]), "native"),
        "native dora": (adapted(["layers.*"], variant="dora", scaling="rslora"), "native"),
        "native parameters": (adapted(["own.attention.in_proj_weight"]), "native"),
        "peft": (adapted(plain, rank_pattern={"layers.0": 3}, alpha_pattern={"conv": 5}, train_also=["top"]), "peft"),
        "peft dora": (adapted(["layers.*"], variant="dora"), "peft"),
        "kohya": (adapted(linear), "kohya"),
        "diffusers": (adapted(linear), "diffusers"),
        **{
            f"{format} {name}": (adapted(targets, **options), format)
            for name, (targets, options) in OTHER_KINDS.items()
            for format in ("native", "peft")
        },
    }
    return {name: _written(each, format) for name, (each, format) in made.items()}


def _written(adapted: nn.Module, format: str) -> Files:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / ("folder" if format == "peft" else "file.safetensors")
        lora_plus.save_adapter(adapted, path, format=format)
        return contents(path) if path.is_dir() else {"": path.read_bytes()}


@cache
def checkpoints() -> dict[str, Files]:
    """The model's checkpoint in one file, in shards, and fine-tuned."""
    # one tensor for the tied weight
    state = {name: tensor for name, tensor in model().state_dict().items() if name != "lm_head.weight"}
    tuned = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in state.items()}
    names = sorted(state)
    shards = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    with tempfile.TemporaryDirectory() as name:
        single, folder, other = (Path(name) / part for part in ("a.safetensors", "folder", "b.safetensors"))
        save_file(state, single)
        save_file(tuned, other)
        folder.mkdir()
        for shard, part in shards.items():
            save_file({each: state[each] for each in part}, folder / shard, {"format": "pt"})
        size = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": {n: s for s, part in shards.items() for n in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps({"model_type": "x", "tie_word_embeddings": False}))
        return {"single": {"": single.read_bytes()}, "sharded": contents(folder), "tuned": {"": other.read_bytes()}}


# ---- how it is changed -----------------------------------------------------------------------------------------------

ACTING = ["\x1b]0;owned\x07\x1b[2J", "[bold red]q", "[link=http:evil]q[/link]", "[/x]", "a\nerror: b", "\u202e",
          "\x9b", "\0"]  # fmt: skip
TEXTS = [*ACTING, "", "lora", "dora", "rslora", "linear", "Linear", "Embedding", "Conv2d", "Parameter", "top",
         "\ud800", "layers.0", "conv", "layers.0.weight", ".", "..", "../../x", "/etc/passwd", "q(", ".*", "(a|a)*b",
         "a" * 40, "ß漢", "o i -> o i", "i o -> o i", "F32", "F4", "model.safetensors", "1", "é" * 300,
         "x" * 10_000]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 7, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, 1e-320,
           float("nan"), float("inf"), True, False, None]  # fmt: skip
TOKENS = ["[" * 100_000, '{"a":' * 50_000, "9" * 5000, "1e400", "NaN", "-Infinity", "{}", "[]", '"\\ud800"', "\x00",
          "'a'"]  # fmt: skip
DTYPES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
          "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F4": 0.5,
          "F6_E2M3": 0.75}  # fmt: skip
"""What a safetensors file calls dtypes, with the bytes of an element."""


def value(rng: random.Random, depth: int = 2) -> Any:
    """Any JSON value."""
    kind = rng.random()
    if kind < 0.4 or not depth:
        return rng.choice(NUMBERS)
    if kind < 0.75:
        return rng.choice(TEXTS)
    if kind < 0.88:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(TEXTS): value(rng, depth - 1) for _ in range(rng.randrange(3))}


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every ``(container, key)`` in a JSON value."""
    if isinstance(tree, (dict, list)):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from places(tree[key])


def changed_tree(tree: Any, rng: random.Random) -> Any:
    """A JSON value with an entry replaced, removed, added, renamed or exchanged; or another value altogether."""
    tree = copy.deepcopy(tree)
    spots = list(places(tree))
    if not spots or rng.random() < 0.02:
        return value(rng)
    container, key = rng.choice(spots)
    action = rng.choice(["replace", "replace", "replace", "remove", "add", "rename", "swap"])
    if action == "replace":
        container[key] = value(rng)
    elif action == "remove":
        del container[key]
    elif action == "swap":
        other, place = rng.choice(spots)
        container[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(container[key])
    elif isinstance(container, dict):
        container[rng.choice(TEXTS)] = container.pop(key) if action == "rename" else value(rng)
    else:
        container.insert(key, value(rng))
    return tree


def changed_text(text: str, rng: random.Random) -> str:
    """JSON with a key twice, or with something in the place of a value that `json.dumps` does not write."""
    spots = [at for at, letter in enumerate(text) if letter == (":" if rng.random() < 0.7 else "{")]
    if not spots:
        return text + rng.choice(TOKENS)
    at = rng.choice(spots) + 1
    if text[at - 1] == "{":
        known = [part for part in text.split('"')[1::2] if len(part) < 60] or ["a"]
        return f"{text[:at]}{json.dumps(rng.choice(known))}: {json.dumps(value(rng))}, {text[at:]}"
    return f"{text[:at]} {rng.choice(TOKENS)}, {text[at:]}" if rng.random() < 0.5 else text[:at] + rng.choice(TOKENS)


def changed_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Some bytes of a file changed, removed, added or repeated; mostly near its beginning."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.3 else rng.randrange(min(len(data), 2000) + 1)
        action = rng.randrange(4)
        if action == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif action == 1:
            del data[at : at + rng.choice([1, 8, 100, len(data)])]
        elif action == 2:
            data[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
        else:
            data[at:at] = data[at : at + 50]
    return bytes(data)


def json_file(raw: bytes, rng: random.Random) -> bytes:
    """A JSON file with a change."""
    action = rng.random()
    if action < 0.15:
        return changed_bytes(raw, rng)
    if action < 0.3:
        return changed_text(raw.decode(), rng).encode()
    if action < 0.35:
        return rng.choice([b"", b"\xff\xfe{}", b"\xef\xbb\xbf" + raw, raw.decode().encode("utf-16"), b"null", b"[]"])
    return json.dumps(changed_tree(json.loads(raw), rng)).encode()


def tensor_file(raw: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a change: of its bytes, its header, its metadata, or a tensor."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    often = (_header, _metadata, _metadata, _tensor)
    return rng.choice([*often, *often, _bytes, _length, _text, _name])(header, data, rng)


def assembled(header: Any, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def _bytes(header: Any, data: bytes, rng: random.Random) -> bytes:
    return changed_bytes(assembled(header, data), rng)


def _length(header: Any, data: bytes, rng: random.Random) -> bytes:
    raw = assembled(header, data)
    claimed = rng.choice([0, 1, 7, len(raw) - 8, len(raw), 2**31, 2**40, 2**63, 2**64 - 1])
    return struct.pack("<Q", claimed) + raw[8:]


def _header(header: Any, data: bytes, rng: random.Random) -> bytes:
    return assembled(changed_tree(header, rng), data)


def _text(header: Any, data: bytes, rng: random.Random) -> bytes:
    return assembled(changed_text(json.dumps(header), rng), data)


def _metadata(header: Any, data: bytes, rng: random.Random) -> bytes:
    """What a format writes in the metadata is JSON in a text, or a text."""
    metadata = header.setdefault("__metadata__", {})
    key = rng.choice(sorted(metadata) or ["format"])
    try:
        document = json.loads(metadata[key])
    except (KeyError, ValueError):
        metadata[rng.choice([key, *TEXTS])] = rng.choice(TEXTS)
        return assembled(header, data)
    for _ in range(rng.randint(1, 2)):
        document = changed_tree(document, rng)
    text = json.dumps(document)
    metadata[key] = changed_text(text, rng) if rng.random() < 0.15 else text
    return assembled(header, data)


def _tensor(header: Any, data: bytes, rng: random.Random) -> bytes:
    """A tensor of another dtype, shape or value, in a file that is whole."""
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    chosen = rng.choice(sorted(tensors))
    old = tensors[chosen]
    dtype = rng.choice([old["dtype"], rng.choice(sorted(DTYPES))])
    any_shape = [rng.randrange(8) for _ in range(rng.randrange(5))]
    shape = rng.choice([old["shape"], old["shape"], old["shape"][::-1], [*old["shape"], 1], any_shape])
    count = 1
    for extent in shape:
        count *= extent
    fill = rng.choice([None, b"\0", b"\xff", b"\x7f", b"\x00\x00\x80\x7f"])  # NaN, huge and infinite are the last
    size = int(count * DTYPES[dtype])
    assert size < 2**20
    raw = rng.randbytes(size) if fill is None else (fill * size)[:size]
    new, out = {}, b""
    for name, entry in tensors.items():
        piece = raw if name == chosen else data[slice(*entry["data_offsets"])]
        entry = {**entry, "dtype": dtype, "shape": shape} if name == chosen else entry
        new[name] = {**entry, "data_offsets": [len(out), len(out) + len(piece)]}
        out += piece
    if rng.random() < 0.1:
        del new[rng.choice(sorted(new))]  # which leaves a gap
    return assembled({**{k: v for k, v in header.items() if k == "__metadata__"}, **new}, out)


def retyped(raw: bytes, dtype: str) -> Iterator[bytes]:
    """A safetensors file with one of its tensors in another dtype, for each of them that is no single number."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    for chosen in sorted(name for name in header.keys() - {"__metadata__"} if header[name]["shape"]):
        new, out = dict(header), b""
        for name in header.keys() - {"__metadata__"}:
            entry = header[name]
            piece = data[slice(*entry["data_offsets"])]
            if name == chosen:
                count = math.prod(entry["shape"])
                entry, piece = {**entry, "dtype": dtype}, b"\1" * int(count * DTYPES[dtype])
            new[name] = {**entry, "data_offsets": [len(out), len(out) + len(piece)]}
            out += piece
        yield assembled(new, out)


def _name(header: Any, data: bytes, rng: random.Random) -> bytes:
    """Another name for a layer, wherever it stands."""
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    part = rng.choice([name, name.rpartition(".")[0] or name, name.partition(".")[0]])
    spelled, new = json.dumps(part)[1:-1], json.dumps(rng.choice(TEXTS))[1:-1]
    text = json.dumps(header).replace(spelled, new)
    inner = json.dumps(json.dumps(part))[3:-3]  # in the JSON that is in the metadata
    return assembled(text.replace(inner, json.dumps(new)[1:-1]) if inner != spelled else text, data)


OTHERS = ["other.safetensors", "pytorch_model.bin", "model.safetensors", "a\x1b[2J.json"]


def changed(files: Files, rng: random.Random) -> Files:
    """Files with one or two of them changed, missing, or of another name."""
    files = dict(files)
    for _ in range(1 if rng.random() < 0.7 else 2):
        name = rng.choice(sorted(files))
        if name and rng.random() < 0.05:
            raw = files.pop(name)
            if rng.random() < 0.5:
                files[rng.choice(OTHERS)] = raw
            if not files:
                return {"x": b""}
            continue
        change: Callable[[bytes, random.Random], bytes] = json_file if name.endswith(".json") else tensor_file
        try:
            files[name] = change(files[name], rng)
        except Exception:  # it is changed already, and cannot be taken apart
            files[name] = changed_bytes(files[name], rng)
    return files


def write(files: Files, path: Path) -> None:
    for name, raw in files.items():
        target = path / name if name else path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(raw)
