"""Engines: how each holds a model's parameters, and what training under it needs.

Importing this package enters the engines in the tables of `lora_plus.model` and `lora_plus.training`. They use
frameworks that are imported already, and import none.
"""

from lora_plus.model.storage import FINDERS

from . import dtensor, fsdp1, zero
from . import peft as peft
from . import ranks as ranks

FINDERS |= {
    "torch.distributed.fsdp": fsdp1.find,
    "deepspeed": zero.find,
    "torch.distributed.tensor": dtensor.find,
}
