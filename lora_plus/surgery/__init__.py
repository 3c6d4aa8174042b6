"""Adapters and checkpoints without training: combine, resize, extract, merge."""

from .checkpoint.extract import extract_checkpoint as extract_checkpoint
from .checkpoint.merge import CheckpointReport as CheckpointReport
from .checkpoint.merge import merge_checkpoint as merge_checkpoint
from .combine import combine_adapters as combine_adapters
from .draft import CombineReport as CombineReport
from .extract import extract_adapter as extract_adapter
from .resize import resize_adapter as resize_adapter
