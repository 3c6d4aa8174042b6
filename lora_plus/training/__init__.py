"""LoRA+ learning rates, checks of optimizers and schedules, sweeps."""

from .candidates import Candidate as Candidate
from .candidates import SweepResult as SweepResult
from .candidates import SweepRow as SweepRow
from .candidates import grid as grid
from .fold import fold_lr_ratio as fold_lr_ratio
from .gauge import GaugeReport as GaugeReport
from .gauge import GaugeRow as GaugeRow
from .gauge import LoRAPlusGauge as LoRAPlusGauge
from .groups import create_loraplus_optimizer as create_loraplus_optimizer
from .groups import loraplus_param_groups as loraplus_param_groups
from .layerwise import split_loraplus_groups as split_loraplus_groups
from .optimizer_check import check_optimizer as check_optimizer
from .plots import plot_gauge as plot_gauge
from .plots import plot_sweep as plot_sweep
from .plots import plot_sweep_curves as plot_sweep_curves
from .rebind import rebind_optimizer as rebind_optimizer
from .schedule import check_lr_ratio as check_lr_ratio
from .schedule import watch_lr_ratio as watch_lr_ratio
from .search import Sweep as Sweep
from .search import sweep as sweep
from .start import init_from_gradients as init_from_gradients
from .start import reset_lora_parameters as reset_lora_parameters
from .transfer import transfer_lr as transfer_lr
