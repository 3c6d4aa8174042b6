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
    "unmerge_lora",
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
        if name == "model":  # Python sets it when the room has been imported, whichever name was asked for
            import_module(f"{self.__name__}.engines")  # they enter themselves in its tables

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = _Package
