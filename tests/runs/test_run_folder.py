"""The run folder: its name, what refuses it, what stands in it."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from windlass.config import TrainConfig
from windlass.errors import ConfigError, WriteError
from windlass.plan.graph import INPUT, Graph, Layer
from windlass.plan.plan import plan_from_mapping
from windlass.runs.folder import (
    check_writable,
    choose_folder,
    describe_machine,
    free_bytes,
    memory_bytes,
    write_folder,
)
from windlass.tuning.choose import choose_plan

GRAPH = Graph(
    network="small",
    input_shape=(4, 1, 8, 8),
    layers=(
        Layer(
            name="c1", kind="conv2d", inputs=(INPUT,), output_shape=(4, 2, 8, 8), num_parameters=20, forward_macs=1,
            backward_macs=2, kept_bytes=3, weight_bytes=4, output_grad_bytes=5, weight_grad_bytes=6,
            attributes=(("kernel", (3, 3)),),
        ),
    ),
    input_bytes=7,
    peak_bytes=8,
    peak_at="c1",
)  # fmt: skip


def choose(out: str, *, resume: bool = False, network: str = "lenet5", source: str = "digits") -> Path:
    return choose_folder(out, network=network, source=source, resume=resume)


def test_an_unnamed_folder_gets_the_next_free_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose("") == Path("runs/lenet5-digits-001")
    for name in ("lenet5-digits-001", "lenet5-digits-002", "lenet5-mnist-003"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert choose("") == Path("runs/lenet5-digits-003")
    assert choose("", source="mnist:/data/x") == Path("runs/lenet5-mnist-001")
    (tmp_path / "runs" / "lenet5-digits-003").write_text("a file takes a number too")
    assert choose("") == Path("runs/lenet5-digits-004")


def test_names_of_ones_own_networks_become_folder_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose("", network="my.nets:Small Net") == Path("runs/my.nets-Small-Net-digits-001")


def test_a_named_folder_must_be_missing_or_empty_unless_the_run_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert choose(str(run)) == run
    run.mkdir()
    assert choose(str(run)) == run
    (run / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="is not empty; add --resume"):
        choose(str(run))
    assert choose(str(run), resume=True) == run


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_is_no_folder(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        choose(str(tmp_path / "file"), resume=resume)


def test_a_name_that_the_system_refuses_is_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"^cannot write .*: File name too long$"):
        choose(str(tmp_path / ("x" * 300)))


def test_folders_that_can_be_made_pass_and_are_not_made(tmp_path: Path) -> None:
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []


def test_below_a_file_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for below in ("file", "file/a", "file/a/b"):
        with pytest.raises(WriteError) as caught:
            check_writable(tmp_path / below)
        assert str(caught.value) == (
            f"cannot write {tmp_path / below}: {tmp_path / 'file'} is not a folder that may be written"
        )
        assert caught.value.exit_code == 5


AS_NOBODY = """
import os, sys
from pathlib import Path
from windlass.errors import WriteError
from windlass.runs.folder import check_writable, choose_folder

if os.geteuid() == 0:
    os.setuid(65534)
for action in (
    lambda: check_writable(Path(sys.argv[1]) / "shut"),
    lambda: choose_folder(sys.argv[1] + "/shut/a/b", network="n", source="s", resume=False),
):
    try:
        action()
    except WriteError as error:
        print(error.exit_code)
"""


def test_without_the_right_to_look_or_write_it_is_a_write_error() -> None:
    with tempfile.TemporaryDirectory() as name:  # not pytest's folder: that is shut to others altogether
        shut = Path(name) / "shut"
        shut.mkdir()
        shut.chmod(0)
        Path(name).chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, name], capture_output=True, text=True, timeout=60, check=False
        )
        shut.chmod(0o700)
    assert done.stdout == "5\n5\n", done.stderr


def test_free_bytes_are_those_of_the_disk_a_folder_will_be_on(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") > 0


def test_memory_is_read_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "MemTotal:       16 kB\nMemAvailable:   3 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert (memory_bytes("MemTotal"), memory_bytes("MemAvailable"), memory_bytes("Mem")) == (16384, 3072, 0)

    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert memory_bytes("MemTotal") == 0


def test_the_folder_tells_everything_that_is_known_before_the_first_step(tmp_path: Path) -> None:
    folder, config = tmp_path / "a" / "run", TrainConfig(epochs=3)
    plan = choose_plan(GRAPH, workers=1, batch=4)
    for _ in range(2):  # a run that resumes writes them again
        write_folder(folder, config=config.to_mapping(), plan=plan, graph=GRAPH, machine={"host": "größe"})
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config.to_mapping()
    assert plan_from_mapping(yaml.safe_load((folder / "plan.yaml").read_text()), where="plan") == plan
    graph = json.loads((folder / "graph.json").read_text())
    assert (graph["network"], graph["layers"][0]["attributes"]) == ("small", [["kernel", [3, 3]]])
    assert json.loads((folder / "machine.json").read_text()) == {"host": "größe"}
    assert len(list(folder.iterdir())) == 4


def test_a_folder_that_cannot_be_made_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plan = choose_plan(GRAPH, workers=1, batch=4)
    with pytest.raises(WriteError, match=r"^cannot make .*: Not a directory$"):
        write_folder(tmp_path / "file" / "run", config={}, plan=plan, graph=GRAPH, machine={})


def test_the_machine_is_described_for_a_report() -> None:
    machine = describe_machine(hosts=["a", "b", "a"], threads=2, versions={"torch": "9"})
    assert (machine["hosts"], machine["threads_per_rank"], machine["torch"]) == ("a, b", 2, "9")
    assert machine["cores"] >= 1
    assert json.loads(json.dumps(machine)) == machine
