"""Runs plans for real: the only place with MPI, processes, threads, sockets and clocks."""
