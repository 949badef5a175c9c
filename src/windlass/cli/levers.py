"""Options of several commands that set levers of the plan."""

from __future__ import annotations

from windlass.errors import ConfigError

BATCH_HELP = "Global batch: samples of a step over all workers; 256,128: the head is updated after every 128."
PARALLEL_HELP = "What the workers divide: data, model, hybrid, hybrid:a, hybrid:b, hybrid:c, tiles, or a file."
PRECISION_HELP = "How numbers are kept: fixed16, float16, bfloat16, or a recipe such as fixed16,errors=<4,12>."
MESH_HELP = "The workers in rows, as in node:2,device:2."
ACCUMULATE_HELP = "Micro-batches of a step, whose gradients add up."
RECOMPUTE_HELP = "blocks: compute activations again in the backward pass instead of keeping them; or none."


def given_levers(
    *, precision: str | None, parallel: str | None, mesh: str | None, accumulate: int | None, recompute: str | None
) -> dict[str, str | int]:
    """What was given of them, as keys of the configuration."""
    given = {
        "number_format": precision, "parallel": parallel, "mesh": mesh, "accumulate": accumulate,
        "recompute": recompute,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}


def batches(text: str | None) -> dict[str, int]:
    """The batch, and where two are written that of the model-parallel head.

    >>> batches("256,128")
    {'batch': 256, 'head_batch': 128}
    """
    if text is None:
        return {}
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 2:
        raise ConfigError(f"--batch: needs a whole number, or two as in 256,128, got {text!r}")
    return dict(zip(("batch", "head_batch"), numbers, strict=False))
