"""Kernels of collective operations: reductions of two buffers, and a sum through memory that processes share."""
