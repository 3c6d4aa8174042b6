"""LoRA and LoRA+ for any PyTorch model: inject adapters, train them, save them, merge them.

The names are imported when the first one is asked for, so that help and completion of the command line do not wait for
torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .public import *

__all__ = [
    "Candidate",
    "CheckpointReport",
    "CombineReport",
    "ExportReport",
    "GaugeReport",
    "GaugeRow",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAConvTranspose1d",
    "LoRAConvTranspose2d",
    "LoRAConvTranspose3d",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRAParameter",
    "LoRAPlusGauge",
    "Sweep",
    "SweepResult",
    "SweepRow",
    "__version__",
    "active_adapters",
    "adapter_names",
    "adapter_per_sample",
    "adapter_state_dict",
    "add_adapter",
    "bare_model",
    "check_adapters",
    "check_lr_ratio",
    "check_optimizer",
    "combine_adapters",
    "convert_lr",
    "create_loraplus_optimizer",
    "delete_adapter",
    "disabled",
    "export_adapter",
    "extract_adapter",
    "extract_checkpoint",
    "fold_lr_ratio",
    "grid",
    "init_from_gradients",
    "inject_lora",
    "load_adapter",
    "lora_summary",
    "loraplus_param_groups",
    "merge_and_unload",
    "merge_checkpoint",
    "merge_lora",
    "merged",
    "rebind_optimizer",
    "remove_lora",
    "rename_adapter",
    "reset_lora_parameters",
    "resize_adapter",
    "save_adapter",
    "set_adapter",
    "split_loraplus_groups",
    "sweep",
    "unmerge_lora",
    "watch_lr_ratio",
]


class _Package(ModuleType):
    """A package whose public names are imported late, and are not those of files that are called the same."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        public = vars(import_module(f"{self.__name__}.public"))
        vars(self).update({each: public[each] for each in __all__ if each in public})
        return vars(self)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in __all__):  # as importing lora_plus.sweep would do
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Package
