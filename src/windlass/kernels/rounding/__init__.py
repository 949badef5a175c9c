"""Kernels that round numbers to 16 bits and fewer: Philox bits, rounding and storage in one pass."""

from windlass.kernels.rounding.passes import Pass, round_array
from windlass.kernels.rounding.reference import Counts
from windlass.kernels.rounding.updating import Updated, update_pass
from windlass.kernels.rounding.widen import widen_codes

__all__ = ["Counts", "Pass", "Updated", "round_array", "update_pass", "widen_codes"]
