"""Measures Windlass beside its rivals, interleaved in the same processes."""
