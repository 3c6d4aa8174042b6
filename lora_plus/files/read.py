"""Reads an adapter from the disk, in whichever format it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_plus.errors import Problems
from lora_plus.text import some

from .checks import adapter_problems
from .formats import FORMATS, Contents, Files
from .json_text import parsed, read_text
from .paths import PathLike, irregular, stated
from .saved_adapter import SavedAdapter
from .target import Target
from .tensor_file import open_safetensors, read_all


def read_adapter(path: PathLike) -> SavedAdapter:
    """Read an adapter file or PEFT folder as plain data, without its model.

    A PEFT folder does not say what kind its layers are. Embeddings and convolutions are recognised by their tensors.
    All others count as linear layers, stored as ``fan_in_fan_out`` says.

    Raises:
        ValueError: one error with all problems of the file, and all that cannot be read without the model.
        FileNotFoundError: if there is no such file or folder.
    """
    problems: list[str] = []
    adapter = described(stated(path), Target(), problems)
    if not problems and not adapter.layers:
        problems.append("it has no adapted layer")
    problems += adapter_problems(adapter)
    if problems:
        raise Problems(f"adapter {str(path)!r} cannot be read", problems)
    read_all(adapter.trained.values())
    return adapter


InMemory = SavedAdapter | tuple[Mapping[str, Any], Mapping[str, Tensor]]
"""An adapter in memory: as plain data, or as the config and the tensors of a PEFT folder."""


def described(source: Path | InMemory, target: Target, problems: list[str]) -> SavedAdapter:
    """An adapter, as far as it is described; what is wrong with it is added to ``problems``.

    Its layers have the names of the file, or those of the target where it is ``resolved``. Its tensors are unread where
    what they mean does not depend on their values.
    """
    if isinstance(source, SavedAdapter):
        return source
    if isinstance(source, tuple):
        found: tuple[str, Files] | None = _in_memory(*source)
    elif not source.exists():
        raise FileNotFoundError(f"there is no adapter at {str(source)!r}")
    else:
        found = _folder(source, problems) if source.is_dir() else _file(source, problems)
    if found is None:
        return SavedAdapter({}, {})
    name, files = found
    return replace(FORMATS[name].read(files, target, problems), format=name)


def _in_memory(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[str, Files]:
    """The config and the tensors of a folder as its files."""
    name, format = next((name, format) for name, format in FORMATS.items() if format.folder)
    return name, {file: config if file.endswith(".json") else Contents(tensors, {}) for file in format.folder}


def _file(path: Path, problems: list[str]) -> tuple[str, Files] | None:
    contents = _contents(path, problems)
    if problems or contents is None:
        return None
    for name, format in FORMATS.items():
        if format.recognises(contents):
            return name, {"": contents}
    inside = any((path.parent / name).exists() for format in FORMATS.values() for name in format.folder[-1:])
    hint = f"; give the folder {str(path.parent)!r}" if inside else ""
    problems.append(f"it is a safetensors file, but its header does not describe an adapter{hint}")
    return None


def _folder(path: Path, problems: list[str]) -> tuple[str, Files] | None:
    folders = {name: format.folder for name, format in FORMATS.items() if format.folder}
    known = (name for name, inside in folders.items() if any((path / each).exists() for each in inside))
    format = next(known, next(iter(folders)))
    _check_names(path, folders[format], problems)
    if problems:
        return None
    texts = {name: _text(path / name, problems) for name in folders[format] if name.endswith(".json")}
    files: Files = {}
    for name, text in texts.items():
        try:
            files[name] = None if text is None else parsed(text)
        except ValueError as error:
            problems.append(f"{name} is not valid JSON: {error}")
    files |= {name: _contents(path / name, problems) for name in folders[format] if name not in texts}
    if not problems and any(_text(path / name, []) != text for name, text in texts.items()):
        problems.append("another process wrote to the folder while it was read; load it again")
    return None if problems else (format, files)


def _check_names(path: Path, names: Sequence[str], problems: list[str]) -> None:
    """Add what files are missing in a folder, or are no files."""
    main = names[-1]
    missing = [name for name in names[::-1] if not (path / name).exists()]
    inner = sorted(file.parent.name for file in path.glob(f"*/{main}")) if len(missing) == len(names) else []
    if inner:
        problems.append(
            f"the folder has no {main}, but folders that have one: {', '.join(map(repr, inner))}; "
            f"give one of them, such as {str(path / inner[0])!r}"
        )
        return
    if len(missing) == len(names):
        others = [file.name for ending in (".safetensors", ".bin") for file in sorted(path.glob(f"*{ending}"))]
        hint = f"; it has {some(others)}: give a .safetensors file itself, convert others" if others else ""
        problems.append(f"the folder has no {' and no '.join(missing)}{hint}")
    for name in missing if len(missing) < len(names) else ():
        pickled = (path / name).with_suffix(".bin").exists()
        hint = "; there is a .bin file, which is a pickle and is not read: convert it to safetensors" if pickled else ""
        problems.append(f"the folder has no {name}{hint}")
    there = [name for name in names if name not in missing]
    problems += [f"{name} is {what}, not a regular file" for name in there if (what := irregular(path / name))]


def _text(path: Path, problems: list[str]) -> str | None:
    try:
        return read_text(path)
    except (ValueError, OSError) as error:
        problems.append(f"{path.name} is not valid JSON: {error}")
        return None


def _contents(path: Path, problems: list[str]) -> Contents | None:
    if (what := irregular(path)) is not None:
        problems.append(f"{path.name} is {what}, not a regular file")
        return None
    try:
        return Contents(*open_safetensors(path, problems))
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} is not a whole safetensors file: {error}")
        return None
