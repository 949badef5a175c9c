"""A cluster on one machine: links keep to their latency and bandwidth, MPI runs across, and a cut cable is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from windlass.bench.cluster import Links, bench_cluster, cluster_picks, cut_cluster, parse_links
from windlass.cli import main
from windlass.cli.tune_cluster import count_slots
from windlass.engine import namespaces
from windlass.engine.listen import RanksFailed, run_and_listen
from windlass.engine.namespaces import SHAPERS, Namespaces, Shaper, namespaces_trouble, pick_shaper, shaper_trouble
from windlass.engine.wire import HEADER_BYTES, Port, Switch
from windlass.errors import ConfigError

MBIT_PS = 80_000  # picoseconds a byte at 100 Mbit/s
LINKS = Links(latency_ns=1_000_000, bits_per_s=100_000_000)


def trouble() -> str:
    found = namespaces_trouble()
    if not found:
        try:
            pick_shaper(latency_ns=1)
        except ConfigError as error:
            return str(error)
    return found


permitted = pytest.mark.skipif(bool(trouble()), reason=trouble() or "permitted")


# --- the switch, by hand ------------------------------------------------------------------------------------


def frame(to: int, num_bytes: int) -> bytes:
    return bytes(HEADER_BYTES) + bytes([2, 0, 0, 0, 0, to]) + bytes(num_bytes - 6)


def arrivals(switch: Switch, until: int) -> list[tuple[int, int]]:
    """(time, port) of everything that arrives, by the switch's own account of when something happens."""
    found, now = [], 0
    while (event := switch.next_event(now)) is not None and event <= until:
        now = event
        found += [(now, port) for port, _ in switch.due(now)]
    return found


def make_switch(count: int = 3, latency_ns: int = 1000) -> Switch:
    return Switch([Port(-1, MBIT_PS) for _ in range(count)], latency_ns)


def test_a_frame_takes_latency_and_its_bytes_once() -> None:
    switch = make_switch()
    switch.take(0, frame(1, 1000), 0)
    assert arrivals(switch, 10**9) == [(80_000 + 1000, 1)]


def test_frames_of_one_card_go_one_after_the_other_and_it_waits_with_the_next() -> None:
    switch = make_switch()
    for _ in range(4):
        assert switch.ready(0, 0)
        switch.take(0, frame(1, 1000), 0)
    assert not switch.ready(0, 0) and switch.ready(1, 0)
    assert arrivals(switch, 10**9) == [(80_000 * k + 1000, 1) for k in (1, 2, 3, 4)]


def test_two_senders_share_the_cable_of_their_receiver() -> None:
    switch = make_switch()
    switch.take(0, frame(2, 1000), 0)
    switch.take(1, frame(2, 1000), 0)
    assert arrivals(switch, 10**9) == [(81_000, 2), (161_000, 2)]


def test_both_directions_of_a_cable_are_free_for_each_other() -> None:
    switch = make_switch()
    switch.take(0, frame(1, 1000), 0)
    switch.take(1, frame(0, 1000), 0)
    assert arrivals(switch, 10**9) == [(81_000, 1), (81_000, 0)]


def test_a_call_for_all_reaches_all_others() -> None:
    switch = make_switch()
    switch.take(0, bytes(HEADER_BYTES) + b"\xff" * 100, 0)
    assert sorted(port for _, port in arrivals(switch, 10**9)) == [1, 2]


def test_nothing_passes_a_cut_cable_not_even_what_was_on_its_way() -> None:
    switch = make_switch()
    switch.take(0, frame(1, 1000), 0)
    switch.ports[1].cut = True
    switch.take(1, frame(2, 1000), 0)
    switch.take(0, frame(2, 1000), 0)
    assert [port for _, port in arrivals(switch, 10**9)] == [2]


# --- hosts --------------------------------------------------------------------------------------------------


@permitted
def test_hosts_have_names_and_networks_of_their_own_and_leave_nothing() -> None:
    script = "import socket; print(socket.gethostname()); print(len(socket.if_nameindex()))"
    with Namespaces(hosts=2, latency_ns=1000, bits_per_s=10**9) as cluster:
        said = [subprocess.check_output(cluster.enter(host, [sys.executable, "-c", script])) for host in (0, 1)]
        pids, folder = list(cluster._pids), cluster.folder
    assert [text.decode().split() for text in said] == [["host0", "2"], ["host1", "2"]]
    assert not folder.exists()
    assert not any(Path(f"/proc/{pid}/ns/net").exists() for pid in pids)


@permitted
def test_hosts_are_removed_after_an_error() -> None:
    with pytest.raises(KeyboardInterrupt), Namespaces(hosts=1, latency_ns=0, bits_per_s=10**9) as cluster:
        pids = list(cluster._pids)
        raise KeyboardInterrupt
    assert not any(Path(f"/proc/{pid}/ns/net").exists() for pid in pids)


@permitted
@pytest.mark.parametrize("shaper", SHAPERS)
def test_whatever_shapes_links_carries_bytes_and_can_be_cut(shaper: Shaper) -> None:
    if said := shaper_trouble(shaper, latency_ns=0):
        pytest.skip(said)
    ask = "import socket, sys; s = socket.create_connection(('10.77.0.1', 5000), timeout=3); print(len(s.recv(9)))"
    serve = "import socket; s = socket.create_server(('10.77.0.1', 5000)); print(flush=True)\n"
    serve += "while True: s.accept()[0].send(b'x' * 9)"
    with Namespaces(hosts=2, latency_ns=0, bits_per_s=10**8, shaper=shaper) as cluster:
        server = subprocess.Popen(cluster.enter(0, [sys.executable, "-c", serve]), stdout=subprocess.PIPE)
        with server:
            assert server.stdout is not None and server.stdout.readline() == b"\n"
            assert subprocess.check_output(cluster.enter(1, [sys.executable, "-c", ask])) == b"9\n"
            cluster.cut(1)
            cut = subprocess.run(cluster.enter(1, [sys.executable, "-c", ask]), capture_output=True, check=False)
            assert b"timed out" in cut.stderr
            server.kill()


@pytest.mark.mpi
@permitted
def test_every_schedule_runs_across_hosts_and_is_predicted() -> None:
    result = bench_cluster(
        LINKS, hosts=2, per_host=2, sizes=[4096], turns=1, on_event=lambda event: None, library=False,
        messages=[1, 4096, 65536],
    )  # fmt: skip
    assert {row.by for row in result.rows} == {str(pick) for pick in cluster_picks(2, 2)}
    assert all(row.predicted_s > 0 and row.measured_s >= 0.9 * 1e-3 for row in result.rows)  # no sooner than light
    assert set(result.points) == {"host", "network"}
    assert min(seconds for _, seconds in result.points["network"]) >= 1e-3
    assert result.crossovers()[0][0] == 1024
    assert set(result.errors()) == {"all", *(row.by for row in result.rows)}


@pytest.mark.mpi
@permitted
def test_a_cut_cable_gives_one_error_that_names_rank_host_and_operation() -> None:
    message, after_s = cut_cluster(LINKS, hosts=3, per_host=1, num_bytes=65536, after_s=0.2, timeout_s=2.0)
    assert "in allreduce for" in message and "on host" in message and message.startswith("rank ")
    assert after_s < 60


# --- words --------------------------------------------------------------------------------------------------


def test_where_namespaces_are_not_permitted_the_command_says_so_and_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(namespaces, "namespaces_trouble", lambda: "network namespaces are not permitted here: no")
    assert main(["bench", "cluster"]) == 0
    assert capsys.readouterr().out == "skipped: network namespaces are not permitted here: no\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hosts", "1"], "--hosts: needs a number of at least 2, got 1"),
        (["--ranks-per-host", "0"], "--ranks-per-host: needs a number of at least 1, got 0"),
        (["--latency", "1ms,2ms", "--bandwidth", "1Gbit,2Gbit,3Gbit"], "need as many of each"),
        (["--bandwidth", "fast"], "a bandwidth is written like"),
    ],
)
def test_wrong_settings_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cluster", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "--ranks: needs at least 2, got 1"),
        (["--sizes", "many"], "a size is written like"),
        (["--turns", "0"], "--turns: needs at least 1, got 0"),
        (["--hosts", "absent"], "--hosts absent: cannot be read"),
    ],
)
def test_wrong_settings_of_tuning_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "cluster", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_slots_of_a_hostfile_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# mine\nnode1 slots=4\nnode2\n\nnode3 max_slots=9 slots=2 # old\n")
    assert count_slots(path) == 7
    path.write_text("node1 slots=many\n")
    with pytest.raises(ConfigError, match="needs lines like: node1 slots=4"):
        count_slots(path)


def test_settings_of_links_are_paired() -> None:
    assert parse_links("1ms", "1Gbit,2Gbit") == [
        Links(latency_ns=10**6, bits_per_s=10**9), Links(latency_ns=10**6, bits_per_s=2 * 10**9)
    ]  # fmt: skip


def test_a_program_is_listened_to_and_its_last_lines_are_shown() -> None:
    heard: list[object] = []
    script = "print('{\"kind\": 1}'); print('so be it'); raise SystemExit(3)"
    with pytest.raises(RanksFailed, match="so be it"):
        run_and_listen([sys.executable, "-c", script], on_event=heard.append, limit_s=60)
    assert heard == [{"kind": 1}]


@pytest.mark.parametrize(("hosts", "bits"), [(0, 1), (65, 1), (2, 0)])
def test_clusters_that_cannot_be_are_refused(hosts: int, bits: int) -> None:
    with pytest.raises(ConfigError):
        Namespaces(hosts=hosts, latency_ns=0, bits_per_s=bits)
