"""Rows of tokens on DDP, ``fully_shard`` and FullyShardedDataParallel: all as in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_model import TARGETS, base_model, batches, distance, optimizer_for, train, trained
from processes import Processes
from sharded_models import TOKENS, by_fsdp1, by_fully_shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lora_plus as lp
from lora_plus.engines.tensor_parallel import ColwiseLoRA

STEPS = 3
ROWS = {"tied": {"embedding": [5, 1, 40]}, "untied": {"embedding": [5, 1, 40], "head": [0, 5]}}
ENGINES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DistributedDataParallel": DistributedDataParallel,
    "fully_shard": by_fully_shard,
    "FullyShardedDataParallel": by_fsdp1,
}


def rows_model(case: str) -> Any:
    model: Any = base_model()
    if case == "tied":
        model.head.weight = model.embedding.weight
    generator = torch.Generator().manual_seed(1)
    return lp.inject_lora(model, TARGETS, r=4, alpha=8, train_rows=ROWS[case], generator=generator).double()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def parity(folder: str) -> list[str]:
    """The engines and cases that end elsewhere than one process, or write another file."""
    wrong = []
    rank = torch.distributed.get_rank()
    for case in ROWS:
        alone = rows_model(case)
        start = trained(alone)
        train(alone, optimizer_for(alone), batches(STEPS))
        assert distance(trained(alone), start) > 1e-3
        for name, wrap in ENGINES.items():
            model = wrap(rows_model(case))
            train(model, optimizer_for(model), batches(STEPS, rank=rank, world=2))
            if (apart := distance(trained(model), trained(alone))) > 1e-10:
                wrong.append(f"{name}, {case}: {apart}")
            place = Path(folder) / name / case
            lp.save_adapter(model, place / "a.safetensors")
            torch.distributed.barrier()
            loaded = lp.load_adapter(rows_plain(case), place / "a.safetensors")
            if distance(trained(loaded), trained(model)):
                wrong.append(f"{name}, {case}: the file differs")
    return wrong


def rows_plain(case: str) -> nn.Module:
    return lp.remove_lora(rows_model(case))


def test_rows_are_trained_and_saved_as_by_one_process(two_processes: Processes, tmp_path: Path) -> None:
    assert two_processes(parity, str(tmp_path)) == [[], []]


def taken_in(folder: str) -> list[str]:
    """What is wrong with loading into shards, or with merging them."""
    wrong = []
    for case in ROWS:
        source = rows_model(case)
        train(source, optimizer_for(source), batches(STEPS))
        path = Path(folder) / f"{case}-{torch.distributed.get_rank()}.safetensors"
        lp.save_adapter(source, path)
        model = by_fully_shard(rows_model(case))
        lp.load_adapter(model, path)
        with torch.no_grad():
            expected, y = source(TOKENS), model(TOKENS)
            if not torch.allclose(y, expected, rtol=1e-12, atol=1e-12):
                wrong.append(f"{case}: loaded, {float((y - expected).abs().max())}")
            try:
                with lp.merged(model):
                    if not torch.allclose(model(TOKENS), expected, rtol=1e-10, atol=1e-10):
                        wrong.append(f"{case}: merged")
            except ValueError as error:
                wrong.append(f"{case}: {error}")
            if not torch.equal(model(TOKENS), y):
                wrong.append(f"{case}: unmerged")
    return wrong


def test_shards_take_in_a_file_and_merge_where_the_weights_are_their_own(
    two_processes: Processes, tmp_path: Path
) -> None:
    for lines in two_processes(taken_in, str(tmp_path)):
        assert len(lines) == 1 and "its weight is shared with" in lines[0], lines


def zero(stage: int) -> list[str]:
    """The cases in which an engine of DeepSpeed ends elsewhere than one process."""
    from test_deepspeed import by_client, prepare, shares, train_engine

    wrong = []
    for case in ROWS:
        prepare()
        alone = rows_model(case).float()
        train(alone, optimizer_for(alone), batches(STEPS))
        engine = by_client(rows_model(case).float(), stage)
        train_engine(engine, shares(STEPS))
        if (apart := distance(trained(engine), trained(alone))) > 1e-5:
            wrong.append(f"{case}: {apart}")
    return wrong


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_trains_rows_as_one_process_does(two_processes: Processes, stage: int) -> None:
    pytest.importorskip("deepspeed")
    assert two_processes(zero, stage) == [[], []]


def cut() -> str:
    """What tensor parallelism says of a layer with rows."""
    mesh = init_device_mesh("cpu", (2,))
    try:
        parallelize_module(rows_model("untied"), mesh, {"embedding": ColwiseLoRA()})
    except ValueError as error:
        return str(error)
    return ""


def test_tensor_parallelism_refuses_rows(two_processes: Processes) -> None:
    for message in two_processes(cut):
        assert "cannot shard a LoRAEmbedding with rows of tokens (train_rows), which are not sharded" in message
