"""``windlass report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report_command(
    folders: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page; default DIR/report.html, for several comparison.html."),
    ] = None,
) -> None:
    """Rebuild a run's report, or compare several runs in one page."""
    from windlass.report.page import write_report

    path = out or (folders[0] / "report.html" if len(folders) == 1 else Path("comparison.html"))
    print(write_report(folders, path))
