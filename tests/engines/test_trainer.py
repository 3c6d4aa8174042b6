"""The Hugging Face Trainer with LoRA+, in one process: its groups, exact runs, and guards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_model import (
    SETTINGS,
    STEPS,
    STOCK,
    TARGETS,
    integration,
    llama,
    lora_llama,
    randomised,
    run_state,
    same,
    trainer,
    transformers,
)

import lora_plus as lp
from lora_plus.training.schedule import check_lr_ratio

LR, DECAY, RATIO = SETTINGS["learning_rate"], SETTINGS["weight_decay"], SETTINGS["loraplus_lr_ratio"]

# ---- the optimizer ---------------------------------------------------------------------------------------------------

OPTIMIZERS = [
    "adamw_torch",
    "adamw_torch_fused",
    "sgd",
    "rmsprop",
    "adagrad",
    "adafactor",
    "adamw_bnb_8bit",
    "lion_32bit",
]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_ratio_one_is_the_stock_trainer_bit_for_bit(optim: str, tmp_path: Path) -> None:
    settings = {"optim": optim, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    wanted, one, two = randomised(lora_llama()), randomised(lora_llama()), randomised(lora_llama())
    before = run_state(wanted)
    trainer(wanted, tmp_path, **STOCK, **settings).train()
    trainer(one, tmp_path, **settings | {"loraplus_lr_ratio": 1.0}).train()
    assert same(run_state(one), run_state(wanted)) and not same(run_state(one), before)
    trainer(two, tmp_path, **settings | {"loraplus_lr_ratio": 2.0}).train()
    assert not same(run_state(two), run_state(wanted))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_without_a_ratio_it_is_the_stock_trainer(variant: str, tmp_path: Path) -> None:
    ours, stock, one = (lora_llama(variant=variant) for _ in range(3))
    trainer(ours, tmp_path, loraplus_lr_ratio=None).train()
    trainer(stock, tmp_path, **STOCK).train()
    trainer(one, tmp_path, loraplus_lr_ratio=1.0).train()  # magnitudes are decayed as the Trainer decays them
    assert same(run_state(ours), run_state(stock)) and same(run_state(one), run_state(stock))


def test_a_run_equals_a_loop_over_groups_written_by_hand(tmp_path: Path) -> None:
    seen: list[Any] = []

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        seen.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        return seen[-1]

    ours, ours_by_hand = randomised(lora_llama()), randomised(lora_llama())
    settings = {"loraplus_lr_embedding": 3e-4, "max_grad_norm": 0.5}
    trainer(ours, tmp_path, options={"data_collator": collate}, **settings).train()

    names = {name: p for name, p in ours_by_hand.named_parameters() if p.requires_grad}
    rate = {name: 3e-4 if "embed" in name else RATIO * LR if "lora_B" in name else LR for name in names}
    groups = [
        {"params": [p], "lr": rate[name], "weight_decay": 0.0 if "norm" in name else DECAY} for name, p in names.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (STEPS - step) / STEPS)
    ours_by_hand.train()
    for batch in seen[:STEPS]:
        ours_by_hand(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(ours_by_hand.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    one, other = run_state(ours), run_state(ours_by_hand)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) <= 1e-6


def test_groups_have_the_trainers_decay(tmp_path: Path) -> None:
    model = lora_llama(train_also=["norm", "lm_head"], targets=[*TARGETS, "k_proj"])
    run = trainer(model, tmp_path, loraplus_lr_embedding=1e-6)
    names = {id(p): name for name, p in model.named_parameters()}
    stock = trainer(model, tmp_path, **STOCK).create_optimizer().param_groups
    decays = {names[id(p)]: group["weight_decay"] for group in stock for p in group["params"]}
    groups = run.create_optimizer().param_groups
    assert {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]} == decays
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("lora_A", LR, DECAY),
        ("lora_B", RATIO * LR, DECAY),
        ("lora_embedding", 1e-6, DECAY),
        ("other", LR, DECAY),
        ("other_no_decay", LR, 0.0),
    ]
    assert run.optimizer.defaults["lr"] == LR


def test_a_class_of_optimizer_that_the_user_gives(tmp_path: Path) -> None:
    options = {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 2e-3, "betas": (0.8, 0.9)})}
    run = trainer(lora_llama(), tmp_path, options=options)
    optimizer = run.create_optimizer()
    assert type(optimizer) is torch.optim.NAdam
    assert [(group["lr"], group["betas"]) for group in optimizer.param_groups[:2]] == [
        (2e-3, (0.8, 0.9)), (RATIO * 2e-3, (0.8, 0.9))
    ]  # fmt: skip
    assert run.optimizer_cls_and_kwargs == options["optimizer_cls_and_kwargs"]
    options = {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {})}
    assert trainer(lora_llama(), tmp_path, options=options).create_optimizer().param_groups[1]["lr"] == RATIO * LR


def test_embeddings_and_their_adapters_keep_32_bit_state(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    whole = {"targets": ["q_proj"], "train_also": ["embed_tokens"]}
    for settings, name in ((whole, "other"), ({}, "lora_embedding")):
        run = trainer(lora_llama(r=160, **settings), tmp_path, optim="adamw_bnb_8bit")
        run.train()
        optimizer = run.optimizer.optimizer
        assert isinstance(optimizer, bitsandbytes.optim.AdamW)
        kinds = {
            group["name"]: {optimizer.state[p]["state1"].dtype for p in group["params"] if p.numel() >= 4096}
            for group in optimizer.param_groups
        }
        assert kinds["lora_A"] == {torch.uint8} and kinds[name] <= {torch.float32}


def test_the_function_of_the_original_code() -> None:
    model = lora_llama()
    kwargs = {"lr": LR, "weight_decay": DECAY, "betas": (0.9, 0.95)}
    groups = integration.create_loraplus_optimizer(model, torch.optim.AdamW, kwargs, 4.0).param_groups
    assert [(g["name"], g["lr"], g["weight_decay"], g["betas"]) for g in groups] == [
        ("lora_A", LR, DECAY, (0.9, 0.95)),
        ("lora_B", 4 * LR, DECAY, (0.9, 0.95)),
        ("lora_embedding", 1e-6, DECAY, (0.9, 0.95)),
        ("other_no_decay", LR, 0.0, (0.9, 0.95)),
    ]
    assert (
        integration.create_loraplus_optimizer(model, torch.optim.AdamW, kwargs, 4.0, 1e-5).param_groups[2]["lr"] == 1e-5
    )


def test_the_arguments_have_the_original_names() -> None:
    arguments = integration.LoraPlusTrainingArguments(output_dir="x")
    assert (arguments.loraplus_lr_ratio, arguments.loraplus_lr_embedding) == (None, None)
    parsed = transformers.HfArgumentParser(integration.LoraPlusTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", "x", "--loraplus_lr_ratio", "16", "--loraplus_lr_embedding", "1e-5"]
    )[0]
    assert (parsed.loraplus_lr_ratio, parsed.loraplus_lr_embedding) == (16.0, 1e-5)


# ---- guards ----------------------------------------------------------------------------------------------------------


class Factory:
    """An optimizer that makes its own groups, as transformers' Muon and Dion."""

    def __call__(self, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), **settings)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(lp.loraplus_param_groups(model, lr=LR))


def with_an_idle_adapter() -> Any:
    model = lora_llama()
    lp.add_adapter(model, "other", like="default")
    lp.set_adapter(model, "default", trainable=True)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.other"):
            parameter.requires_grad_(True)
    return model


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ready-made": ({"optimizers": True}, "loraplus_lr_ratio=16.0 has no effect on a ready-made optimizer"),
    "factory": ({"cls": (Factory, {})}, "Factory makes its own groups or rates"),
    "own groups": ({"cls": (torch.optim.AdamW, {"params": []})}, "AdamW makes its own groups or rates"),
    "layer-wise": ({"cls": (torch.optim.AdamW, {"optimizer_dict": {}})}, "AdamW makes its own groups or rates"),
    "lomo": ({"cls": (torch.optim.AdamW, {"model": None})}, "AdamW makes its own groups or rates"),
    "relative": (
        {"cls": (transformers.Adafactor, {"relative_step": True, "lr": None})},
        "Adafactor makes its own groups or rates",
    ),
    "plateau": (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"min_lr": 5e-4, "patience": 0},
         "eval_strategy": "steps", "max_steps": 50},
        "under ReduceLROnPlateau, at step .* where LoRA\\+ was set up with 16",
    ),
    "inactive": ({"model": with_an_idle_adapter}, "the adapter 'other' is trainable but not active"),
    "no adapter": ({"model": llama}, "the model has no LoRA adapter; call inject_lora"),
    "ratio": ({"loraplus_lr_ratio": -1.0}, "lr_ratio must be finite and positive, got -1.0"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_undo_lora_plus_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = dict(settings)
    model = settings.pop("model", lora_llama)()
    before = {name: p.clone() for name, p in model.named_parameters()}
    options: dict[str, Any] = {"optimizers": (optimizer_of(model), None)} if settings.pop("optimizers", False) else {}
    if "cls" in settings:
        options = {"optimizer_cls_and_kwargs": settings.pop("cls")}
    with pytest.raises(ValueError, match=message):
        trainer(model, tmp_path, options=options, **settings).train()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_arguments_without_the_ratio_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args must have loraplus_lr_ratio, but TrainingArguments has not"):
        trainer(lora_llama(), tmp_path, args_cls=transformers.TrainingArguments)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt",
                                  "cosine_with_min_lr", "warmup_stable_decay", "cosine_with_restarts"])  # fmt: skip
def test_schedules_of_transformers_keep_the_ratio(kind: str, tmp_path: Path) -> None:
    kwargs = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "warmup_stable_decay": {"num_decay_steps": 4}}.get(kind, {})
    run = trainer(lora_llama(), tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, warmup_steps=2)
    run.create_optimizer_and_scheduler(20)
    check_lr_ratio(run.optimizer, run.lr_scheduler, steps=20)


def test_a_minimal_rate_is_that_of_A(tmp_path: Path) -> None:
    """Such schedules start from ``optimizer.defaults``, where the groups' rate has to be as well."""
    settings = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}}
    run = trainer(lora_llama(), tmp_path, **settings)
    run.train()
    rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
    assert rates["lora_A"] == pytest.approx(1e-4) and rates["lora_B"] == pytest.approx(RATIO * 1e-4)


DEEPSPEED = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
            "'optimizer' \\('AdamW'\\): an optimizer built from",
        ),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}}, "'scheduler' \\('WarmupLR' with"),
        ({"optimizers": True}, "under DeepSpeed the Trainer drops the optimizer that it is given"),
    ],
    ids=["optimizer", "scheduler", "optimizers"],
)
def test_deepspeed_settings_that_turn_lora_plus_off(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    model, options, settings = lora_llama(), {}, {}
    if sections.pop("optimizers", False):
        options, settings = {"optimizers": (optimizer_of(model), None)}, {"loraplus_lr_ratio": None}
    with pytest.raises(ValueError, match=message):
        trainer(model, tmp_path, options=options, deepspeed=DEEPSPEED | sections, **settings)


def test_each_method_that_is_overridden_must_be_the_trainers() -> None:
    own = {name for name, value in vars(integration.LoraPlusTrainer).items() if callable(value)}
    named = {name for name in own & set(dir(transformers.Trainer)) if not name.startswith("__")}
    assert named == set(integration.OVERRIDDEN)
