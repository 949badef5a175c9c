"""Draws the convolution benchmark: speed against filter size, or a network's speed-ups layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.bench.conv import FFT_CONV, TORCH_LAST, TORCH_NCHW, ConvRow, geometric_means
from windlass.errors import ConfigError
from windlass.plan.convolution import CONV_ALGORITHMS, DIRECTIONS, Direction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")

TITLES: dict[Direction, str] = {
    "forward": "forward",
    "input": "gradient of the input",
    "weight": "gradient of the weights",
}

# Okabe and Ito's colours, which colour-blind eyes tell apart; markers and dashes say the same once more.
STYLES: dict[str, dict[str, Any]] = {
    TORCH_LAST: {"color": "#000000", "marker": "o", "linewidth": 2.2},
    TORCH_NCHW: {"color": "#000000", "marker": "o", "linestyle": ":", "markerfacecolor": "white"},
    FFT_CONV: {"color": "#999999", "marker": "s", "linestyle": "--"},
    "direct": {"color": "#0072B2", "marker": "^"},
    "im2col": {"color": "#56B4E9", "marker": "v", "linestyle": "--"},
    "winograd-2x2": {"color": "#E69F00", "marker": "D", "linestyle": ":"},
    "winograd-4x4": {"color": "#D55E00", "marker": "D"},
    "winograd-6x6": {"color": "#F0E442", "marker": "D", "linestyle": "--"},
    "fft-16": {"color": "#009E73", "marker": "P", "linestyle": ":"},
    "fft-32": {"color": "#009E73", "marker": "X", "linestyle": "--"},
    "fft-64": {"color": "#CC79A7", "marker": "*"},
}
"""How each is drawn, the same in every picture."""

BARS: dict[Direction, dict[str, str]] = {
    "forward": {"color": "#0072B2"},
    "input": {"color": "#E69F00", "hatch": "//"},
    "weight": {"color": "#009E73", "hatch": ".."},
}


def check_plot_path(path: Path) -> None:
    """Refuses a picture that could not be written at the end.

    Raises:
        ConfigError: an unknown kind of file, or there is no such folder.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path}: needs a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}")


def draw_kernels(rows: Sequence[ConvRow], path: Path, *, title: str, peak_flops: float) -> None:
    """Speed in GFLOP/s of the definition against the filter's side, one panel per direction."""
    directions = _directions(rows)
    figure, panels = _panels(len(directions), width=5.2, height=4.6)
    for panel, direction in zip(panels, directions, strict=True):
        mine = [row for row in rows if row.direction == direction]
        for by in _order({row.by for row in mine}):
            points = sorted((row.kernel, row.gflops) for row in mine if row.by == by)
            panel.plot(
                *zip(*points, strict=True), label=by, **({"markersize": 6, "linewidth": 1.5} | STYLES.get(by, {}))
            )
        panel.axhline(peak_flops / 1e9, color="#999999", linewidth=1)
        panel.annotate("measured peak", (0.02, peak_flops / 1e9), xycoords=("axes fraction", "data"),
                       textcoords="offset points", xytext=(0, 3), fontsize=8, color="#555555")  # fmt: skip
        _kernel_axis(panel, sorted({row.kernel for row in mine}), TITLES[direction])
    panels[0].set_ylabel("GFLOP/s of the definition")
    found = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    names = _order(set(found))
    columns = min(6, len(names))
    figure.legend([found[name] for name in names], names, loc="outside lower center", ncols=columns, fontsize=8,
                  frameon=False)  # fmt: skip
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def draw_network(rows: Sequence[ConvRow], path: Path, *, title: str) -> None:
    """The chooser's speed-up over PyTorch's channels_last convolution, layer by layer, and the geometric means."""
    directions, names = _directions(rows), list(dict.fromkeys(row.case for row in rows))
    figure, (panel,) = _panels(1, width=max(6.0, 1.6 + 0.55 * len(names) * len(directions) / 2), height=4.6)
    means, width = geometric_means(rows), 0.8 / len(directions)
    for number, direction in enumerate(directions):
        chosen = [row for row in rows if row.is_auto and row.direction == direction]
        shift = (number - (len(directions) - 1) / 2) * width
        places = [names.index(row.case) + shift for row in chosen]
        heights = [row.speedup for row in chosen]
        spread = [[row.speedup - row.speedup_low for row in chosen], [row.speedup_high - row.speedup for row in chosen]]
        mean = means.get((direction, "auto"), 1.0)
        panel.bar(places, heights, width, yerr=spread, label=f"{TITLES[direction]}: {mean:.2f}×", edgecolor="white",
                  error_kw={"elinewidth": 1, "ecolor": "#333333"}, **BARS[direction])  # fmt: skip
    panel.axhline(1.0, color="#000000", linewidth=1)
    panel.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    panel.set_ylabel("times as fast as PyTorch, channels_last")
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    figure.legend(
        title="geometric means", loc="outside lower center", ncols=3, fontsize=8, title_fontsize=8, frameon=False
    )
    panel.set_title(title, fontsize=10)
    _save(figure, path)


def _kernel_axis(panel: Axes, kernels: Sequence[int], title: str) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(kernels, [f"{k}×{k}" for k in kernels], fontsize=8, rotation=40)
    panel.minorticks_off()
    panel.set_xlabel("filter")
    panel.set_title(title, fontsize=9)
    panel.grid(color="#dddddd", linewidth=0.6)


def _panels(count: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, count, figsize=(width * count, height), sharey=True, squeeze=False, layout="constrained"
    )
    for panel in panels[0]:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(panels[0])


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    finally:
        pyplot.close(figure)


def _directions(rows: Sequence[ConvRow]) -> list[Direction]:
    found = {row.direction for row in rows}
    return [direction for direction in DIRECTIONS if direction in found]


def _order(names: set[str]) -> list[str]:
    known = [*(TORCH_LAST, TORCH_NCHW, FFT_CONV), *CONV_ALGORITHMS]
    return [name for name in known if name in names]
