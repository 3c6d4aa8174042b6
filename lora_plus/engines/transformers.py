"""LoRA+ with the Hugging Face Trainer: its groups, and guards against what would undo them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_plus
from lora_plus.files.formats import FORMATS, Inexpressible
from lora_plus.files.save import save_adapter
from lora_plus.model.adapters import adapter_names
from lora_plus.model.state import State
from lora_plus.model.unsaved import unsaved
from lora_plus.packages import check_methods, needed
from lora_plus.training.groups import LR_RATIO, Roles, loraplus_param_groups
from lora_plus.training.optimizer_check import check_optimizer
from lora_plus.training.schedule import check_lr_ratio

from .run_file import load_run, save_run

with needed(__name__, "transformers", "accelerate"):
    from accelerate.utils import save_fsdp_optimizer
    from transformers import Trainer, TrainingArguments
    from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
    from transformers.trainer_optimizer import is_optimizer_factory

OVERRIDDEN = (
    "create_optimizer", "save_model", "_save_optimizer_and_scheduler", "_prepare_for_training",
    "_load_from_checkpoint", "_load_best_model",
)  # fmt: skip
"""Methods of the Trainer that have another one here: what it no longer has would never be called."""
check_methods(__name__, Trainer, OVERRIDDEN)


@dataclass
class LoraPlusArguments:
    """The arguments of LoRA+, with the names of the original LoRA+ code (arXiv:2402.12354).

    The original default of ``loraplus_lr_embedding`` is 1e-6, at which adapters on embeddings hardly move.

    Mix them into the arguments of any Trainer: ``class Arguments(LoraPlusArguments, SFTConfig)``, a dataclass.
    """

    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "Learning rate of B over that of A; without it, training is plain LoRA."}
    )
    """Learning rate of B over that of A; without it, training is plain LoRA."""
    loraplus_lr_embedding: float | None = field(
        default=None, metadata={"help": "Learning rate of adapters on embeddings; None for learning_rate."}
    )
    """Learning rate of adapters on embeddings; None for ``learning_rate``."""


@dataclass
class LoraPlusTrainingArguments(LoraPlusArguments, TrainingArguments):
    """``transformers.TrainingArguments`` with ``loraplus_lr_ratio`` and ``loraplus_lr_embedding``."""


def create_loraplus_optimizer(
    opt_model: nn.Module,
    optimizer_cls: Any,
    optimizer_kwargs: Mapping[str, Any],
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float | None = None,
) -> torch.optim.Optimizer:
    """The original LoRA+ code's function of this name, with the groups of `loraplus_param_groups`.

    Args:
        opt_model: a model of `inject_lora`, or PEFT's.
        optimizer_cls: the optimizer's class.
        optimizer_kwargs: its settings, with ``lr`` (A's rate) and ``weight_decay``.
        loraplus_lr_ratio: rate of B over rate of A.
        loraplus_lr_embedding: rate of adapters on embeddings; None for 1e-6, as in the original.
    """
    return lora_plus.create_loraplus_optimizer(
        opt_model,
        optimizer_cls,
        lr_ratio=loraplus_lr_ratio,
        embedding_lr=1e-6 if loraplus_lr_embedding is None else loraplus_lr_embedding,
        roles=_foreign_roles(opt_model),
        **optimizer_kwargs,
    )


class LoraPlusTrainer(Trainer):
    """A ``transformers.Trainer`` that trains with LoRA+: A at ``learning_rate``, B at ``loraplus_lr_ratio`` times that.

    It takes models of `inject_lora` and of PEFT, alone and under DDP, FSDP2 and DeepSpeed. The groups are those of
    `loraplus_param_groups`, with the Trainer's own rule for weight decay. The optimizer is that of ``optim`` or
    ``optimizer_cls_and_kwargs``. In 8-bit optimizers, embeddings and their adapters keep 32-bit state. Without
    ``loraplus_lr_ratio`` it is a plain ``Trainer``. To add LoRA+ to another Trainer, put it first, as in
    ``class LoraPlusSFTTrainer(LoraPlusTrainer, SFTTrainer)``, and add `LoraPlusArguments` to the arguments.

    Checkpoints and ``save_model`` save a model of `inject_lora` without its base:

    - each adapter as a PEFT folder: the one named "default" in the folder itself, others below it. An adapter that
      PEFT's format cannot express becomes ``<name>.adapter.safetensors``. An earlier save in the other form is removed.
    - ``run.safetensors``: all tensors but the frozen base's, to resume the run and to load the best model.

    For a whole model, call ``merge_and_unload(trainer.model).save_pretrained(folder)``.

    Raises:
        TypeError: if the arguments have no ``loraplus_lr_ratio``.
        ValueError: for settings that would switch LoRA+ off: a ready-made optimizer together with
            ``loraplus_lr_ratio``; any ready-made optimizer under DeepSpeed, where the Trainer drops it; sections of a
            DeepSpeed config that set one rate for all groups. In ``train()``: an optimizer that makes its own groups or
            rates, a schedule that changes the ratio, a checkpoint of a run with another ratio, and everything that
            `check_optimizer` finds.
    """

    optimizer_cls_and_kwargs: Any

    def __init__(self, *positional: Any, **named: Any) -> None:
        """As the Trainer's, or that of the class that comes after this one."""
        model = positional[0] if positional else named.get("model")
        with _adapted_though_quantized(model):
            super().__init__(*positional, **named)
        if not hasattr(self.args, "loraplus_lr_ratio"):
            raise TypeError(
                f"args must have loraplus_lr_ratio, but {type(self.args).__name__} has not; pass "
                "LoraPlusTrainingArguments, or a dataclass of LoraPlusArguments and your own arguments"
            )
        if _adapters(self.model) and any(True for _ in _foreign_roles(self.model)):
            raise ValueError(
                "the model has adapters of both inject_lora and PEFT, and each froze the other's; use only one of "
                "inject_lora and peft_config"
            )
        if self.optimizer is not None:
            _check_optimizer_given(self.args.loraplus_lr_ratio, self.is_deepspeed_enabled)
        if self.args.loraplus_lr_ratio is not None and self.is_deepspeed_enabled:
            from .deepspeed import check_config

            check_config(self.accelerator.state.deepspeed_plugin.hf_ds_config.config)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer over the groups of LoRA+, if the arguments say a ratio; else the Trainer's own."""
        if self.optimizer is not None or self.args.loraplus_lr_ratio is None:
            return super().create_optimizer(model)
        given = self.optimizer_cls_and_kwargs
        optimizer_cls, settings = self._loraplus_cls_and_kwargs(self.model if model is None else model)
        _keep_32_bits(optimizer_cls, settings)
        self.optimizer_cls_and_kwargs = optimizer_cls, settings
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given

    def _loraplus_cls_and_kwargs(self, model: nn.Module) -> tuple[Any, dict[str, Any]]:
        """What the Trainer makes the optimizer from, with the groups as its ``params``."""
        optimizer_cls, own = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
        settings = {"lr": self.args.learning_rate, **own}
        if is_optimizer_factory(optimizer_cls) or _OWN_GROUPS & settings.keys() or settings.get("relative_step"):
            raise ValueError(
                f"{optimizer_cls.__name__} makes its own groups or rates, so loraplus_lr_ratio would have no effect; "
                "choose another optimizer, or leave the ratio out"
            )
        decays = set(self.get_decay_parameter_names(model))
        groups = loraplus_param_groups(
            model,
            lr=settings["lr"],
            lr_ratio=self.args.loraplus_lr_ratio,
            embedding_lr=self.args.loraplus_lr_embedding,
            weight_decay=self.args.weight_decay,
            roles=_foreign_roles(model),
            decayed=[parameter for name, parameter in model.named_parameters() if name in decays],
        )
        return optimizer_cls, {**settings, "params": groups}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save all but the frozen base, as said above; every rank must call this."""
        if not _adapters(self.model):
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self.args.should_save or State(self.model).storage.sharded:
            for adapter in _adapters(self.model):
                _save_adapter(self.model, folder, adapter)
        save_run(self.model, folder / RUN_NAME, write=self.args.should_save)
        State(self.model).storage.on_every_rank(
            lambda: self._save_surroundings(folder) if self.args.should_save else None
        )
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_surroundings(self, folder: Path) -> None:
        """The arguments and what prepares the data."""
        torch.save(self.args, folder / TRAINING_ARGS_NAME)
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not _adapters(self.model) or not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.is_deepspeed_enabled:
            from accelerate.utils import DeepSpeedSchedulerWrapper  # is there only with DeepSpeed

            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            holds_schedule = isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper)
        else:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            holds_schedule = False
        if self.args.should_save and not holds_schedule:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        with _base_may_miss(self.model):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_deepspeed_enabled:  # its own checkpoints leave out adapters' frozen matrices
            self._load_run(resume_from_checkpoint)
        unsaved(State(self.model)).check("training was not started")  # the first checkpoint would be too late
        if self.args.loraplus_lr_ratio is not None:
            self._check_training(max_steps)
        return prepared

    def _check_training(self, max_steps: int) -> None:
        """Raise if what has been set up, or resumed, would not train as the arguments say."""
        wanted = self.args.loraplus_lr_ratio
        noted = {group[LR_RATIO] for group in self.optimizer.param_groups if LR_RATIO in group}
        if wanted not in noted or noted - {1.0, wanted}:
            raise ValueError(
                f"loraplus_lr_ratio is {wanted}, but the optimizer's groups note {sorted(noted)}; to resume from a "
                "checkpoint, pass the ratio of its run"
            )
        check_lr_ratio(self.optimizer, self.lr_scheduler, steps=max_steps)
        if self.is_deepspeed_enabled:
            from .deepspeed import check_engine

            check_engine(self.model_wrapped)
        else:
            check_optimizer(self.optimizer, self.model_wrapped, roles=_foreign_roles(self.model))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_run(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or not Path(self.state.best_model_checkpoint, RUN_NAME).is_file():
            with _base_may_miss(self.model):
                super()._load_best_model()
        self._load_run(self.state.best_model_checkpoint)

    def _load_run(self, folder: str | None) -> bool:
        """Load the tensors of the run, if the folder has them."""
        if folder is None or not Path(folder, RUN_NAME).is_file():
            return False
        load_run(self.model, Path(folder, RUN_NAME))
        return True


RUN_NAME = "run.safetensors"
"""The file of a checkpoint with all tensors that are not the frozen base's."""

_OWN_GROUPS = {"params", "model", "optimizer_dict"}
"""Settings by which GaLore, Apollo, LOMO and layer-wise optimizers get parameters of their own choice."""


def _check_optimizer_given(lr_ratio: float | None, deepspeed: bool) -> None:
    if lr_ratio is not None:
        raise ValueError(
            f"loraplus_lr_ratio={lr_ratio} has no effect on a ready-made optimizer; leave that out of optimizers, or "
            "the ratio out of the arguments"
        )
    if deepspeed:
        raise ValueError(
            "under DeepSpeed the Trainer drops the optimizer that it is given, and its groups; pass "
            "optimizer_cls_and_kwargs, or loraplus_lr_ratio in the arguments"
        )


def _foreign_roles(model: nn.Module) -> Roles:
    """The roles of PEFT's adapters, where PEFT is in use at all."""
    if "peft" not in sys.modules:
        return ()
    from .peft import peft_roles

    return peft_roles(model)


def _keep_32_bits(optimizer_cls: Any, settings: dict[str, Any]) -> None:
    """Have bitsandbytes keep 32-bit state for adapters of embeddings, as the Trainer has it do for embeddings."""
    if settings.get("optim_bits") == 8 and optimizer_cls.__module__.startswith("bitsandbytes"):
        from bitsandbytes.optim import GlobalOptimManager

        for group in settings["params"]:
            if group["name"].startswith("lora_embedding"):
                GlobalOptimManager.get_instance().override_config(group["params"], "optim_bits", 32)


def _adapters(model: Any) -> list[str]:
    """The names of the adapters of `inject_lora` in a model."""
    return adapter_names(model) if isinstance(model, nn.Module) else []


def _save_adapter(model: nn.Module, folder: Path, adapter: str) -> None:
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    metadata = {"base_model_name_or_path": name} if name else {}
    peft_folder = folder if adapter == "default" else folder / adapter
    native = folder / f"{adapter}.adapter.safetensors"
    stale = [native]
    try:
        save_adapter(model, peft_folder, adapter=adapter, metadata=metadata)
    except Inexpressible:
        save_adapter(model, native, adapter=adapter, metadata=metadata)
        stale = [peft_folder / name for name in FORMATS["peft"].folder]

    def remove() -> None:  # an earlier one of this name is another adapter
        for path in stale:
            path.unlink(missing_ok=True)

    State(model).storage.on_one_rank(remove)


@contextmanager
def _adapted_though_quantized(model: Any) -> Iterator[None]:
    """Have the Trainer take a quantized base with adapters of `inject_lora`, as it takes one with PEFT's."""
    if not _adapters(model) or getattr(model, "_hf_peft_config_loaded", True):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


@contextmanager
def _base_may_miss(model: nn.Module) -> Iterator[None]:
    """Have DeepSpeed load a checkpoint without the frozen base, which it takes for strict."""

    def forget(module: nn.Module, incompatible: Any) -> None:
        held = module.state_dict(keep_vars=True)
        frozen = {name for name, own in held.items() if isinstance(own, nn.Parameter) and not own.requires_grad}
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in frozen]

    handle = model.register_load_state_dict_post_hook(forget)
    try:
        yield
    finally:
        handle.remove()
