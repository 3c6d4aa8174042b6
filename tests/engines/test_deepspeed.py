"""DeepSpeed, ZeRO 0 to 3: LoRA+ groups survive, training is that of one process, what would lose them is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed_trainer
import pytest
import torch
from engine_model import (
    LR,
    LR_RATIO,
    WEIGHT_DECAY,
    base_model,
    batches,
    distance,
    lora_model,
    loss_of,
    optimizer_for,
    reference,
    train,
    trained,
)
from processes import Processes
from torch import Tensor, nn

import lora_plus as lp
from lora_plus.files import adapter_state_dict
from lora_plus.tensors import fused_linear
from lora_plus.training import fold_lr_ratio, reset_lora_parameters

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's, about what these packages call
    deepspeed = pytest.importorskip("deepspeed")
    import torch._inductor.compile_fx

    from lora_plus.engines.deepspeed import check_config, check_engine, initialize

STEPS = 5
RATES: dict[str, Any] = {"lr": LR, "lr_ratio": LR_RATIO, "weight_decay": WEIGHT_DECAY}
ADAMW = {"type": "AdamW", "params": {"torch_adam": True}}
STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])


def config_of(stage: int, **sections: Any) -> dict[str, Any]:
    """A configuration for half of a batch of four; DeepSpeed clips gradients at 1 where it is not told otherwise."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # all parameters are partitioned
    settings = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    return {**settings, "zero_optimization": zero, **sections}


def prepare() -> None:
    """What DeepSpeed needs on a machine without a GPU."""
    warnings.filterwarnings("ignore", message=".*deprecated.*")  # torch's, about what DeepSpeed calls
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled for a minute
    deepspeed.utils.logger.setLevel("ERROR")


def shares(steps: int = STEPS) -> list[Tensor]:
    return batches(steps, rank=torch.distributed.get_rank(), world=torch.distributed.get_world_size())


def train_engine(engine: Any, data: list[Tensor]) -> None:
    for tokens in data:
        engine.backward(loss_of(engine, tokens))
        engine.step()


def noted(groups: Any) -> list[tuple[Any, ...]]:
    return [tuple(group.get(key) for key in ("name", "lr", "weight_decay", "loraplus_ratio")) for group in groups]


# ---- groups survive ------------------------------------------------------------------------------------------------


def by_client(model: nn.Module, stage: int) -> Any:
    return initialize(model, config=config_of(stage), optimizer_cls=torch.optim.AdamW, **RATES)[0]


def by_section(model: nn.Module, stage: int) -> Any:
    return initialize(model, config=config_of(stage, optimizer=ADAMW), **RATES)[0]


def by_callable(model: nn.Module, stage: int) -> Any:
    groups = lp.loraplus_param_groups(model, **RATES)
    return deepspeed.initialize(
        model=model, model_parameters=groups, optimizer=torch.optim.AdamW, config=config_of(stage)
    )[0]


WAYS: tuple[Callable[[nn.Module, int], Any], ...] = (by_client, by_section, by_callable)


def trained_by_engine(stage: int) -> list[tuple[str, list[Any], float]]:
    prepare()
    found = []
    wanted = reference(STEPS, embedding=True)
    for way in WAYS:
        engine = way(lora_model(embedding=True), stage)
        train_engine(engine, shares())
        check_engine(engine)
        found.append((way.__name__, noted(engine.optimizer.param_groups), distance(trained(engine), wanted)))
    return found


@STAGES
def test_groups_survive_and_training_is_that_of_one_process(two_processes: Processes, stage: int) -> None:
    groups = noted(lp.loraplus_param_groups(lora_model(embedding=True), **RATES))
    assert len(groups) == 4
    for answers in two_processes(trained_by_engine, stage):
        for way, found, far in answers:
            assert found == groups, way
            assert far <= 1e-6, way


def resumed(stage: int, folder: str) -> tuple[list[Any], float]:
    prepare()
    engine = by_client(lora_model(embedding=True), stage)
    train_engine(engine, shares()[:3])
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    other = initialize(
        lora_model(embedding=True), config=config_of(stage), optimizer_cls=torch.optim.AdamW, lr=9e-9, lr_ratio=2
    )[0]
    other.load_checkpoint(folder, load_module_strict=False)
    check_engine(other)
    train_engine(other, shares()[3:])
    return noted(other.optimizer.param_groups), distance(trained(other), reference(STEPS, embedding=True))


@STAGES
def test_a_checkpoint_brings_rates_and_ratio_back(two_processes: Processes, tmp_path: Path, stage: int) -> None:
    groups = noted(lp.loraplus_param_groups(lora_model(embedding=True), **RATES))
    for found, far in two_processes(resumed, stage, str(tmp_path)):
        assert found == groups
        assert far <= 1e-6


def ratio_one_and_plain(stage: int) -> bool:
    prepare()
    same = {"lr": LR, "weight_decay": WEIGHT_DECAY}
    ours = initialize(
        lora_model(train_also=()), config=config_of(stage), optimizer_cls=torch.optim.AdamW, lr_ratio=1, **same
    )[0]
    model = lora_model(train_also=())
    plain = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **same),
        config=config_of(stage),
    )[0]
    for engine in (ours, plain):
        train_engine(engine, shares())
    one, other = trained(ours), trained(plain)
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


@STAGES
def test_a_ratio_of_one_is_plain_lora_bit_for_bit(two_processes: Processes, stage: int) -> None:
    assert two_processes(ratio_one_and_plain, stage) == [True, True]


# ---- partitioned parameters ------------------------------------------------------------------------------------------


class Kinds(nn.Module):
    """A layer of every way in which an adapter can be held."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(48, 16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(2, 16, 16) / 4)
        self.read = nn.Linear(16, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 48)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = x + torch.einsum("bld,edo->blo", x, self.experts)
        x = x + x @ self.read.weight.T
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.lstm(x)[0]
        x = x + self.qkv(x).unflatten(-1, (3, -1)).sum(-2)
        logits: Tensor = self.head(x)
        return logits


SETTINGS: dict[str, dict[str, Any]] = {
    "every kind": {
        "targets": ["embedding", "attn", "experts", "read.weight", "conv", "lstm", "qkv.q", "qkv.v", "head"],
        "fused": {"qkv": ["q", "k", "v"]},
    },
    "dora": {"targets": ["head", "conv", "read.weight"], "variant": "dora"},
    "from the weight": {"targets": ["head", "experts", "qkv", "embedding"], "init": "pissa"},
}


def kinds() -> Kinds:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Kinds()


def injected(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    return lp.inject_lora(model, r=4, alpha=8, generator=torch.Generator().manual_seed(1), **settings)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return lp.create_loraplus_optimizer(model, torch.optim.SGD, lr=0.05, lr_ratio=2)


def before_the_engine(settings: Mapping[str, Any]) -> nn.Module:
    return injected(kinds(), settings)


def partitioned_kinds() -> Kinds:
    """Built under ``zero.Init``, with the plain model's values: attention resets parts of it when they are empty."""
    model = kinds()
    assert all(parameter.shape == (0,) for parameter in model.parameters())
    deepspeed.runtime.zero.partition_parameters.shutdown_init_context()
    plain = kinds()
    deepspeed.runtime.zero.partition_parameters.restore_init_context()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        model.load_state_dict(plain.state_dict())
    return model


def after_zero_init(settings: Mapping[str, Any]) -> nn.Module:
    with deepspeed.zero.Init(config_dict_or_path=config_of(3)):
        model = partitioned_kinds()
    injected(model, settings)
    assert all((parameter.shape == (0,)) == hasattr(parameter, "ds_id") for parameter in model.parameters())
    return model


def inside_zero_init(settings: Mapping[str, Any]) -> nn.Module:
    with deepspeed.zero.Init(config_dict_or_path=config_of(3)):
        return injected(partitioned_kinds(), settings)


BUILT = {build.__name__: build for build in (before_the_engine, after_zero_init, inside_zero_init)}


def kinds_under_zero_3(built: str, settings: Mapping[str, Any]) -> tuple[bool, float]:
    """Whether the adapters start as in one process, and how far from it they end."""
    prepare()
    plain = injected(kinds(), settings)
    before = fused_linear._LEAST_WORK
    fused_linear._LEAST_WORK = 0
    try:
        model = BUILT[built](settings)
        engine = deepspeed.initialize(model=model, optimizer=sgd(model), config=config_of(3))[0]
        start, wanted = trained(engine), trained(plain)
        train_engine(engine, shares(3))
        train(plain, sgd(plain), batches(3))
    finally:
        fused_linear._LEAST_WORK = before
    return distance(start, wanted) == 0, distance(trained(engine), trained(plain))


@pytest.mark.parametrize("built", BUILT)
@pytest.mark.parametrize("settings", SETTINGS)
def test_zero_3_with_every_kind_of_adapter(two_processes: Processes, settings: str, built: str) -> None:
    for same_start, far in two_processes(kinds_under_zero_3, built, SETTINGS[settings]):
        assert same_start
        assert far <= 1e-6


def drawn_inside_zero_init() -> tuple[list[torch.dtype], bool]:
    prepare()
    generator = torch.Generator().manual_seed(1)
    with deepspeed.zero.Init(dtype=torch.bfloat16, config_dict_or_path=config_of(3)):
        model = lp.inject_lora(nn.Sequential(nn.Linear(16, 8)), ["0"], r=4, generator=generator)
    plain = lp.inject_lora(nn.Sequential(nn.Linear(16, 8)), ["0"], r=4, generator=torch.Generator().manual_seed(1))
    ours, theirs = adapter_state_dict(model), adapter_state_dict(plain)
    return [tensor.dtype for tensor in ours.values()], torch.equal(ours["0.lora_A"], theirs["0.lora_A"])


def test_adapters_are_float32_inside_a_zero_init_in_bfloat16(two_processes: Processes) -> None:
    assert two_processes(drawn_inside_zero_init) == [([torch.float32, torch.float32], True)] * 2


# ---- files ---------------------------------------------------------------------------------------------------------


def saved(stage: int, folder: str) -> tuple[bytes, bytes, str]:
    """What both ranks find written by the engine, and by its module; what loading into the engine says."""
    prepare()
    engine = by_client(lora_model(embedding=True, non_zero=True), stage)
    lp.save_adapter(engine, Path(folder) / "engine.safetensors")
    if stage == 3 or torch.distributed.get_rank() == 0:
        lp.save_adapter(engine.module, Path(folder) / "module.safetensors")
    torch.distributed.barrier()
    answer = [(Path(folder) / name).read_bytes() for name in ("engine.safetensors", "module.safetensors")]
    torch.distributed.barrier()
    try:
        lp.load_adapter(engine.module, Path(folder) / "engine.safetensors", adapter="more")
        said = ""
    except ValueError as error:
        said = str(error)
    return answer[0], answer[1], said


@STAGES
def test_the_file_is_that_of_one_process(two_processes: Processes, tmp_path: Path, stage: int) -> None:
    lp.save_adapter(lora_model(embedding=True, non_zero=True), tmp_path / "one.safetensors")
    for engine, module, said in two_processes(saved, stage, str(tmp_path)):
        assert engine == module == (tmp_path / "one.safetensors").read_bytes()
        assert ("sharded by DeepSpeed ZeRO-3" in said) == (stage == 3)


def loaded_before(folder: str) -> float:
    prepare()
    lp.save_adapter(lora_model(non_zero=True), Path(folder) / f"{torch.distributed.get_rank()}.safetensors")
    model = lp.load_adapter(base_model(), Path(folder) / f"{torch.distributed.get_rank()}.safetensors", trainable=True)
    engine = by_client(model, 3)
    train_engine(engine, shares(3))
    plain = lora_model(non_zero=True)
    train(plain, optimizer_for(plain), batches(3))
    return distance(trained(engine), trained(plain))


def test_an_adapter_that_was_loaded_before_trains_on(two_processes: Processes, tmp_path: Path) -> None:
    assert max(two_processes(loaded_before, str(tmp_path))) <= 1e-6


def loaded_after_zero_init(file: str) -> tuple[bytes, list[str]]:
    """What a partitioned model that the file was loaded into saves, and what about weight decay its shapes decide."""
    prepare()
    with deepspeed.zero.Init(config_dict_or_path=config_of(3)):
        model = base_model()
    lp.load_adapter(model, file, trainable=True)
    again = Path(file).with_name("again.safetensors")
    lp.save_adapter(model, again)
    answer = again.read_bytes()
    torch.distributed.barrier()
    return answer, [str(group["name"]) for group in lp.loraplus_param_groups(model, **RATES)]


def test_a_partitioned_model_takes_a_file_and_gives_it_back(two_processes: Processes, tmp_path: Path) -> None:
    model, file = lora_model(embedding=True, non_zero=True, train_also=["norm", "head"]), tmp_path / "one.safetensors"
    lp.save_adapter(model, file)
    names = [group["name"] for group in lp.loraplus_param_groups(model, **RATES)]
    assert "other" in names and "other_no_decay" in names
    assert two_processes(loaded_after_zero_init, str(file)) == [(file.read_bytes(), names)] * 2


# ---- what would lose LoRA+ -------------------------------------------------------------------------------------------

SCALAR = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}}
GROUPS = [{"name": "lora_A", "lr": 1e-3, "weight_decay": 0.1, "loraplus_ratio": 1.0},
          {"name": "lora_B", "lr": 4e-3, "weight_decay": 0.1, "loraplus_ratio": 4.0}]  # fmt: skip


def scheduler(name: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": name, "params": params}}


REFUSED: list[tuple[dict[str, Any], Any, list[str]]] = [
    ({"optimizer": ADAMW}, None, ["'optimizer' ('AdamW')"]),
    ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, GROUPS, ["'lr' of 'auto'"]),
    ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.0}}}, GROUPS, ["'weight_decay' of 0.0"]),
    (scheduler("WarmupLR", warmup_max_lr=1e-3), None, ["'scheduler' ('WarmupLR'"]),
    (scheduler("WarmupLR", warmup_max_lr="auto", warmup_num_steps="auto"), None, ["'scheduler' ('WarmupLR'"]),
    (scheduler("WarmupLR", warmup_min_lr=1e-4), None, ["'scheduler' ('WarmupLR'"]),
    (scheduler("WarmupLR", warmup_max_lr=[1e-3, 1e-3]), GROUPS, ["'scheduler' ('WarmupLR'"]),
    (scheduler("WarmupDecayLR", total_num_steps="auto"), None, ["'scheduler' ('WarmupDecayLR'"]),
    (scheduler("OneCycle", cycle_min_lr=0.0, cycle_max_lr=1e-3), GROUPS, ["'scheduler' ('OneCycle'"]),
    (scheduler("LRRangeTest"), None, ["'scheduler' ('LRRangeTest'"]),
    (scheduler("CosineAnnealingLR", T_max=10, eta_min=1e-4), None, ["'scheduler' ('CosineAnnealingLR'"]),
    ({"optimizer": ADAMW, "scheduler": SCALAR}, None, ["'optimizer'", "'scheduler'"]),
]
ALLOWED: list[tuple[dict[str, Any], Any]] = [
    ({}, None),
    ({"optimizer": ADAMW}, GROUPS),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}}}, GROUPS),
    (scheduler("WarmupLR"), None),
    (scheduler("WarmupLR", warmup_max_lr=[1e-3, 4e-3]), GROUPS),
    (scheduler("WarmupLR", warmup_max_lr=[1e-3, 4e-3]), None),
    (scheduler("WarmupDecayLR", total_num_steps=100, warmup_max_lr=[1e-3, 4e-3]), GROUPS),
    (scheduler("WarmupCosineLR", total_num_steps="auto", warmup_num_steps="auto"), None),
    (scheduler("OneCycle", cycle_min_lr=[0.0, 0.0], cycle_max_lr=[1e-3, 4e-3]), GROUPS),
    (scheduler("StepLR", step_size=3), None),
    (scheduler("WarmupLR", warmup_max_lr=1e-3), [{**group, "lr": 1e-3, "loraplus_ratio": 1.0} for group in GROUPS]),
]


@pytest.mark.parametrize(("config", "groups", "found"), REFUSED, ids=lambda value: str(value)[:60])
def test_configurations_that_lose_the_rates_are_refused(
    config: dict[str, Any], groups: Any, found: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    for given in (config, file, str(file)):
        with pytest.raises(ValueError, match="would switch LoRA\\+ off") as error:
            check_config(given, groups=groups)
        assert len(error.value.problems) == len(found)  # type: ignore[attr-defined]
        for start, problem in zip(found, error.value.problems, strict=True):  # type: ignore[attr-defined]
            assert start in problem
    assert config == json.loads(file.read_text())


@pytest.mark.parametrize(("config", "groups"), ALLOWED, ids=lambda value: str(value)[:60])
def test_configurations_that_keep_the_rates_pass(config: dict[str, Any], groups: Any) -> None:
    check_config(config, groups=groups)


def test_the_optimizer_comes_from_one_place() -> None:
    for config, cls, found in (
        ({}, None, "pass optimizer_cls"),
        ({"optimizer": ADAMW}, torch.optim.AdamW, "remove one of the two"),
    ):
        model = lora_model()
        with pytest.raises(ValueError, match=found):
            initialize(model, config=config, lr=LR, optimizer_cls=cls)


def complaint(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def flat(model: nn.Module, stage: int) -> Any:
    """A section without groups: what is trained is right, and so is the rate of A."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    section = {"type": "AdamW", "params": {"torch_adam": True, "lr": LR, "weight_decay": WEIGHT_DECAY}}
    return deepspeed.initialize(model=model, model_parameters=trainable, config=config_of(stage, optimizer=section))[0]


def scheduled(model: nn.Module, stage: int) -> Any:
    groups = lp.loraplus_param_groups(model, **RATES)
    config = config_of(stage, optimizer=ADAMW, scheduler=SCALAR)
    return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]


def late(model: nn.Module, stage: int) -> Any:
    engine = by_client(model, stage)
    lp.inject_lora(engine.module, ["head"], r=2, adapter="late")
    return engine


def silently_lost(stage: int) -> list[tuple[str, float]]:
    """Per trap, what the check says, and how far from LoRA+ the trained weights are; all run without a word."""
    prepare()
    found = []
    for build in (flat, scheduled):
        engine = build(lora_model(), stage)
        said = complaint(lambda engine=engine: check_engine(engine))
        train_engine(engine, shares())
        found.append((said, distance(trained(engine), reference(STEPS))))
    return found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_engines_that_have_lost_lora_plus_are_found(two_processes: Processes, stage: int) -> None:
    for (flat_said, flat_far), (scheduled_said, scheduled_far) in two_processes(silently_lost, stage):
        assert "no group of the optimizer notes the ratio" in flat_said
        assert "under WarmupLR" in scheduled_said
        assert min(flat_far, scheduled_far) > 1e-2


def added_late(stage: int) -> str:
    prepare()

    def build() -> None:
        check_engine(late(lora_model(), stage))

    return complaint(build)


@pytest.mark.parametrize(
    ("stage", "found"),
    [(0, "not in the optimizer"), (2, "not in the optimizer"), (3, "is sharded by DeepSpeed ZeRO-3")],
)
def test_adapters_added_to_an_engine_are_found(two_processes: Processes, stage: int, found: str) -> None:
    assert all(found in said for said in two_processes(added_late, stage))


def trained_by_hand(stage: int) -> list[str]:
    """What `initialize` and saving warn of, and what the check says once a base weight is to be trained."""
    prepare()
    model = lora_model()
    model.head.requires_grad_(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = by_client(model, stage)
        check_engine(engine)
        adapter_state_dict(engine)
    told = {str(each.message) for each in caught if "saved with no adapter" in str(each.message)}
    model.blocks[0].q.weight.requires_grad_(True)
    return [*told, complaint(lambda: check_engine(engine)), complaint(lambda: adapter_state_dict(engine))]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_is_trained_by_hand_is_named(two_processes: Processes, stage: int) -> None:
    for told, checked, saved in two_processes(trained_by_hand, stage):
        assert told.startswith("trained, but saved with no adapter: 'head.weight', 'head.bias';")
        assert all("'blocks.0.q.weight': base weights under an adapter" in said for said in (checked, saved))


def values_that_would_be_lost(stage: int) -> list[str]:
    prepare()
    engine = by_client(lora_model(non_zero=True), stage)
    before = trained(engine)
    said = [complaint(lambda: reset_lora_parameters(engine)), complaint(lambda: fold_lr_ratio(engine, 4))]
    assert distance(trained(engine), before) == 0
    return said


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_values_that_the_next_step_would_overwrite_are_refused(two_processes: Processes, stage: int) -> None:
    for said in two_processes(values_that_would_be_lost, stage):
        assert all("its next step would undo it" in line for line in said), said


def under_the_trainer() -> dict[str, tuple[list[str], float, float]]:
    """Per section: the groups, how far ratio 64 ends from ratio 1 there, and from plain LoRA without the section."""
    prepare()
    warnings.simplefilter("ignore")  # the Trainer's own
    _, plain = deepspeed_trainer.trained({}, 1.0)
    found = {}
    for name, sections in {"no section": {}, "section optimizer": {"optimizer": deepspeed_trainer.ADVICE}}.items():
        (groups, high), (_, one) = (deepspeed_trainer.trained(sections, ratio) for ratio in (64.0, 1.0))
        found[name] = groups, distance(high, one), distance(high, plain)
    return found


def test_an_optimizer_section_switches_lora_plus_off_under_the_trainer(two_processes: Processes) -> None:
    """The advice for a ratio of 1 that is unlike plain LoRA: with it, no ratio has an effect."""
    pytest.importorskip("transformers")
    for found in two_processes(under_the_trainer):
        without, section = found.values()
        assert without[0] == ["lora_A", "lora_B"] and without[1] > 1e-2 and without[2] > 1e-2
        assert section == (["unnamed"], 0.0, 0.0)
    with pytest.raises(ValueError, match="'optimizer'"):
        check_config({"optimizer": deepspeed_trainer.ADVICE})
