"""The line between rank and launcher: any cutting of the stream, both ends, and a launcher that is gone."""

import itertools
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from windlass.engine.channel import Channel, LineBuffer, Message, encode

MESSAGES: list[Message] = [
    {"kind": "hello", "rank": 0, "host": "größe", "pid": 12},
    {"kind": "beat", "phase": "the allreduce", "step": 3, "idle_s": 0.1 + 0.2},
    {"kind": "error", "message": "two\nlines\r\nand a \u2028 third", "code": 1},
    {"kind": "event", "event": {"nested": [1, None, True, {"a": []}]}},
    {"kind": "bye", "code": 0},
]
STREAM = b"".join(map(encode, MESSAGES))


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    ends = [0, *sorted(places), len(stream)]
    return [stream[start:stop] for start, stop in itertools.pairwise(ends)]


def fed(parts: list[bytes]) -> list[Message]:
    buffer = LineBuffer()
    return [message for part in parts for message in buffer.feed(part)]


def test_a_message_is_one_line() -> None:
    for message in MESSAGES:
        line = encode(message)
        assert line.endswith(b"\n") and line.count(b"\n") == 1


def test_any_cutting_of_the_stream_gives_the_same_messages() -> None:
    assert fed([STREAM]) == MESSAGES
    assert fed([bytes([byte]) for byte in STREAM]) == MESSAGES
    for place in range(len(STREAM) + 1):
        assert fed(cut(STREAM, [place])) == MESSAGES
    dice = random.Random(5)
    for _ in range(200):
        assert fed(cut(STREAM, [dice.randrange(len(STREAM) + 1) for _ in range(dice.randrange(9))])) == MESSAGES


def test_a_message_comes_as_soon_as_its_line_ends_and_not_before() -> None:
    buffer = LineBuffer()
    for message in MESSAGES:
        line = encode(message)
        assert buffer.feed(line[:-1]) == []
        assert buffer.feed(b"") == []
        assert buffer.feed(line[-1:]) == [message]


def test_empty_lines_are_no_messages() -> None:
    assert fed([b"\n\n" + encode(MESSAGES[0]) + b"\n"]) == MESSAGES[:1]


class Launcher:
    """The other end of one line."""

    def __init__(self, path: str) -> None:
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(path)
        self.server.listen(1)
        self.reasons: list[str] = []
        self.heard = threading.Semaphore(0)
        self.channel = Channel(path, on_stop=self.on_stop)
        self.rank_end = self.channel._socket  # the channel lets go of it when the launcher is gone
        self.line, _ = self.server.accept()
        self.line.settimeout(10)

    def on_stop(self, reason: str) -> None:
        self.reasons.append(reason)
        self.heard.release()

    def receive(self, count: int) -> list[Message]:
        buffer, messages = LineBuffer(), list[Message]()
        while len(messages) < count:
            messages += buffer.feed(self.line.recv(7))
        return messages


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launcher]:
    monkeypatch.chdir(tmp_path)  # a socket's path may have 107 bytes at most
    launcher = Launcher("socket")
    yield launcher
    launcher.line.close()
    launcher.server.close()
    assert launcher.heard.acquire(timeout=10)  # the listening thread has seen the end
    assert launcher.rank_end is not None
    launcher.rank_end.close()


def test_what_a_rank_says_arrives(launcher: Launcher) -> None:
    launcher.channel.hello(rank=3, host="here")
    for message in MESSAGES:
        launcher.channel.send(message)
    hello, *rest = launcher.receive(1 + len(MESSAGES))
    assert (hello["kind"], hello["rank"], hello["host"], hello["pid"] > 0) == ("hello", 3, "here", True)
    assert rest == MESSAGES


def test_messages_of_several_threads_do_not_mix(launcher: Launcher) -> None:
    long = [{"kind": "event", "event": {"from": number, "text": "x" * 5000}} for number in range(4)]

    def send(message: Message) -> None:
        for _ in range(20):
            launcher.channel.send(message)

    threads = [threading.Thread(target=send, args=(message,)) for message in long]
    for thread in threads:
        thread.start()
    received = launcher.receive(80)
    for thread in threads:
        thread.join(10)
    assert all(received.count(message) == 20 for message in long)


def test_a_rank_hears_requests_to_stop_with_their_reasons(launcher: Launcher) -> None:
    launcher.line.sendall(encode({"kind": "stop", "reason": "SIGTERM"}) + encode({"kind": "other"}))
    assert launcher.heard.acquire(timeout=10)
    launcher.line.sendall(encode({"kind": "stop", "reason": "SIGINT"}))
    assert launcher.heard.acquire(timeout=10)
    assert launcher.reasons == ["SIGTERM", "SIGINT"]


def test_a_launcher_that_is_gone_is_a_reason_to_stop_and_none_to_fail(launcher: Launcher) -> None:
    launcher.line.close()
    assert launcher.heard.acquire(timeout=10)
    assert launcher.reasons == ["the launcher is gone"]
    for _ in range(3):
        launcher.channel.send({"kind": "beat"})
    launcher.heard.release()  # for the fixture


def test_without_a_launcher_every_call_does_nothing() -> None:
    channel = Channel(None, on_stop=lambda reason: None)
    channel.hello(rank=0, host="here")
    channel.send({"kind": "beat"})
