"""A drawing of our own on one sheet, in inches from the top left, written as .png, .svg or .pdf."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "windlass",
    "pdf.fonttype": 42,
    "font.sans-serif": ["DejaVu Sans"],
    "hatch.linewidth": 0.6,
}


def check_sheet(path: Path) -> None:
    """Refuses a picture that could not be written.

    Raises:
        ConfigError: an unknown kind of file, or no such folder.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {path}: needs a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}")


def save_sheet(path: Path, width: float, height: float, draw: Callable[[Axes], None]) -> None:
    """Writes what `draw` draws; the same picture gives the same file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = STYLE
    with matplotlib.rc_context(style):
        figure = pyplot.figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        try:
            draw(axes)
            if path.suffix.lower() == ".svg":
                path.write_text(_svg(figure), encoding="utf-8")
            else:
                figure.savefig(path, format=path.suffix.lower()[1:], dpi=150)
        finally:
            pyplot.close(figure)


def _svg(figure: Any) -> str:
    """The picture as text, with hundredths of a point."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return re.sub(r"(\d\.\d\d)\d+", r"\1", text.getvalue())
