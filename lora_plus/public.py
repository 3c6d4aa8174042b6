"""The public names, all of which import torch. ``lora_plus`` gives them when one is asked for."""

from .files import export_adapter as export_adapter
from .files import load_adapter as load_adapter
from .files import save_adapter as save_adapter
from .layers import LoRALinear as LoRALinear
from .model import adapter_per_sample as adapter_per_sample
from .model import add_adapter as add_adapter
from .model import check_adapters as check_adapters
from .model import delete_adapter as delete_adapter
from .model import disabled as disabled
from .model import inject_lora as inject_lora
from .model import lora_summary as lora_summary
from .model import merge_and_unload as merge_and_unload
from .model import merge_lora as merge_lora
from .model import merged as merged
from .model import remove_lora as remove_lora
from .model import rename_adapter as rename_adapter
from .model import set_adapter as set_adapter
from .model import unmerge_lora as unmerge_lora
from .surgery import merge_checkpoint as merge_checkpoint
from .training import check_optimizer as check_optimizer
from .training import create_loraplus_optimizer as create_loraplus_optimizer
from .training import loraplus_param_groups as loraplus_param_groups
