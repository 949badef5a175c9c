"""The rival of `bench.elastic`: DDP over Gloo as a user of ``torchrun --max-restarts`` writes it.

The first thing each process does is to look for a checkpoint; rank 0 writes one every few steps.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Trains until it is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--network", required=True)
    parser.add_argument("--every", type=int, required=True)
    options = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    log = (options.folder / f"rank-{rank}-{os.getpid()}.jsonl").open("a", buffering=1)

    def write(kind: str, **values: Any) -> None:
        start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        row = {"kind": kind, "start": start, "rank": rank, "pid": os.getpid(), "at": time.monotonic(), **values}
        log.write(json.dumps(row) + "\n")

    write("hello")
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from windlass.config import config_from_layers
    from windlass.data import open_dataset
    from windlass.data.serving import BatchServer
    from windlass.prepare import image_size, network_for

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    config = config_from_layers([{"network": options.network, "workers": size}])
    dataset = open_dataset(config.data.source, holdout=config.data.holdout)
    side = image_size(config, dataset)
    torch.manual_seed(0)
    module = network_for(config, dataset, side)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, fused=True)
    path, step = options.folder / "checkpoint.pt", 0
    if path.exists():
        saved = torch.load(path)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
    server = BatchServer(dataset.train, dataset=dataset, batch=config.batch, image_size=side,
                         augment=config.data.augment, rank=rank, world_size=size)  # fmt: skip
    while True:
        batch = server.fetch(step // server.num_steps, step % server.num_steps)
        try:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(ddp(batch.images), batch.labels).backward()  # type: ignore[no-untyped-call]
        except RuntimeError:
            write("error")
            raise
        optimizer.step()
        step += 1
        if rank == 0:
            write("step", step=step)
            if step % options.every == 0:
                temporary = path.with_suffix(".new")
                state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, temporary)
                temporary.replace(path)


if __name__ == "__main__":
    main()
