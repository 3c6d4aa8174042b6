"""A tree of modules: places, patterns, injecting, merging, several adapters."""

from . import parameter_places as parameter_places
from .adapters import active_adapters as active_adapters
from .adapters import adapter_names as adapter_names
from .adapters import add_adapter as add_adapter
from .adapters import delete_adapter as delete_adapter
from .adapters import disabled as disabled
from .adapters import rename_adapter as rename_adapter
from .adapters import set_adapter as set_adapter
from .check import check_adapters as check_adapters
from .dense_reads import dense_reads as dense_reads
from .inject import inject_lora as inject_lora
from .inject import remove_lora as remove_lora
from .merge import merge_and_unload as merge_and_unload
from .merge import merge_lora as merge_lora
from .merge import merged as merged
from .merge import unmerge_lora as unmerge_lora
from .per_sample import adapter_per_sample as adapter_per_sample
from .summary import lora_summary as lora_summary
