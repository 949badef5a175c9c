"""The command ``windlass``: the only part that prints, beside `windlass.display`.

Nothing heavy is imported before a command needs it: ``--help`` and refusals are instant.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import Any

import typer

from windlass.cli import (
    bench,
    bench_allreduce,
    bench_cluster,
    bench_ddp,
    bench_parallel,
    bench_precision,
    bench_rounding,
    collectives,
    collectives_plan,
    inspect,
    launch,
    plan,
    report,
    train,
    tune_cluster,
)
from windlass.errors import EXIT_CODES, WindlassError

# Typer brings its own Click in newer releases and uses the installed one before; these are its classes either way.
UsageError: Any = typer.BadParameter.__bases__[0]
ClickException: Any = UsageError.__bases__[0]

LAST_S = 2.0
"""So long the other ranks wait for rank 0 to say what all have met."""

EPILOG = "Exit status: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + "."

app = typer.Typer(
    name="windlass",
    help="Trains convolutional networks fast: every lever behind one plan.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", epilog=EPILOG)(train.train_command)
app.command("plan")(plan.plan_command)
app.command("inspect")(inspect.inspect_command)
app.add_typer(tune_cluster.tune_app, name="tune")
app.command("report")(report.report_command)
bench.app.command("allreduce")(bench_allreduce.bench_allreduce_command)
bench.app.command("ddp")(bench_ddp.bench_ddp_command)
bench.app.command("parallel")(bench_parallel.bench_parallel_command)
bench.app.command("rounding")(bench_rounding.bench_rounding_command)
bench.app.command("precision")(bench_precision.bench_precision_command)
bench.app.command("cluster")(bench_cluster.bench_cluster_command)
app.command("launch", context_settings=launch.CONTEXT)(launch.launch_command)
app.add_typer(bench.app, name="bench")
collectives.collectives_app.command("plan")(collectives_plan.plan_command)
app.add_typer(collectives.collectives_app, name="collectives")


@app.callback(invoke_without_command=True)
def version_option(
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    """Trains convolutional networks fast: every lever behind one plan."""
    if version:
        from importlib.metadata import version as package_version

        print(f"windlass {package_version('windlass')}")
        raise typer.Exit()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status; every error of a person's making is one line."""
    try:
        code = app(args=arguments, prog_name="windlass", standalone_mode=False)
    except WindlassError as error:
        return _fail(str(error), error.exit_code)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "windlass"
        return _fail(f"{error.format_message()} (see {command} --help)", 2)
    except ClickException as error:
        return _fail(error.format_message(), 2)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        return _fail(f"internal error, please report it:\n{traceback.format_exc()}", 1)
    return int(code or 0)


def _fail(message: str, code: int) -> int:
    """One line on stderr; under mpiexec only rank 0 says what all ranks met, and the others end after it.

    At the first rank that fails mpiexec kills the others.
    """
    from windlass.engine.world import world_from_environment

    rank, _ = world_from_environment() or (0, 1)
    if rank == 0:
        print(f"windlass: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(LAST_S)
    return code


def run() -> None:
    """The console script."""
    sys.exit(main())
