"""Makes a process group where PyTorch asks for one."""

from __future__ import annotations

from typing import Any

from windlass.backend.options import Options
from windlass.engine.world import world_from_environment
from windlass.errors import ConfigError

HOW_TO_START = "start them with `windlass launch -n {size} script.py` or `mpiexec -n {size} python -m mpi4py script.py`"


def create_group(opts: Any, options: Any) -> object:
    """A group of the ranks in PyTorch's `opts`; `options` are None or an `Options`."""
    if options is not None and not isinstance(options, Options):
        raise ConfigError(f'pg_options of the backend "windlass": needs windlass.backend.Options, got {options!r}')
    ranks = list(opts.global_ranks_in_group)
    if not ranks and opts.group_size > 1 and world_from_environment() is None:
        how = HOW_TO_START.format(size=opts.group_size)
        raise ConfigError(f'the backend "windlass" needs its {opts.group_size} processes to be ranks of MPI: {how}')
    from windlass.backend.process_group import WindlassGroup
    from windlass.backend.world import mpi_world

    world = mpi_world()
    if not ranks:
        if (opts.group_rank, opts.group_size) != (world.rank, world.size):
            raise ConfigError(
                f"this process is rank {opts.group_rank} of {opts.group_size} to PyTorch (RANK, WORLD_SIZE), but rank "
                f"{world.rank} of {world.size} to MPI; leave RANK and WORLD_SIZE unset, or start the processes by MPI"
            )
        ranks = list(range(world.size))
    return WindlassGroup(
        world,
        ranks,
        store=opts.store,
        timeout=opts.timeout,
        options=options or Options(),
        name=opts.group_id,
    )
