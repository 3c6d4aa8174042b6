"""LoRA and LoRA+ for any PyTorch model: inject adapters, train them, save them, merge them.

More names are in `lora_plus.training`, `lora_plus.files`, `lora_plus.surgery`, `lora_plus.model`, `lora_plus.layers`.
Each of these packages is imported when one of its names is first used, so that help and completion of the command line
do not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import files as files
    from . import layers as layers
    from . import model as model
    from . import surgery as surgery
    from . import training as training
    from .files import export_adapter, load_adapter, save_adapter
    from .layers import LoRALinear
    from .model import (
        adapter_per_sample,
        add_adapter,
        check_adapters,
        delete_adapter,
        disabled,
        inject_lora,
        lora_summary,
        merge_and_unload,
        merge_lora,
        merged,
        remove_lora,
        rename_adapter,
        set_adapter,
        unmerge_lora,
    )
    from .surgery import merge_checkpoint
    from .training import check_optimizer, create_loraplus_optimizer, loraplus_param_groups, transfer_lr

__all__ = [
    "LoRALinear",
    "__version__",
    "adapter_per_sample",
    "add_adapter",
    "check_adapters",
    "check_optimizer",
    "create_loraplus_optimizer",
    "delete_adapter",
    "disabled",
    "export_adapter",
    "inject_lora",
    "load_adapter",
    "lora_summary",
    "loraplus_param_groups",
    "merge_and_unload",
    "merge_checkpoint",
    "merge_lora",
    "merged",
    "remove_lora",
    "rename_adapter",
    "save_adapter",
    "set_adapter",
    "transfer_lr",
    "unmerge_lora",
]

_ROOMS = ("model", "layers", "training", "files", "surgery")
"""The first one that has a name gives it."""


class _Package(ModuleType):
    """A package whose rooms are imported when one of their names is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name in _ROOMS:
            return import_module(f"{self.__name__}.{name}")
        if name in __all__:
            for room in _ROOMS:
                names = vars(import_module(f"{self.__name__}.{room}"))
                if name in names:
                    setattr(self, name, names[name])
                    return names[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "model":  # Python sets it when the room has been imported, whichever name was asked for
            import_module(f"{self.__name__}.engines")  # they enter themselves in its tables

    def __dir__(self) -> list[str]:
        return sorted([*__all__, *_ROOMS])


sys.modules[__name__].__class__ = _Package
