"""The line between a rank and the launcher that started it: JSON objects, one a line, over a local socket.

A rank says ``hello`` when it starts, ``beat`` every second with what it is doing, ``event`` for what a person
should see (the leading rank alone), ``error`` when it fails, and ``bye`` when it is done.  The launcher says
``stop``, and in an elastic run ``dead`` for every rank that died.  A line that ends without ``bye`` is a dead
rank: the kernel closes a socket however its owner dies.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
BEAT_S = 1.0
"""Seconds between two signs of life of a rank."""


def encode(message: Message) -> bytes:
    """One line."""
    return json.dumps(message).encode() + b"\n"


class LineBuffer:
    """Cuts a stream of bytes into messages.

    >>> LineBuffer().feed(encode({"kind": "bye"}) + b'{"ki')
    [{'kind': 'bye'}]
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines if line]


class Channel:
    """A rank's end of the line; without a launcher every call does nothing.

    Args:
        path: the launcher's socket, or None.
        on_stop: called, from another thread, when the launcher asks for a stop or is gone.
        on_dead: called likewise with what the launcher says of a rank that died.
    """

    def __init__(
        self,
        path: str | None,
        *,
        on_stop: Callable[[str], None],
        on_dead: Callable[[Message], None] = lambda message: None,
    ) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._on_stop, self._on_dead = on_stop, on_dead
        if path is not None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(path)
            threading.Thread(target=self._listen, daemon=True, name="windlass-channel").start()

    def hello(self, *, rank: int, host: str, survives: bool = False) -> None:
        """Tells the launcher who speaks on this line, and whether the others go on when this rank dies."""
        self.send({"kind": "hello", "rank": rank, "host": host, "pid": os.getpid(), "survives": survives})

    def send(self, message: Message) -> None:
        """Sends one message; a launcher that is gone is no reason to fail."""
        if self._socket is None:
            return
        with self._lock:
            try:
                self._socket.sendall(encode(message))
            except OSError:
                self._socket = None

    def _listen(self) -> None:
        buffer = LineBuffer()
        connection = self._socket
        assert connection is not None
        while True:
            try:
                data = connection.recv(65536)
            except OSError:
                data = b""
            if not data:
                self._on_stop("the launcher is gone")
                return
            for message in buffer.feed(data):
                if message["kind"] == "stop":
                    self._on_stop(str(message["reason"]))
                elif message["kind"] == "dead":
                    self._on_dead(message)
