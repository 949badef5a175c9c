"""`windlass.train`: what the command ``windlass train`` does, from Python.

Nothing here imports PyTorch before the configuration and the data's files have been checked.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from windlass.config import LEVERS_SET, config_from_layers, read_yaml, saved_config
from windlass.data import check_dataset
from windlass.display import make_display
from windlass.engine.channel import Channel
from windlass.engine.elastic import Crew
from windlass.engine.launch import Launcher, Outcome, threads_per_rank
from windlass.engine.watch import StopRequest, Watchdog
from windlass.engine.world import join_world, world_from_environment
from windlass.errors import (
    ConfigError,
    DataError,
    LostRankError,
    NonFiniteError,
    StoppedError,
    WindlassError,
    WriteError,
)
from windlass.job import Job
from windlass.plan.plan import Plan, plan_from_mapping
from windlass.runs.files import to_yaml
from windlass.runs.folder import check_writable, choose_folder

if TYPE_CHECKING:
    import torch

    from windlass.progress import Summary


Event = dict[str, Any]
OnEvent = Callable[[Event], None]
FIXED_ON_RESUME = (
    "network", "network_args", "data.source", "data.augment", "data.image_size", "data.holdout",
    "batch", "head_batch", "seed", "update.name",
)  # fmt: skip
"""What a run that goes on may not change: with another value it would be another run."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        values: the last epoch's metrics, e.g. ``values["test_accuracy"]``.
        trace: every epoch's row of metrics, in order.
        seconds: time of training.
        status: ``done``, ``early`` (stopped early) or ``dry-run``.
        folder: the run folder.
        best: the best checkpoint: metric, value, step, path in the folder.
    """

    values: Mapping[str, float]
    trace: tuple[Event, ...]
    seconds: float
    status: str
    folder: Path
    best: Mapping[str, Any] | None = None


def train(
    network: str | torch.nn.Module | None = None,
    data: str | Mapping[str, Any] | None = None,
    *,
    plan: str | Path | Plan | None = None,
    progress: bool = True,
    on_event: OnEvent | None = None,
    resume: bool = False,
    resume_from: str = "",
    dry_run: bool = False,
    **options: Any,
) -> Result:
    """Trains a network and returns how it ended.

    Args:
        network: a built-in name, ``package.module:function``, or a module (one worker only); None: the plan's or
            the resumed run's, else LeNet-5.
        data: a data source, e.g. ``"digits"`` or ``"mnist:PATH"``, or keys of `DataConfig`; None: the resumed
            run's, else digits.
        plan: a plan or a plan file; None lets Windlass choose.
        progress: whether to show progress on a terminal.
        on_event: called with every event (rank 0's), as mappings with a ``kind``.
        resume: go on from the newest checkpoint in the folder `out`.
        resume_from: go on from this one.
        dry_run: check everything, take one step, write nothing.
        **options: keys of `TrainConfig`, e.g. ``workers=2, epochs=5, update={"name": "adam"}``.

    Raises:
        WindlassError: one of `windlass.errors`, with the exit status of the command in ``exit_code``.
    """
    module = None if network is None or isinstance(network, str) else network
    name = network if module is None else f"{type(module).__module__}:{type(module).__name__}"
    data_options = {"source": data} if isinstance(data, str) else data
    with tempfile.TemporaryDirectory(prefix="windlass-") as scratch:
        if isinstance(plan, Plan):
            path = Path(scratch) / "plan.yaml"
            path.write_text(to_yaml(plan.to_mapping()))
            plan = path
        said = {"network": name, "data": data_options, "plan": str(plan) if plan else None}
        layer = {key: value for key, value in said.items() if value is not None} | options
        job = make_job([layer], resume=resume, resume_from=resume_from, dry_run=dry_run)
        if module is not None and job.config.workers > 1:
            raise ConfigError(
                "several workers build the network themselves: give package.module:function, not a module"
            )
        display = make_display("auto" if progress else "quiet")

        def show(event: Event) -> None:
            display.handle(event)
            if on_event is not None:
                on_event(event)

        with display:
            return execute(job, on_event=show, module=module, watch=False)


def make_job(
    layers: list[Mapping[str, Any]], *, resume: bool = False, resume_from: str = "", dry_run: bool = False
) -> Job:
    """Checks a run as far as that goes without PyTorch: configuration, plan file, data files, folder.

    Args:
        layers: configuration mappings, the later overriding the earlier.
        resume: see `train`.
        resume_from: see `train`.
        dry_run: see `train`.
    """
    resume = resume or bool(resume_from)
    given: dict[str, Any] = {}
    for layer in layers:
        given |= layer
    if resume:
        layers = _layers_to_resume(layers, str(given.get("out", "")))
    if given.get("plan"):
        layers = [_plan_layer(Path(str(given["plan"]))), *layers]
    started = world_from_environment()
    if started is not None:
        workers = started[1] - _spares(layers)
        if int(given.get("workers", workers)) != workers:
            raise ConfigError(f"workers: mpiexec or srun started {started[1]} ranks, --workers says {given['workers']}")
        layers = [*layers, {"workers": workers}]
    config = config_from_layers(layers)
    check_dataset(config.data.source, holdout=config.data.holdout)
    folder = choose_folder(config.out, network=config.network, source=config.data.source, resume=resume or dry_run)
    check_writable(folder)
    return Job(config, str(folder), resume, resume_from, dry_run)


def _spares(layers: list[Mapping[str, Any]]) -> int:
    """Spare ranks among those that were started."""
    elastic = [layer["elastic"] for layer in layers if isinstance(layer.get("elastic"), Mapping)]
    spares = [rules["spares"] for rules in elastic if "spares" in rules]
    return int(spares[-1]) if spares else 0


def _layers_to_resume(layers: list[Mapping[str, Any]], out: str) -> list[Mapping[str, Any]]:
    """The saved configuration below what is given now; what may not change must be the same."""
    if not out:
        raise ConfigError("--resume needs --out FOLDER, the folder of the run to go on with")
    saved = saved_config(Path(out))
    before = config_from_layers([saved]).to_mapping()
    after = config_from_layers([saved, *layers]).to_mapping()
    for name in FIXED_ON_RESUME:
        first, _, second = name.partition(".")
        old, new = (values[first][second] if second else values[first] for values in (before, after))
        if old != new:
            raise ConfigError(f"{name}: the run in {out} has {old!r}, not {new!r}: a run that resumes keeps it")
    # The plan it ran with still fits, unless what it was chosen for changes: then Windlass chooses anew.
    same = all(before[name] == after[name] for name in ("workers", *LEVERS_SET))
    plan = str(Path(out) / "plan.yaml") if same else ""
    return [saved, {"out": out, "plan": plan}, *layers]


def _plan_layer(path: Path) -> dict[str, Any]:
    """What a plan file says of the configuration; options given beside it must agree (`prepare.plan_for`)."""
    plan = plan_from_mapping(read_yaml(path, "plan"), where=f"plan {path}")
    levers = {name: plan.value(name) for name in LEVERS_SET}
    return {"network": plan.network, "workers": plan.workers, "batch": plan.batch, **levers}


@dataclass
class _Collector:
    """Keeps of the events what makes a `Result`."""

    on_event: OnEvent
    epochs: list[Event] = field(default_factory=list)
    end: Event = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        if event["kind"] == "epoch":
            self.epochs.append(event)
        if event["kind"] == "end":
            self.end = event
        self.on_event(event)

    def result(self, folder: Path) -> Result:
        end = self.end
        return Result(end["metrics"], tuple(self.epochs), end["seconds"], end["status"], folder, end["best"])


def execute(job: Job, *, on_event: OnEvent, module: torch.nn.Module | None = None, watch: bool = True) -> Result:
    """Runs a job: as one of the ranks that mpiexec or srun started, alone, or by starting ranks itself.

    Args:
        job: what to run.
        on_event: called with rank 0's events.
        module: the network itself; one worker only.
        watch: whether a stall ends this process (it always ends ranks started for the run).

    Raises:
        WindlassError: how the run ended, if not well.
    """
    collector = _Collector(on_event)
    if world_from_environment() is not None or job.config.num_ranks == 1:
        summary = _run_here(job, collector, module, watch)
        collector.end = collector.end or {**summary.__dict__, "best": None}  # only rank 0 sees events
    else:
        _launch(job, collector)
    return collector.result(Path(job.folder))


def _run_here(job: Job, on_event: OnEvent, module: torch.nn.Module | None, watch: bool) -> Summary:
    """This process is the rank."""
    config = job.config
    crew = Crew(config.workers) if config.elastic.enabled and config.num_ranks > 1 else None
    world = crew.everyone if crew else join_world(config.workers)
    stop = StopRequest()
    channel = Channel(None, on_stop=stop.ask)

    def on_stall(phase: str, idle_s: float) -> None:
        line = {
            "kind": "stall",
            "message": f"rank {world.rank} on {world.host} has not moved for {idle_s:.0f} s in {phase}",
        }
        on_event(line)

    stall_s = job.config.stall_s if watch else float("inf")
    watchdog = Watchdog(channel, stall_s=stall_s, on_stall=on_stall)

    def emit(event: Event) -> None:
        if crew.leads if crew else world.rank == 0:
            on_event(event)

    from windlass.session import run_rank

    try:
        with _signals(stop.install):
            return run_rank(job, world, emit=emit, stop=stop, note=watchdog.note, module=module, crew=crew)
    except WindlassError:
        raise
    except Exception:
        if world.size > 1:  # the others would wait for this rank for ever
            on_event(
                {
                    "kind": "crash",
                    "message": f"internal error on rank {world.rank}:\n{traceback.format_exc()}",
                }
            )
            world.abort(1)
        raise
    finally:
        watchdog.close()


def _launch(job: Job, on_event: OnEvent) -> None:
    """Starts the ranks and raises what ended them, if not well; an elastic run may be started again."""
    rules = job.config.elastic
    outcome = _run_ranks(job, on_event)
    for restart in range(rules.max_restarts if rules.enabled else 0):
        if outcome.code != LostRankError.exit_code or job.dry_run:
            break
        job, where = _restarted(job)
        message = f"{outcome.message}\nstarting again {where} (restart {restart + 1} of at most {rules.max_restarts})"
        on_event({"kind": "warning", "message": message})
        outcome = _run_ranks(job, on_event)
    raise_outcome(outcome)


def _restarted(job: Job) -> tuple[Job, str]:
    """The job from its newest checkpoint that is whole, else from its beginning; and that in words."""
    from windlass.runs.checkpoint import newest_whole

    newest = newest_whole(Path(job.folder) / "checkpoints")
    if newest is None:
        return dataclasses.replace(job, resume=False, resume_from=""), "from the beginning"
    return dataclasses.replace(job, resume=True, resume_from=newest.name), f"from {newest.name}"


def _run_ranks(job: Job, on_event: OnEvent) -> Outcome:
    """Starts the ranks and says how they ended."""
    config = job.config
    launcher = Launcher(
        "windlass.worker",
        ["--job", json.dumps(job.to_mapping())],
        num_ranks=config.num_ranks,
        threads=config.threads or threads_per_rank(config.workers),
        stall_s=config.stall_s,
        on_event=on_event,
        elastic=config.elastic.enabled,
    )

    def install() -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            launcher.stop(signal.Signals(number).name)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, handle)

    with _signals(install):
        return launcher.run()


def raise_outcome(outcome: Outcome) -> None:
    """Raises the error that an exit status stands for; returns on 0."""
    if outcome.code == 0:
        return
    kinds = (ConfigError, DataError, NonFiniteError, WriteError, LostRankError, StoppedError)
    for kind in kinds:
        if kind.exit_code == outcome.code:
            raise kind(outcome.message)
    error = WindlassError(outcome.message)
    error.exit_code = outcome.code
    raise error


@contextmanager
def _signals(install: Callable[[], None]) -> Iterator[None]:
    """Signal handlers for the time of a run; a thread other than the main one cannot have any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
