"""What the figures draw is what the results say, and their files are whole, stable and of known kinds."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from matplotlib.text import Text

from kd_jax.study.plan import Student
from kd_jax.study.report import figures, findings, plotting
from kd_jax.study.report.contrasts import mixture_trend
from kd_jax.study.report.numbers import Place, ReportInputs
from tests.support.report_inputs import STUDENTS, synthetic_inputs


@pytest.fixture(scope="module")
def inputs() -> ReportInputs:
    return synthetic_inputs(size=60)


def drawn(axes) -> set[tuple[float, float]]:
    """Every point of every line in a panel, rounded."""
    points = set()
    for line in axes.get_lines():
        points |= {(round(float(x), 6), round(float(y), 6)) for x, y in zip(line.get_xdata(), line.get_ydata())}
    return points


def test_the_share_curve_goes_through_the_means_over_seeds(inputs):
    numbers = inputs.numbers
    panel = figures.share_curves(numbers).axes[0]
    line = next(line for line in panel.get_lines() if len(line.get_xdata()) == 3 and line.get_linestyle() == "-")
    expected = []
    for set_name in ("generic", "mix50", "task"):
        student = Student("distilled", set_name, "generic")
        expected.append(100 * np.mean(list(numbers.values(student, "dc", "error_rate").values())))
    assert list(line.get_xdata()) == [0, 50, 100]
    np.testing.assert_allclose(np.asarray(line.get_ydata()), expected)


def test_every_seed_has_a_point_in_the_curve(inputs):
    panel = figures.share_curves(inputs.numbers).axes[4]
    values = inputs.numbers.values(Student("distilled", "mix50", "generic"), "icner", "semer")
    assert len(values) == 3
    assert {(50.0, round(100 * value, 6)) for value in values.values()} <= drawn(panel)


def test_amounts_of_task_text_have_a_curve_of_their_own_and_stay_out_of_the_others(inputs):
    assert figures.amount_curves(inputs.numbers) is None
    few = synthetic_inputs(size=60, students={key: STUDENTS[key] for key in STUDENTS if key[0] != "mlm"})
    texts = {"generic": 0, "mix50": 30, "task": 300}
    realized = {name: {"kinds": {"task": {"unique_utterances": count}}} for name, count in texts.items()}
    shares = {"generic": 0.0, "mix50": 1.0, "task": 1.0}
    few = dataclasses.replace(few, task_shares=shares, task_texts={"mix50": 10}, realized=realized)
    numbers = few.numbers
    assert numbers.label(Student("distilled", "mix50", "generic")) == "distilled, task 100 % of 10 texts"
    assert numbers.with_share(1.0) == Student("distilled", "task", "generic")
    drawing = figures.amount_curves(numbers)
    assert drawing is not None
    means = {
        name: 100 * np.mean(list(numbers.values(Student("distilled", name, "generic"), "icner", "semer").values()))
        for name in shares
    }
    panel = drawing.axes[1]
    (line,) = (line for line in panel.get_lines() if list(line.get_xdata()) == [30, 300])
    np.testing.assert_allclose(np.asarray(line.get_ydata()), [means["mix50"], means["task"]])
    assert any(np.allclose(np.asarray(line.get_ydata()), means["generic"]) for line in panel.get_lines())
    curve = figures.share_curves(numbers)
    assert curve is not None and round(means["mix50"], 6) not in {y for _, y in drawn(curve.axes[4])}
    assert mixture_trend(numbers, "dc") is None


def test_heldout_loss_shows_means_and_each_models_unigram(inputs):
    panel = figures.heldout_loss(inputs.numbers).axes[0]
    models = [label.get_text() for label in panel.get_yticklabels()]
    assert "from scratch" not in models and models[-2:] == ["generic teacher", "adapted teacher"]
    student = Student("distilled", "task", "generic")
    mean = np.mean(list(inputs.numbers.values(student, "mlm", "loss", Place("heldout_task")).values()))
    points = drawn(panel)
    assert (round(float(mean), 6), float(models.index("distilled, task 100 %"))) in points
    assert (6.7, float(models.index("generic teacher"))) in points
    assert (6.1, float(models.index("distilled, task 100 %"))) in points


def test_scatter_has_one_named_point_a_domain(inputs):
    rows = findings.domain_gains(inputs.numbers)
    panel = figures.similarity_scatter(inputs.numbers).axes[0]
    points = findings.similarity_points(rows, "dc")
    assert {text.get_text() for text in panel.texts} == {domain for domain, _, _ in points}
    assert {(round(x, 6), round(100 * y, 6)) for _, x, y in points} <= drawn(panel)


def test_training_curves_prefer_the_masked_lm_part():
    rows = [{"step": 0, "mlm": 5.0, "loss": 9.0}, {"step": 10, "loss": 4.0}]
    rows += [{"step": 20, "heldout_task/loss": 1.0}, {"step": 30, "loss": None}]
    assert figures.curve_points(rows) == (figures.MLM, [(0, 5.0), (10, 4.0)])


def test_masked_lm_losses_and_distances_of_states_share_no_panel():
    curves = {
        "mlm-task, seed 0": [{"step": 10, "loss": 3.0}],
        "distilled-task-generic, seed 0": [{"step": 10, "loss": 0.2, "hidden": 0.2}],
        "distilled-generic-generic, seed 0": [{"step": 10, "loss": 1.2, "hidden": 0.2, "kl": 1.0}],
    }
    figure = figures.training_curves(ReportInputs(name="x", curves=curves).numbers)
    panels = [(panel.get_ylabel(), [np.asarray(line.get_ydata())[0] for line in panel.lines]) for panel in figure.axes]
    assert panels == [(figures.MLM, [3.0, 1.2]), (figures.STATES, [0.2])]


def test_a_run_without_losses_draws_no_curve():
    curves = {"teacher, generic": [{"step": 10, "heldout_task/loss": 3.0}]}
    assert figures.training_curves(ReportInputs(name="x", curves=curves).numbers) is None


def test_students_of_one_figure_have_different_colors_or_markers(inputs):
    numbers = inputs.numbers
    looks = [(plotting.color(numbers, student), plotting.marker(student)) for student in numbers.students]
    assert len(set(looks)) == len(STUDENTS)


def test_every_line_of_a_figure_has_its_own_color_and_style(inputs):
    kinds = (("ngrams", ""), ("ngrams", "labeled"), ("probe", ""), ("finetuned", ""), ("scratch", ""))
    rows = [Student(kind, "", teacher) for kind, teacher in (*kinds, ("scratch", "labeled"), ("initialized", ""))]
    rows += [Student("mlm", "task", ""), Student("mlm", "task", "initialized")]
    rows += [
        Student("distilled", name, teacher)
        for name in ("generic", "task")
        for teacher in ("generic", "adapted", "schedule", "average", "chain")
    ]
    shades = [plotting.color(inputs.numbers, who) for who in [*rows, *inputs.numbers.teachers]]
    assert len(set(shades)) == len(shades) - 1, "only what starts from the teacher shares a color, with other markers"
    assert len(set(plotting.DASHES.values())) == len(plotting.DASHES)
    assert len(set(plotting.STROKES)) == len(plotting.STROKES)
    legend = figures.training_curves(inputs.numbers).legends[0].get_lines()
    looks = [(line.get_color(), str(vars(line)["_dash_pattern"])) for line in legend]
    assert len(looks) == 7 and all(len(set(column)) == 7 for column in zip(*looks))


def test_the_answer_has_every_row_with_its_interval_and_lines_at_the_baselines(inputs):
    numbers = inputs.numbers
    dc, icner = figures.answer(numbers).axes
    assert [text.get_text() for text in dc.get_yticklabels()] == [numbers.label(who) for who in numbers.students]
    for panel, task in ((dc, "dc"), (icner, "icner")):
        for row, who in enumerate(numbers.students):
            counts = numbers.errors(who, figures.HEADLINE[task])
            interval = figures.error_rate(counts)
            assert interval is not None
            rate, low, high = interval
            assert low < rate < high
            assert (round(100 * rate, 6), float(row)) in drawn(panel)
            assert {(round(100 * low, 6), float(row)), (round(100 * high, 6), float(row))} <= drawn(panel)
        ends = [np.asarray(line.get_xdata()) for line in panel.lines]
        lines = [x[0] for x in ends if len(x) == 2 and x[0] == x[1]]
        scratch = numbers.errors(numbers.scratch, figures.HEADLINE[task])
        assert lines == [100 * float(scratch.rates.mean())]


def test_nothing_to_show_is_none():
    numbers = ReportInputs(name="x").numbers
    assert figures.answer(numbers) is None
    assert figures.heldout_loss(numbers) is None
    assert figures.share_curves(numbers) is None
    assert figures.by_locale(numbers) is None
    assert figures.by_test_set(numbers) is None
    assert figures.teacher_noise(numbers) is None
    assert figures.similarity_scatter(numbers) is None
    assert figures.training_curves(numbers) is None


def test_files_are_whole_images_and_the_same_each_time(inputs, tmp_path):
    plotting.write_figure(figures.teacher_noise(inputs.numbers), tmp_path, "noise")
    first = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    plotting.write_figure(figures.teacher_noise(inputs.numbers), tmp_path, "noise")
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == first
    assert (tmp_path / "noise.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "noise.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["noise.png", "noise.svg"]


@pytest.mark.parametrize("spread", [0.0, 10.0])
def test_no_name_covers_another_where_domains_crowd(spread):
    """Eighteen domains close together: names do not overlap, are in the order of their points and in the figure."""
    names = [f"domain number {index}" for index in range(18)]
    figure, axes = plotting.panel_grid(1, 1, 4.3)
    panel = axes[0, 0]
    rng = np.random.default_rng(0)
    x, y = 0.3 + 0.01 * rng.random(18), spread * rng.random(18)
    panel.plot(x, y, "o")
    figures.name_points(panel, names, x, y, figures.LINE / 3.4)
    figure.savefig(io.BytesIO(), format="png")
    boxes = [Text.get_window_extent(text) for text in panel.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(one.x0 > panel.get_window_extent().x1 and one.x1 < figure.bbox.x1 for one in boxes)
    assert all(figure.bbox.y0 < one.y0 and one.y1 < figure.bbox.y1 for one in boxes)
    heights = {text.get_text(): box.y0 for text, box in zip(panel.texts, boxes)}
    assert [heights[names[index]] for index in np.argsort(y, kind="stable")] == sorted(heights.values())
