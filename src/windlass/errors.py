"""Errors a person can cause or cure, each with the exit status of the command that met it.

Status 0 means done and 1 an internal error (a bug of ours, with a traceback).  Everything here is one clear
line for the person who typed the command.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WindlassError(Exception):
    """Base of all errors that are reported as one line, without a traceback."""

    exit_code = 1


class ConfigError(WindlassError):
    """Usage, configuration or plan: something was asked for that does not exist or does not fit."""

    exit_code = 2


class CheckError(ConfigError):
    """A plan or schedule that would not do what it says; the message names the place."""


class DataError(WindlassError):
    """Missing, truncated or wrong data, or a damaged checkpoint."""

    exit_code = 3


class NonFiniteError(WindlassError):
    """The loss or a gradient became NaN or infinite."""

    exit_code = 4


class WriteError(WindlassError):
    """A run folder, checkpoint or report could not be written."""

    exit_code = 5


class LostRankError(WindlassError):
    """A rank died or stopped making progress."""

    exit_code = 6


class StoppedError(WindlassError):
    """Stopped on request with a checkpoint written (EX_TEMPFAIL: a scheduler may requeue)."""

    exit_code = 75


EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "internal error",
    2: "usage or configuration",
    3: "bad or missing data",
    4: "non-finite loss or gradient",
    5: "cannot write",
    6: "lost rank or stall",
    75: "stopped on request with a checkpoint written",
}


def unknown(what: str, name: str, choices: Iterable[str]) -> str:
    """One line that refuses `name`, suggests the nearest choices and lists what there is.

    >>> unknown("network", "lenet", ["lenet5", "vgg16"])
    "unknown network 'lenet'; did you mean 'lenet5'? There are: lenet5, vgg16"
    """
    names = sorted(choices)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    return f"unknown {what} {name!r}{hint} There are: {', '.join(names)}"
