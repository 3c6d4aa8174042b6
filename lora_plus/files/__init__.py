"""Adapters on the disk: formats, saving, loading."""

from . import native as native

from .peft import folder as folder  # isort: skip
from . import experts as experts  # isort: skip
from . import read_layers as read_layers  # isort: skip
from . import kohya as kohya  # isort: skip
from . import token_rows as token_rows  # isort: skip
from . import diffusers as diffusers  # isort: skip
from . import starts as starts  # isort: skip
from .export import ExportReport as ExportReport
from .export import export_adapter as export_adapter
from .export import to_peft as to_peft
from .formats import FORMATS as FORMATS
from .formats import Contents as Contents
from .formats import Files as Files
from .formats import Format as Format
from .load import load_adapter as load_adapter
from .outline import Outline as Outline
from .read import read_adapter as read_adapter
from .save import adapter_state_dict as adapter_state_dict
from .save import save_adapter as save_adapter
from .save import write_adapter as write_adapter
from .saved_adapter import SavedAdapter as SavedAdapter
from .saved_adapter import SavedLayer as SavedLayer
from .target import Target as Target
