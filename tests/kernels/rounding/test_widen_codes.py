from __future__ import annotations

import numpy as np
import pytest

from windlass.kernels.rounding import widen_codes
from windlass.kernels.rounding.widen import STREAM_BYTES, TASK


@pytest.mark.parametrize("storage", ["int8", "int16", "int32"])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 33, TASK + 17])
def test_codes_times_the_step(storage: str, size: int) -> None:
    """With a guard behind the last number, at addresses that are no vector's."""
    ends = np.iinfo(storage) if storage != "int32" else np.iinfo(np.int16)
    codes = np.random.default_rng(size).integers(ends.min, ends.max, size + 1, storage, endpoint=True)
    out = np.full(size + 3, np.nan, np.float32)
    widen_codes(storage)(codes[1:].ctypes.data, out[1:].ctypes.data, size, 2.0**-14, 2)
    np.testing.assert_array_equal(out[1 : size + 1], np.ldexp(codes[1:].astype(np.float32), -14))
    assert np.isnan(out[0]) and np.isnan(out[size + 1 :]).all()


def test_results_past_the_caches() -> None:
    codes = np.arange(STREAM_BYTES // 4 + 5, dtype=np.int32).astype(np.int16)
    room = np.full(codes.size + 32, np.nan, np.float32)
    out = room[-room.ctypes.data % 64 // 4 :][: codes.size]
    widen_codes("int16")(codes.ctypes.data, out.ctypes.data, codes.size, 0.5, 2)
    np.testing.assert_array_equal(out, codes.astype(np.float32) / 2)
    assert np.isnan(room).sum() == 32
