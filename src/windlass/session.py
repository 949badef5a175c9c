"""One run on one rank, from the first check to the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from windlass.engine.agree import on_all, on_root
from windlass.engine.allreduce import Allreduce
from windlass.engine.elastic import STANDING_BY, Crew
from windlass.engine.watch import StopRequest
from windlass.engine.world import LocalWorld, RankLost, World
from windlass.errors import StoppedError, WindlassError, WriteError
from windlass.job import Job
from windlass.loop import Emit, Note, Trainer
from windlass.objective import check_metrics
from windlass.optim.rules import UPDATE_RULES
from windlass.placed import PlacedTrainer
from windlass.placing import find_placement
from windlass.plan.recipe import parse_recipe
from windlass.prepare import Prepared, prepare
from windlass.progress import Progress, Summary
from windlass.recovery import ElasticTrainer
from windlass.report.page import write_report
from windlass.resources import check_resources
from windlass.rounded import RoundedTrainer
from windlass.runs.checkpoint import MANIFEST, list_checkpoints, set_aside_later
from windlass.runs.folder import describe_machine, write_folder
from windlass.runs.metrics import FLUSH_S, MetricsWriter, load_board

TRIED_SIZES = (1 << 10, 1 << 16, 1 << 20)
"""Elements of the sums that ranks of an elastic run try beforehand."""


def run_rank(
    job: Job,
    world: World,
    *,
    emit: Emit,
    stop: StopRequest,
    note: Note,
    module: torch.nn.Module | None = None,
    crew: Crew | None = None,
) -> Summary:
    """Prepares, checks, trains, and writes the run folder with its report; every rank calls it.

    Args:
        job: what to run.
        world: all ranks, spare ones too.
        emit: takes events for a person, of whichever rank leads.
        stop: asked from outside to stop.
        note: told what is being done, for the watchdog.
        module: the network itself, instead of its name; one worker only.
        crew: the ranks of an elastic run.

    Raises:
        WindlassError: whatever ended the run, on every rank alike.
    """
    note("preparing", 0)

    def on_event(event: dict[str, Any]) -> None:
        if stop.reason is not None:
            raise StoppedError(f"stopped on request ({stop.reason}) before the first step; nothing was written")
        note("measuring convolutions", int(event.get("done", 0)))
        emit(event)

    prepared = prepare(job, world, module=module, on_event=on_event, note=note)
    on_all(world, lambda: check_metrics(prepared.module, job.config))
    if job.config.parallel != "data" and world.size > 1:
        prepared.placement = on_root(world, lambda: find_placement(prepared))
    checks = on_root(world, lambda: check_resources(prepared))
    if not job.dry_run:
        hosts = world.gather(world.host)
        on_root(world, lambda: _write_folder(prepared, hosts))
    if crew is None:
        return _dry_run(prepared, checks, emit=emit, stop=stop, note=note) if job.dry_run else _lead(
            prepared, emit=emit, stop=stop, note=note)  # fmt: skip
    _try_sums(prepared)
    prepared.seat(crew.world or LocalWorld())
    if crew.world is None:
        return _stand_by(prepared, crew, emit=emit, stop=stop, note=note)
    if not crew.survives:
        emit({"kind": "warning", "message": "this MPI cannot go on without a lost rank: a loss starts the run again "
              "from its last checkpoint"})  # fmt: skip
    try:
        if job.dry_run:
            return _dry_run(prepared, checks, emit=emit, stop=stop, note=note)
        load_board()
        return _lead(prepared, emit=emit, stop=stop, note=note, crew=crew)
    finally:
        crew.dismiss()


def _try_sums(prepared: Prepared) -> None:
    """Everyone sums something once, spares too: kernels are loaded before they are needed in a hurry."""
    plan = prepared.plan
    allreduce = Allreduce(
        prepared.world, str(plan.value("allreduce")), fixed_order=bool(plan.value("fixed_order"))
    )  # fmt: skip
    for size in TRIED_SIZES:
        send, receive = np.zeros(size, dtype=np.float32), np.empty(size, dtype=np.float32)
        allreduce.start(send, receive).wait()
    allreduce.close()


def _lead(prepared: Prepared, *, emit: Emit, stop: StopRequest, note: Note, crew: Crew | None = None) -> Summary:
    """What a rank with a seat does."""
    world = prepared.world
    writer = on_all(world, lambda: _writer(prepared, emit) if world.rank == 0 else None)
    emit(_begin_event(prepared, prepared.checkpoint.step if prepared.checkpoint else 0))
    trainer = _trainer(prepared, emit=emit, stop=stop, note=note, writer=writer, crew=crew)
    return _train(trainer, emit=emit, note=note)


def _trainer(
    prepared: Prepared,
    *,
    emit: Emit,
    stop: StopRequest,
    note: Note,
    writer: MetricsWriter | None,
    crew: Crew | None = None,
) -> Trainer:
    """The trainer that this run asks for."""
    if prepared.placement is not None:
        return PlacedTrainer(prepared, emit=emit, stop=stop, note=note, writer=writer)
    if not parse_recipe(str(prepared.plan.value("number_format"))).is_plain:
        return RoundedTrainer(prepared, emit=emit, stop=stop, note=note, writer=writer)
    if crew is None:
        return Trainer(prepared, emit=emit, stop=stop, note=note, writer=writer)
    return ElasticTrainer(prepared, emit=emit, stop=stop, note=note, writer=writer, crew=crew, reopen=_reopen(prepared))


def _stand_by(prepared: Prepared, crew: Crew, *, emit: Emit, stop: StopRequest, note: Note) -> Summary:
    """What a spare does: makes everything ready, waits, and trains if it is called."""
    load_board()
    trainer = ElasticTrainer(
        prepared, emit=emit, stop=stop, note=note, writer=None, crew=crew, reopen=_reopen(prepared)
    )
    trainer.rehearse()
    note(STANDING_BY, 0)
    if not crew.stand_by(lambda: note(STANDING_BY, 0)):
        return Summary("spare", 0, 0.0, {})
    try:
        if not trainer.rejoin():
            trainer.recover(RankLost("a rank died while a spare took its seat"))
        return _train(trainer, emit=emit, note=note)
    finally:
        crew.dismiss()


def _reopen(prepared: Prepared) -> Callable[[Progress], MetricsWriter]:
    """How a rank goes on with the metrics of one that died; every row is on its way to the disk at once."""
    folder = Path(prepared.job.folder)
    return lambda progress: MetricsWriter(folder, step=progress.step, epoch=progress.epoch, flush_s=0.0)


def _writer(prepared: Prepared, emit: Emit) -> MetricsWriter:
    """Opens the metrics; of a run that resumes, what came after the checkpoint is dropped or set aside."""
    folder, checkpoint = Path(prepared.job.folder), prepared.checkpoint
    flush_s = 0.0 if prepared.job.config.elastic.enabled else FLUSH_S
    if checkpoint is None:
        return MetricsWriter(folder, step=0, flush_s=flush_s)
    for path in set_aside_later(checkpoint.path.parent, checkpoint.step):
        emit({"kind": "warning", "message": f"{path.name} is later than this start: now abandoned-{path.name}"})
    epoch = int(checkpoint.manifest["progress"]["epoch"])
    writer = MetricsWriter(folder, step=checkpoint.step, epoch=epoch, flush_s=flush_s)
    writer.write({"kind": "resume", "step": checkpoint.step, "workers": prepared.world.size})
    return writer


def _train(trainer: Trainer, *, emit: Emit, note: Note) -> Summary:
    """The run itself, and what is written and said at its end, by whichever rank then leads."""
    end: dict[str, Any] = {"kind": "end", "status": "failed", "message": "internal error"}
    try:
        summary = trainer.run()
        end |= {"status": summary.status, "message": "", "seconds": summary.seconds}
    except WindlassError as error:
        end |= {"status": "stopped" if isinstance(error, StoppedError) else "failed", "message": str(error)}
        raise
    finally:
        _close(trainer, end, emit=emit, note=note)
    prepared = trainer.prepared
    while True:
        event = {"kind": "end", **summary.__dict__, "folder": prepared.job.folder, "best": best_checkpoint(prepared)}
        try:
            note("the end", 0)
            trainer.world.barrier()
            emit(event)
            return summary
        except RankLost as loss:  # perhaps the one that was to write the report
            trainer.recover(loss)
            trainer.tell_losses()
            _close(trainer, end, emit=emit, note=note)


def _close(trainer: Trainer, end: dict[str, Any], *, emit: Emit, note: Note) -> None:
    """Writes the last row and the report, on the rank that writes."""
    writer, prepared = trainer.writer, trainer.prepared
    if writer is None:
        return
    last = {"step": trainer.progress.step, "allreduce": trainer.allreduce.describe()}
    _try(lambda: writer.write(end | last | {"best": best_checkpoint(prepared)}))
    note("the report", 0)
    _warn(emit, "the last rows could not be written", writer.close)
    folder = Path(prepared.job.folder)
    _warn(emit, "the report could not be written", lambda: write_report([folder], folder / "report.html"))
    trainer.writer = None


def _try(action: Callable[[], None]) -> None:
    """Does what must not hide the error that is on its way."""
    try:
        action()
    except WriteError:
        return


def _warn(emit: Emit, what: str, action: Callable[[], object]) -> None:
    """Does what a run is not lost without, and what only rank 0 does while the others wait."""
    try:
        action()
    except Exception as error:
        emit({"kind": "warning", "message": f"{what}: {error}"})


def _begin_event(prepared: Prepared, step: int) -> dict[str, Any]:
    config, graph = prepared.job.config, prepared.graph
    return {
        "kind": "begin",
        "network": config.network,
        "data": config.data.source,
        "workers": prepared.world.size,
        "threads": prepared.threads,
        "epochs": config.epochs,
        "batch": config.batch,
        "steps_per_epoch": prepared.train.num_steps,
        "step": step,
        "num_parameters": graph.num_parameters,
        "num_train": len(prepared.dataset.train),
        "num_test": len(prepared.dataset.test),
        "folder": prepared.job.folder,
    }


def _write_folder(prepared: Prepared, hosts: list[str]) -> None:
    job, config = prepared.job, prepared.job.config
    update = UPDATE_RULES[config.update.name].torch_class
    machine = describe_machine(
        hosts=hosts,
        threads=prepared.threads,
        versions={
            "torch": torch.__version__,
            "mpi": _mpi_version() if prepared.world.size > 1 else "not used: one worker",
            "windlass": _package_version("windlass"),
            "optimizer": f"torch.optim.{update}, fused",
        },
    )
    write_folder(
        Path(job.folder),
        config=config.to_mapping(),
        plan=prepared.plan,
        graph=prepared.graph,
        machine=machine,
    )


def _mpi_version() -> str:
    from mpi4py import MPI

    return MPI.Get_library_version().split(",")[0].strip("\0 ")


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def best_checkpoint(prepared: Prepared) -> dict[str, Any] | None:
    """The best checkpoint so far: metric, value, step, path."""
    link = Path(prepared.job.folder) / "checkpoints" / "best"
    metric = prepared.job.config.checkpoint.monitor
    try:
        manifest = json.loads((link / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return {
        "metric": metric,
        "value": manifest["metrics"][metric],
        "step": manifest["step"],
        "checkpoint": str(link.resolve().relative_to(Path(prepared.job.folder).resolve())),
    }


def _dry_run(prepared: Prepared, checks: dict[str, str], *, emit: Emit, stop: StopRequest, note: Note) -> Summary:
    """One step and one evaluation step's worth of checks; nothing is written."""
    config, data, graph = prepared.job.config, prepared.dataset, prepared.graph
    parts = int(prepared.plan.value("accumulate"))
    found = {
        "configuration": f"{config.network}, {config.epochs} epochs of {prepared.train.num_steps} steps, "
        f"batch {config.batch}, {config.update.name}",
        "data": f"{data.name}: {len(data.train)} to train, {len(data.test)} to test, {data.num_classes} classes, "
        f"images {'×'.join(map(str, graph.input_shape[1:]))}",
        "network": f"{graph.num_parameters:,} parameters, {parts * graph.forward_macs:,} forward MACs a worker and "
        f"step",
        "plan": ", ".join(f"{name} {choice.value}" for name, choice in prepared.plan.levers.items()),
        **checks,
    }
    for name, detail in found.items():
        emit({"kind": "check", "name": name, "detail": detail})
    trainer = _trainer(prepared, emit=emit, stop=stop, note=note, writer=None)
    trainer.module.train()
    trainer.step(trainer.serve(prepared.train, 0, 0))  # the first one pays for what is made once
    trainer.progress.step = 0
    trainer._timer.begin()
    agreed = trainer.step(trainer.serve(prepared.train, 0, 0))
    seconds = trainer._timer.end()["seconds"]
    total_s = seconds * prepared.train.num_steps * config.epochs
    emit(
        {
            "kind": "check",
            "name": "one step",
            "detail": f"loss {agreed.loss:.4f} in {1e3 * seconds:.1f} ms on {prepared.world.size} worker(s): "
            f"the run will take about {total_s:.0f} s",
        }
    )
    if list_checkpoints(Path(prepared.job.folder) / "checkpoints"):
        emit({"kind": "check", "name": "folder", "detail": f"{prepared.job.folder} holds a run to resume"})
    summary = Summary("dry-run", 1, seconds, {"loss": agreed.loss})
    emit({"kind": "end", **summary.__dict__, "folder": "", "best": None})
    return summary
