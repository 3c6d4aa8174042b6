"""Lightning: Trainer and Fabric train as one process does, checkpoints hold what is trained, and resume to the bit."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_model import batches, distance, lora_model, loss_of, optimizer_for, reference, train, trained
from processes import Processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import lora_plus as lp
from lora_plus.training import check_lr_ratio, rebind_optimizer

L = pytest.importorskip("lightning")
strategies = pytest.importorskip("lightning.pytorch.strategies")
fabric_strategies = pytest.importorskip("lightning.fabric.strategies")
environments = pytest.importorskip("lightning.fabric.plugins.environments")
integration = pytest.importorskip("lora_plus.engines.lightning")

STEPS = 4
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Module(integration.LoraPlusModule):  # type: ignore[misc, name-defined]
    """The model, as Lightning wants it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.model = lora_model(**settings)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> Any:
        return optimizer_for(self.model)


class Scheduled(Module):
    """With rates that change in each step."""

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_for(self.model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        check_lr_ratio(optimizer, scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Sharded(Module):
    """With parameters sharded over the processes."""

    def configure_model(self) -> None:
        shard(self.model, self.device_mesh["data_parallel"])


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    if not isinstance(model, torch.distributed.fsdp.FSDPModule):  # Lightning may call it again
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def loader() -> Any:
    """The batches in one sequence, of which each process gets its share; Lightning's own sampler would shuffle them."""
    if not torch.distributed.is_initialized():
        return DataLoader(torch.cat(batches(STEPS)), batch_size=4)  # type: ignore[arg-type]
    sampler = DistributedSampler(data := torch.cat(batches(STEPS)), shuffle=False)  # type: ignore[var-annotated, arg-type]
    return DataLoader(data, batch_size=4 // sampler.num_replicas, sampler=sampler)  # type: ignore[arg-type]


def fit(module: Module, resume_from: Path | None = None, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
        trainer = L.Trainer(**({"accelerator": "cpu", "devices": 1, "max_epochs": 1} | QUIET | settings))
        trainer.fit(module, loader(), ckpt_path=resume_from)
    return trainer


def saved(path: Path) -> dict[str, Tensor]:
    """What a checkpoint holds, under the names of `trained`."""
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("model.").replace(".default", ""): tensor for name, tensor in state.items()}


# ---- one process ----------------------------------------------------------------------------------------------------


def test_trainer_is_the_loop_by_hand() -> None:
    module = Module()
    fit(module)
    assert distance(trained(module.model), reference(STEPS)) == 0


def test_rates_follow_the_schedule_in_their_ratio_in_each_step() -> None:
    seen = []

    class Watched(Scheduled):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append({group["name"]: group["lr"] for group in self.optimizers().param_groups})

    fit(Watched())
    assert len({rates["lora_A"] for rates in seen}) == STEPS
    assert all(rates["lora_B"] == 16 * rates["lora_A"] for rates in seen)


class Halfway(L.Callback):  # type: ignore[misc, name-defined]
    """Saves a checkpoint after the first epoch, and keeps what it must hold."""

    def __init__(self, path: Path) -> None:
        self.path, self.trained = path, {}

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 0:
            self.trained = trained(module.model)
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_holds_what_is_trained_and_resumes_to_the_bit(tmp_path: Path) -> None:
    at_once, halfway = Scheduled(), Halfway(tmp_path / "half.ckpt")
    fit(at_once, max_epochs=2, callbacks=[halfway])
    assert distance(saved(halfway.path), halfway.trained) == 0
    (state,) = torch.load(halfway.path, weights_only=True)["optimizer_states"]
    names = [group["name"] for group in state["param_groups"]]
    assert names == [group["name"] for group in optimizer_for(at_once.model).param_groups]

    resumed = Scheduled(non_zero=True)
    assert fit(resumed, halfway.path, max_epochs=2).global_step == 2 * STEPS
    assert distance(trained(resumed.model), trained(at_once.model)) == 0


def test_a_checkpoint_of_other_adapters_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    fit(Module(), callbacks=[halfway := Halfway(tmp_path / "half.ckpt")])
    other = Module(embedding=True, non_zero=True)
    before = trained(other.model)
    with pytest.raises(ValueError, match=r"(?s)adapters of its run.*embedding.lora_A.default' is in the mod"):
        fit(other, halfway.path, max_epochs=2)
    assert distance(trained(other.model), before) == 0


def test_frozen_tensors_of_an_adapter_are_in_the_checkpoint(tmp_path: Path) -> None:
    first = Module(variant="lora_fa", generator=torch.Generator().manual_seed(5))
    fit(first, callbacks=[halfway := Halfway(tmp_path / "half.ckpt")])
    other = Module(variant="lora_fa", generator=torch.Generator().manual_seed(6))
    fit(other, halfway.path)
    assert distance(trained(other.model), trained(first.model)) == 0


def test_fabric_is_the_loop_by_hand() -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(m := lora_model(), optimizer_for(m))
    train(model, optimizer, list(fabric.setup_dataloaders(loader())), backward=fabric.backward)
    assert distance(trained(model), reference(STEPS)) == 0


# ---- two processes --------------------------------------------------------------------------------------------------


def joined(strategy: Any) -> dict[str, Any]:
    """Settings by which Lightning joins the processes that run already."""
    return {"strategy": strategy, "devices": 2, "plugins": [environments.TorchElasticEnvironment()]}


def trainer_ddp() -> float:
    fit(module := Module(), **joined("ddp"))
    return distance(trained(module.model), reference(STEPS))


def trainer_fsdp2() -> float:
    fit(module := Sharded(), **joined(strategies.ModelParallelStrategy(2, 1)))
    return distance(trained(module.model), reference(STEPS))


@pytest.mark.parametrize("run", [trainer_ddp, trainer_fsdp2])
def test_trainer_on_two_processes(two_processes: Processes, run: Any) -> None:
    assert max(two_processes(run)) <= 1e-6


def resumed_on_two_processes(sharded: bool, folder: str) -> tuple[float, float]:
    """How far the checkpoint is from what was trained by then, and a resumed run from one at once."""

    def settings() -> dict[str, Any]:
        strategy = strategies.ModelParallelStrategy(2, 1, save_distributed_checkpoint=False) if sharded else "ddp"
        return {"max_epochs": 2, **joined(strategy)}

    module_class = Sharded if sharded else Module
    fit(at_once := module_class(), **settings(), callbacks=[halfway := Halfway(Path(folder, "half.ckpt"))])
    fit(resumed := module_class(non_zero=True), halfway.path, **settings())
    return distance(saved(halfway.path), halfway.trained), distance(trained(resumed.model), trained(at_once.model))


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_resuming_on_two_processes(two_processes: Processes, sharded: bool, tmp_path: Path) -> None:
    assert two_processes(resumed_on_two_processes, sharded, str(tmp_path)) == [(0, 0)] * 2


def fabric(strategy: Any) -> Any:
    made = L.Fabric(accelerator="cpu", **joined(strategy))
    made.launch()
    return made


def fabric_ddp() -> float:
    engine = fabric("ddp")
    model, optimizer = engine.setup(m := lora_model(), optimizer_for(m))
    train(model, optimizer, list(engine.setup_dataloaders(loader())), backward=engine.backward)
    return distance(trained(model), reference(STEPS))


def fabric_of_shards() -> Any:
    """Without the sizes of the mesh Lightning would take two processes for tensor parallel, and reduce no gradient."""
    parallelize = lambda model, mesh: shard(model, mesh["data_parallel"])  # noqa: E731
    return fabric(fabric_strategies.ModelParallelStrategy(parallelize, data_parallel_size=2, tensor_parallel_size=1))


def fabric_fsdp2() -> float:
    engine = fabric_of_shards()
    model = engine.setup_module(lora_model())
    optimizer = engine.setup_optimizers(optimizer_for(model))
    train(model, optimizer, list(engine.setup_dataloaders(loader())), backward=engine.backward)
    return distance(trained(model), reference(STEPS))


@pytest.mark.parametrize("run", [fabric_ddp, fabric_fsdp2])
def test_fabric_on_two_processes(two_processes: Processes, run: Any) -> None:
    assert max(two_processes(run)) <= 1e-6


def optimizer_before_sharding(rebound: bool) -> tuple[float, float, str]:
    """How far training ends from one process and from where it began, and what `check_optimizer` says before it."""
    engine, said = fabric_of_shards(), ""
    optimizer = optimizer_for(m := lora_model())
    with rebind_optimizer(optimizer, m) if rebound else nullcontext():
        model = engine.setup_module(m)
    try:
        lp.check_optimizer(optimizer, model)
    except ValueError as error:
        said = str(error)
    optimizer = engine.setup_optimizers(optimizer)
    train(model, optimizer, list(engine.setup_dataloaders(loader())), backward=engine.backward)
    found = trained(model)
    return distance(found, reference(STEPS)), distance(found, trained(lora_model())), said


def test_an_optimizer_from_before_sharding_is_found_or_kept_bound(two_processes: Processes) -> None:
    for far, moved, said in two_processes(optimizer_before_sharding, False):
        assert far > 1e-2 and moved == 0 and "holds parameters that are not the model's" in said, said
    for far, moved, said in two_processes(optimizer_before_sharding, True):
        assert far <= 1e-6 and moved > 1e-2 and not said
