"""What runs in virtual time: the cost of a schedule on links, in whole nanoseconds.  NumPy and Numba, no clock."""
