"""The figures of a report; each is None where the study has nothing to show in it."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from kd_jax.study.plan import Student
from kd_jax.study.report.findings import (
    DomainGain,
    correlation,
    correlation_text,
    divergence_key,
    similarity_points,
)
from kd_jax.study.report.inputs import HEADLINE, TEACHER_LABELS, Measure, Numbers, Place
from kd_jax.study.report.plotting import (
    ADAPTED,
    INK,
    SOFT,
    STYLE,
    TASK_ONLY,
    color,
    marker,
    panel_grid,
    rows_axis,
    seed_points,
)
from kd_jax.study.report.tables import compared_students, heldout_locales, unigram_loss


@rc_context(STYLE)
def heldout_loss(numbers: Numbers) -> Figure | None:
    """Held-out masked-LM loss of students and teachers on task and generic text, with the unigram's; None without
    any.
    """
    models = [
        who for who in [*numbers.students, *numbers.teachers] if numbers.mean(who, "mlm", "loss", Place("heldout_task"))
    ]
    if not models:
        return None
    figure, axes = panel_grid(1, 2, 1.3 + 0.3 * len(models), sharey=True)
    for panel, kind in zip(axes[0], ("task", "generic")):
        rows_axis(panel, [numbers.label(who) for who in models])
        for row, who in enumerate(models):
            values = numbers.values(who, "mlm", "loss", Place(f"heldout_{kind}")).values()
            seed_points(panel, values, row, (color(numbers, who), marker(who)))
        unigram = unigram_loss(numbers, kind)
        if unigram is not None:
            panel.axvline(unigram, color=SOFT, linestyle=(0, (4, 3)), linewidth=1)
            panel.annotate(
                "unigram",
                (unigram, -0.6),
                (-3, 2),
                textcoords="offset points",
                ha="right",
                va="bottom",
                color=SOFT,
                size=9,
            )
        panel.set_title(f"On held-out {kind} text\n")
        panel.set_xlabel("loss, nats a masked token")
    return figure


@rc_context(STYLE)
def share_curves(numbers: Numbers) -> Figure | None:
    """Each error rate against the share of task text: a point a seed, a line through the means; None without
    students.
    """
    measures, distilled = numbers.measures(), numbers.distilled("generic")
    if not measures or not distilled:
        return None
    rows = (len(measures) + 2) // 2
    figure, axes = panel_grid(rows, 2, 0.3 + 2.45 * rows)
    panels = list(axes.flat)
    for panel, measure in zip(panels, measures):
        _share_panel(panel, numbers, measure)
    legend, *rest = panels[len(measures) :]
    legend.legend(handles=_share_legend(numbers), loc="center left", handlelength=2.2, labelspacing=0.9)
    for panel in (legend, *rest):
        panel.set_axis_off()
    return figure


def _share_panel(panel: Axes, numbers: Numbers, measure: Measure) -> None:
    panel.grid(axis="y")
    panel.set_title(measure.error_title)
    panel.set_ylabel("error, %")
    panel.set_xlabel("share of task text, %")
    shares = sorted({100 * share for share in numbers.inputs.task_shares.values()})
    panel.set_xticks(shares, [f"{share:.4g}" for share in shares])
    panel.set_xlim(-8, 108)
    line = []
    for student in numbers.students:
        values = np.array(list(numbers.values(student, measure.task, measure.error).values())) * 100
        if not len(values):
            continue
        shade = color(numbers, student)
        share = numbers.share(student)
        if share is None:
            panel.axhspan(values.min(), values.max(), color=shade, alpha=0.15, linewidth=0)
            panel.axhline(values.mean(), color=shade, linestyle=(0, (5, 3)), linewidth=1.4)
            continue
        # Baselines stand a little aside, so that they do not cover the curve.
        x = 100 * share + {"mlm": -3.5, "distilled": 0 if student.teacher == "generic" else 3.5}[student.kind]
        panel.plot([x] * len(values), values, marker(student), color=shade, alpha=0.4, markersize=4, markeredgewidth=0)
        panel.plot(
            [x],
            [values.mean()],
            marker(student),
            color=shade,
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.8,
        )
        if student in numbers.distilled("generic") and student.transfer_set not in numbers.inputs.selected:
            line.append((x, values.mean()))
    if line:
        panel.plot(*zip(*sorted(line)), color=TASK_ONLY, linewidth=1.4, zorder=1.5)
    panel.margins(y=0.12)


def _share_legend(numbers: Numbers) -> list[Line2D]:
    kinds = {(student.kind, student.teacher): student for student in numbers.students}
    names = {
        ("distilled", "generic"): "distilled, generic teacher",
        **{("distilled", teacher): f"distilled, {name}" for teacher, name in TEACHER_LABELS.items()},
        ("mlm", ""): "MLM only, no teacher",
        ("scratch", ""): "from scratch",
    }
    handles = []
    for kind, name in names.items():
        if kind in kinds:
            student = kinds[kind]
            dashed = student.kind == "scratch"
            linestyle = (0, (5, 3)) if dashed else "-" if kind == ("distilled", "generic") else "none"
            shape = "none" if dashed else marker(student)
            shade = TASK_ONLY if kind == ("distilled", "generic") else color(numbers, student)
            handles.append(Line2D([], [], color=shade, marker=shape, linestyle=linestyle, markersize=7, label=name))
    if len(numbers.seeds()) > 1:
        handles.append(
            Line2D(
                [], [], color=SOFT, marker="o", linestyle="none", markersize=4, alpha=0.5, label="small: single seeds"
            )
        )
    return handles


@rc_context(STYLE)
def by_group(numbers: Numbers, places: Sequence[tuple[str, Place]], students: Sequence[Student]) -> Figure | None:
    """The headline error of each task for named groups of utterances (locales, test sets), students side by side."""
    tasks = numbers.tasks()
    if not tasks or not places or not students:
        return None
    figure, axes = panel_grid(1, len(tasks), 1.5 + 0.5 * len(places), sharey=True)
    steps = np.linspace(-0.27, 0.27, len(students)) if len(students) > 1 else [0.0]
    for panel, task in zip(axes[0], tasks):
        measure = HEADLINE[task]
        rows_axis(panel, [name for name, _ in places])
        for row, (_, place) in enumerate(places):
            if row % 2:
                panel.axhspan(row - 0.5, row + 0.5, color="#f5f7fa", zorder=0)
            for step, student in zip(steps, students):
                values = [100 * value for value in numbers.values(student, task, measure.error, place).values()]
                seed_points(panel, values, row + step, (color(numbers, student), marker(student)))
        panel.set_title(measure.error_title)
        panel.set_xlabel("error, %")
    handles = [
        Line2D(
            [],
            [],
            color=color(numbers, who),
            marker=marker(who),
            linestyle="none",
            markersize=7,
            label=numbers.label(who),
        )
        for who in students
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handletextpad=0.3)
    return figure


def by_locale(numbers: Numbers) -> Figure | None:
    """The headline error of each task by locale; None without results by locale."""
    names = sorted({locale for task in numbers.tasks() for locale in numbers.locales(task)})
    return by_group(numbers, [(name, Place(locale=name)) for name in names], compared_students(numbers))


def by_test_set(numbers: Numbers) -> Figure | None:
    """The headline error of each task by test set; None without results."""
    names = sorted({name for task in numbers.tasks() for name in numbers.test_sets(task)})
    order = sorted(names, key=lambda name: (name != "test", name != "test_unseen", name))
    return by_group(numbers, [(name, Place(name)) for name in order], compared_students(numbers))


@rc_context(STYLE)
def teacher_noise(numbers: Numbers) -> Figure | None:
    """Loss and accuracy of the teachers by language, on held-out task and generic text; None without teachers."""
    locales = {kind: heldout_locales(numbers, kind) for kind in ("task", "generic")}
    if not any(locales.values()):
        return None
    ratios = [max(1, len(names)) for names in locales.values()]
    figure, axes = panel_grid(2, 2, 1.9 + 0.27 * sum(ratios), height_ratios=ratios, sharex="col")
    for row, (kind, names) in enumerate(locales.items()):
        for panel, (metric, scale) in zip(axes[row], (("loss", 1), ("accuracy", 100))):
            rows_axis(panel, names)
            for position, locale in enumerate(names):
                place = Place(f"heldout_{kind}", locale)
                unigram = unigram_loss(numbers, kind, locale)
                if metric == "loss" and unigram is not None:
                    panel.plot([unigram], [position], "|", color=INK, markersize=15, markeredgewidth=1.6, zorder=3)
                for teacher in numbers.teachers:
                    values = [scale * value for value in numbers.values(teacher, "mlm", metric, place).values()]
                    seed_points(panel, values, position, _teacher_style(teacher))
            panel.set_title(f"{'Loss' if metric == 'loss' else 'Accuracy'} on {kind} text")
    axes[1][0].set_xlabel("nats a masked token")
    axes[1][1].set_xlabel("masked tokens right, %")
    axes[1][1].set_xlim(left=0)
    handles = []
    for teacher in numbers.teachers:
        shade, shape = _teacher_style(teacher)
        handles.append(
            Line2D([], [], color=shade, marker=shape, linestyle="none", markersize=7, label=numbers.label(teacher))
        )
    handles.append(
        Line2D([], [], color=INK, marker="|", linestyle="none", markersize=13, markeredgewidth=1.6, label="unigram")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handletextpad=0.3)
    return figure


def _teacher_style(teacher: Student) -> tuple[str, str]:
    return (ADAPTED, "D") if teacher.teacher == "adapted" else (TASK_ONLY, "o")


@rc_context(STYLE)
def similarity_scatter(numbers: Numbers, rows: Sequence[DomainGain]) -> Figure | None:
    """Each domain's divergence from generic text against its gain from task text; None without points."""
    rows = list(rows)
    tasks = [task for task in numbers.tasks() if similarity_points(rows, task)]
    if not tasks:
        return None
    figure, axes = panel_grid(len(tasks), 1, 0.2 + 3.3 * len(tasks), sharex=True)
    for panel, task in zip(axes[:, 0], tasks):
        points = similarity_points(rows, task)
        panel.axhline(0, color="#9aa4b0", linewidth=1)
        panel.grid(axis="y")
        x, y = np.array([point[1] for point in points]), 100 * np.array([point[2] for point in points])
        panel.plot(x, y, "o", color=TASK_ONLY, markersize=6.5, markeredgecolor="white", markeredgewidth=0.6)
        panel.margins(0.1, 0.15)
        _place_names(panel, [point[0] for point in points], x, y)
        panel.set_title(f"{HEADLINE[task].title}: {correlation_text(correlation(rows, task))}")
        panel.set_ylabel("relative error reduction\nby task text, %")
    matched = " at a matched number of tokens" if divergence_key(rows) == "jsd_matched" else ""
    axes[-1, 0].set_xlabel(f"Jensen-Shannon divergence from generic text{matched}, bits")
    return figure


def _place_names(panel: Axes, names: Sequence[str], x: np.ndarray, y: np.ndarray) -> None:
    """Writes each name beside its point, at the first side where it covers neither another name nor a point."""
    figure = panel.figure
    figure.canvas.draw()
    points = panel.transData.transform(np.column_stack([x, y]))
    height, frame = figure.dpi * 9 / 72, panel.get_window_extent()
    taken: list[tuple[float, float, float, float]] = []

    def box(index: int, side: tuple[float, float, str]) -> tuple[float, float, float, float]:
        dx, dy, align = side
        width = 0.62 * height * len(names[index])
        shift = {"left": 0, "right": -width, "center": -width / 2}[align]
        left, bottom = points[index, 0] + dx * figure.dpi / 72 + shift, points[index, 1] + dy * figure.dpi / 72
        return left, bottom - height / 2, left + width, bottom + height / 2

    def covered(spot: tuple[float, float, float, float], index: int) -> int:
        left, bottom, right, top = spot
        names_hit = sum(left < b[2] and right > b[0] and bottom < b[3] and top > b[1] for b in taken)
        near = (
            (points[:, 0] > left - 4)
            & (points[:, 0] < right + 4)
            & (points[:, 1] > bottom - 4)
            & (points[:, 1] < top + 4)
        )
        near[index] = False
        outside = left < frame.x0 or right > frame.x1
        return 2 * names_hit + int(near.sum()) + 2 * outside

    sides = [(6, 0, "left"), (-6, 0, "right"), (0, 9, "center"), (0, -10, "center")]
    sides += [(5, 8, "left"), (5, -8, "left"), (-5, 8, "right"), (-5, -8, "right")]
    for index in map(int, np.argsort(-points[:, 1])):
        best = min(sides, key=lambda side: covered(box(index, side), index))
        taken.append(box(index, best))
        text = panel.annotate(
            names[index],
            xy=(x[index], y[index]),
            xytext=best[:2],
            textcoords="offset points",
            horizontalalignment=best[2],
            verticalalignment="center",
            fontsize=9,
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


@rc_context(STYLE)
def training_curves(numbers: Numbers) -> Figure | None:
    """Masked-LM training loss of teachers and students against the step, seeds as thin lines; None without curves."""
    curves = numbers.inputs.curves
    teachers = {label: rows for label, rows in curves.items() if label.startswith("teacher")}
    students = {label: rows for label, rows in curves.items() if label not in teachers}
    groups = [(name, group) for name, group in (("Teachers", teachers), ("Students", students)) if _any_points(group)]
    if not groups:
        return None
    styles = {label: _curve_style(numbers, label) for _, group in groups for label in group}
    names = dict(styles.values())
    figure, axes = panel_grid(1, len(groups), 3.2 + 0.1 * len(names))
    for panel, (title, group) in zip(axes[0], groups):
        panel.grid(axis="y")
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.set_ylabel("masked-LM training loss, nats")
        for label, rows in group.items():
            panel.plot(*zip(*curve_points(rows)), color=styles[label][1], linewidth=1.1, alpha=0.8)
        panel.set_xlim(left=0)
    handles = [Line2D([], [], color=shade, linewidth=2, label=name) for name, shade in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=1.4)
    return figure


def _any_points(group: dict) -> bool:
    for label in list(group):
        if not curve_points(group[label]):
            del group[label]
    return bool(group)


def curve_points(rows: Sequence[tuple[int, Mapping[str, float | None]]]) -> list[tuple[int, float]]:
    """(step, loss): the masked-LM part where a run logs it apart from the distillation loss, else its whole loss."""
    points = []
    for step, values in rows:
        value = values.get("mlm", values.get("loss"))
        if value is not None and np.isfinite(value):
            points.append((step, value))
    return points


def _curve_style(numbers: Numbers, label: str) -> tuple[str, str]:
    """(name in the legend, color) of a curve; labels are "teacher, adapted" or "<student's name>, seed 0"."""
    name = re.sub(r", seed \d+$", "", label)
    for student in numbers.students:
        if student.name == name:
            return numbers.label(student), color(numbers, student)
    if name.startswith("teacher, "):
        name = f"{name.removeprefix('teacher, ')} teacher"
    return name, ADAPTED if name.startswith("adapted") else INK
