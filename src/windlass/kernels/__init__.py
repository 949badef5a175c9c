"""How fast on one host: kernels in Numba and LLVM IR.  Arrays and scalars only; no torch here."""
