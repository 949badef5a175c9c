"""One rank of `windlass.bench.parallel`: builds, warms up, times and lets go every rival in turn.

One network at a time is in memory, for that of AlexNet takes a gigabyte.  Started by the launcher on one host, or by
``mpiexec`` on hosts of their own, where what it says are lines on its output.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.bench.ranks import BenchRank, enter
from windlass.engine.listen import tell
from windlass.engine.memory import ask_for_huge_pages, keep_freed_memory

if TYPE_CHECKING:
    from windlass.bench.parallel_ways import Setting, Way
    from windlass.parallel.trace import Traced

CARDS = Path("/proc/net/dev")
MEETING_PORT = 29500
"""On a host of its own, where nobody else has it."""


class _Quiet:
    """What a rank on a host of its own has in place of a line to the launcher."""

    reason = ""

    def send(self, message: dict[str, Any]) -> None:
        """The launcher hears no more than what `tell` says."""

    def note(self, phase: str, number: int) -> None:
        """Nobody watches."""


class _FarRank(BenchRank):
    """A rank on a host of its own."""

    def say(self, event: dict[str, Any]) -> None:
        """On the output, which ``mpiexec`` carries."""
        if self.rank == 0:
            tell(event)


def _enter() -> BenchRank:
    """Says hello to the launcher, where there is one."""
    if "--channel" in sys.argv:
        return enter()
    from windlass.engine.world import world_from_environment

    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", required=True)
    spec = json.loads(parser.parse_args().spec)
    rank, size = world_from_environment() or (0, 1)
    quiet = _Quiet()
    return _FarRank(spec, rank, size, quiet, quiet, quiet)


def _main() -> int:
    ask_for_huge_pages()
    keep_freed_memory()
    me = _enter()
    if "card" in me.spec:  # hosts do not know each other's names
        meeting = {"MASTER_ADDR": me.spec["master"], "MASTER_PORT": str(MEETING_PORT)}
        os.environ.update(meeting, GLOO_SOCKET_IFNAME=me.spec["card"])

    import torch

    from windlass.bench.parallel_ways import traced_of

    torch.set_num_threads(me.spec["threads"])
    setting = _setting(me)
    traced = traced_of(setting)
    expected = {name: _expected(name, setting, traced, me) for name in me.spec["ways"]}
    _say_all(me, setting, {"kind": "expected"}, expected)
    for turn in range(me.spec["turns"]):
        rivals = list(me.spec["ways"])
        random.Random(turn).shuffle(rivals)
        for name in rivals:
            me.watchdog.note(name, turn)
            event = {"kind": "turn", "way": name, "turn": turn}
            _say_all(me, setting, event, _measure(name, setting, traced, me, turn=turn))
            if me.give_up(setting.world.gather(me.stop.reason)):
                return 0
    me.channel.send({"kind": "bye", "code": 0})
    setting.world.barrier()
    from mpi4py import MPI

    MPI.Finalize()
    sys.stdout.flush()
    os._exit(0)  # Gloo's destructors now and then wait for ever


def _say_all(me: BenchRank, setting: Setting, event: dict[str, Any], mine: Any) -> None:
    """An event with what every rank has to say."""
    me.say(event | {"workers": me.size, "ranks": setting.world.gather(mine)})


def _setting(me: BenchRank) -> Setting:
    """The ranks and the network; all rivals' networks begin with the same weights."""
    import torch
    import torch.distributed as dist

    from windlass.backend import register
    from windlass.bench.parallel_ways import FORMATS, Setting
    from windlass.engine.world import join_world
    from windlass.networks import build_network

    spec = me.spec
    register()
    dist.init_process_group("windlass")
    groups = {"windlass": dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}

    def build() -> torch.nn.Module:
        torch.manual_seed(spec["seed"])
        shape = {"in_channels": spec["channels"], "image_size": spec["image_size"]}
        module = build_network(spec["network"], num_classes=spec["classes"], **shape, **spec["network_args"])
        return module.train()

    shape = (spec["batch"] * me.size, spec["channels"], spec["image_size"], spec["image_size"])
    return Setting(join_world(me.size), groups, build, shape, spec["classes"], FORMATS[spec["layout"]])


# --- what is measured ---------------------------------------------------------------------------------------


def _measure(name: str, setting: Setting, traced: Traced, me: BenchRank, *, turn: int) -> dict[str, Any]:
    """One turn of a rival on this rank."""
    from windlass.bench.parallel_ways import make_way

    way = make_way(name, setting, traced)
    way.step(0)
    peak = _peak_bytes(way) if turn == 0 else None
    setting.world.barrier()
    way.reset()
    on_wire = card_bytes(me.spec.get("card", ""))
    began = time.perf_counter()
    losses = [way.step(number + 1) for number in range(me.spec["steps"])]
    own_s = time.perf_counter() - began
    setting.world.barrier()
    took = time.perf_counter() - began
    sent, steps = way.sent(), me.spec["steps"]
    found = {
        "seconds": took / steps,
        "own_s": own_s / steps,
        "losses": losses,
        "exposed_s": None if way.exposed_s is None else way.exposed_s / steps,
        "sent": None if sent is None else sent[0] / steps,
        "head_sent": None if sent is None else sent[1] / steps,
        "wire": (card_bytes(me.spec["card"]) - on_wire) / steps if "card" in me.spec else None,
        "peak": peak,
    }
    way.close()
    del way
    gc.collect()
    return found


def _peak_bytes(way: Way) -> int:
    """Most bytes of tensors alive in a step: what stays between steps, and the allocator's own record of one."""
    import itertools

    from torch.profiler import ProfilerActivity, profile

    from windlass.bench.parallel_ways import held_bytes

    held = held_bytes(way.tensors())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        way.step(0)
    results: Any = record.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return held + int(max(itertools.accumulate(changes), default=0))


def card_bytes(card: str) -> int:
    """Bytes that this host has sent through a card, as its kernel counts them."""
    for line in CARDS.read_text().splitlines() if card else ():
        name, colon, counts = line.partition(":")
        if colon and name.strip() == card:
            return int(counts.split()[8])
    return 0


def _expected(name: str, setting: Setting, traced: Traced, me: BenchRank) -> dict[str, Any]:
    """What the placement says beforehand about this rank."""
    from windlass.bench.parallel_ways import DDP, derived_of, head_of, is_of_head
    from windlass.parallel.limits import training_bytes
    from windlass.parallel.memory import predict

    if name == DDP:
        return {"sent": None, "head_sent": None, "peak": None}
    derived, head = derived_of(name, traced, me.size), head_of(traced)
    rows = derived.traffic(me.rank)
    graph = predict(
        setting.build(), derived.placement, setting.input_shape, rank=me.rank, network=me.spec["network"],
        num_classes=setting.num_classes, keep_gradients=False,
    )  # fmt: skip
    return {
        "sent": sum(row.sent for row in rows),
        "head_sent": sum(row.sent for row in rows if is_of_head(row.name, head)),
        "peak": training_bytes(graph, derived, me.rank, optimizer_copies=1),
    }


if __name__ == "__main__":
    sys.exit(_main())
