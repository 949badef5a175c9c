"""Bad input: one clear line on stderr, the right exit status, no traceback, nothing half-written."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from windlass.cli import main

IDX = {"images": "t10k-images-idx3-ubyte.gz", "labels": "t10k-labels-idx1-ubyte.gz"}


def write_mnist(folder: Path, *, magic: int = 0x803, cut: int = 0, label: int = 3, count: int = 40) -> Path:
    """A small IDX pair, spoiled as asked."""
    folder.mkdir()
    images = struct.pack(">IIII", magic, count, 28, 28) + bytes(count * 784)
    labels = struct.pack(">II", 0x801, count) + bytes([label] * count)
    (folder / IDX["images"]).write_bytes(gzip.compress(images[: len(images) - cut]))
    (folder / IDX["labels"]).write_bytes(gzip.compress(labels))
    return folder


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The one line that a refused command prints."""
    before = sorted(Path().rglob("*"))
    assert main(list(arguments)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("windlass: ")
    assert captured.err.count("\n") == 1, captured.err
    assert sorted(Path().rglob("*")) == before, "something was written"
    return captured.err


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


REFUSED = [
    (["train", "lenet"], "unknown network 'lenet'; did you mean 'lenet5'"),
    (["train", "resnet50", "--network", "vgg16"], "the network is given twice"),
    (["train", "--data", "digit"], "unknown data source 'digit'; did you mean 'digits'"),
    (["train", "--data", "mnist"], "--data mnist:"),
    (["train", "--epohcs", "3"], "--epochs"),
    (["train", "--epochs", "many"], "Invalid value for '--epochs'"),
    (["train", "--epochs", "0"], "epochs: needs a number of at least 1, got 0"),
    (["train", "--batch", "3", "--workers", "4"], "batch: 4 workers need a batch of at least 4, got 3"),
    (["train", "--update", "adamm"], "unknown update rule 'adamm'; did you mean 'adam'"),
    (["train", "--lr", "-1"], "update.lr: needs a finite number of at least 0, got -1.0"),
    (["train", "--schedule", "cosin"], "unknown schedule 'cosin'; did you mean 'cosine'"),
    (["train", "--warmup", "99"], "schedule.warmup_epochs: 99.0 is longer than the run of 20 epochs"),
    (["train", "--augment", "shfit"], "unknown augmentation 'shfit'; did you mean 'shift'"),
    (["train", "--set", "updat.lr=1"], "unknown configuration key 'updat'; did you mean 'update'"),
    (["train", "--set", "update.momentun=0.5"], "'update.momentun'; did you mean 'update.momentum'"),
    (["train", "--set", "epochs=3.5"], "epochs: needs a whole number, got 3.5"),
    (["train", "--set", "epochs"], "--set: needs key=value"),
    (["train", "--set", "early_stop.metric=test_acuracy"], "did you mean 'test_accuracy'"),
    (["train", "--config", "none.yaml"], "configuration file none.yaml: no such file"),
    (["train", "--plan", "none.yaml"], "plan none.yaml: no such file"),
    (["train", "--quiet", "--json"], "--quiet and --json exclude each other"),
    (["train", "--resume"], "--resume needs --out FOLDER"),
    (["train", "no.such:net"], "no module 'no'"),
    (["train", "--set", "network_args.depth=3"], "unknown argument 'depth'"),
    (["train", "alexnet", "--set", "data.image_size=20"], "needs images of side 63 at least, got 20"),
    (["inspect", "resnet"], "unknown network 'resnet'"),
    (["inspect", "lenet5", "--batch", "0"], "--batch: needs a number of at least 1, got 0"),
    (["inspect", "lenet5", "--plot", "dag.doc"], ".png"),
    (["plan", "lenet"], "unknown network 'lenet'"),
    (["plan", "lenet5", "--workers", "100"], "batch: 100 workers need a batch of at least 100, got 64"),
    (["bench", "train", "--networks", "lenet"], "lenet5"),
    (["bench", "train", "--workers", "1"], "--workers: DDP needs at least 2, got 1"),
    (["repotr"], "report"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: " ".join(value) if value else "")
def test_wrong_usage_is_one_line_and_2(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in refused(capsys, 2, *arguments)


def test_bad_data_is_one_line_and_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spoiled = {
        "missing": (tmp_path / "missing", "missing"),
        "magic": (write_mnist(tmp_path / "magic", magic=0x802), "0x00000802"),
        "short": (write_mnist(tmp_path / "short", cut=100), IDX["images"]),
        "label": (write_mnist(tmp_path / "label", label=11), "labels must lie in 0..9, found 11"),
    }
    for folder, message in spoiled.values():
        assert message in refused(capsys, 3, "train", "lenet5", "--data", f"mnist:{folder}")
    good = write_mnist(tmp_path / "good")
    assert main(["train", "lenet5", "--data", f"mnist:{good}", "--epochs", "1", "--quiet", "--out", "out"]) == 0


def test_refusals_come_before_pytorch() -> None:
    program = (
        "import sys\nfrom windlass.cli import main\n"
        "codes = [main(a.split()) for a in sys.argv[1:]]\n"
        "assert codes == [0, 2, 2, 3], codes\n"
        "assert not {'torch', 'matplotlib', 'sklearn', 'mpi4py.MPI'} & set(sys.modules)"
    )
    arguments = ("train --help", "train lenet", "train --set epochs=x", "train --data mnist:/nowhere")
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_folder_in_use_is_not_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert "is not empty; add --resume" in refused(capsys, 2, "train", "--out", "out")
    assert "no run to resume here" in refused(capsys, 3, "train", "--out", "out", "--resume")
    assert "is a file" in refused(capsys, 2, "train", "--out", "out/mine.txt")
    assert "cannot write" in refused(capsys, 5, "train", "--out", "out/mine.txt/below")


def test_plans_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "lenet5", "-o", "plan.yaml"]) == 0
    capsys.readouterr()
    original = yaml.safe_load(Path("plan.yaml").read_text())

    def edited(*path: str, value: object) -> list[str]:
        plan = yaml.safe_load(yaml.safe_dump(original))
        place = plan
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        Path("plan.yaml").write_text(yaml.safe_dump(plan))
        return ["train", "--plan", "plan.yaml"]

    for path, value, message in PLAN_EDITS:
        assert message in refused(capsys, 2, *edited(*path, value=value))
    edited("batch", value=64)
    assert "network: the plan is for lenet5, this run trains alexnet" in refused(
        capsys, 2, "train", "alexnet", "--plan", "plan.yaml", "--data", "synthetic:3x64x64:10:64"
    )
    assert "batch: the plan says 64, the configuration 32" in refused(
        capsys, 2, "train", "--plan", "plan.yaml", "--batch", "32"
    )


PLAN_EDITS: list[tuple[tuple[str, ...], object, str]] = [
    (("levers", "convolution"), "winograd", "levers.convolution: 'winograd' is not a value of it; choose from: torch"),
    (
        ("levers", "allreduce"),
        {"value": "rign"},
        "levers.allreduce: 'rign' is not a value of it (unknown",
    ),
    (("levers", "bucket_bytes"), 3, "levers.bucket_bytes: 3 is out of range"),
    (("levers", "overlapp"), True, "unknown lever 'overlapp'; did you mean 'overlap'"),
    (("layers", "c9"), {"convolution": "torch"}, "unknown convolution 'c9'; did you mean 'c"),
    (("graph",), "sha256:0", "graph: the plan is for another form of lenet5"),
    (("workers",), 0, "workers: needs a whole number of at least 1, got 0"),
    (("schema",), "other/1", "schema: needs 'windlass-plan/1', got 'other/1'"),
]


def test_a_flipped_bit_is_noticed_and_the_previous_checkpoint_offered(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = ["train", "lenet5", "--out", "out", "--quiet"]
    assert main([*run, "--epochs", "2"]) == 0
    weights = tmp_path / "out" / "checkpoints" / "step-00000046" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 4
    weights.write_bytes(data)
    capsys.readouterr()
    line = refused(capsys, 3, *run, "--resume", "--epochs", "3")
    assert "step-00000046 is damaged" in line
    assert "crc32" in line
    assert "add --resume-from step-00000023" in line
    assert main([*run, "--resume-from", "step-00000023", "--epochs", "3"]) == 0
    names = {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()}
    assert names >= {"step-00000046", "step-00000069", "abandoned-step-00000046"}
    assert (tmp_path / "out" / "checkpoints" / "last").resolve().name == "step-00000069"


def test_a_resume_may_not_become_another_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "lenet5", "--out", "out", "--quiet", "--epochs", "1"]) == 0
    capsys.readouterr()
    again = ("train", "--out", "out", "--resume")
    assert "network: the run in out has 'lenet5', not 'vgg11'" in refused(capsys, 2, *again, "--network", "vgg11")
    assert "batch: the run in out has 64, not 32" in refused(capsys, 2, *again, "--batch", "32")
    assert "seed: the run in out has 0, not 1" in refused(capsys, 2, *again, "--seed", "1")
    assert "update.name: the run in out has 'momentum', not 'adam'" in refused(capsys, 2, *again, "--update", "adam")
    assert "unknown checkpoint 'step-1'" in refused(capsys, 2, *again, "--resume-from", "step-1", "--epochs", "2")
