"""The programs are run by mpiexec; pytest must not import them for doctests."""

collect_ignore_glob = ["programs/*"]
