"""Reads the tensors of a PEFT folder, once its config is in order."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_plus.errors import Problems, shortened, warn_user
from lora_plus.files.saved_adapter import SavedAdapter, SavedLayer, checked_spec
from lora_plus.layers.base_layer import BaseLayer
from lora_plus.tensors.variant import AdapterSpec
from lora_plus.text import endings, parents, some

from .biases import add_lora_biases, is_bias, lost_biases
from .config import USER_FIELDS, fan_in_fan_out, settings_of
from .limits import layer_problems
from .names import LORA_BIAS, OUT_PROJECTION, PREFIX, TENSORS, moved, split_key, wrappers
from .renaming import FolderTarget
from .tensors import ATTENTION, attention_from_peft, convolution_from_peft, parameter_from_peft

_WRAPPED = ("modules_to_save.", "original_module.")
"""What is in a module that PEFT trains in full."""

DOUBLED = "peft 0.21.2 adds the update of an nn.MultiheadAttention's out_proj twice, merged or not"


class Reader:
    """Turns the tensors of one folder into an adapter; its target has the names of the folder."""

    def __init__(self, config: dict[str, Any], target: FolderTarget, problems: list[str]) -> None:
        self.config, self.target, self.outline, self.problems = config, target, target.outline, problems
        entries = dict.fromkeys(config.get("target_parameters") or ())
        inside = [full for full in self.outline.parameters if "." in full] if entries else []
        found = {full: [end for end in (full, *endings(full)) if end in entries] for full in inside}
        self.parameters = {full: None for full, ends in found.items() if ends}
        """Those inside the model that PEFT takes the entries of ``target_parameters`` for."""
        named = {end for ends in found.values() for end in ends}
        problems += [
            f"target_parameters {entry!r} names no parameter inside the model"
            for entry in config.get("target_parameters") or ()
            if entry not in named
        ]
        self.paths, owners = wrappers(self.parameters, self.outline)
        self.wrapped = {path: owner for owner, path in owners.items()}
        self.spec = functools.lru_cache(maxsize=None, typed=True)(AdapterSpec)  # layers share their settings, mostly
        self.biases: dict[str, Tensor] = {}
        """By layer the bias of its B."""
        self.unsure: list[str] = []
        """Weights of the base model that cannot be compared with its own."""
        self.attentions: dict[str, dict[str, BaseLayer]] = {}
        for module, names in target.readers.items():
            bases = {name: base for name in names if (base := target.base(name)) is not None}
            if any(base.facts.get("of") == ATTENTION for base in bases.values()):
                self.attentions[module] = bases

    def read(self, tensors: Mapping[str, Tensor]) -> SavedAdapter:
        """The adapter; it is not whole if there are problems."""
        metadata = {name: self.config[name] for name in USER_FIELDS if isinstance(self.config.get(name), str)}
        adapter = SavedAdapter({}, {}, metadata)
        found = self._sort(tensors, adapter)
        layers: dict[str, SavedLayer] = {}
        for name in dict.fromkeys([*self.parameters, *found]):
            if name not in self.parameters and self._attention_of(name) is not None:
                continue
            layer = self._layer(name, found.get(name, {}))
            if layer is not None:
                layers[name] = layer
        attentions = list(dict.fromkeys(filter(None, map(self._attention_of, found))))
        parts = {name: layer for module in attentions for name, layer in self._attention(module, found).items()}
        adapter.layers = dict(sorted({**layers, **parts}.items()))
        plain = {name: layer for name, layer in layers.items() if name not in self.parameters}
        self.problems += lost_biases(adapter, self.config.get("bias", "none"), plain, self.outline)
        if self.config.get("lora_bias"):
            add_lora_biases(adapter, self.biases, plain, self.target.parameter, self.target.whole, self.problems)
        alphas = {name: self.config["alpha_pattern"].values(name) for name in (*layers, *attentions)}
        ambiguous = [name for name, values in alphas.items() if any(value != values[0] for value in values)]
        if ambiguous:  # PEFT does not keep the order of the keys, and it decides here
            warn_user(
                f"alpha_pattern gives several values for {some(ambiguous)}; the first key counts, but PEFT sorts the "
                "keys when it saves, so another may have been the first in training; check their scale"
            )
        doubled = [name for name, layer in parts.items() if "rows" not in layer.base.facts]
        if doubled and self.config.get("peft_version"):  # they were trained with twice their update
            warn_user(
                f"the file says W + s B A of {', '.join(map(repr, doubled))}, which is what is loaded, but {DOUBLED}; "
                "if it was trained there, double their lora_B to compute the same"
            )
        inert = [
            name
            for name, layer in plain.items()
            if layer.base.facts.get("of") == ATTENTION and torch.count_nonzero(layer.tensors["lora_B"])
        ]
        if inert and self.config.get("peft_version"):
            warn_user(
                f"PEFT passes by the adapter of {some(inert)} until it is merged: nn.MultiheadAttention does not call "
                f"its out_proj. Here it acts; leave it out with names={{{inert[0]!r}: None}} to compute what PEFT does"
            )
        if self.unsure and not self.problems:
            told = f"{', '.join(map(repr, self.unsure[:3]))}{' and more' * (len(self.unsure) > 3)}"
            warn_user(
                f"the file also has weights of the base model, {told}, which are ignored; they could not be compared "
                "with the model's"
            )
        return adapter

    def _sort(self, tensors: Mapping[str, Tensor], adapter: SavedAdapter) -> dict[str, dict[str, Tensor]]:
        """The tensors of adapters by what is adapted; those of modules trained in full go to ``adapter``."""
        saved = self.config.get("modules_to_save") or []
        lengths, there = sorted(set(map(len, saved))), set(saved)
        # the modules whose names end in an entry, at a dot or not
        ends = {
            name: {name[len(name) - length :] for length in lengths if length <= len(name)}
            for name in self.outline.names
        }
        entries_of = {name: own & there for name, own in ends.items() if not own.isdisjoint(there)}
        there = set().union(*entries_of.values())
        absent = [entry for entry in saved if entry not in there]
        order = {name: index for index, name in enumerate(entries_of)}
        entries = [
            shortened(str(self.config.get(field) or []), 200) for field in ("target_parameters", "modules_to_save")
        ]
        trains = self.config.get("bias", "none") != "none"
        found: dict[str, dict[str, Tensor]] = {}
        loose: dict[str, dict[str, Tensor]] = {}
        mentioned: set[str] = set()
        for key, tensor in sorted(tensors.items()):
            name = key.removeprefix(PREFIX)
            if name == key:
                self.problems.append(f"tensor {key!r}: expected a name that starts with {PREFIX!r}")
                continue
            split = split_key(name)
            if split is not None:
                path, part = split
                adapted = self._adapted(path)
                if adapted is None:
                    self.problems.append(
                        f"tensor {key!r}: {path!r} is neither a module nor where PEFT adapts a parameter with "
                        f"target_parameters {entries[0]}"
                    )
                elif part == LORA_BIAS and not self.config.get("lora_bias"):
                    self.problems.append(f"tensor {key!r} is there, but lora_bias is not set")
                elif part == LORA_BIAS:
                    self.biases[adapted] = tensor
                else:
                    found.setdefault(adapted, {})[part] = tensor
                continue
            owner = min((module for module in parents(name) if module in order), default=None, key=order.__getitem__)
            if owner is not None:
                inside = name.removeprefix(f"{owner}.")
                if not (trains and inside.startswith(_WRAPPED)):  # the bias once more
                    adapter.trained.setdefault(owner, {})[inside] = tensor
            elif trains and is_bias(name) and (parameter := self._bias(name)) is not None:
                loose[parameter] = {"": tensor}
            elif any(f".{entry}." in f".{name}" for entry in absent[: Problems.SHOWN]):
                mentioned.update(entry for entry in absent[: Problems.SHOWN] if f".{entry}." in f".{name}")
            else:
                self._pass_over(key, tensor, f"neither part of an adapter nor of modules_to_save {entries[1]}")
        # PEFT lists the names that heads usually have, of which a model has one
        lost = [entry for entry in absent if entry in mentioned] if adapter.trained else absent
        self.problems += [f"modules_to_save {entry!r}: the model has no such module" for entry in lost]
        there -= {entry for name in adapter.trained for entry in entries_of[name]}
        missing = [entry for entry in saved if entry in there]
        self.problems += [f"modules_to_save {entry!r} has no tensors in the file" for entry in missing]
        adapter.trained |= loose
        return found

    def _bias(self, name: str) -> str | None:
        """The parameter that a trained bias is; None where the model has none of that name."""
        own = ".".join(part for part in name.split(".") if part != "base_layer")
        return own if own in self.outline.parameters or not self.outline.whole else None

    def _pass_over(self, key: str, tensor: Tensor, what: str) -> None:
        """Leave out a weight of the base model, which PEFT saves with adapters of embeddings; or say ``what`` it is."""
        parts = key.removeprefix(PREFIX).split(".")
        same = self.target.repeats(".".join(part for part in parts if part != "base_layer"), tensor)
        if same is None and "base_layer" in parts:
            self.unsure.append(key)
        elif not same and "base_layer" in parts:
            self.problems.append(
                f"tensor {key!r} is one of the base model, which an adapter leaves alone, and differs from the "
                "model's; load that weight into the model first, or save the adapter again with "
                "save_embedding_layers=False"
            )
        elif not same:
            self.problems.append(f"tensor {key!r} is {what}")

    def _adapted(self, path: str) -> str | None:
        """What PEFT has the adapter of at a path: a module, a parameter, or the out_proj inside an attention module."""
        if path in self.paths:
            return self.paths[path]
        path = moved(path, self.wrapped)
        if path in self.outline.names or self._attention_of(path) is not None:
            return path
        # a name that the model does not know at all is reported by whoever can say what it may have meant
        known = path in self.outline.parameters or self.target.base(path) is not None
        return None if known or "base_layer" in path.split(".") else path

    def _attention_of(self, name: str) -> str | None:
        """The attention module that an adapter belongs to; None if it is another layer's."""
        module = name.removesuffix(OUT_PROJECTION)
        return module if module in self.attentions else None

    def _layer(self, name: str, found: dict[str, Tensor]) -> SavedLayer | None:
        """The adapter of one layer or parameter with tensors in our shapes."""
        base = self.target.base(name)
        stack = base.shape[0] if base is not None and name in self.parameters and len(base.shape) == 3 else 1
        layer = self._checked(name, found, stack=stack, there=base is not None)
        if layer is None or base is None:
            return layer  # the reader of the file reports modules that are not there or cannot be adapted
        layer.base = base
        wrong = [f"{name!r}: {line}" for line in layer_problems(base, layer.spec.variant)]
        if wrong:
            self.problems += wrong
            return None
        if name in self.parameters:
            transposed = name.rpartition(".")[0] in self.outline.transposed
            return parameter_from_peft(name, layer, transposed, self.problems)
        return layer if len(base.shape) == 2 else convolution_from_peft(name, layer, self.problems)

    def _attention(self, module: str, found: Mapping[str, dict[str, Tensor]]) -> dict[str, SavedLayer]:
        """The adapters of an attention module's parts."""
        parts = self.attentions[module]
        if sum("rows" in base.facts for base in parts.values()) != 3:
            self.problems.append(f"{module!r}: PEFT adapts attention only where q, k and v have one weight together")
            return {}
        layers = {name: self.target.base(name) for name in self.outline.modules if name in found}
        kinds = {name: "" if base is None else base.kind for name, base in layers.items()}
        if fan_in_fan_out(kinds, bool(self.config.get("fan_in_fan_out"))).get(module):
            self.problems.append(
                f"{module!r}: PEFT transposes the update of its out_proj, because fan_in_fan_out is on for it"
            )
            return {}
        whole = self._checked(module, found.get(module, {}))
        last = self._checked(module, found.get(module + OUT_PROJECTION, {}), prefix=f"{OUT_PROJECTION[1:]}.")
        if whole is None or last is None:
            return {}
        return attention_from_peft(module, parts, whole, last.tensors, self.problems)

    def _checked(
        self, name: str, found: dict[str, Tensor], *, prefix: str = "", stack: int = 1, there: bool = True
    ) -> SavedLayer | None:
        """The tensors of one adapter with what the config says of it, still without a base."""
        settings = settings_of(name, self.config)
        wanted = ("lora_A", "lora_B", "lora_magnitude")[: 3 if settings["variant"] == "dora" else 2]
        if found.keys() != {*wanted}:
            told = {part: "is missing" for part in wanted if part not in found}
            told |= {part: "is there, but use_dora is not set" for part in found if part not in wanted}
            self.problems += [f"{name!r}: {prefix}{TENSORS[part]} {line}" for part, line in told.items()]
            return None
        flat = [part for part in ("lora_A", "lora_B") if len(found[part].shape) < 2]
        if flat:
            shapes = [f"{prefix}{TENSORS[part]} has shape {tuple(found[part].shape)}" for part in flat]
            self.problems.append(f"{name!r}: {' and '.join(shapes)}, expected two dimensions or more")
            return None
        r = found["lora_A"].shape[0] / stack
        if there and settings["r"] != r:
            self.problems.append(f"{name!r}: rank {r:g} in the file, {settings['r']} in the config")
            return None
        if name in self.parameters or self._attention_of(name) is not None:
            if settings["variant"] == "dora":
                self.problems.append(f"{name!r}: PEFT has no DoRA for parameters and attention modules")
                return None
            settings["dropout"] = 0.0  # PEFT has none there, whatever the config says
        spec = checked_spec(repr(name), settings, self.problems, self.spec)
        return None if spec is None else SavedLayer(BaseLayer("", "", ()), spec, found)
