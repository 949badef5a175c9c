"""A cluster on one machine: hosts that are network namespaces, joined by links of chosen latency and bandwidth.

Each host has its own network, host name, process numbers and shared memory, so that MPI sees several machines; a
further one, the switch, is where ``mpiexec`` runs.  The links are shaped by ``tc`` on both ends (``netem``: latency
and rate), or, where the kernel has no ``netem``, by a switch in user space (`engine.wire`).  ``tbf`` is there for
machines that permit neither, or for the asking: it has no latency, and what comes after a pause passes for nothing.
The namespaces have no names and live as long as their first processes, which end with a pipe that this process holds:
no host outlives it, not even when it is killed.  Without root they are made in a user namespace, where that is
permitted.

Network namespaces: network_namespaces(7); tbf: tc-tbf(8); netem: tc-netem(8).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from windlass.engine.launch import find_mpiexec
from windlass.engine.wire import CARD, hardware_address
from windlass.errors import ConfigError, WindlassError

Shaper = Literal["netem", "wire", "tbf"]
TOOLS = ("ip", "tc", "unshare", "nsenter")
NETWORK = "10.77.0"
SWITCH_ADDRESS = f"{NETWORK}.254"
MAX_HOSTS = 64
BURST_BYTES, BURST_S = 4 << 10, 50e-6
"""What ``tbf`` lets through at once after a pause, as bytes or as time of the link, whichever is more: little, or
small messages would cost nothing."""
QUEUE_BYTES = 64 << 20
"""What waits before ``tc`` drops."""
SHAPERS: dict[Shaper, str] = {"netem": "tc (netem)", "wire": "a switch in user space", "tbf": "tc (tbf)"}
"""What shapes links, best first."""

TCP_SETTINGS = {"tcp_slow_start_after_idle": "0", "tcp_congestion_control": "reno"}
"""Of every host: connections keep their windows over pauses, and do not pace themselves by what they believe of the
link, as BBR would after every pause of a program."""
WINDOW_PACKETS = 256
"""Connections begin with windows that others have after a while, so that it does not matter who has sent before."""


class NamespaceError(WindlassError):
    """The machine did not make a host or a link; the message is the tool's."""


def namespaces_trouble() -> str:
    """Why this machine permits no cluster of namespaces; empty: it does."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"there is no {', '.join(missing)} here (packages iproute2 and util-linux)"
    done = _tried(["unshare", *_user_options(), "--net", "--uts", "--pid", "--fork", "--mount-proc", "ip", "link"])
    return f"network namespaces are not permitted here: {done}" if done else ""


def shaper_trouble(shaper: Shaper, *, latency_ns: int) -> str:
    """Why links cannot be shaped so on this machine; empty: they can."""
    if shaper == "wire":
        return "" if os.access("/dev/net/tun", os.R_OK | os.W_OK) else "there is no /dev/net/tun to make cards with"
    if shaper == "tbf" and latency_ns:
        return "tbf has no latency"
    enter = ["unshare", *_user_options(), "--net", "tc", "qdisc", "add", "dev", "lo", "root"]
    done = _tried([*enter, *_QDISCS[shaper](1_000_000 if shaper == "netem" else 0, 10**6)])
    return f"tc has no {shaper} ({done.strip(' .')})" if done else ""


def pick_shaper(*, latency_ns: int) -> tuple[Shaper, str]:
    """What shapes links here, and one line that says why.

    Raises:
        ConfigError: nothing can.
    """
    troubles: list[str] = []
    for shaper, meaning in SHAPERS.items():
        trouble = shaper_trouble(shaper, latency_ns=latency_ns)
        if not trouble:
            return shaper, "; ".join([f"links shaped by {meaning}", *troubles])
        troubles.append(trouble)
    raise ConfigError(f"links cannot be shaped here: {'; '.join(troubles)}")


def _netem(latency_ns: int, bits_per_s: int) -> list[str]:
    delay = ["delay", f"{latency_ns // 1000}us"] if latency_ns else []
    return ["netem", *delay, "rate", f"{bits_per_s}bit", "limit", str(QUEUE_BYTES // 1500)]


def _tbf(latency_ns: int, bits_per_s: int) -> list[str]:
    burst = max(BURST_BYTES, int(bits_per_s / 8 * BURST_S))
    return ["tbf", "rate", f"{bits_per_s}bit", "burst", str(burst), "limit", str(QUEUE_BYTES)]


_QDISCS: dict[str, Callable[[int, int], list[str]]] = {"netem": _netem, "tbf": _tbf}


class Namespaces:
    """Hosts and links, from ``with`` to its end.

    Args:
        hosts: how many.
        latency_ns: from card to card.
        bits_per_s: of every host's cable, in each direction.
        shaper: what shapes the links; None: what this machine can.

    Attributes:
        shaped_by: one line about that.
        addresses: the hosts' addresses; host i's name is ``host{i}``.

    Raises:
        ConfigError: numbers that cannot be, or a machine that does not permit it.
        NamespaceError: a tool failed.
    """

    def __init__(self, *, hosts: int, latency_ns: int, bits_per_s: int, shaper: Shaper | None = None) -> None:
        if not 1 <= hosts <= MAX_HOSTS:
            raise ConfigError(f"a cluster on one machine has 1 to {MAX_HOSTS} hosts, got {hosts}")
        if latency_ns < 0 or bits_per_s < 1:
            raise ConfigError(f"a link needs a bandwidth above 0 and no negative latency, got {bits_per_s} bit/s")
        trouble = namespaces_trouble() or (shaper_trouble(shaper, latency_ns=latency_ns) if shaper else "")
        if trouble:
            raise ConfigError(trouble)
        self.latency_ns, self.bits_per_s = latency_ns, bits_per_s
        picked = (shaper, f"links shaped by {SHAPERS[shaper]}") if shaper else pick_shaper(latency_ns=latency_ns)
        self._shaper, self.shaped_by = picked
        self.addresses = [f"{NETWORK}.{number + 1}" for number in range(hosts)]
        self._stack = contextlib.ExitStack()
        self._switch = 0
        self._pids: list[int] = []
        self._wire: subprocess.Popen[bytes] | None = None
        self.folder = Path()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="windlass-hosts-")))
            self._switch = self._hold(stack, ["unshare", *_user_options(), "--net", "--uts"], "switch")
            for number, address in enumerate(self.addresses):
                own = ["unshare", "--net", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"]
                pid = _only_child(self._hold(stack, [*self._user(), *own], f"host{number}"))
                self._pids.append(pid)
                (self.folder / address).write_text(str(pid))
            self._join(stack)
            agent = self.folder / "agent"
            agent.write_text(_AGENT.format(folder=self.folder))
            agent.chmod(0o700)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def enter(self, host: int, command: Sequence[str]) -> list[str]:
        """The command that runs `command` on a host."""
        flags = ["-n", "-u", "-m", "-p", *self._user_flags()]
        return ["nsenter", "-t", str(self._pids[host]), *flags, *command]

    def mpiexec(self, ranks_per_host: int, program: Sequence[str]) -> list[str]:
        """The command that runs a program under MPI, over TCP between hosts and shared memory within."""
        hosts = ",".join(f"{address}:{ranks_per_host}" for address in self.addresses)
        options = {
            "--host": hosts, "-n": str(ranks_per_host * len(self.addresses)), "--bind-to": "none",
            "--map-by": ":OVERSUBSCRIBE",
        }  # fmt: skip
        settings = {"btl": "tcp,sm,self", "btl_tcp_if_include": f"{NETWORK}.0/24", "pml": "ob1"}
        command = [find_mpiexec(), *(word for pair in options.items() for word in pair), "--allow-run-as-root"]
        command += ["--prtemca", "plm_ssh_agent", str(self.folder / "agent"), "--prtemca", "plm_ssh_no_tree_spawn", "1"]
        command += [word for name, value in settings.items() for word in ("--mca", name, value)]
        enter = ["nsenter", "-t", str(self._switch), "-n", "-u", *self._user_flags()]
        return [*enter, "env", f"TMPDIR={self.folder}", *command, *program]

    def cut(self, host: int) -> None:
        """Cuts a host's cable."""
        if self._wire is None:
            self._in_switch("ip", "link", "set", f"port{host}", "down")
            return
        assert self._wire.stdin is not None
        self._wire.stdin.write(f"cut {host}\n".encode())
        self._wire.stdin.flush()

    # --- making them ---

    def _user_flags(self) -> list[str]:
        return ["-U", "--preserve-credentials"] if os.geteuid() else []

    def _user(self) -> list[str]:
        return ["nsenter", "-t", str(self._switch), *self._user_flags(), "--"] if os.geteuid() else []

    def _hold(self, stack: contextlib.ExitStack, command: Sequence[str], name: str) -> int:
        """Starts the first process of a host, which stays until our end of its pipe closes."""
        own_memory = "" if name == "switch" else "mount -t tmpfs windlass /dev/shm && "
        script = f"echo {name} > /proc/sys/kernel/hostname && {own_memory}echo ready && exec cat"
        process = subprocess.Popen(
            [*command, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        stack.callback(_end, process)
        assert process.stdout is not None and process.stderr is not None
        if process.stdout.readline() != b"ready\n":
            raise NamespaceError(f"{name} did not start: {process.stderr.read().decode(errors='replace').strip()}")
        return process.pid

    def _join(self, stack: contextlib.ExitStack) -> None:
        ends = [(self._switch, SWITCH_ADDRESS), *zip(self._pids, self.addresses, strict=True)]
        for pid, _ in ends:
            self._run(pid, "ip", "link", "set", "lo", "up")
        if self._shaper != "wire":
            self._cable_by_tc()
        else:
            self._start_wire(stack)
            self._raise_card(self._switch, SWITCH_ADDRESS, port=len(self._pids))
        for number, pid in enumerate(self._pids):
            self._raise_card(pid, self.addresses[number], port=number)

    def _cable_by_tc(self) -> None:
        self._in_switch("ip", "link", "add", "br0", "type", "bridge")
        self._in_switch("ip", "addr", "add", f"{SWITCH_ADDRESS}/24", "dev", "br0")
        self._in_switch("ip", "link", "set", "br0", "up")
        for number, pid in enumerate(self._pids):
            port, peer = f"port{number}", ("peer", "name", CARD, "netns", str(pid))
            self._in_switch("ip", "link", "add", port, "type", "veth", *peer)
            self._in_switch("ip", "link", "set", port, "master", "br0")
            self._in_switch("ip", "link", "set", port, "up")
            self._shape(self._switch, port, latency_ns=0)
            self._shape(pid, CARD, latency_ns=self.latency_ns)

    def _shape(self, pid: int, device: str, *, latency_ns: int) -> None:
        """Bandwidth on each end of a cable; latency on the host's, where all that it sends passes."""
        qdisc = _QDISCS[self._shaper](latency_ns, self.bits_per_s)
        self._run(pid, "tc", "qdisc", "add", "dev", device, "root", *qdisc)

    def _start_wire(self, stack: contextlib.ExitStack) -> None:
        ps_per_byte = -(-8 * 10**12 // self.bits_per_s)
        spec = {
            "pids": [*self._pids, self._switch],
            "ps_per_byte": [*(ps_per_byte for _ in self._pids), 0],
            "latency_ns": self.latency_ns,
        }
        enter = ["nsenter", "-t", str(self._switch), "-n", *self._user_flags()]
        process = subprocess.Popen(
            [*enter, sys.executable, "-m", "windlass.engine.wire", json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        stack.callback(_end, process)
        self._wire = process
        assert process.stdout is not None and process.stderr is not None
        if process.stdout.readline() != b"ready\n":
            raise NamespaceError(f"the switch did not start: {process.stderr.read().decode(errors='replace').strip()}")

    def _raise_card(self, pid: int, address: str, *, port: int) -> None:
        if self._shaper == "wire":
            self._run(pid, "ip", "link", "set", CARD, "address", hardware_address(port))
        self._run(pid, "ip", "addr", "add", f"{address}/24", "dev", CARD)
        self._run(pid, "ip", "link", "set", CARD, "up")
        windows = ("initcwnd", str(WINDOW_PACKETS), "initrwnd", str(WINDOW_PACKETS))
        self._run(pid, "ip", "route", "replace", f"{NETWORK}.0/24", "dev", CARD, "src", address, *windows)
        for name, value in TCP_SETTINGS.items():
            self._run(pid, "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{name}")

    def _in_switch(self, *command: str) -> None:
        self._run(self._switch, *command)

    def _run(self, pid: int, *command: str) -> None:
        trouble = _tried(["nsenter", "-t", str(pid), "-n", *self._user_flags(), *command])
        if trouble:
            raise NamespaceError(f"{' '.join(command)}: {trouble}")


_AGENT = """#!/bin/sh
# What mpiexec calls instead of ssh: a host's address, then a command for its shell.  It is in the user namespace.
pid=$(cat {folder}/"$1") || exit 1
export TMPDIR={folder}/of-"$1"  # process numbers, after which files are called, are the same on all hosts
mkdir -p "$TMPDIR"
shift
exec nsenter -t "$pid" -n -u -m -p sh -c "$*"
"""


def _user_options() -> list[str]:
    return ["--user", "--map-root-user"] if os.geteuid() else []


def _tried(command: Sequence[str]) -> str:
    """What a command complained of; empty: it did what it should."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = (done.stderr or done.stdout).strip().splitlines()
    return "" if done.returncode == 0 else (said[0] if said else f"status {done.returncode}")


def _only_child(pid: int) -> int:
    """The process that ``unshare`` has started: the host's first."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _end(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


__all__ = ["NamespaceError", "Namespaces", "namespaces_trouble", "pick_shaper", "shaper_trouble"]
