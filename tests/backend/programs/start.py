"""Starts without any variables, with another backend beside, twice; options are checked."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from leave import leave

import windlass.backend
from windlass.errors import ConfigError

if __name__ == "__main__":
    for _ in range(2):
        dist.init_process_group("windlass", pg_options=windlass.backend.Options())
        assert dist.get_backend() == "windlass" and os.environ["MASTER_PORT"]
        beside = dist.new_group(backend="gloo")
        value = torch.ones(2)
        dist.all_reduce(value, group=beside)
        assert value.tolist() == [float(dist.get_world_size())] * 2
        place = f"{dist.get_rank()}/{dist.get_world_size()}:{os.environ['LOCAL_RANK']}\n"
        try:
            dist.new_group(pg_options={"fixed_order": True})
        except ConfigError as error:
            assert "needs windlass.backend.Options" in str(error)
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.write(place)
    leave()
