"""One module and its adapters: kinds of layers, adapted weights, merged state."""

from lora_plus.tensors import starts as starts

from . import recurrent as recurrent
from .convolution import LoRAConv1d as LoRAConv1d
from .convolution import LoRAConv2d as LoRAConv2d
from .convolution import LoRAConv3d as LoRAConv3d
from .convolution import LoRAConvTranspose1d as LoRAConvTranspose1d
from .convolution import LoRAConvTranspose2d as LoRAConvTranspose2d
from .convolution import LoRAConvTranspose3d as LoRAConvTranspose3d
from .embedding import LoRAEmbedding as LoRAEmbedding
from .kinds import adapts as adapts
from .layer import LoRALayer as LoRALayer
from .linear import LoRALinear as LoRALinear
from .parameter import LoRAParameter as LoRAParameter
from .quantized import LoRAQuantizedLinear as LoRAQuantizedLinear
