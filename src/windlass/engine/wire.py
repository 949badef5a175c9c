"""A switch and its cables in user space: the latency and bandwidth of links where the kernel has no ``netem``.

Theory of operation.  Each host's network card is a TAP device; this process holds their other ends.  A cable is
full duplex: in each direction it carries `bits_per_s`, one frame after the other.  A frame that the card takes at
time t occupies the cable upwards for bytes/rate, reaches the switch `latency_ns` later, where it waits for the
receiver's cable, and is there when its last bit is.  The switch cuts through (it does not store whole frames), and
its queues are as long as they need to be: nothing is ever dropped.  A card takes the next frame when at most
`BACKLOG_NS` stand before it, so connections of one host share its cable as they do behind a real card.

Frames are as long as TCP makes them (segmentation is left to the card that is not there), so a second of 1 Gbit/s
costs a few thousand frames.  The process asks for real-time priority and goes on without.
It runs as ``python -m windlass.engine.wire`` and ends with its standard input.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import select
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
OFFLOAD_CSUM_TSO = 0x01 | 0x02 | 0x04
"""The kernel's <linux/if_tun.h>: checksums, TCP segmentation of IPv4 and IPv6."""
HEADER_BYTES = 10
"""Of struct virtio_net_hdr, which stands before every frame."""
CLONE_NEWNET = 0x40000000
MAX_FRAME = 1 << 17
BACKLOG_NS = 300_000
CARD = "eth0"


@dataclass
class Port:
    """One host's cable: when each direction is free again; None: no limit.

    Attributes:
        fd: the TAP device's other end.
        ps_per_byte: of each direction.
        cut: whether nothing passes.
    """

    fd: int
    ps_per_byte: int
    cut: bool = False
    up_free: int = 0
    down_free: int = 0


@dataclass
class Switch:
    """Frames on their way between ports; knows no clock: `take` and `due` are told the time, in nanoseconds.

    Args:
        ports: by number; a frame's last byte of the receiver's address is that number.
        latency_ns: from card to card.
    """

    ports: Sequence[Port]
    latency_ns: int
    _events: list[tuple[int, int, int, int, bytes]] = field(default_factory=list)
    _count: int = 0

    def ready(self, number: int, now: int) -> bool:
        """Whether a card may take its next frame."""
        return self.ports[number].up_free - now <= BACKLOG_NS

    def take(self, number: int, frame: bytes, now: int) -> None:
        """A card puts a frame on its cable."""
        source = self.ports[number]
        start = max(now, source.up_free)
        source.up_free = start + self._time(frame, source)
        for target in _receivers(frame, number, len(self.ports)):
            if not (source.cut or self.ports[target].cut):
                # its first bit reaches the switch; its last one is behind it
                self._push(start + self.latency_ns, target, source.up_free + self.latency_ns, frame)

    def due(self, now: int) -> list[tuple[int, bytes]]:
        """Frames that have arrived, with their ports."""
        arrived: list[tuple[int, bytes]] = []
        while self._events and self._events[0][0] <= now:
            when, _, target, last_bit, frame = heapq.heappop(self._events)
            port = self.ports[target]
            if port.cut:
                continue
            if last_bit < 0:
                arrived.append((target, frame))
                continue
            port.down_free = max(max(when, port.down_free) + self._time(frame, port), last_bit)
            self._push(port.down_free, target, -1, frame)
        return arrived

    def next_event(self, now: int) -> int | None:
        """When something happens that no new frame brings about; None: never."""
        waiting = [port.up_free - BACKLOG_NS for port in self.ports if port.up_free - BACKLOG_NS > now]
        return min([*waiting, *(event[0] for event in self._events[:1])], default=None)

    def _push(self, when: int, target: int, last_bit: int, frame: bytes) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, target, last_bit, frame))

    @staticmethod
    def _time(frame: bytes, port: Port) -> int:
        return (len(frame) - HEADER_BYTES) * port.ps_per_byte // 1000


def _receivers(frame: bytes, source: int, count: int) -> Sequence[int]:
    if frame[HEADER_BYTES] & 1:  # for all
        return [number for number in range(count) if number != source]
    number = frame[HEADER_BYTES + 5]
    return [number] if number < count and number != source else []


def hardware_address(number: int) -> str:
    """Of the card on this port."""
    return f"02:00:00:00:00:{number:02x}"


def open_card(pid: int) -> int:
    """Makes the card of the host whose network this process has, and returns its other end."""
    with Path(f"/proc/{pid}/ns/net").open() as namespace:
        _in_network(namespace.fileno())
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", CARD.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
    fcntl.ioctl(end, TUNSETIFF, request)
    fcntl.ioctl(end, TUNSETOFFLOAD, OFFLOAD_CSUM_TSO)
    return end


def _in_network(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def run_switch(switch: Switch, commands: int, *, clock: Callable[[], int] = time.monotonic_ns) -> None:
    """Carries frames until the descriptor `commands` ends; a line ``cut N`` there cuts port N's cable."""
    while True:
        now = clock()
        for target, frame in switch.due(now):
            with contextlib.suppress(OSError):  # the card is down, or its queue is full
                os.write(switch.ports[target].fd, frame)
        open_ends = {port.fd: number for number, port in enumerate(switch.ports) if switch.ready(number, now)}
        event = switch.next_event(now)
        wait_s = None if event is None else max(0, event - clock()) / 1e9
        readable, _, _ = select.select([commands, *open_ends], [], [], wait_s)
        for descriptor in readable:
            if descriptor != commands:
                _take_frames(switch, open_ends[descriptor], clock)
            elif not _obey(switch, os.read(commands, 4096).decode()):
                return


def _take_frames(switch: Switch, number: int, clock: Callable[[], int]) -> None:
    """Takes what one card has to send, until its cable is busy."""
    for _ in range(64):
        now = clock()
        if not switch.ready(number, now):
            return
        try:
            frame = os.read(switch.ports[number].fd, MAX_FRAME)
        except OSError:
            return
        switch.take(number, frame, now)


def _obey(switch: Switch, text: str) -> bool:
    for line in text.splitlines():
        word, _, number = line.partition(" ")
        if word == "cut":
            switch.ports[int(number)].cut = True
    return bool(text)


def main(arguments: Sequence[str]) -> int:
    """``wire SPEC``: pids of those whose networks get a card, bandwidth of each, latency; says ``ready``."""
    spec = json.loads(arguments[0])
    ports = [Port(open_card(pid), ps) for pid, ps in zip(spec["pids"], spec["ps_per_byte"], strict=True)]
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    run_switch(Switch(ports, spec["latency_ns"]), sys.stdin.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
