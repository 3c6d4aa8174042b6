"""On two processes: what is trained by hand and not saved has its plain name on each rank, and all refuse alike."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from engine_model import batches, lora_model, loss_of, optimizer_for
from processes import Processes
from sharded_models import SHARDED
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lora_plus as lp
from lora_plus.files import adapter_state_dict

RANKS = 2
ENGINES: dict[str, Callable[[nn.Module], nn.Module]] = SHARDED | {"DDP": DistributedDataParallel}
WITH_FORWARD = ["DDP", "fully_shard", "FullyShardedDataParallel"]


def attempt(action: Callable[[], object]) -> list[str]:
    """The library's warnings, or its error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            action()
        except ValueError as error:
            return [str(error).replace("\n", "")]
    return [str(each.message) for each in caught if "saved with no adapter" in str(each.message)]


def told(name: str, folder: str, *, wrong: bool) -> list[list[str]]:
    """What a rank is told by saving, by taking the tensors and by the check, and what the summary lists."""
    model = lora_model()
    (model.blocks[1].q.weight if wrong else model.head).requires_grad_(True)
    model = ENGINES[name](model)
    if name in WITH_FORWARD:
        loss_of(model, batches(1, rank=torch.distributed.get_rank(), world=RANKS)[0]).backward()
    path = Path(folder, f"{name}.safetensors")
    found = [
        attempt(lambda: lp.save_adapter(model, path)),
        attempt(lambda: adapter_state_dict(model)),
        attempt(lambda: lp.loraplus_param_groups(model, lr=1e-3) and None),
        [f"{name} {size}" for name, size in lp.lora_summary(model).unsaved],
    ]
    torch.distributed.barrier()
    assert path.exists() != wrong
    if name in WITH_FORWARD and not wrong:
        found.append(attempt(lambda: lp.check_optimizer(optimizer_for(model), model)))
    return found


def all_told(folder: str, wrong: bool) -> dict[str, list[list[str]]]:
    return {name: told(name, folder, wrong=wrong) for name in ENGINES}


WARNING = (
    "trained, but saved with no adapter: 'head.weight', 'head.bias'; name the modules in "
    "inject_lora(..., train_also=[...]), freeze them, or save them yourself"
)


def test_names_are_right_on_every_rank(two_processes: Processes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        answers = two_processes(all_told, folder, False)
    sizes = ["head.weight 1536", "head.bias 48"]
    wanted = {
        name: [[WARNING], [WARNING], [], sizes] + ([[WARNING]] if name in WITH_FORWARD else []) for name in ENGINES
    }
    assert answers == [wanted] * RANKS


def test_what_would_be_wrong_is_refused_on_every_rank(two_processes: Processes) -> None:
    line = "these are trainable and must be frozen:  'blocks.1.q.weight': base weights under an adapter; "
    with tempfile.TemporaryDirectory() as folder:
        for answer in two_processes(all_told, folder, True):
            for name, (*refusals, sizes) in answer.items():
                assert sizes == ["blocks.1.q.weight 1024"], name
                assert all(line in text for (text,) in refusals), name
