"""The look of all figures: one color, marker and line for each student, SVG and PNG of each figure.

Most colors are Okabe and Ito's, which stay distinct under the common kinds of color blindness; markers and lines
distinguish the kinds of student as well.
"""

import io
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from kd_jax.runtime.files import write_atomically
from kd_jax.study.plan import INITIALIZED, LABELED, Student
from kd_jax.study.report.numbers import Numbers

INK, SOFT, GRID = "#1c2430", "#5b6675", "#e3e7ec"
SCRATCH, TASK_ONLY = "#7a7a7a", "#003f73"
# The ends of the color scale over task shares, by what a student learns from.
SCALES = {
    "generic": ("#56b4e9", TASK_ONLY),
    "adapted": ("#f3b58a", "#d55e00"),
    "schedule": ("#f2b6d8", "#c51b7d"),
    "average": ("#8fd1c6", "#01665e"),
    "chain": ("#d8b365", "#6b3d05"),
    "": ("#ffdf8e", "#e69f00"),  # masked LM alone
    INITIALIZED: ("#cfc98a", "#8a7a00"),  # the same from the teacher
}
NGRAMS, PROBE, FINETUNED, STARTED = "#009e73", "#cc79a7", "#7b3f66", "#8a7a00"
MARKERS = {
    "ngrams": "P",
    "probe": "^",
    "finetuned": "<",
    "scratch": "X",
    "initialized": "h",
    "mlm": "s",
    "teacher": "v",
}
TEACHER_MARKERS = {"adapted": "D", "schedule": "p", "average": "*", "chain": "d"}  # of students; else a circle
KIND_COLORS = {"ngrams": NGRAMS, "probe": PROBE, "finetuned": FINETUNED, "scratch": SCRATCH, "initialized": STARTED}
TAUGHT = "#7b52ab"  # the adapted teacher, distinct from the colors of its students
# The line of a row that has no transfer set, by (kind, teacher).
DASHES: dict[tuple[str, str], Any] = {
    ("ngrams", ""): (0, (1, 1.5)),
    ("ngrams", LABELED): (0, (1, 3.5)),
    ("probe", ""): (0, (3, 1.5, 1, 1.5)),
    ("finetuned", ""): (0, (9, 2)),
    ("scratch", ""): (0, (5, 3)),
    ("scratch", LABELED): (0, (2.5, 4)),
    (INITIALIZED, ""): (0, (6, 1.5, 1, 1.5, 1, 1.5)),
}
# Of training curves, in this order.
STROKES: tuple[Any, ...] = (
    "-",
    (0, (6, 2)),
    (0, (1, 1)),
    (0, (6, 2, 1, 2)),
    (0, (3, 1)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (9, 3)),
    (0, (1, 3)),
    (0, (9, 2, 3, 2)),
)
WIDTH = 7.4  # inches, about the widest that figures are shown
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": SOFT,
    "axes.edgecolor": "#9aa4b0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "svg.hashsalt": "kd_jax",  # without it, each SVG has random ids and no two runs write the same bytes
    "savefig.facecolor": "white",
}


def color(numbers: Numbers, student: Student) -> str:
    """The student's color in every figure."""
    if student.kind in KIND_COLORS:
        shade = KIND_COLORS[student.kind]
        return _lighter(shade) if student.teacher == LABELED else shade
    if student.kind == "teacher":
        return TAUGHT if student.teacher == "adapted" else INK
    share = numbers.share(student) or 0.0
    low, high = (np.array(to_rgb(end)) for end in SCALES[student.teacher])
    return to_hex(tuple(low + share * (high - low)))


def _lighter(shade: str) -> str:
    return to_hex(tuple(0.55 * np.array(to_rgb(shade)) + 0.45))


def marker(student: Student) -> str:
    """The student's marker in every figure."""
    return TEACHER_MARKERS.get(student.teacher, "o") if student.kind == "distilled" else MARKERS[student.kind]


def write_figure(figure: Figure, folder: pathlib.Path, name: str) -> None:
    """Writes <name>.svg and <name>.png, each atomically; the same figure gives the same bytes."""
    for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        with rc_context(STYLE):
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
        write_atomically(folder / f"{name}.{kind}", buffer.getvalue())


def panel_grid(rows: int, columns: int, height: float, **options) -> tuple[Figure, np.ndarray]:
    """A figure of the common width, `height` inches high, with Axes [rows, columns]."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.05, hspace=0.05)
    figure = Figure(figsize=(WIDTH, height), layout=layout)  # not pyplot's: that keeps every figure in memory
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


def rows_axis(axes: Axes, names: Sequence[str]) -> None:
    """Names down the left side, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def seed_points(axes: Axes, values: Iterable[float], row: float, style: tuple[str, str]) -> None:
    """A small point for each seed and a large one for their mean; style: color and marker."""
    values = list(values)
    if not values:
        return
    shade, shape = style
    if len(values) > 1:
        axes.plot(values, [row] * len(values), shape, color=shade, alpha=0.4, markersize=4, markeredgewidth=0)
    axes.plot([np.mean(values)], [row], shape, color=shade, markersize=8, markeredgecolor="white", markeredgewidth=0.8)


def legend_point(shade: str, shape: str, label: str, **options) -> Line2D:
    """A legend's entry that is a marker without a line."""
    return Line2D(
        [], [], **{"color": shade, "marker": shape, "linestyle": "none", "markersize": 7, "label": label, **options}
    )
