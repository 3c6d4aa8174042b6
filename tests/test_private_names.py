"""Private names of torch and of engines that the package uses: each is there, or the test says what needs it."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_plus
from lora_plus.packages import PACKAGES

PACKAGE = Path(lora_plus.__file__).parent

Place = str | Callable[[], Any]
"""The dotted name of a module, class or function; or what makes an object. One that ends in ``()`` names the name in
its source, as attributes of instances are named, whose making costs a process group or a model."""


@dataclass(frozen=True)
class Private:
    """Names in one place, and what of this package does not work where they are gone."""

    place: Place
    names: tuple[str, ...]
    needed_for: str


TORCH = [
    Private(lambda: nn.Linear(1, 1), ("_buffers", "_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks",
            "_modules", "_non_persistent_buffers_set", "_parameters", "_state_dict_pre_hooks"), "adapted layers"),
    Private("torch.nn.Module", ("_apply", "_load_from_state_dict", "_save_to_state_dict"), "adapted parameters: keys"),
    Private("torch.nn.Conv2d", ("_conv_forward",), "convolutions"),
    Private(lambda: nn.MultiheadAttention(2, 1), ("_qkv_same_embed_dim",), "attention"),
    Private(lambda: nn.LSTM(1, 1), ("_flat_weights_names", "_update_flat_weights"), "recurrent layers"),
    Private("torch.nn.modules.batchnorm", ("_BatchNorm", "_NormBase"), "groups: decay of norms; sweep"),
    Private("torch.nn.modules.linear", ("NonDynamicallyQuantizableLinear",), "attention: its output layer"),
    Private(lambda: torch.zeros(1), ("_post_accumulate_grad_hooks", "_version"), "checks run without a trace; merging"),
    Private("torch.Tensor", ("_make_subclass", "_make_wrapper_subclass"), "weights that stand for a sum; files"),
    Private("torch.autograd.forward_ad", ("_current_level",), "the fused linear layer: not under forward AD"),
    Private("torch._C", ("_are_functorch_transforms_active",), "the fused linear layer: not under torch.func"),
    Private("torch._C", ("_get_accelerator",), "random states of accelerators"),
    Private("torch._C._autograd", ("_saved_tensors_hooks_is_enabled",), "weights that stand for a sum"),
    Private("torch._C._autograd", ("_top_saved_tensors_default_hooks",), "readings of a weight shared in a call"),
    Private("torch", ("_foreach_copy_", "_foreach_norm", "_foreach_sub_"), "the gauge"),
    Private("torch", ("_grouped_mm",), "stacked experts without the dense sum"),
    Private(lambda: torch.ops.aten.mm, ("_qualified_op_name",), "weights that stand for a sum: operators"),
    Private("torch.utils._python_dispatch", ("TorchDispatchMode",), "check_adapters"),
    Private("torch.utils._pytree", ("tree_leaves", "tree_map"), "weights that stand for a sum; files"),
    Private("torch.optim.lr_scheduler.SequentialLR.__init__()", ("_schedulers",), "check_lr_ratio"),
    Private("torch._dynamo.eval_frame.OptimizedModule()", ("_orig_mod",), "compiled models: names"),
    Private("torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper()",
            ("_checkpoint_wrapped_module",), "checkpoint wrappers: names"),
    Private("torch.nn.parallel.DistributedDataParallel()", ("_delay_all_reduce_params",), "check_optimizer under DDP"),
    Private("torch.distributed.Reducer", ("_get_zeros_like_grad_buckets",), "check_optimizer under DDP"),
    Private("torch.distributed.fsdp.FullyShardedDataParallel()", ("_fsdp_wrapped_module", "_handle"), "FSDP1: names"),
    Private("torch.distributed.fsdp._flat_param.FlatParameter()", ("_params", "_shapes"), "FSDP1: parameters"),
    Private("torch.distributed.fsdp._common_utils()", ("_fsdp_flattened",), "FSDP1: that it is in use"),
    Private("torch.distributed.tensor.parallel.ParallelStyle", ("_apply",), "tensor parallelism"),
]  # fmt: skip

ENGINES = [
    Private("lightning.fabric.wrappers", ("_FabricModule",), "Lightning: names"),
    Private("lightning.fabric.wrappers._FabricModule()", ("_forward_module",), "Lightning: names"),
    Private("transformers.Trainer", ("_load_best_model", "_load_from_checkpoint", "_prepare_for_training",
            "_save_optimizer_and_scheduler"), "LoraPlusTrainer: resuming, its checks"),
    Private("transformers.PreTrainedModel", ("_tied_weights_keys",), "transformers: which weights are tied"),
    Private("transformers.integrations.peft()", ("_hf_peft_config_loaded",), "LoraPlusTrainer: quantized bases"),
    Private("deepspeed.utils.tensor_fragment()", ("_hp_mapping",), "DeepSpeed: ZeRO 1 and 2"),
    Private("deepspeed.runtime.zero.partition_parameters()", ("ds_id", "ds_process_group", "ds_shape", "ds_status"),
            "DeepSpeed: ZeRO 3"),
]  # fmt: skip

OTHERS = {"_all", "_decay", "_groups", "_no_decay", "_proj_weight", "_fields", "_getframe"}
"""Parts of words, and Python's own."""


def found(place: Place) -> Any:
    """What has the names; a text where they are looked for in a source."""
    if not isinstance(place, str):
        return place()
    names, attributes, held = place.removesuffix("()").split("."), [], None
    while held is None:
        try:
            held = importlib.import_module(".".join(names))
        except ModuleNotFoundError:
            names, attributes = names[:-1], [names[-1], *attributes]
    for name in attributes:
        held = getattr(held, name)
    return inspect.getsource(held) if place.endswith("()") else held


def check(entry: Private) -> None:
    held = found(entry.place)
    gone = [name for name in entry.names if not (name in held if isinstance(held, str) else hasattr(held, name))]
    assert not gone, f"{entry.place} has no {gone}, which is needed for: {entry.needed_for}"


@pytest.mark.parametrize("entry", TORCH, ids=lambda entry: entry.needed_for)
def test_torch_has_the_private_names_that_are_used(entry: Private) -> None:
    check(entry)


@pytest.mark.engines
@pytest.mark.parametrize("entry", ENGINES, ids=lambda entry: entry.needed_for)
def test_engines_have_the_private_names_that_are_used(entry: Private) -> None:
    assert isinstance(entry.place, str)
    package = entry.place.partition(".")[0]
    assert package in PACKAGES
    pytest.importorskip(package)
    check(entry)


def test_every_private_name_that_is_used_is_in_the_tables() -> None:
    listed = {name for entry in (*TORCH, *ENGINES) for name in entry.names}
    parts = {part for entry in (*TORCH, *ENGINES) if isinstance(entry.place, str) for part in entry.place.split(".")}
    assert {name for name in used_names() - OTHERS - listed - parts if not name.startswith("_lora_")} == set()


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@functools.cache
def nodes() -> list[ast.AST]:
    """Of all files of the package."""
    return [node for path in sorted(PACKAGE.rglob("*.py")) for node in ast.walk(ast.parse(path.read_text()))]


def is_called(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def own_names() -> set[str]:
    """What the package itself defines."""
    found = set()
    for node in nodes():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def used_names() -> set[str]:
    """Private names that the package uses, and does not define or overrides."""
    own, found = own_names(), set()
    for node in nodes():
        if isinstance(node, ast.Attribute):
            found |= {node.attr} if is_called(node.value, "super") else {node.attr} - own
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= set((node.module or "").split(".")) | {alias.name for alias in node.names} - own
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found |= {node.value} - own  # what is asked for by getattr, or compared with
    return {name for name in found if is_private(name)}
