"""Draws the figure of each section on given axes: points are medians, lines go from minimum to maximum."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullLocator

COLORS = ("#003f73", "#56b4e9", "#e69f00")  # Okabe and Ito's blues and orange, apart for the color-blind too
INK, SOFT = "#1c2430", "#5b6675"
MIB = 2**20
TITLES = ("Real tokens a second", "% of the GEMM peak", "Peak memory, MiB", "Compilation, seconds")


def draw_step(axes: np.ndarray, result: Mapping[str, Any]) -> None:
    """Axes [2, 2]: real tokens a second, share of the GEMM peak, memory, compile time; a row for each variant."""
    names, texts = list(result["labels"]), list(result["texts"])
    rate, share, memory, compilation = axes.ravel()

    def spreads(panel: Axes, value) -> None:
        for number, text in enumerate(texts):
            variants = result["texts"][text]["variants"]
            points = [value(variants[name]) for name in names]
            _points(panel, points, 0.22 * (number - (len(texts) - 1) / 2), COLORS[number % len(COLORS)], text)

    spreads(rate, lambda variant: variant["tokens_per_second"])
    spreads(share, lambda variant: _exact(100 * variant["gemm_share"]))
    spreads(memory, lambda variant: _exact(max(variant["memory"], 1) / MIB))
    spreads(compilation, lambda variant: _exact(variant["compile_seconds"]))
    for panel, title in zip((rate, share, memory, compilation), TITLES):
        panel.set_title(title)
    for panel in (share, compilation):
        panel.set_xlim(left=0)
    for panel in (rate, memory):
        panel.set_xscale("log")
        _plain_ticks(panel.xaxis, (1, 3))
    for row in axes:
        _rows(row[0], [result["labels"][name] for name in names])
        _rows(row[1], [""] * len(names))
    handles, labels = rate.get_legend_handles_labels()
    rate.get_figure().legend(handles, labels, loc="outside upper center", ncols=len(texts), handletextpad=0.2)


def draw_finetune(axes: np.ndarray, result: Mapping[str, Any]) -> None:
    """Axes [1, 2]: utterances a second when finetuning and when predicting; a row for each layout."""
    labels = result["labels"]
    for panel, (job, found) in zip(axes.ravel(), result["jobs"].items()):
        points = [found["variants"][name]["utterances_per_second"] for name in labels]
        _points(panel, points, 0.0, COLORS[0], job)
        panel.set_title(job)
        panel.set_xlabel("utterances a second")
        panel.set_xlim(left=0)
        panel.locator_params(axis="x", nbins=4)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _rows(axes[0, 0], list(labels.values()))
    for panel in axes[0, 1:]:
        _rows(panel, [""] * len(labels))


def draw_scaling(axes: np.ndarray, result: Mapping[str, Any]) -> None:
    """Axes with a panel for each axis: milliseconds a step, and what they would be if they grew like the FLOPs."""
    panels = list(axes.ravel())
    for panel, (axis, found) in zip(panels, result["axes"].items()):
        points = found["points"]
        values = [point["value"] for point in points]
        times = [{name: 1e3 * value for name, value in point["seconds_per_step"].items()} for point in points]
        per_flop = times[0]["median"] / points[0]["flops"]
        panel.plot(values, [per_flop * point["flops"] for point in points], "--", color=SOFT, label="as the FLOPs")
        panel.vlines(values, [one["min"] for one in times], [one["max"] for one in times], color=COLORS[0])
        panel.plot(values, [one["median"] for one in times], "o-", color=COLORS[0], label="measured")
        panel.set_title(f"{axis}: ms a step")
        panel.set_xlabel(found["counts"])
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(values, [f"{value:,}" for value in values])
        panel.xaxis.minorticks_off()
        _plain_ticks(panel.yaxis, (1, 2, 5))
        panel.grid()
    panels[0].legend()
    for panel in panels[len(result["axes"]) :]:
        panel.set_visible(False)


def _exact(value: float) -> dict[str, float]:
    return dict.fromkeys(("median", "min", "max"), value)


def _points(panel: Axes, points: Sequence[Mapping[str, float]], offset: float, color: str, label: str) -> None:
    rows = np.arange(len(points)) + offset
    panel.hlines(rows, [one["min"] for one in points], [one["max"] for one in points], color=color, linewidth=1.5)
    panel.plot([one["median"] for one in points], rows, "o", color=color, markersize=5, label=label)


def _plain_ticks(axis: Axis, digits: Sequence[int]) -> None:
    axis.set_major_locator(LogLocator(subs=digits, numticks=6))
    axis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    axis.set_minor_locator(NullLocator())


def _rows(panel: Axes, names: Sequence[str]) -> None:
    panel.set_yticks(range(len(names)), [name.replace(": ", "\n") for name in names], linespacing=1.3)
    panel.tick_params(axis="y", length=0, labelcolor=INK)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.grid(axis="x")
    panel.spines["left"].set_visible(False)
