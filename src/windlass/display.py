"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, JSON for scripts."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from windlass.report import units

Event = dict[str, Any]
PLAIN_S = 10.0
"""Seconds between two lines of progress where there is no terminal."""


class Display(Protocol):
    """Shows events; a context manager, since a bar must be taken down."""

    def handle(self, event: Event) -> None:
        """Shows one event."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_display(mode: str) -> Display:
    """A display by mode: ``auto`` (bar or plain lines), ``plain``, ``quiet`` or ``json``."""
    if mode == "auto":
        return BarDisplay() if sys.stdout.isatty() else PlainDisplay()
    return {"plain": PlainDisplay, "quiet": QuietDisplay, "json": JsonDisplay}[mode]()


def _time(seconds: float) -> str:
    return units.plain(units.duration(seconds))


def begin_lines(event: Event) -> list[str]:
    """Two lines that say what begins."""
    workers, threads = event["workers"], event["threads"]
    lines = [
        f"{event['network']} ({event['num_parameters']:,} parameters) on {event['data']} "
        f"({event['num_train']:,} images to train, {event['num_test']:,} to test)",
        f"{workers} worker{'s' * (workers > 1)} of {threads} thread{'s' * (threads > 1)}, {event['epochs']} epochs of "
        f"{event['steps_per_epoch']} steps, batch {event['batch']}, folder {event['folder']}",
    ]
    return [*lines, f"resumed after step {event['step']}"] if event["step"] else lines


def _share(event: Event, key: str, *, width: int = 0) -> str:
    """``accuracy 97.50%  ``; nothing where none is counted, as in a network that learns without labels."""
    value = event.get(key)
    return "" if value is None else f"{key.removeprefix('train_').replace('_', ' ')} {value:{width}.2%}  "


def epoch_line(event: Event) -> str:
    """One line for an epoch."""
    return (
        f"epoch {event['epoch'] + 1:3d}  loss {event['train_loss']:.4f}  {_share(event, 'train_accuracy', width=7)}"
        f"test loss {event['test_loss']:.4f}  {_share(event, 'test_accuracy', width=7)}"
        f"{event['images_per_s']:,.0f} images/s  data {event['data_share']:.1%}  "
        f"left {_time(event['eta_s'])}"
    )


def end_lines(event: Event) -> list[str]:
    """The last lines: what came out and where it is."""
    if event["status"] == "dry-run":
        return ["dry run: everything checked, nothing written"]
    metrics, best = event["metrics"], event["best"]
    why = " (no longer improving)" if event["status"] == "early" else ""
    lines = []
    if metrics:
        share = metrics.get("test_accuracy")
        lines.append(
            f"done{why} after {event['step']} steps in {_time(event['seconds'])}: "
            + ("" if share is None else f"test accuracy {share:.2%}, ")
            + f"test loss {metrics['test_loss']:.4f}"
        )
    else:
        lines.append(f"done: nothing was left to do after step {event['step']}")
    if best:
        lines.append(
            f"best {best['metric']} {best['value']:.4f} at step {best['step']}: {event['folder']}/{best['checkpoint']}"
        )
    return [*lines, f"report: {event['folder']}/report.html"]


class QuietDisplay:
    """Shows nothing but what goes wrong."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def handle(self, event: Event) -> None:
        """Warnings alone, on stderr."""
        if event["kind"] in ("warning", "stall", "crash", "lost"):
            print(event["message"], file=sys.stderr, flush=True)


class JsonDisplay(QuietDisplay):
    """Every event as a line of JSON on stdout."""

    def handle(self, event: Event) -> None:
        """One line."""
        print(json.dumps(event), flush=True)


class PlainDisplay(QuietDisplay):
    """Lines for a log: the beginning, every epoch, progress now and then, the end."""

    def __init__(self) -> None:
        self._shown = time.monotonic()

    def handle(self, event: Event) -> None:
        """Prints what the event is worth in a log."""
        super().handle(event)
        match event["kind"]:
            case "begin":
                self._print(*begin_lines(event))
            case "check":
                self._print(f"{event['name']:>14}: {event['detail']}")
            case "tuning" if time.monotonic() - self._shown > PLAIN_S:
                self._print(f"measuring {event['layer']}, {event['direction']} ({event['done']} of {event['total']})")
            case "step" if time.monotonic() - self._shown > PLAIN_S:
                self._print(
                    f"epoch {event['epoch'] + 1:3d}  step {event['step']}  loss {event['loss']:.4f}  "
                    f"{_share(event, 'accuracy')}{event['images_per_s']:,.0f} images/s  "
                    f"left {_time(event['eta_s'])}"
                )
            case "epoch":
                self._print(epoch_line(event))
            case "end":
                self._print(*end_lines(event))

    def _print(self, *lines: str) -> None:
        self._shown = time.monotonic()
        print(*lines, sep="\n", flush=True)


class _Left(ProgressColumn):
    """Time left of the whole run."""

    def render(self, task: Task) -> Text:
        """What the loop predicts."""
        left = task.fields.get("eta_s")
        return Text(f"left {_time(left)}" if left is not None else "left ?", style="cyan")


class BarDisplay(QuietDisplay):
    """A bar over the whole run, with a line for every epoch above it."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[figures]}"),
            _Left(),
            console=self._console,
            refresh_per_second=10,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, figures="", eta_s=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def handle(self, event: Event) -> None:
        """Moves the bar or prints above it."""
        match event["kind"]:
            case "tuning":
                description = f"measuring {event['layer']}, {event['direction']}"
                self._bar.update(self._task, total=event["total"], completed=event["done"], description=description)
            case "begin":
                self._print(*begin_lines(event))
                self._epochs = event["epochs"]
                total = event["epochs"] * event["steps_per_epoch"]
                self._bar.update(
                    self._task, total=total, completed=event["step"], description=f"epoch 1/{self._epochs}"
                )
            case "step":
                figures = f"loss {event['loss']:.4f}  {_share(event, 'accuracy')}{event['images_per_s']:,.0f} images/s"
                self._bar.update(
                    self._task,
                    completed=event["step"],
                    description=f"epoch {event['epoch'] + 1}/{self._epochs}",
                    figures=figures,
                    eta_s=event["eta_s"],
                )
            case "epoch":
                self._print(epoch_line(event))
            case "check":
                self._print(f"{event['name']:>14}: {event['detail']}")
            case "end":
                self._bar.update(self._task, visible=False)
                self._print(*end_lines(event))
            case "warning" | "stall" | "crash" | "lost":
                self._print(event["message"])

    def _print(self, *lines: str) -> None:
        for line in lines:
            self._console.print(line, markup=False, soft_wrap=True)
