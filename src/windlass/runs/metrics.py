"""The rows of a run: JSONL for every step and epoch, CSV of the epochs, TensorBoard events."""

from __future__ import annotations

import csv
import io
import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from windlass.errors import WriteError
from windlass.runs.files import write_atomically
from windlass.runs.tally import scalars

Row = Mapping[str, Any]
FLUSH_S = 1.0
"""Rows reach the disk at least this often while rows come."""
BOARD_S = 0.05
"""Steps go to TensorBoard no oftener than this."""
EPOCH_COLUMNS = (
    "epoch", "step", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
    "images_per_s", "seconds", "data_share",
)  # fmt: skip


class MetricsWriter:
    """Appends rows to ``metrics.jsonl`` and ``metrics.csv`` and to TensorBoard's event file.

    Args:
        folder: the run folder.
        step: rows beyond this step are dropped first: a run that resumes from step 100 repeats what came after.
        epoch: so are rows of this epoch's end and of later ones.
        flush_s: rows reach the disk at least this often while rows come.
    """

    def __init__(self, folder: Path, *, step: int, epoch: int | None = None, flush_s: float = FLUSH_S) -> None:
        self._flush_s = flush_s
        self._path = folder / "metrics.jsonl"
        self._csv = folder / "metrics.csv"
        kept = [row for row in read_rows(self._path) if _stands(row, step=step, epoch=epoch)]
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self.rows_at_start: list[dict[str, Any]] = kept[-8:]
        self._epochs = [row for row in kept if row["kind"] == "epoch"]
        if self._csv.exists():
            write_atomically(self._csv, _csv_text(self._epochs))
        self._file = self._path.open("a")
        self._flushed = self._boarded = time.monotonic()
        self._board = load_board()(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, row: Row) -> None:
        """Adds one row.

        Raises:
            WriteError: the disk is full or the folder is gone.
        """
        try:
            self._file.write(json.dumps(row) + "\n")
            if row["kind"] != "step" or time.monotonic() - self._flushed > self._flush_s:
                self._file.flush()
                self._flushed = time.monotonic()
            self._show(row)
        except OSError as error:
            raise WriteError(f"cannot write {self._path}: {error.strerror or error}") from None
        if row["kind"] == "epoch":
            self._epochs.append(dict(row))
            write_atomically(self._csv, _csv_text(self._epochs))

    def close(self) -> None:
        """Flushes and closes the files.

        Raises:
            WriteError: the last rows do not fit on the disk.
        """
        try:
            try:
                self._file.close()
            finally:
                self._board.close()
        except OSError as error:
            raise WriteError(f"cannot write {self._path}: {error.strerror or error}") from None

    def _show(self, row: Row) -> None:
        """TensorBoard's rows; of quick steps not every one, since an event takes longer than a row of JSON."""
        if row["kind"] == "step" and time.monotonic() - self._boarded < BOARD_S:
            return
        self._boarded = time.monotonic()
        names = {"step": ("loss", "accuracy", "lr"), "epoch": EPOCH_COLUMNS[3:]}.get(row["kind"], ())
        for name in names:
            if row.get(name) is not None:
                self._board.add_scalar(f"{row['kind']}/{name}", row[name], row["step"])
        for name, value in scalars(row).items() if row["kind"] == "precision" else ():
            self._board.add_scalar(f"precision/{name}", value, row["step"])


def load_board() -> Callable[..., Any]:
    """TensorBoard's writer, whose import takes a second or two: early, where that must not be late."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


def _stands(row: Row, *, step: int, epoch: int | None) -> bool:
    """Whether a row was written before a run's position: so many steps done, in this epoch."""
    ended = row["kind"] == "epoch" and epoch is not None and row.get("epoch", 0) >= epoch
    return row.get("step", 0) <= step and not ended and row["kind"] != "end"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows in a ``metrics.jsonl``; a last line that a crash cut short is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def _csv_text(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, EPOCH_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
