"""Times on disk: round trip, damage, other machines, two processes at once, folders that cannot be written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from windlass.tuning.cache import SCHEMA, TimesCache, cache_folder
from windlass.tuning.cost import Machine

MINE: dict[str, object] = {"cpu": "this one", "threads": 2}


def opened(folder: Path | None, warnings: list[str], **changes: object) -> TimesCache:
    return TimesCache(MINE | changes, warn=warnings.append, folder=folder)


def test_times_and_machine_come_back(tmp_path: Path) -> None:
    warnings: list[str] = []
    cache = opened(tmp_path / "deep" / "folder", warnings)
    assert cache.get("a", "forward") == {} and cache.machine is None
    cache.machine = Machine(5e11, 4e10, 2)
    cache.put("a", "forward", {"torch": 0.25, "direct": 0.125})
    cache.put("a", "input", {"torch": 1e-7})
    cache.save()
    again = opened(tmp_path / "deep" / "folder", warnings)
    assert again.get("a", "forward") == {"torch": 0.25, "direct": 0.125}
    assert again.get("a", "input") == {"torch": 1e-7}
    assert again.get("a", "weight") == again.get("b", "forward") == {}
    assert again.machine == Machine(5e11, 4e10, 2)
    assert warnings == []
    assert not list((tmp_path / "deep" / "folder").glob(".*")), "nothing half-written is left"


def test_new_times_replace_old_ones_of_the_same_algorithm(tmp_path: Path) -> None:
    first = opened(tmp_path, [])
    first.put("a", "forward", {"torch": 1.0, "direct": 2.0})
    first.save()
    second = opened(tmp_path, [])
    second.put("a", "forward", {"torch": 3.0})
    second.save()
    assert opened(tmp_path, []).get("a", "forward") == {"torch": 3.0, "direct": 2.0}


def test_what_is_given_out_is_a_copy(tmp_path: Path) -> None:
    cache = opened(tmp_path, [])
    cache.put("a", "forward", {"torch": 1.0})
    cache.get("a", "forward")["torch"] = 9.0
    assert cache.get("a", "forward") == {"torch": 1.0}


@pytest.mark.parametrize("changes", [{"cpu": "another"}, {"threads": 4}, {"kernels": "newer"}])
def test_another_machine_or_kernel_knows_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    cache = opened(tmp_path, [])
    cache.put("a", "forward", {"torch": 1.0})
    cache.save()
    other = opened(tmp_path, [], **changes)
    assert other.times == {}
    assert other.path != cache.path


def whole(**changes: object) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "fingerprint": MINE,
        "machine": {"peak_flops": 1e11, "bytes_per_s": 1e10},
        "times": {"a": {"forward": {"torch": 1.0}}},
        **changes,
    }


DAMAGED: list[str] = [
    "",
    "{",
    "[]",
    "null",
    "\x00\x01",
    "[" * 100_000,
    json.dumps(whole(schema="windlass-convolution/0")),
    json.dumps({key: value for key, value in whole().items() if key != "times"}),
    json.dumps({key: value for key, value in whole().items() if key != "machine"}),
    json.dumps(whole(times=[])),
    json.dumps(whole(times={"a": 3})),
    json.dumps(whole(times={"a": {"forward": {"torch": "1"}}})),
    json.dumps(whole(times={"a": {"forward": {"torch": -1.0}}})),
    json.dumps(whole(times={"a": {"forward": {"torch": 0}}})),
    json.dumps(whole(times={"a": {"forward": {"torch": True}}})),
    json.dumps(whole(times={"a": {"forward": {"torch": float("nan")}}})),
    json.dumps(whole(machine={"peak_flops": "fast", "bytes_per_s": 1e10})),
    json.dumps(whole(machine=3)),
]


@pytest.mark.parametrize("text", DAMAGED)
def test_damage_costs_one_warning_and_is_written_anew(tmp_path: Path, text: str) -> None:
    path = opened(tmp_path, []).path
    assert path is not None
    path.write_text(text)
    warnings: list[str] = []
    cache = opened(tmp_path, warnings)
    assert cache.times == {} and cache.machine is None
    assert len(warnings) == 1 and "\n" not in warnings[0]
    assert warnings[0].startswith(f"{path} is damaged and will be written anew")
    cache.put("a", "forward", {"torch": 2.0})
    cache.save()
    assert len(warnings) == 1, "once is enough"
    assert opened(tmp_path, warnings).get("a", "forward") == {"torch": 2.0}
    assert len(warnings) == 1, "it is whole again"


def test_a_file_of_no_text_is_damage(tmp_path: Path) -> None:
    path = opened(tmp_path, []).path
    assert path is not None
    path.write_bytes(b"\xff\xfe\xff")
    warnings: list[str] = []
    opened(tmp_path, warnings)
    assert len(warnings) == 1


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    warnings: list[str] = []
    cache = opened(tmp_path / "file" / "below", warnings)
    cache.put("a", "forward", {"torch": 2.0})
    cache.save()
    cache.save()
    assert cache.get("a", "forward") == {"torch": 2.0}
    assert len(warnings) == 1, warnings


def test_memory_only(tmp_path: Path) -> None:
    cache = opened(None, [])
    cache.put("a", "forward", {"torch": 2.0})
    cache.save()
    assert cache.path is None and cache.get("a", "forward") == {"torch": 2.0}


PROCESS = """
import sys
from pathlib import Path
from windlass.tuning.cache import TimesCache
folder, name = Path(sys.argv[1]), sys.argv[2]
def refuse(message):
    raise SystemExit(message)
for number in range(40):
    cache = TimesCache({"cpu": "this one", "threads": 2}, warn=refuse, folder=folder)
    cache.put(f"{name}{number}", "forward", {"torch": 1.0 + number})
    cache.save()
"""


def test_two_processes_lose_nothing_of_each_other_s(tmp_path: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path), name], stderr=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    for process in running:
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    times = opened(tmp_path, []).times
    assert set(times) == {f"{name}{number}" for name in ("a", "b") for number in range(40)}
    assert all(
        times[f"{name}{number}"] == {"forward": {"torch": 1.0 + number}} for name in "ab" for number in range(40)
    )


def test_the_folder_follows_the_user_s_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "windlass" / "convolution"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for nothing in ("", "relative/paths/do/not/count"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert cache_folder() == tmp_path / "home" / ".cache" / "windlass" / "convolution"
