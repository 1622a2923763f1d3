"""Draws the figure of the README from a page of results: what each student read, its loss, and its errors.

    .venv/bin/python -m docs.figures.transfer_sets [docs/results/massive.md [docs/figures/transfer-sets]]

The numbers come from the page's tables, so figure and page agree. A cell is "mean" or "mean ± standard deviation".
"""

import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from kd_jax.study.report.plotting import (
    ADAPTED,
    GENERIC_ONLY,
    MLM,
    SCRATCH,
    SOFT,
    STYLE,
    TASK_ONLY,
    panel_grid,
    rows_axis,
    write_figure,
)

HELDOUT, TEST = "Held-out masked-LM loss", "Test set"
SHARES = {"generic only": 0.0, "half task text": 0.5, "task text only": 1.0, "task text": 1.0}
KINDS = {  # how a student was trained -> its legend label, color and marker
    "scratch": ("from scratch: no text before finetuning", SCRATCH, "X"),
    "mlm": ("masked LM alone, no teacher", MLM, "s"),
    "distilled": ("distilled from the generic teacher", TASK_ONLY, "o"),
    "adapted": ("distilled from a teacher adapted to task text", ADAPTED, "D"),
}


class Row(NamedTuple):
    """A student: how it was trained, and the share of task text that it read; None if it read nothing."""

    kind: str
    share: float | None


class Value(NamedTuple):
    """A mean over seeds and their standard deviation, 0 if the table gives none."""

    mean: float
    deviation: float


def tables(page: str, heading: str) -> tuple[list[str], dict[str, list[str]]]:
    """(column names, label -> cells) of the first table below a heading that starts with this text."""
    section = re.search(rf"^## {re.escape(heading)}.*?(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    if section is None:
        raise SystemExit(f"the page has no section '## {heading}'")
    lines = [line for line in section.group().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header, _, *body = cells
    return header[1:], {row[0]: row[1:] for row in body}


def student(label: str) -> Row | None:
    """The student that a table's label describes; None for teachers and unigrams."""
    if label == "from scratch":
        return Row("scratch", None)
    kind, _, text = label.partition(", ")
    if kind not in ("distilled", "MLM only"):
        return None
    text, _, teacher = re.sub(r" \(.*\)$", "", text).partition(", ")
    number = re.search(r"([\d.]+) %", text)
    share = float(number.group(1)) / 100 if number else SHARES[text]
    return Row("mlm" if kind == "MLM only" else "adapted" if teacher == "adapted teacher" else "distilled", share)


def value(cell: str) -> Value | None:
    """The mean and deviation in a cell; None for an empty one."""
    numbers = re.match(r"([\d.]+)(?: ± ([\d.]+))?", cell)
    return Value(float(numbers.group(1)), float(numbers.group(2) or 0)) if numbers else None


def column(page: str, heading: str, name: str) -> dict[Row, Value]:
    """Student -> its value in one column."""
    names, rows = tables(page, heading)
    found = {student(label): value(cells[names.index(name)]) for label, cells in rows.items()}
    return {row: one for row, one in found.items() if row is not None and one is not None}


@rc_context(STYLE)
def draw(page: str) -> Figure:
    """One row per student: the share of task text it read, its held-out loss, and its error on both tasks."""
    rows = [row for label in tables(page, TEST)[1] if (row := student(label))]
    figure, axes = panel_grid(1, 4, 1.5 + 0.42 * len(rows), sharey=True, width_ratios=(1.1, 1, 1, 1))
    shares, *panels = axes[0]
    _shares(shares, rows)
    wanted = (
        (HELDOUT, "task text", "Held-out loss\non task text", "nats per masked token"),
        (TEST, "DC error", "Domain\nclassification", "error, %"),
        (TEST, "SemER", "Intents and\nslots", "semantic error, %"),
    )
    for panel, (heading, name, title, unit) in zip(panels, wanted, strict=True):
        _values(panel, rows, column(page, heading, name))
        panel.set_title(title)
        panel.set_xlabel(f"{unit}\n← better")
    rows_axis(shares, [_name(row) for row in rows])
    shares.grid(False)
    for panel in panels:
        rows_axis(panel, [_name(row) for row in rows])
        panel.tick_params(axis="y", labelleft=False)
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    handles: list = [Patch(color=GENERIC_ONLY, label="generic text"), Patch(color=TASK_ONLY, label="task text")]
    for kind in kinds:
        label, color, shape = KINDS[kind]
        handles.append(Line2D([], [], color=color, marker=shape, linestyle="none", markersize=7, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handletextpad=0.5)
    return figure


def _name(row: Row) -> str:
    kinds = {"scratch": "from scratch", "mlm": "no teacher", "distilled": "distilled", "adapted": "adapted teacher"}
    return kinds[row.kind]


def _shares(panel: Axes, rows: Sequence[Row]) -> None:
    for index, row in enumerate(rows):
        if row.share is None:
            panel.text(50, index, "nothing", ha="center", va="center", color=SOFT)
            continue
        generic = 100 * (1 - row.share)
        panel.barh(index, generic, height=0.5, color=GENERIC_ONLY)
        panel.barh(index, 100 - generic, left=generic, height=0.5, color=TASK_ONLY)
    panel.set_title("What the\nstudent read")
    panel.set_xlabel("% of its text")
    panel.set_xlim(0, 100)
    panel.set_xticks([0, 50, 100])


def _values(panel: Axes, rows: Sequence[Row], values: Mapping[Row, Value]) -> None:
    for index, row in enumerate(rows):
        if row in values:
            one, (_, color, shape) = values[row], KINDS[row.kind]
            panel.hlines(index, one.mean - one.deviation, one.mean + one.deviation, color=color, linewidth=1.6)
            panel.plot([one.mean], [index], shape, color=color, markersize=7, markeredgecolor="white")
    panel.margins(x=0.12)
    panel.locator_params(axis="x", nbins=4)


def main(arguments: Sequence[str]) -> None:
    """Reads the page and writes the figure as PNG and SVG."""
    root = pathlib.Path(__file__).resolve().parent.parent.parent
    defaults = [root / "docs/results/massive.md", root / "docs/figures/transfer-sets"]
    page, target = [*map(pathlib.Path, arguments), *defaults[len(arguments) :]]
    write_figure(draw(page.read_text(encoding="utf-8")), target.parent, target.name)


if __name__ == "__main__":
    main(sys.argv[1:])
