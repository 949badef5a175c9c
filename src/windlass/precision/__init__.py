"""Numbers of 16 bits and fewer: tensors rounded to fixed point ⟨IL, FL⟩, float16 and bfloat16.

>>> import torch
>>> from windlass.precision import fixed, quantize
>>> quantize(torch.tensor([0.3, 9.0]), fixed(8, 4), "nearest")
tensor([0.3125, 7.9375])
"""

from windlass.plan.number import BFLOAT16, FLOAT16, FLOAT32, ROUNDINGS, Fixed, Key, fixed, parse_format
from windlass.plan.recipe import PRESETS, ROLES, Recipe, parse_recipe
from windlass.precision.counters import Counters
from windlass.precision.lowered import Lowered, apply
from windlass.precision.quantize import dequantize, quantize
from windlass.precision.quantizer import Quantizer

__all__ = [
    "BFLOAT16",
    "FLOAT16",
    "FLOAT32",
    "PRESETS",
    "ROLES",
    "ROUNDINGS",
    "Counters",
    "Fixed",
    "Key",
    "Lowered",
    "Quantizer",
    "Recipe",
    "apply",
    "dequantize",
    "fixed",
    "parse_format",
    "parse_recipe",
    "quantize",
]
