"""Adapters and checkpoints without training: combine, resize, extract, merge."""

from .checkpoint.extract import extract_checkpoint as extract_checkpoint
from .checkpoint.merge import CheckpointReport as CheckpointReport
from .checkpoint.merge import merge_checkpoint as merge_checkpoint
from .combine import combine_adapters as combine_adapters
from .combine import combine_saved as combine_saved
from .draft import CombineReport as CombineReport
from .extract import extract_adapter as extract_adapter
from .measures import AdapterDifference as AdapterDifference
from .measures import LayerDifference as LayerDifference
from .measures import LayerMeasures as LayerMeasures
from .measures import diff_saved as diff_saved
from .measures import measure as measure
from .plots import plot_measures as plot_measures
from .resize import resize_adapter as resize_adapter
from .resize import resize_saved as resize_saved
