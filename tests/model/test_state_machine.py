"""Random sequences of all public operations on random models, beside a reference of explicit dense weights.

After every operation the model must compute what the reference does, hold the same factors, train the same parameters
and have the same keys. A call that the reference expects to be refused must be refused; whatever is refused must leave
everything as it was. ``LORA_PLUS_SEQUENCES=2000 LORA_PLUS_SEED=1 python -m pytest -m slow
tests/model/test_state_machine.py`` runs that many sequences, drawn from that seed.
"""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_reference import PARTS, Adapter, Dense, Factors, Forest, difference, loss, snapshot
from hypothesis import HealthCheck, assume, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import lora_plus
from lora_plus.files import adapter_state_dict
from lora_plus.model import active_adapters, adapter_names
from lora_plus.model.train_also import Head, units_in
from lora_plus.model.tree import Tree, adapted_weights
from lora_plus.surgery import combine_adapters, resize_adapter
from lora_plus.training import fold_lr_ratio, reset_lora_parameters

REFUSED = (ValueError, KeyError, TypeError)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}
LR, RATIO, EMBEDDING_LR = 0.05, 4.0, 0.02

NAMES = st.sampled_from(["a", "b", "c"])
ANY = st.integers(0, 2**16)
"""Chooses among what there is then."""
PICKS = st.lists(ANY, min_size=1, max_size=4)
SOME = st.lists(ANY, min_size=1, max_size=2)
STRENGTHS = st.sampled_from([1.0, 1.0, 0.5, -1.0])


@dataclass
class Block:
    """A ``with`` block that is open."""

    kind: str
    manager: AbstractContextManager[Any]
    samples: tuple[str | None, ...] = ()
    merges: bool = False
    """Whether leaving it undoes a merge."""


@dataclass
class Saved:
    """What a file must hold."""

    path: Path
    update: dict[str, Tensor]
    adapter: Adapter
    full: dict[str, dict[str, Tensor]]


class Machine(RuleBasedStateMachine):
    model: Forest
    dense: Dense

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.blocks: list[Block] = []
        self.merged: dict[str, float] | None = None
        self.stale = False
        self.shown: dict[str, Tensor] | None = None
        """The state that a `disabled` block shows."""
        self.files: dict[str, Saved] = {}

    def teardown(self) -> None:
        for block in reversed(self.blocks):
            block.manager.__exit__(None, None, None)
        self.folder.cleanup()

    @initialize(kinds=st.lists(st.sampled_from(sorted(PARTS)), min_size=2, max_size=4), nested=ANY, start=ANY)
    def grow(self, kinds: list[str], nested: int, start: int) -> None:
        torch.manual_seed(start)
        self.tries_without = start % 10 == 3
        paths = [f"deep.p{n}" if nested >> n & 1 else f"p{n}" for n in range(len(kinds))]
        self.kinds = dict(zip(paths, kinds, strict=True))
        model = Forest(self.kinds).double()
        for parameter in list(model.parameters())[::3]:
            parameter.requires_grad_(bool(nested & 1))
        self.dense = Dense(model, self.kinds, start)
        self.model = model
        self.base = dict(model.named_parameters(remove_duplicate=False))
        self.types = [type(module) for module in model.modules()]

    # ---- what it must be at any time ---------------------------------------------------------------------------------

    @property
    def disabled(self) -> bool:
        return any(block.kind == "disabled" for block in self.blocks)

    @property
    def samples(self) -> tuple[str | None, ...]:
        """The adapter of each sample; empty where there is no such block."""
        return next((block.samples for block in reversed(self.blocks) if block.kind == "samples"), ())

    @property
    def locked(self) -> bool:
        """Whether adapters cannot be changed."""
        return self.disabled or bool(self.samples)

    @property
    def changeable(self) -> bool:
        return not self.locked and self.merged is None

    @property
    def worth_trying(self) -> bool:
        """Whether what needs adapters is called: in most runs only where there are some."""
        return bool(self.dense.adapters) or self.tries_without

    def in_force(self) -> dict[str, float]:
        return self.dense.active if self.merged is None else self.merged

    def expected(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The outputs, and the buffers afterwards, of the state that is shown."""
        dense, training = self.dense, self.model.training
        if self.disabled:
            return dense.run(dense.state if self.shown is None else self.shown, training)
        state = dense.with_heads(self.in_force())
        if not self.samples:
            return dense.run(dense.weights(self.in_force(), state), training)
        runs = [dense.run(dense.weights({} if name is None else {name: 1.0}, state), training) for name in self.samples]
        outputs = {path: torch.stack([outputs[path][n] for n, (outputs, _) in enumerate(runs)]) for path in dense.kinds}
        return outputs, runs[0][1]

    @invariant()
    @torch.no_grad()
    def computes_what_it_must(self) -> None:
        if self.stale and not self.disabled:
            with pytest.raises(ValueError, match="changed while it was merged"):
                self.model.eval()(self.dense.inputs)
            return
        outputs, buffers = self.expected()
        torch.testing.assert_close(self.model(self.dense.inputs), outputs, **TOLERANCE)
        if self.shown is None:
            self.dense.keep(buffers, self.in_force())
            return
        self.shown |= buffers  # a buffer of what shows no trained values is one and the same
        aside = {key for path in self.dense.heads(self.in_force()) for key in self.dense.tensors_of(path)}
        self.dense.state |= {name: value for name, value in buffers.items() if name not in aside}

    @invariant()
    def holds_what_it_must(self) -> None:
        dense, model = self.dense, self.model
        assert set(adapter_names(model)) == dense.adapters.keys()
        here = {name for name in dense.active if dense.adapters[name].spots}
        assert set(active_adapters(model)) == here
        if not self.disabled:
            for name in dense.adapters:
                self.same_tensors(name)
        flags = {
            name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False) if name in dense.flags
        }
        inside = {name for spot, at in dense.spots.items() if at.in_weight for name in at.keys}
        wanted = dense.flags_now(self.in_force())
        assert {n: f for n, f in flags.items() if n not in inside} == {
            n: f for n, f in wanted.items() if n not in inside
        }
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        count = sum(len(held.trained()) for a in dense.adapters.values() if a.trainable for held in a.spots.values())
        assert len(trained) == count + len({id(p) for n, p in model.named_parameters() if wanted.get(n)})

    @invariant()
    def has_the_keys_that_it_must(self) -> None:
        if self.merged is not None or not self.dense.adapters:
            assert list(self.model.state_dict()) == self.dense.keys
        else:
            assert [key for key in self.model.state_dict() if key in self.dense.state] == self.dense.keys
        if not self.dense.adapters:
            assert [type(module) for module in self.model.modules()] == self.types

    def same_tensors(self, name: str) -> None:
        adapter = self.dense.adapters[name]
        wanted = {f"{spot}.{key}": value for spot, held in adapter.spots.items() for key, value in held.tensors.items()}
        for values in adapter.full.values():
            wanted |= values
        got = adapter_state_dict(self.model, adapter=name)
        assert got.keys() == wanted.keys()
        torch.testing.assert_close(got, wanted, **TOLERANCE)

    # ---- calls ------------------------------------------------------------------------------------------------------

    def call(self, expected: bool | None, operation: Callable[[], Any]) -> Any:
        """The result, or None if the call was refused, which then has changed nothing; None means: either may be."""
        before, _alive = snapshot(self.model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is shared with")
            warnings.filterwarnings("ignore", message=".*adds the update of an nn.MultiheadAttention's out_proj twice")
            try:
                result = operation()
            except REFUSED as error:
                assert not expected, f"refused: {error!r}"
                after, _ = snapshot(self.model)
                changed = difference(before, after)
                assert not changed, f"the refused call has changed {changed}: {error!r}"
                return None
        assert expected is not False, "it should have been refused"
        return True if result is None else result

    def read(self, name: str) -> Adapter:
        """An adapter as the model holds it now."""
        spots: dict[str, Factors] = {}
        state = adapter_state_dict(self.model, adapter=name)
        variants = {row.name: row for row in lora_plus.lora_summary(self.model).rows if row.adapter == name}
        for spot, row in variants.items():
            own = {name: name.rpartition(".") for name in state}
            tensors = {key: state[k].clone() for k, (at, _, key) in own.items() if at == spot and "lora_" in key}
            variant = next((v for v in ("dora", "lora_fa") if f"variant {v}" in row.note), "lora")
            spots[spot] = Factors(row.scale, variant, tensors)
        return Adapter(spots)

    def known(self, pick: int) -> str:
        """A name that an adapter has, or may not have."""
        names = [*self.dense.adapters] * 4 + ["a", "b", "c"]
        return names[pick % len(names)]

    def several(self, picks: Sequence[int] | None) -> list[str] | None:
        """Several such names, each once."""
        return None if picks is None else list(dict.fromkeys(map(self.known, picks)))

    def pick(self, among: Sequence[str], picks: Sequence[int]) -> list[str]:
        return list(dict.fromkeys(among[pick % len(among)] for pick in picks)) if among else []

    def overlapping(self, paths: Sequence[str]) -> bool:
        """Whether one of these is inside of what is trained in full already, or around it."""
        pairs = [(path, other) for path in paths for other in self.dense.full()]
        return any(one.startswith(f"{other}.") or other.startswith(f"{one}.") for one, other in pairs)

    def only_trains(self, name: str | None) -> None:
        for other, adapter in self.dense.adapters.items():
            adapter.trainable = other == name

    # ---- rules ------------------------------------------------------------------------------------------------------

    @rule(
        name=NAMES,
        picks=PICKS,
        full=st.lists(ANY, max_size=2),
        r=st.integers(1, 3),
        alpha=st.sampled_from([1, 4, -3]),
        scaling=st.sampled_from(["standard", "rslora"]),
        variant=st.sampled_from(["lora", "lora", "lora_fa", "dora"]),
        init=st.sampled_from(["kaiming", "kaiming", "gaussian", "kaiming_B", "orthogonal", "pissa", "milora", "olora"]),
        wrong=st.sampled_from([False] * 9 + [True]),
    )
    def inject(
        self, name: str, picks: list[int], full: list[int], r: int, alpha: float, wrong: bool, **how: str
    ) -> None:
        dense = self.dense
        targets = self.pick(list(dense.spots), picks)
        parts = self.pick(dense.units(), full)
        parts = [path for path in parts if not any(path.startswith(f"{other}.") for other in parts)]
        hosts = {dense.part_of(spot) for spot in targets}
        adapted = {dense.part_of(spot) for adapter in dense.adapters.values() for spot in adapter.spots}
        expected: bool | None = (
            self.changeable
            and name not in dense.adapters
            and bool(targets)
            and not wrong
            and not set(parts) & (hosts | adapted)
            and not self.overlapping(parts)
            and not hosts & dense.full()
            and not (how["variant"] == "dora" and any(dense.spots[spot].rows for spot in targets))
            and not (how["variant"] == "lora_fa" and how["init"] == "kaiming_B")
        )
        if expected and how["init"] in ("orthogonal", "pissa", "milora", "olora"):
            expected = None  # not every rank has such a start
        state = {path: {k: v.clone() for k, v in dense.tensors_of(path).items()} for path in parts}
        done = self.call(
            expected,
            lambda: lora_plus.inject_lora(
                self.model, [*targets, *(["nowhere"] if wrong else [])], r=r, alpha=alpha, adapter=name,
                train_also=parts, **how,
            ),
        )  # fmt: skip
        if done is not None:
            dense.adapters[name] = replace(self.read(name), full=state)
            scale = alpha / (r if how["scaling"] == "standard" else r**0.5)
            assert set(dense.adapters[name].spots) == set(targets)
            assert all(abs(held.scale / scale - 1) < 1e-12 for held in dense.adapters[name].spots.values())
            assert all(held.variant == how["variant"] for held in dense.adapters[name].spots.values())
            dense.active = {name: 1.0}
            self.only_trains(name)

    @precondition(lambda self: self.worth_trying)
    @rule(name=NAMES, like=ANY, r=st.sampled_from([None, 1, 4]), variant=st.sampled_from([None, "lora", "dora"]))
    def add(self, name: str, like: int, r: int | None, variant: str | None) -> None:
        dense, like = self.dense, self.known(like)
        other = dense.adapters.get(like)
        expected = (
            self.changeable
            and other is not None
            and name not in dense.adapters
            and not (variant == "dora" and any(dense.spots[spot].rows for spot in other.spots))
        )
        done = self.call(expected, lambda: lora_plus.add_adapter(self.model, name, like=like, r=r, variant=variant))
        if done is not None:
            dense.adapters[name] = self.read(name)
            assert dense.adapters[name].spots.keys() == other.spots.keys()
            dense.active = {name: 1.0}
            self.only_trains(name)

    @precondition(lambda self: self.worth_trying)
    @rule(
        factors=st.dictionaries(ANY, STRENGTHS, min_size=1, max_size=2), trainable=st.sampled_from([None, True, False])
    )
    def set(self, factors: dict[int, float], trainable: bool | None) -> None:
        dense, chosen = self.dense, {self.known(pick): factor for pick, factor in factors.items()}
        known = chosen.keys() <= dense.adapters.keys()
        dora = [spot for name in chosen if known for spot in dense.adapters[name].dora]
        scaled = known and any(dense.adapters[name].dora and factor != 1 for name, factor in chosen.items())
        expected = known and self.changeable and len(dora) == len(set(dora)) and not scaled and dense.agree(chosen)
        if self.call(expected, lambda: lora_plus.set_adapter(self.model, chosen, trainable=trainable)) is not None:
            dense.active = dict(chosen)
            if trainable is not None:
                for name, adapter in dense.adapters.items():
                    adapter.trainable = trainable and name in chosen

    @precondition(lambda self: self.worth_trying)
    @rule(old=ANY, new=NAMES)
    def rename(self, old: int, new: str) -> None:
        dense, old = self.dense, self.known(old)
        expected = old in dense.adapters and new not in dense.adapters and not self.locked
        if self.call(expected, lambda: lora_plus.rename_adapter(self.model, old, new)) is not None:
            for names in (dense.adapters, dense.active, self.merged or {}):
                renamed = {new if name == old else name: value for name, value in names.items()}
                names.clear()
                names.update(renamed)

    @precondition(lambda self: self.worth_trying)
    @rule(name=ANY)
    def delete(self, name: int) -> None:
        name = self.known(name)
        dense = self.dense
        expected = name in dense.adapters and self.changeable
        if self.call(expected, lambda: lora_plus.delete_adapter(self.model, name)) is not None:
            del dense.adapters[name]
            dense.active.pop(name, None)

    @rule(training=st.booleans())
    def mode(self, training: bool) -> None:
        self.model.train(training)

    @precondition(lambda self: self.dense.adapters and self.merged is None and not self.blocks)
    @rule(ratio=st.sampled_from([1.0, RATIO]), mode=st.sampled_from(["A", "B", "geometric"]))
    def train(self, ratio: float, mode: str) -> None:
        dense = self.dense
        trainable = {name: a for name, a in dense.adapters.items() if a.trainable and a.spots}
        expected = bool(trainable) and bool(trainable.keys() & dense.active.keys())
        optimizer = self.call(
            expected,
            lambda: lora_plus.create_loraplus_optimizer(
                self.model, torch.optim.SGD, lr=LR, lr_ratio=ratio, lr_mode=mode, embedding_lr=EMBEDDING_LR
            ),
        )
        if optimizer is None:
            return
        leaves: dict[int, tuple[Tensor, float]] = {}
        rates = {"A": {"lora_A": LR, "lora_B": LR * ratio}, "B": {"lora_A": LR / ratio, "lora_B": LR},
                 "geometric": {"lora_A": LR / ratio**0.5, "lora_B": LR * ratio**0.5}}[mode]  # fmt: skip
        for adapter in trainable.values():
            for spot, held in adapter.spots.items():
                for key in held.trained():
                    lr = EMBEDDING_LR if dense.spots[spot].embedding and key in rates else rates.get(key, LR)
                    leaf = held.tensors[key] = held.tensors[key].detach().clone().requires_grad_()
                    leaves[id(leaf)] = leaf, lr
        state = dense.with_heads(dense.active)
        for name, flag in dense.flags_now(dense.active).items():
            if flag:
                state[name] = state[name].detach().clone().requires_grad_()
                leaves[id(state[name])] = state[name], LR
        outputs, buffers = dense.run(dense.weights(dense.active, state), self.model.training)
        loss(outputs).backward() if any(o.requires_grad for o in outputs.values()) else None
        with torch.no_grad():
            for leaf, lr in leaves.values():
                if leaf.grad is not None:
                    leaf -= lr * leaf.grad
                leaf.requires_grad_(False).grad = None
        dense.keep({**state, **buffers}, dense.active)
        got = loss(self.model(dense.inputs))
        if got.requires_grad:
            got.backward()
        optimizer.step()
        optimizer.zero_grad()

    @precondition(lambda self: self.dense.adapters and not self.disabled)
    @rule(name=ANY, start=ANY)
    def write(self, name: int, start: int) -> None:
        """Change an adapter in place, as an engine or a user may."""
        name = self.known(name)
        assume(name in self.dense.adapters)
        generator = torch.Generator().manual_seed(start)
        noise = {
            f"{spot}.{key}": 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for spot, held in self.dense.adapters[name].spots.items()
            for key, value in held.tensors.items()
            if key in ("lora_A", "lora_B")
        }
        state = adapter_state_dict(self.model, adapter=name)
        for spot, held in self.dense.adapters[name].spots.items():
            for key in held.tensors:
                if f"{spot}.{key}" not in noise:
                    continue
                held.tensors[key] = held.tensors[key] + noise[f"{spot}.{key}"]
                with torch.no_grad():
                    state[f"{spot}.{key}"].add_(noise[f"{spot}.{key}"])
        self.stale |= self.merged is not None and name in self.merged and bool(noise)

    # ---- merging ----------------------------------------------------------------------------------------------------

    def merge_wanted(self, names: list[str] | None) -> dict[str, float] | None:
        """What merging these puts into the weights; None if it must be refused."""
        dense = self.dense
        wanted = dict(dense.active) if names is None else {name: dense.active.get(name, 1.0) for name in names}
        if not wanted.keys() <= dense.adapters.keys():
            return None
        dora = [spot for name in wanted for spot in dense.adapters[name].dora]
        usable = not self.locked and any(dense.adapters[name].spots for name in wanted) and dense.agree(wanted)
        return wanted if usable and len(dora) == len(set(dora)) else None

    @precondition(lambda self: self.worth_trying)
    @rule(picks=st.none() | SOME)
    def merge(self, picks: list[int] | None) -> None:
        names = self.several(picks)
        wanted = self.merge_wanted(names) if self.merged is None else None
        if self.call(wanted is not None, lambda: lora_plus.merge_lora(self.model, adapters=names)) is not None:
            self.merged = wanted

    @precondition(lambda self: self.worth_trying)
    @rule()
    def unmerge(self) -> None:
        expected = self.merged is not None and not self.locked
        if self.call(expected, lambda: lora_plus.unmerge_lora(self.model)) is not None:
            self.merged, self.stale = None, False

    @precondition(lambda self: self.worth_trying and not self.stale and len(self.blocks) < 2)
    @rule(picks=st.none() | SOME)
    def enter_merged(self, picks: list[int] | None) -> None:
        names = self.several(picks)
        wanted = self.merge_wanted(names)
        expected: bool | None = wanted is not None
        if expected and self.merged is not None:
            expected = None if self.merged == wanted else False
        manager = lora_plus.merged(self.model, adapters=names)
        if self.call(expected, manager.__enter__) is not None:
            self.blocks.append(Block("merged", manager, merges=self.merged is None))
            self.merged = wanted if self.merged is None else self.merged

    @precondition(lambda self: self.worth_trying and len(self.blocks) < 2)
    @rule()
    def enter_disabled(self) -> None:
        manager = lora_plus.disabled(self.model)
        if self.call(bool(self.dense.adapters), manager.__enter__) is not None:
            if not self.disabled:
                self.shown = {name: value.clone() for name, value in self.dense.state.items()}
            self.blocks.append(Block("disabled", manager))

    @precondition(lambda self: self.worth_trying and len(self.blocks) < 2 and not self.samples)
    @rule(picks=st.lists(st.none() | ANY, min_size=2, max_size=2))
    def enter_samples(self, picks: list[int | None]) -> None:
        names = [None if pick is None else self.known(pick) for pick in picks]
        dense = self.dense
        given = {name for name in names if name is not None}
        expected = (
            bool(dense.adapters)
            and given <= dense.adapters.keys()
            and self.merged is None
            and not self.disabled
            and all(
                {name if name in given and path in dense.adapters[name].full else None for name in names}
                == {dense.heads(dense.active).get(path)}
                for path in dense.full()
            )
            and not any(dense.spots[spot].in_weight for name in given for spot in dense.adapters[name].spots)
        )
        manager = lora_plus.adapter_per_sample(self.model, names)
        if self.call(expected, manager.__enter__) is not None:
            self.blocks.append(Block("samples", manager, samples=tuple(names)))

    @precondition(lambda self: self.blocks)
    @rule()
    def leave(self) -> None:
        self.end_block()

    @precondition(lambda self: self.blocks)
    @rule()
    def leave_soon(self) -> None:
        self.end_block()  # inside a block most calls are refused

    def end_block(self) -> None:
        block = self.blocks.pop()
        block.manager.__exit__(None, None, None)
        if block.kind == "merged" and block.merges:
            self.merged, self.stale = None, False
        if not self.disabled:
            self.shown = None

    @precondition(lambda self: self.worth_trying)
    @rule(picks=st.none() | SOME)
    def merge_for_good(self, picks: list[int] | None) -> None:
        names = self.several(picks)
        dense = self.dense
        wanted = self.merge_wanted(names)
        expected: bool | None = wanted is not None and not self.stale
        if expected and self.merged is not None and self.merged != wanted:
            expected = False
        if self.call(expected, lambda: lora_plus.merge_and_unload(self.model, adapters=names)) is not None:
            dense.state = dense.weights(wanted, dense.with_heads(wanted))
            self.plain_again()

    @precondition(lambda self: self.worth_trying)
    @rule()
    def remove(self) -> None:
        if self.call(not self.locked, lambda: lora_plus.remove_lora(self.model)) is not None:
            self.plain_again()
            now = dict(self.model.named_parameters(remove_duplicate=False))
            assert all(now[name] is parameter for name, parameter in self.base.items())

    def plain_again(self) -> None:
        self.dense.adapters, self.dense.active = {}, {}
        self.merged, self.stale = None, False
        for name, value in self.model.state_dict().items():
            torch.testing.assert_close(value, self.dense.state[name], **TOLERANCE)
        self.base = dict(self.model.named_parameters(remove_duplicate=False))

    # ---- files and copies -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.worth_trying)
    @rule(name=ANY, slot=st.sampled_from(["one", "two"]), form=st.sampled_from(["native", "native", "peft"]))
    def save(self, name: int, slot: str, form: str) -> None:
        name = self.known(name)
        dense = self.dense
        path = Path(self.folder.name, f"{slot}.safetensors" if form == "native" else slot)
        adapter = dense.adapters.get(name)
        expected: bool | None = adapter is not None
        if adapter is not None and (form == "peft" or (self.disabled and adapter.full)):
            expected = None if form == "peft" else False
        if self.call(expected, lambda: lora_plus.save_adapter(self.model, path, adapter=name, format=form)) is not None:
            full = {path: {k: v.clone() for k, v in values.items()} for path, values in adapter.full.items()}
            self.files[slot] = Saved(path, dense.update(name), adapter, full)

    @precondition(lambda self: self.files)
    @rule(name=NAMES, slot=st.sampled_from(["one", "two"]), trainable=st.booleans())
    def load(self, name: str, slot: str, trainable: bool) -> None:
        assume(slot in self.files)
        dense, saved = self.dense, self.files[slot]
        hosts = {dense.part_of(spot) for spot in saved.adapter.spots}
        adapted = {dense.part_of(spot) for adapter in dense.adapters.values() for spot in adapter.spots}
        expected: bool | None = (
            self.changeable
            and name not in dense.adapters
            and not hosts & dense.full()
            and not saved.full.keys() & adapted
            and not self.overlapping(list(saved.full))
        )
        done = self.call(
            expected,
            lambda: lora_plus.load_adapter(self.model, saved.path, adapter=name, trainable=trainable),
        )
        if done is not None:
            dense.adapters[name] = replace(self.read(name), full=copy.deepcopy(saved.full))
            dense.active = {name: 1.0}
            self.only_trains(name if trainable else None)
            if not any(held.variant == "dora" for held in saved.adapter.spots.values()):
                self.same_update(name, saved.update)

    def same_update(self, name: str, wanted: Mapping[str, Tensor]) -> None:
        for key, value in self.dense.update(name).items():
            if value.is_floating_point():
                torch.testing.assert_close(value, wanted[key], rtol=1e-8, atol=1e-8)

    @precondition(lambda self: self.worth_trying)
    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copied(self, how: str) -> None:
        """A copy is a model of its own, outside of all blocks; where no block is open, the run goes on with it."""
        before, _alive = snapshot(self.model)
        copies = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}
        made = copies[how](self.model)
        assert (changed := difference(before, snapshot(self.model)[0])) == "", changed
        dense = self.dense
        if not self.stale:
            weights = dense.weights(self.in_force(), dense.with_heads(self.in_force()))
            training = made.training
            with torch.no_grad():
                torch.testing.assert_close(made.eval()(dense.inputs), dense.run(weights, False)[0], **TOLERANCE)
            made.train(training)
        if not self.blocks:
            self.model, self.base = made, self.base_of(made)

    def base_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The base's own parameters by their names, which adapted ones have in a plain model."""
        plain = lora_plus.remove_lora(copy.deepcopy(model))
        names = [name for name, _ in plain.named_parameters(remove_duplicate=False)]
        held = dict(model.named_parameters(remove_duplicate=False))
        for path, weight in adapted_weights(model):
            own = weight.own_weight()
            spot = self.dense.spots.get(path) or next(
                at for name, at in self.dense.spots.items() if name.startswith(f"{path}.") or path in at.keys
            )
            held |= dict.fromkeys(spot.keys, own)
        for unit, record in units_in(Tree(model)):
            own_tensors = Head(unit, record, record.home).tensors()
            held |= {f"{unit.name}.{key}" if key else unit.name: value for key, value in own_tensors.items()}
        return {name: held[name] for name in names}

    @precondition(lambda self: self.worth_trying and not self.disabled and self.merged is None)
    @rule()
    def reload_state(self) -> None:
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(state)

    # ---- changes of adapters ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.worth_trying)
    @rule(name=ANY, init=st.sampled_from(["kaiming", "gaussian"]))
    def reset(self, name: int, init: str) -> None:
        name = self.known(name)
        adapter = self.dense.adapters.get(name)
        expected = adapter is not None and self.changeable
        if self.call(expected, lambda: reset_lora_parameters(self.model, adapter=name, init=init)) is not None:
            self.dense.adapters[name] = replace(adapter, spots=self.read(name).spots)

    @precondition(lambda self: self.worth_trying)
    @rule(name=ANY, ratio=st.sampled_from([4.0, 2.0, 0.25]), rule_=st.sampled_from(["adam", "sgd"]))
    def fold(self, name: int, ratio: float, rule_: str) -> None:
        name = self.known(name)
        dense = self.dense
        adapter = dense.adapters.get(name)
        spots = [] if adapter is None else [spot for spot in adapter.spots if not dense.spots[spot].embedding]
        factor = ratio if rule_ == "adam" else ratio**0.5
        assume(all(0.1 < abs(adapter.spots[spot].scale) * factor < 10 for spot in spots))  # training stays stable
        expected = bool(spots) and self.changeable
        done = self.call(expected, lambda: fold_lr_ratio(self.model, ratio, rule=rule_, adapter=name))
        for held in (adapter.spots[spot] for spot in (spots if done is not None else ())):
            held.scale *= factor
            divided = {key: held.tensors[key] / factor for key in ("lora_B", "lora_B0") if key in held.tensors}
            held.tensors |= divided

    @precondition(lambda self: self.worth_trying)
    @rule(name=ANY, r=st.integers(1, 6))
    def resize(self, name: int, r: int) -> None:
        name = self.known(name)
        dense = self.dense
        adapter = dense.adapters.get(name)
        before = {} if adapter is None else dense.update(name)
        flags = None if adapter is None else adapter.trainable
        expected = adapter is not None and self.changeable
        if self.call(expected, lambda: resize_adapter(self.model, r=r, adapter=name)) is not None:
            ranks = [
                held.tensors["lora_B"].shape[-1] * (2 if "lora_A0" in held.tensors else 1)
                for held in adapter.spots.values()
            ]
            dense.adapters[name] = replace(adapter, spots=self.read(name).spots)
            assert dense.adapters[name].trainable == flags
            if r >= max(ranks):
                self.same_update(name, before)

    @precondition(lambda self: self.worth_trying)
    @rule(
        picks=SOME,
        name=NAMES,
        factors=st.lists(STRENGTHS, min_size=2, max_size=2),
    )
    def combine(self, picks: list[int], name: str, factors: list[float]) -> None:
        dense = self.dense
        weights = dict(zip(self.several(picks), factors, strict=False))
        known = weights.keys() <= dense.adapters.keys()
        expected = (
            known
            and self.changeable
            and name not in dense.adapters
            and not any(dense.adapters[each].dora or dense.adapters[each].full for each in weights)
        )
        done = self.call(
            expected,
            lambda: combine_adapters(self.model, list(weights), weights=list(weights.values()), adapter=name),
        )
        if done is not None:
            parts = [(dense.update(each), factor) for each, factor in weights.items()]
            wanted = {
                key: sum((part[key] * factor for part, factor in parts), torch.zeros_like(value))
                for key, value in dense.state.items()
                if value.is_floating_point()
            }
            dense.adapters[name] = self.read(name)
            dense.active = {name: 1.0}
            self.only_trains(None)
            self.same_update(name, wanted)


COMMON = {
    "deadline": None,
    "stateful_step_count": 30,
    "suppress_health_check": list(HealthCheck),
    "database": None,
}


def test_short_sequences_of_operations() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=25, derandomize=True, **COMMON))


@pytest.mark.slow
def test_many_sequences_of_operations() -> None:
    count, start = int(os.environ.get("LORA_PLUS_SEQUENCES", "100")), int(os.environ.get("LORA_PLUS_SEED", "0"))
    run_state_machine_as_test(seed(start)(Machine), settings=settings(max_examples=count, print_blob=True, **COMMON))
