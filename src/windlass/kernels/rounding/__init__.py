"""Kernels that round numbers to 16 bits and fewer: Philox bits, rounding and storage in one pass."""

from windlass.kernels.rounding.passes import round_array
from windlass.kernels.rounding.reference import Counts

__all__ = ["Counts", "round_array"]
