"""The figures of a report; each is None if the study has nothing to show in it."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.optimize import isotonic_regression

from kd_jax.config.training import FEATURE_TERMS
from kd_jax.evaluation.significance import error_rate
from kd_jax.study.plan import INITIALIZED, Student
from kd_jax.study.report.findings import correlation, correlation_text, divergence_key, domain_gains, similarity_points
from kd_jax.study.report.numbers import HEADLINE, TEACHER_LABELS, Measure, Numbers, Place, percent
from kd_jax.study.report.plotting import (
    DASHES,
    INK,
    SOFT,
    STROKES,
    STYLE,
    TASK_ONLY,
    color,
    legend_point,
    marker,
    panel_grid,
    rows_axis,
    seed_points,
)

BASELINES = ("scratch", "ngrams")  # whose error is a line through the other rows
LINE = 0.19  # inches from one name in a list to the next
MLM, STATES = "masked-LM training loss, nats", "distance of states, training"  # what a training curve shows


@rc_context(STYLE)
def answer(numbers: Numbers) -> Figure | None:
    """The headline error of each task for every row of the study, with its interval; lines at the baselines."""
    tasks = numbers.tasks()
    rows = [who for who in numbers.students if any(numbers.errors(who, HEADLINE[task]) for task in tasks)]
    if not rows:
        return None
    figure, axes = panel_grid(1, len(tasks), 1.2 + 0.3 * len(rows), sharey=True)
    for panel, task in zip(axes[0], tasks):
        rows_axis(panel, [numbers.label(who) for who in rows])
        for row, who in enumerate(rows):
            found = numbers.errors(who, HEADLINE[task])
            if found is None:
                continue
            rate = 100 * float(found.rates.mean())
            shade, interval = color(numbers, who), error_rate(found)
            if interval is not None:
                panel.plot([100 * end for end in interval[1:]], [row, row], color=shade, linewidth=2, alpha=0.55)
            panel.plot([rate], [row], marker(who), color=shade, markersize=8, markeredgecolor="white")
            if who.kind in BASELINES and not who.teacher:
                panel.axvline(rate, color=shade, linestyle=DASHES[who.kind, ""], linewidth=1.2, zorder=0.5)
        panel.set_title(HEADLINE[task].error_title)
        panel.set_xlabel("error, %")
    return figure


@rc_context(STYLE)
def heldout_loss(numbers: Numbers) -> Figure | None:
    """Held-out masked-LM loss of students and teachers on task and generic text, and each one's unigram."""
    everyone, place = [*numbers.students, *numbers.teachers], Place("heldout_task")
    models = [who for who in everyone if numbers.mean(who, "mlm", "loss", place)]
    if not models:
        return None
    figure, axes = panel_grid(1, 2, 1.3 + 0.3 * len(models), sharey=True)
    for panel, kind in zip(axes[0], ("task", "generic")):
        rows_axis(panel, [numbers.label(who) for who in models])
        for row, who in enumerate(models):
            values = numbers.values(who, "mlm", "loss", Place(f"heldout_{kind}")).values()
            seed_points(panel, values, row, (color(numbers, who), marker(who)))
            unigram_mark(panel, numbers.unigram_loss(who, kind), row)
        panel.set_title(f"On held-out {kind} text\n")
        panel.set_xlabel("loss, nats per masked token")
    return figure


def unigram_mark(panel: Axes, loss: float | None, row: int) -> None:
    """Marks the loss of a unigram with the model's vocabulary, in the model's row."""
    if loss is not None:
        panel.plot([loss], [row], "|", color=INK, markersize=15, markeredgewidth=1.6, zorder=3)


@rc_context(STYLE)
def share_curves(numbers: Numbers) -> Figure | None:
    """Each error rate against the share of task text: a point for each seed, a line through the means."""
    measures, distilled = numbers.measures(), numbers.distilled("generic")
    if not measures or not distilled:
        return None
    rows = (len(measures) + 2) // 2  # one panel more than measures, for the legend
    figure, axes = panel_grid(rows, 2, 0.3 + 2.45 * rows)
    panels = list(axes.flat)
    for panel, measure in zip(panels, measures):
        _share_panel(panel, numbers, measure)
    legend, *rest = panels[len(measures) :]
    handles = _share_legend(numbers)
    spacing = 0.9 if len(handles) < 8 else 0.3  # all within one panel
    legend.legend(handles=handles, loc="center left", handlelength=2.8, labelspacing=spacing)
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
        shade, shape, share = color(numbers, student), marker(student), numbers.share(student)
        if student.transfer_set in numbers.inputs.task_texts:  # shown by `amount_curves`
            continue
        if share is None:  # a band over all shares
            panel.axhspan(values.min(), values.max(), color=shade, alpha=0.15, linewidth=0)
            panel.axhline(values.mean(), color=shade, linestyle=DASHES[student.kind, student.teacher], linewidth=1.4)
            continue
        # Baselines stand a little aside, so that they do not cover the curve.
        x = 100 * share + {"mlm": -3.5, "distilled": 0 if student.teacher == "generic" else 3.5}[student.kind]
        panel.plot([x] * len(values), values, shape, color=shade, alpha=0.4, markersize=4, markeredgewidth=0)
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.8}
        panel.plot([x], [values.mean()], shape, color=shade, markersize=7, **edge)
        if student in numbers.distilled("generic") and numbers.plain(student):
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
        ("mlm", INITIALIZED): "MLM only from the teacher",
    }
    lines = [student for student in numbers.students if numbers.share(student) is None]
    handles = []
    for kind, name in names.items():
        if kind in kinds:
            shade, shape = color(numbers, kinds[kind]), marker(kinds[kind])
            if kind == ("distilled", "generic"):
                handles.append(legend_point(TASK_ONLY, shape, name, linestyle="-"))
            else:
                handles.append(legend_point(shade, shape, name))
    for student in lines:
        shade = color(numbers, student)
        handles.append(
            legend_point(shade, "none", numbers.label(student), linestyle=DASHES[student.kind, student.teacher])
        )
    if len(numbers.seeds()) > 1:
        handles.append(legend_point(SOFT, "o", "small: single seeds", markersize=4, alpha=0.5))
    return handles


@rc_context(STYLE)
def amount_curves(numbers: Numbers) -> Figure | None:
    """The headline error of each task against how many task texts were read, a line for each share of task text."""
    tasks, limits = numbers.tasks(), numbers.inputs.task_texts
    curves: dict[float, list[tuple[float, Student]]] = {}
    for student in numbers.distilled("generic"):
        share, texts = numbers.share(student), numbers.task_texts(student)
        if share and texts and (numbers.plain(student) or student.transfer_set in limits):
            curves.setdefault(share, []).append((texts, student))
    curves = {
        share: sorted(curve, key=lambda point: point[0])
        for share, curve in curves.items()
        if any(who.transfer_set in limits for _, who in curve)
    }
    if not tasks or not curves:
        return None
    lines = [one for one in numbers.students if numbers.share(one) is None or one == numbers.with_share(0.0)]
    figure, axes = panel_grid(1, len(tasks), 3.4 + 0.1 * len(lines))
    for panel, task in zip(axes[0], tasks):
        measure = HEADLINE[task]
        panel.grid(axis="y")
        panel.set_xscale("log")
        panel.set_title(measure.error_title)
        panel.set_xlabel("unique task texts read")
        amounts = sorted({round(texts) for curve in curves.values() for texts, _ in curve})
        panel.set_xticks(amounts, [f"{amount:,}" for amount in amounts])
        panel.minorticks_off()
        panel.set_ylabel("error, %")
        for who in lines:
            values = list(numbers.values(who, task, measure.error).values())
            if values:
                stroke = DASHES.get((who.kind, who.teacher), "-")
                panel.axhline(100 * np.mean(values), color=color(numbers, who), linestyle=stroke, linewidth=1.4)
        for curve in curves.values():
            means = []
            for texts, who in curve:
                values = 100 * np.array(list(numbers.values(who, task, measure.error).values()))
                if len(values):
                    panel.plot([texts] * len(values), values, "o", color=color(numbers, who), alpha=0.4, markersize=4)
                    means.append((texts, values.mean()))
            if means:
                panel.plot(*zip(*means), "o-", color=color(numbers, curve[-1][1]), linewidth=1.6, markersize=6)
    handles = [
        legend_point(color(numbers, curve[-1][1]), "o", f"task {percent(share)}", linestyle="-")
        for share, curve in curves.items()
    ]
    for who in lines:
        stroke = DASHES.get((who.kind, who.teacher), "-")
        handles.append(legend_point(color(numbers, who), "none", numbers.label(who), linestyle=stroke))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=2.6)
    return figure


@rc_context(STYLE)
def by_group(numbers: Numbers, places: Sequence[tuple[str, Place]]) -> Figure | None:
    """The headline error of each task for named groups of utterances, the compared students next to each other."""
    tasks, students = numbers.tasks(), numbers.compared()
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
    handles = [legend_point(color(numbers, who), marker(who), numbers.label(who)) for who in students]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handletextpad=0.3)
    return figure


def by_locale(numbers: Numbers) -> Figure | None:
    """The headline error of each task by locale."""
    names = sorted({locale for task in numbers.tasks() for locale in numbers.locales(task)})
    return by_group(numbers, [(name, Place(locale=name)) for name in names])


def by_test_set(numbers: Numbers) -> Figure | None:
    """The headline error of each task by test set."""
    names = sorted({name for task in numbers.tasks() for name in numbers.test_sets(task)})
    order = sorted(names, key=lambda name: (name != "test", name != "test_unseen", name))
    return by_group(numbers, [(name, Place(name)) for name in order])


@rc_context(STYLE)
def teacher_noise(numbers: Numbers) -> Figure | None:
    """Loss and accuracy of the teachers by language, on held-out task and generic text."""
    locales = {kind: numbers.heldout_locales(kind) for kind in ("task", "generic")}
    if not any(locales.values()):
        return None
    ratios = [max(1, len(names)) for names in locales.values()]
    figure, axes = panel_grid(2, 2, 1.9 + 0.27 * sum(ratios), height_ratios=ratios, sharex="col")
    # Not the shapes of students: a figure of teachers alone has no use for the difference.
    styles = {who: (color(numbers, who), "D" if who.teacher == "adapted" else "o") for who in numbers.teachers}
    for row, (kind, names) in enumerate(locales.items()):
        for panel, (metric, scale) in zip(axes[row], (("loss", 1), ("accuracy", 100))):
            rows_axis(panel, names)
            for position, locale in enumerate(names):
                place = Place(f"heldout_{kind}", locale)
                if metric == "loss" and numbers.teachers:
                    unigram_mark(panel, numbers.unigram_loss(numbers.teachers[0], kind, locale), position)
                for teacher, style in styles.items():
                    values = [scale * value for value in numbers.values(teacher, "mlm", metric, place).values()]
                    seed_points(panel, values, position, style)
            panel.set_title(f"{metric.capitalize()} on {kind} text")
    axes[1][0].set_xlabel("nats per masked token")
    axes[1][1].set_xlabel("masked tokens right, %")
    axes[1][1].set_xlim(left=0)
    handles = [legend_point(*style, numbers.label(teacher)) for teacher, style in styles.items()]
    handles.append(legend_point(INK, "|", "unigram", markersize=13, markeredgewidth=1.6))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handletextpad=0.3)
    return figure


@rc_context(STYLE)
def similarity_scatter(numbers: Numbers) -> Figure | None:
    """Each domain's divergence from generic text against its gain from task text."""
    gains = domain_gains(numbers)
    found = {task: points for task in numbers.tasks() if (points := similarity_points(gains, task))}
    if not found:
        return None
    height = max(3.3, 0.9 + LINE * max(map(len, found.values())))
    figure, axes = panel_grid(len(found), 1, 0.2 + height * len(found), sharex=True)
    for panel, (task, points) in zip(axes[:, 0], found.items()):
        panel.axhline(0, color="#9aa4b0", linewidth=1)
        panel.grid(axis="y")
        x, y = np.array([point[1] for point in points]), 100 * np.array([point[2] for point in points])
        panel.plot(x, y, "o", color=TASK_ONLY, markersize=6.5, markeredgecolor="white", markeredgewidth=0.6)
        panel.margins(0.06, 0.08)
        name_points(panel, [point[0] for point in points], x, y, LINE / (height - 0.9))
        panel.set_title(f"{HEADLINE[task].title}: {correlation_text(correlation(gains, task))}")
        panel.set_ylabel("relative error reduction\nby task text, %")
    matched = " at a matched number of tokens" if divergence_key(gains) == "jsd_matched" else ""
    axes[-1, 0].set_xlabel(f"Jensen-Shannon divergence from generic text{matched}, bits")
    return figure


def name_points(panel: Axes, names: Sequence[str], x: np.ndarray, y: np.ndarray, gap: float) -> None:
    """Lists the names at the right of the panel, in the order of y and at least `gap` of its height apart, each with a
    thin line to its point."""
    low, high = panel.get_ylim()
    order, steps = np.argsort(y, kind="stable"), gap * np.arange(len(y))
    # As close to their points as possible: after subtracting the gaps, positions only have to ascend.
    places = isotonic_regression((y[order] - low) / (high - low) - steps).x
    places = np.clip(places, 0.02, max(0.97 - steps[-1], 0.02)) + steps
    line = {"arrowstyle": "-", "color": "#b6bec9", "linewidth": 0.7, "shrinkA": 2, "shrinkB": 4}
    for index, place in zip(order, places):
        panel.annotate(
            names[int(index)],
            (x[index], y[index]),
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9.5,
            arrowprops={**line, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


@rc_context(STYLE)
def training_curves(numbers: Numbers) -> Figure | None:
    """Training loss of teachers and students against the step, a thin line for each seed; one panel for each kind of
    loss."""
    groups: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for label, rows in numbers.inputs.curves.items():
        loss, points = curve_points(rows)
        if points:
            who = "Teachers" if label.startswith("teacher") else "Students"
            groups.setdefault((who, loss), {})[label] = points
    if not groups:
        return None
    curves = {label: _curve(numbers, label) for group in groups.values() for label in group}
    styles = {
        name: (shade, STROKES[number % len(STROKES)])
        for number, (name, shade) in enumerate(dict(curves.values()).items())
    }
    figure, axes = panel_grid(1, len(groups), 3.2 + 0.1 * len(styles))
    # Teachers first; then students of masked LM before those of states.
    for panel, (who, loss) in zip(axes[0], sorted(groups, key=lambda group: (group[0] == "Students", group[1] != MLM))):
        panel.grid(axis="y")
        panel.set_title(who)
        panel.set_xlabel("step")
        panel.set_ylabel(loss)
        for label, points in groups[who, loss].items():
            shade, stroke = styles[curves[label][0]]
            panel.plot(*zip(*points), color=shade, linestyle=stroke, linewidth=1.3, alpha=0.85)
        panel.set_xlim(left=0)
    handles = [
        Line2D([], [], color=shade, linestyle=stroke, linewidth=2, label=name)
        for name, (shade, stroke) in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=2.6)
    return figure


def curve_points(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, float]]]:
    """(what the loss is, its (step, loss)) from rows of metrics.jsonl: the masked-LM part if a run logs it separately,
    else the total loss, which is a distance if a student learned from states alone."""
    terms = {name for row in rows for name in row}
    states = terms & {*FEATURE_TERMS} and not terms & {"mlm", "kl"}
    losses = ((row["step"], row.get("mlm", row.get("loss"))) for row in rows)
    found = [(step, loss) for step, loss in losses if loss is not None and np.isfinite(loss)]
    return STATES if states else MLM, found


def _curve(numbers: Numbers, label: str) -> tuple[str, str]:
    """(name in the legend, color) of a curve; labels are "teacher, adapted" or "<student's name>, seed 0"."""
    name = re.sub(r", seed \d+$", "", label)
    for student in numbers.students:
        if student.name == name:
            return numbers.label(student), color(numbers, student)
    teacher = Student("teacher", "", name.removeprefix("teacher, "))
    return numbers.label(teacher), color(numbers, teacher)


class Drawing(NamedTuple):
    """A figure of the report: its caption, what it shows in words, and the sentence in its place if it is None."""

    draw: Callable[[Numbers], Figure | None]
    caption: str
    alternative: str
    missing: str


FIGURES = {  # the name of the file -> the figure
    "answer": Drawing(
        answer,
        "Test error of every row: the mean over seeds with its 95 % interval over seeds and utterances; lower is "
        "better. The dashed line is the student from scratch, the dotted one the n-grams. Rows are tested on the same "
        "utterances, so two of them can differ although their intervals overlap: see the declared comparisons.",
        "Dot plot of the error rates of all students and baselines with their intervals",
        "Nothing was tested.",
    ),
    "heldout_loss": Drawing(
        heldout_loss,
        "Held-out masked-LM loss (lower is better). Small points are seeds, large ones their means; the bar is the "
        "loss of a unigram of the same vocabulary.",
        "Dot plot of held-out masked-LM loss by student and teacher, on task and on generic text",
        "No held-out masked-LM loss was measured.",
    ),
    "share_curves": Drawing(
        share_curves,
        "Error against the share of task text in the transfer set. The line joins the means over seeds of the students "
        "distilled from the generic teacher. Students by MLM alone and of other teachers are shown next to their "
        "share; rows without a transfer set are horizontal lines with a band from the lowest to the highest seed. Axes "
        "do not start at zero.",
        "Line plots of each error rate against the share of task text",
        "No distilled student was tested, so there is no curve.",
    ),
    "amount_curves": Drawing(
        amount_curves,
        "Error against the number of task texts, for students distilled from the generic teacher: large points are "
        "means over seeds, small ones seeds. Horizontal lines are rows that read no task text in distillation.",
        "Line plots of the headline errors against the number of unlabeled task texts",
        "",
    ),
    "test_sets": Drawing(
        by_test_set,
        "Exploratory: the headline error rates by test set. Small points are seeds, large ones their means.",
        "Dot plot of error rates by test set and student",
        "",
    ),
    "locales": Drawing(
        by_locale,
        "Exploratory: the headline error rates by locale. Small points are seeds, large ones their means.",
        "Dot plot of error rates by locale and student",
        "None of the students that this figure compares was tested.",
    ),
    "teacher_noise": Drawing(
        teacher_noise,
        "Held-out masked-LM loss and masked-token accuracy of each teacher by language. A teacher at or right of the "
        "unigram's mark knows no more about such text than how often each token occurs.",
        "Dot plots of teacher loss and accuracy by language on task and generic text",
        "No teacher's held-out loss was measured.",
    ),
    "similarity": Drawing(
        similarity_scatter,
        "Exploratory: one point for each domain, named at the right in the order of the gains: how much less error "
        "task text makes than generic text, against how far the domain's text is from generic text. The intervals "
        "of the gains are in the table.",
        "Scatter plot of each domain's divergence from generic text against its gain from task text",
        "There are no gains by domain: they need a generic-only and a task-only student, and records or several seeds.",
    ),
    "training": Drawing(
        training_curves,
        "Loss on each run's own training text against the step, a line for each seed: the masked-LM loss, or the "
        "distance from the teacher's states where a student learns from these alone. Curves on different text cannot "
        "be compared with each other.",
        "Line plots of training loss against the step for teachers and students",
        "No training curves were recorded.",
    ),
}
