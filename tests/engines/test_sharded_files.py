"""Adapters on sharded models: one rank writes the file that one process would write, and shards take files in."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine_model import batches, lora_model, optimizer_for, train
from processes import Processes
from sharded_models import DISTRIBUTED, FULLY_SHARDED, SHARDED, TOKENS, by_fsdp1, by_fully_shard
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

import lora_plus as lp
from lora_plus.engines import run_file as trained_state
from lora_plus.files import adapter_state_dict, to_peft
from lora_plus.files.existing import Existing
from lora_plus.files.formats import FORMATS
from lora_plus.model import adapter_names
from lora_plus.tensors.distributed import whole

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"embedding": True},
    "r below the world size": {"r": 1},
    "dora": {"variant": "dora"},
    "pissa": {"init": "pissa"},
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def save_all(folder: Path, model: nn.Module) -> dict[str, bytes]:
    """What the formats write, as it is at once after the calls."""
    for name in ("a.safetensors", "peft"):
        lp.save_adapter(model, folder / name)
    return files(folder)


def saved_by_two(folder: str) -> list[str]:
    """The engines and settings whose files differ from one process's; every rank looks."""
    wrong = []
    rank = torch.distributed.get_rank()
    for name, settings in SETTINGS.items():
        plain = lora_model(non_zero=True, **settings)
        expected = save_all(Path(folder) / f"rank {rank}" / name, plain)
        state = adapter_state_dict(plain)
        for engine in SHARDED if name == "lora" else ("fully_shard", "FullyShardedDataParallel"):
            model = SHARDED[engine](lora_model(non_zero=True, **settings))
            if save_all(Path(folder) / f"{engine} {name}", model) != expected:
                wrong.append(f"{engine}, {name}: files")
            if engine in FULLY_SHARDED or engine == "FullyShardedDataParallel":
                model(TOKENS)
            gathered = adapter_state_dict(model)
            if gathered.keys() != state.keys() or not all(torch.equal(gathered[key], state[key]) for key in state):
                wrong.append(f"{engine}, {name}: state after a forward")
            if lp.lora_summary(model) != lp.lora_summary(plain):
                wrong.append(f"{engine}, {name}: summary")
        torch.distributed.barrier()
    return wrong


def test_two_ranks_save_the_bytes_of_one(two_processes: Processes, tmp_path: Path) -> None:
    assert two_processes(saved_by_two, str(tmp_path)) == [[], []]


def writers(folder: str) -> list[bool]:
    """Whether this rank wrote: sharded over both, in DDP, and a plain model of its own."""
    written = []
    for model in (by_fully_shard(lora_model()), DistributedDataParallel(lora_model()), lora_model()):
        calls: list[Any] = []
        native = FORMATS["native"]

        def write(*given: Any, write: Any = native.write, calls: list[Any] = calls) -> Any:
            calls.append(given)
            return write(*given)

        FORMATS["native"] = replace(native, write=write)
        lp.save_adapter(model, Path(folder) / "a.safetensors")
        FORMATS["native"] = native
        written.append(bool(calls))
    model = DistributedDataParallel(lora_model())
    if torch.distributed.get_rank() == 0:  # as loops of DDP have it
        lp.save_adapter(model, Path(folder) / "a.safetensors")
    torch.distributed.barrier()
    return [*written, (Path(folder) / "a.safetensors").exists()]


def test_one_rank_writes_and_each_one_a_model_of_its_own(two_processes: Processes, tmp_path: Path) -> None:
    assert two_processes(writers, str(tmp_path)) == [[True, True, True, True], [False, False, True, True]]


def errors_of(action: Callable[[], Any]) -> tuple[str, str]:
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def failing_saves(folder: str) -> list[tuple[str, str]]:
    """The errors of a full disk, of an error that does not pickle, of a value that is not finite, of no adapter."""
    model = by_fully_shard(lora_model())
    path = Path(folder) / "a.safetensors"

    class Local(Exception):
        pass

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def local(*args: Any) -> None:
        raise Local("of this function")

    native, found = FORMATS["native"], []
    for writer in (full, local):
        FORMATS["native"] = replace(native, write=writer)
        found.append(errors_of(lambda: lp.save_adapter(model, path)))
    FORMATS["native"] = native
    bad = lora_model()
    with torch.no_grad():
        bad.blocks[1].q.lora_A["default"][0, 0] = torch.nan  # on the first rank's shard
    bad = by_fully_shard(bad)
    found.append(errors_of(lambda: lp.save_adapter(bad, path)))
    found.append(errors_of(lambda: lp.save_adapter(bad, path, adapter="other")))
    return [*found, ("files", " ".join(files(Path(folder))))]


def test_an_error_of_the_writing_rank_is_raised_on_all(two_processes: Processes, tmp_path: Path) -> None:
    first, second = two_processes(failing_saves, str(tmp_path))
    assert first[1] == ("Local", "of this function") and second[1] == ("RuntimeError", "Local: of this function")
    del first[1], second[1]
    assert first == second and [kind for kind, _ in first] == ["OSError", "Problems", "KeyError", "files"]
    assert "No space left on device" in first[0][1] and "'blocks.1.q.lora_A' has values" in first[1][1]
    assert first[-1] == ("files", "")


def saves_at_once(folder: str) -> bool:
    """Each rank saves a model of its own to the same path, over and over, while both read it."""
    rank, path = torch.distributed.get_rank(), Path(folder) / "a.safetensors"
    model = lora_model(non_zero=True, r=2 + rank)
    for _ in range(5):
        lp.save_adapter(model, path)
        assert adapter_state_dict(lp.load_adapter(lora_model_base(), path))["blocks.0.q.lora_A"].shape[0] in (2, 3)
    torch.distributed.barrier()
    return [each.name for each in Path(folder).iterdir()] == ["a.safetensors"]


def lora_model_base() -> nn.Module:
    return lp.remove_lora(lora_model())


def test_saves_to_one_path_at_once_do_not_collide(two_processes: Processes, tmp_path: Path) -> None:
    assert two_processes(saves_at_once, str(tmp_path)) == [True, True]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def loads(folder: str) -> list[str]:
    """What is wrong with loading one process's file into shards, and with training on."""
    wrong = []
    for name in ("a.safetensors", "peft"):
        path = Path(folder) / name
        source = lp.load_adapter(lora_model_base(), path, trainable=True)
        state = adapter_state_dict(source)
        for engine in DISTRIBUTED:
            model = DISTRIBUTED[engine](lora_model(embedding=True))
            parameters = list(model.parameters())
            if engine in FULLY_SHARDED:
                model(TOKENS)
            lp.load_adapter(model, path, trainable=True)
            if not equal(adapter_state_dict(model), state):
                wrong.append(f"{engine}, {name}: values")
            if [id(p) for p in model.parameters()] != [id(p) for p in parameters]:
                wrong.append(f"{engine}, {name}: other parameters")
            if [p.requires_grad for p in model.parameters()] != [p.requires_grad for p in source.parameters()]:
                wrong.append(f"{engine}, {name}: trainable")
            if engine in FULLY_SHARDED and (model(TOKENS) - source(TOKENS)).abs().max() > 1e-5:
                wrong.append(f"{engine}, {name}: output")
            lp.load_adapter(model, path)
            if any(p.requires_grad for p in model.parameters()):
                wrong.append(f"{engine}, {name}: not frozen")
    return wrong


def test_a_file_is_loaded_into_shards(two_processes: Processes, tmp_path: Path) -> None:
    save_all(tmp_path, lora_model(embedding=True, non_zero=True))
    assert two_processes(loads, str(tmp_path)) == [[], []]


def resumed(folder: str) -> float:
    """How far a run is from one that saved, loaded its own file halfway, and went on with the optimizer as it was."""
    rank, states = torch.distributed.get_rank(), []
    data = batches(4, rank=rank, world=2)
    for halfway in (False, True):
        model = by_fully_shard(lora_model())
        optimizer = optimizer_for(model)
        train(model, optimizer, data[:2])
        if halfway:
            path = Path(folder) / "a.safetensors"
            lp.save_adapter(model, path)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.zero_()
            lp.load_adapter(model, path, trainable=True)
        train(model, optimizer, data[2:])
        states.append(adapter_state_dict(model))
    return max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])


def test_loading_into_shards_leaves_the_optimizer_alone(two_processes: Processes, tmp_path: Path) -> None:
    assert two_processes(resumed, str(tmp_path)) == [0.0, 0.0]


def refused_loads(folder: str) -> list[tuple[str, str]]:
    """The errors of files that do not fit the adapter there, and whether anything was changed."""
    rank, path = torch.distributed.get_rank(), Path(folder)
    model = by_fully_shard(lora_model())
    before = adapter_state_dict(model)
    found = [errors_of(lambda name=name: lp.load_adapter(model, path / name)) for name in ("other", "full")]
    mine = path / ("fits" if rank == 0 else "is not there")  # one rank alone cannot read it
    found.append(errors_of(lambda: lp.load_adapter(model, mine)))
    found.append(errors_of(lambda: lp.load_adapter(model, path / "fits", adapter="b")))
    found.append(errors_of(lambda: lp.load_adapter(by_fsdp1(lora_model()), path / "fits")))
    found.append(errors_of(lambda: lp.load_adapter(by_fully_shard(lora_model(init="pissa")), path / "fits")))
    lp.merge_lora(model)
    found.append(errors_of(lambda: lp.load_adapter(model, path / "fits")))
    lp.unmerge_lora(model)
    return [*found, ("unchanged", str(equal(adapter_state_dict(model), before)))]


def test_a_file_that_does_not_fit_is_refused_on_all_ranks(two_processes: Processes, tmp_path: Path) -> None:
    lp.save_adapter(lora_model(), tmp_path / "fits")
    other = lora_model(r=2, alpha=4, rank_pattern={"blocks.0.q": 3}, train_also=())
    lp.save_adapter(other, tmp_path / "other")
    full = lora_model(embedding=True, train_also=["norm", "head"])
    lp.save_adapter(full, tmp_path / "full")
    first, second = two_processes(refused_loads, str(tmp_path))
    assert first == second
    (_, differs), (_, full_text), missing, unknown, fsdp1, (_, pissa), merged, unchanged = first
    for line in (
        "'blocks.0.q': r 3 in the file, 4 in the model", "'blocks.1.down': alpha 4 in the file, 8 in the model",
        "'norm' is not trained in full in the file",
    ):  # fmt: skip
        assert line in differs
    assert "'blocks.0.q': lora_A0.dtype None in the file, torch.float32 in the model" in pissa
    assert "'embedding' has no adapter 'default' in the model" in full_text
    assert "'head' is not trained in full in the model" in full_text
    assert missing[0] == "FileNotFoundError"
    both = "do it before the model is sharded, or inject one of its name and settings before"
    assert both in unknown[1] and both.partition(",")[0] in fsdp1[1] and both not in fsdp1[1]
    assert merged[0] == "ValueError" and "merged" in merged[1] and unchanged == ("unchanged", "True")


def other_operations() -> list[str]:
    """What is wrong with choosing, disabling, deleting and removing on storage."""
    wrong = []
    for engine in ("fully_shard", "fully_shard, layers"):
        plain, model = (lora_model(non_zero=True).double() for _ in range(2))
        for each in (plain, model):
            with torch.no_grad():
                each.norm.weight.mul_(2)
        DISTRIBUTED[engine](model)
        with lp.disabled(plain), lp.disabled(model):
            if (plain(TOKENS) - model(TOKENS)).abs().max() > 1e-12:
                wrong.append(f"{engine}: disabled")
        if (plain(TOKENS) - model(TOKENS)).abs().max() > 1e-12:
            wrong.append(f"{engine}: after disabled")
        for each in (plain, model):
            lp.set_adapter(each, {"default": 0.5}, trainable=False)
        if (plain(TOKENS) - model(TOKENS)).abs().max() > 1e-12 or any(p.requires_grad for p in model.parameters()):
            wrong.append(f"{engine}: set_adapter")
        change = lp.remove_lora if engine == "fully_shard" else lambda each: lp.delete_adapter(each, "default")
        for each in (plain, model):
            change(each)
        if (plain(TOKENS) - model(TOKENS)).abs().max() > 1e-12 or adapter_names(model):
            wrong.append(f"{engine}: removed")
        state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        if not equal(state, plain.state_dict()):
            wrong.append(f"{engine}: state after removal")
        for each in (plain, model):
            each(TOKENS).square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        for gradient, expected in zip(gradients, plain.parameters(), strict=True):
            if (whole(gradient) - expected.grad).abs().max() > 1e-12 * expected.grad.abs().max():
                wrong.append(f"{engine}: gradients after removal")
    for engine in ("fully_shard", "FullyShardedDataParallel", "DTensors"):
        _, text = errors_of(functools.partial(lp.check_adapters, SHARDED[engine](lora_model()), TOKENS))
        wrong += [] if "checking adapters needs an unsharded model" in text else [f"{engine}: {text}"]
    return wrong


def test_adapters_are_chosen_disabled_and_removed_on_shards(two_processes: Processes) -> None:
    assert two_processes(other_operations) == [[], []]


# ---- the file of a run ---------------------------------------------------------------------------------------------


def failing_runs(folder: str, engine: str) -> dict[str, tuple[str, str]]:
    """What this rank is told where the first one's disk is full, and where the second one's file is wrong or gone."""
    rank, path = torch.distributed.get_rank(), Path(folder) / engine / "run.safetensors"
    model = SHARDED[engine](lora_model(non_zero=True))
    write, found = trained_state.write_safetensors, {}

    def full(path: Path, *args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    trained_state.write_safetensors = full
    found["full"] = errors_of(lambda: trained_state.save_run(model, path, write=rank == 0))
    trained_state.write_safetensors = write
    trained_state.save_run(model, path, write=rank == 0)
    before = {name: whole(tensor).clone() for name, tensor in trained_state.run_tensors(model).items()}
    own = path if rank == 0 else path.with_name("absent.safetensors")
    found["absent"] = errors_of(lambda: trained_state.load_run(model, own))
    if rank == 1:
        write(own, {"other": torch.zeros(1)}, {})
    found["other"] = errors_of(lambda: trained_state.load_run(model, own))
    if rank == 1:
        own.write_bytes(b"no tensors")
    found["broken"] = errors_of(lambda: trained_state.load_run(model, own))
    after = {name: whole(tensor) for name, tensor in trained_state.run_tensors(model).items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    found["right"] = errors_of(lambda: trained_state.load_run(model, path))
    return found


def test_a_run_that_one_rank_cannot_write_or_read_fails_on_all(two_processes: Processes, tmp_path: Path) -> None:
    for engine in ("fully_shard", "FullyShardedDataParallel"):
        first, second = two_processes(failing_runs, str(tmp_path), engine)
        assert first == second
        kinds = ["OSError", "FileNotFoundError", "Problems", "SafetensorError", ""]
        assert [kind for kind, _ in first.values()] == kinds
        assert "No space left on device" in first["full"][1] and "does not fit the model" in first["other"][1]


def synced() -> list[str]:
    """What is wrong with weights that go from a sharded trainer to a sampler, and into shards of a higher rank."""
    wrong, data = [], batches(2, rank=torch.distributed.get_rank(), world=2)
    trainer = by_fully_shard(lora_model(train_also=()))
    train(trainer, optimizer_for(trainer), data)
    sampler = lp.load_adapter(lora_model(r=6, alpha=3, train_also=()), to_peft(trainer), replace=True)
    if (sampler.eval()(TOKENS) - trainer.eval()(TOKENS)).abs().max() > 1e-5:
        wrong.append("the sampler's output")
    sharded = by_fully_shard(lora_model(r=6, alpha=3, train_also=()))
    parameters = list(sharded.parameters())
    lp.load_adapter(sharded, to_peft(trainer), replace=True)
    if [id(p) for p in sharded.parameters()] != [id(p) for p in parameters]:
        wrong.append("other parameters")
    if not equal(adapter_state_dict(sharded), adapter_state_dict(sampler)):
        wrong.append("values in shards")
    return wrong


def test_weights_of_a_sharded_trainer_reach_a_sampler(two_processes: Processes) -> None:
    assert two_processes(synced) == [[], []]


def one_without_memory() -> tuple[str, str]:
    """What this rank is told where the second one has no memory for the values."""
    trainer, sampler = (by_fully_shard(lora_model(train_also=(), non_zero=True, r=r)) for r in (4, 6))
    before = {name: whole(p).clone() for name, p in sampler.named_parameters()}
    given, own = to_peft(trainer), Existing.values

    def failing(*args: Any) -> Any:
        raise MemoryError("no memory")

    if torch.distributed.get_rank() == 1:
        Existing.values = failing  # type: ignore[method-assign]
    try:
        found = errors_of(lambda: lp.load_adapter(sampler, given, replace=True))
    finally:
        Existing.values = own  # type: ignore[method-assign]
    assert all(torch.equal(whole(p), before[name]) for name, p in sampler.named_parameters())
    return found


def test_values_that_one_rank_cannot_hold_are_written_on_none(two_processes: Processes) -> None:
    assert two_processes(one_without_memory) == [("MemoryError", "no memory")] * 2


def synced_over_groups() -> list[str]:
    """What is wrong with weights that ranks 0 and 1 train in shards and ranks 2 and 3 sample with, in shards too."""
    rank, wrong = torch.distributed.get_rank(), list[str]()
    meshes = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]  # every rank makes both
    settings: dict[str, Any] = {} if rank < 2 else {"r": 6, "alpha": 3}
    model = by_fully_shard(lora_model(train_also=(), **settings), mesh=meshes[rank // 2])
    plain = lora_model(train_also=(), **settings).eval()
    optimizer = optimizer_for(model) if rank < 2 else None
    before = lora_model(train_also=()).eval()(TOKENS)
    for data in batches(3, size=8, rank=rank % 2, world=2):
        if optimizer is not None:
            train(model.train(), optimizer, [data])
        sent = [to_peft(model) if rank < 2 else None]
        torch.distributed.broadcast_object_list(sent, src=0)
        if rank >= 2:
            lp.load_adapter(model, sent[0], replace=True)
            lp.load_adapter(plain, sent[0], replace=True)
        outputs: list[Any] = [None] * 4
        own = model.eval()(TOKENS).detach()  # all ranks of a group take part
        torch.distributed.all_gather_object(outputs, plain(TOKENS).detach() if rank == 3 else own)
        wrong += [f"rank {n}" for n in range(1, 4) if (outputs[n] - outputs[0]).abs().max() > 1e-5]
        if (outputs[0] - before).abs().max() < 1e-3:
            wrong.append("nothing was learnt")
        before = outputs[0]
    return wrong


def test_weights_of_a_sharded_trainer_reach_sharded_and_plain_samplers_on_other_ranks() -> None:
    processes = Processes(4)
    try:
        assert processes(synced_over_groups) == [[], [], [], []]
    finally:
        processes.close()
