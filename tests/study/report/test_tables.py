"""The numbers in the tables against hand computations on a handful of results."""

import pytest

from kd_jax.study.plan import Student
from kd_jax.study.report import tables
from kd_jax.study.report.numbers import Numbers, ReportInputs
from kd_jax.text_tables import aligned_table
from tests.support.report_inputs import LATENCY, synthetic_inputs

SHARES = {"generic": 0.0, "half": 0.5, "task": 1.0}


def row(
    student, set_name, teacher, seed, value, task="dc", metric="error_rate", test_set="test", scope="all", locale="all"
):
    place = {"scope": scope, "locale": locale, "domain": "all", "test_set": test_set}
    who = {"student": student, "transfer_set": set_name, "teacher": teacher, "seed": seed}
    return {**who, "task": task, **place, "metric": metric, "value": value, "count": 200}


def dc_rows():
    rows = [row("scratch", "", "", seed, value) for seed, value in enumerate((0.30, 0.30, 0.30))]
    rows += [row("distilled", "generic", "generic", seed, value) for seed, value in enumerate((0.20, 0.20, 0.20))]
    rows += [row("distilled", "task", "generic", seed, value) for seed, value in enumerate((0.10, 0.12, 0.14))]
    return rows


def numbers_of(results) -> Numbers:
    return ReportInputs(name="x", results=results, task_shares=SHARES).numbers


def test_result_table_is_mean_deviation_and_relative_change():
    table = tables.result_table(numbers_of(dc_rows()))
    by_name = {cells[0]: cells[1] for cells in table.rows}
    assert list(by_name) == ["from scratch", "distilled, generic only", "distilled, task 100 %"]
    # (.10, .12, .14): mean .12, sample standard deviation .02; .12 / .20 - 1 = -40 %. The seeds' ratios .5, .6, .7 have
    # a standard error of .1 / sqrt(3) = .0577, and t(.975, 2) = 4.303: +-24.8 points, up to the resampling.
    value, change = by_name["distilled, task 100 %"].split("\n")
    assert value == "12.00 ± 2.00"
    assert change.startswith("−40.0 % [")
    low, high = (float(end.replace("−", "-")) for end in change.split("[")[1].rstrip("]").split(", "))
    assert low == pytest.approx(-64.8, abs=2.5) and high == pytest.approx(-15.2, abs=2.5)
    assert by_name["distilled, generic only"] == "20.00 ± 0.00\nreference"
    assert by_name["from scratch"].startswith("30.00 ± 0.00\n+50.0 %")
    assert "200 utterances for DC" in table.caption
    assert table.strong == [1]


def test_one_seed_without_records_has_neither_spread_nor_interval():
    rows = [entry for entry in dc_rows() if entry["seed"] == 0]
    table = tables.result_table(numbers_of(rows))
    assert table.rows[2] == ["distilled, task 100 %", "10.00\n−50.0 % (no interval)"]
    assert "one seed (so no spread)" in table.caption


def test_rows_without_a_seed_are_shown_next_to_the_students():
    rows = [row("probe", "", "", None, 0.11), row("scratch", "", "labeled", 0, 0.25), *dc_rows()]
    rows += [row("ngrams", "", "", None, 0.15), row("initialized", "", "", 1, 0.2), row("finetuned", "", "", 0, 0.05)]
    rows += [row("mlm", "task", teacher, 0, 0.3) for teacher in ("initialized", "")]
    numbers = numbers_of(rows)
    assert numbers.seeds() == [0, 1, 2] and numbers.values(Student("ngrams"), "dc", "error_rate") == {None: 0.15}
    cells = {name: cell.split("\n")[0] for name, cell in tables.result_table(numbers).rows}
    assert list(cells.items())[:8] == [
        ("n-grams", "15.00"),
        ("teacher, frozen, linear probe", "11.00"),
        ("teacher, finetuned", "5.00"),
        ("from scratch", "30.00 ± 0.00"),
        ("from scratch, labels by the teacher", "25.00"),
        ("from the teacher, not distilled", "20.00"),
        ("MLM only, task 100 %", "30.00"),
        ("MLM only from the teacher, task 100 %", "30.00"),
    ]
    assert numbers.scratch == Student("scratch")


def test_recipe_table_has_every_trial_and_counts_them():
    found = {"student": "ngrams", "task": "icner", "dev_score": 0.5, "chosen": True}
    recipes = [
        {**found, "part": part, "c": c, "chosen": c == 10} for part in ("intent", "slots") for c in (1.0, 10.0, 100.0)
    ]
    recipe = {"learning_rate": 1e-3, "epochs": 5, "pooling": "mean"}
    recipes += [{**found, **recipe, "student": "scratch"}, {**found, **recipe, "student": "scratch", "epochs": 20}]
    recipes[-1]["encoder_rate"] = 0.25
    results = [row("ngrams", "", "", None, 0.1, "icner", "intent_error_rate"), row("scratch", "", "", 0, 0.1)]
    table = tables.recipe_table(ReportInputs(name="x", results=results, recipes=recipes).numbers)
    assert table.rows[1] == ["n-grams", "ICNER, intent", "C = 10", "50.00", "chosen"]
    assert table.rows[3][1:3] == ["ICNER, slots", "C = 1"]
    recipe = "learning rate 0.001 (0.00025 for the encoder), 20 epochs, pooling mean"
    assert table.rows[7] == ["from scratch", "ICNER", recipe, "50.00", "chosen"]
    assert "Trials of each row and task: 2 for from scratch; 3 for n-grams." in table.caption


def test_scores_are_shown_and_error_rates_compared():
    rows = []
    for set_name, f1 in (("generic", 0.80), ("task", 0.90)):
        rows.append(row("distilled", set_name, "generic", 0, f1, "icner", "slot_f1"))
        rows.append(row("distilled", set_name, "generic", 0, 1 - f1, "icner", "slot_error_rate"))
    table = tables.result_table(numbers_of(rows))
    column = list(table.header).index("Slot F1 ↑")
    assert table.rows[1][column] == "90.00\n−50.0 % (no interval)"
    assert table.rows[1][list(table.header).index("SemER ↓")] == "–\n–"


def test_undefined_values_are_dashes():
    rows = dc_rows()
    for entry in rows:
        if entry["student"] == "scratch":
            entry["value"] = None
    assert tables.result_table(numbers_of(rows)).rows[0] == ["from scratch", "–\n–"]


def test_a_missing_reference_is_said():
    rows = [entry for entry in dc_rows() if entry["transfer_set"] != "generic"]
    table = tables.result_table(numbers_of(rows))
    assert "no distilled student with generic text only" in table.caption
    assert table.rows[0][1].endswith("\n–")


def test_labels_name_share_and_teacher():
    numbers = numbers_of(dc_rows())
    assert numbers.label(Student("mlm", "half")) == "MLM only, task 50 %"
    assert numbers.label(Student("distilled", "task", "adapted")) == "distilled, task 100 %, adapted teacher"
    twice = ReportInputs(name="x", task_shares={"first": 1.0, "second": 1.0}).numbers
    assert twice.label(Student("distilled", "second", "generic")) == "distilled, task 100 % (second)"
    for target, text in (("language", "selected generic"), ("random", "a random part of generic")):
        config = {"select": {"target": target}}
        inputs = ReportInputs(name="x", task_shares={"all": 0.0, "half": 0.5}, selected=("all", "half"), config=config)
        assert inputs.numbers.label(Student("distilled", "all", "generic")) == f"distilled, {text}"
        assert inputs.numbers.label(Student("distilled", "half", "generic")) == f"distilled, task 50 % and {text}"


def test_students_are_ordered_baselines_first_then_by_share():
    rows = [row("distilled", "task", "adapted", 0, 0.1), *reversed(dc_rows()), row("mlm", "task", "", 0, 0.1)]
    rows.append(row("distilled", "half", "generic", 0, 0.1))
    names = [student.name for student in numbers_of(rows).students]
    distilled = [
        "distilled-generic-generic",
        "distilled-half-generic",
        "distilled-task-generic",
        "distilled-task-adapted",
    ]
    assert names == ["scratch", "mlm-task", *distilled]


def test_heldout_table_has_each_models_own_unigram():
    rows = []
    for seed, loss in enumerate((4.0, 4.2)):
        rows.append(row("distilled", "task", "generic", seed, loss, "mlm", "loss", "heldout_task"))
        rows.append(row("distilled", "task", "generic", seed, 0.30, "mlm", "accuracy", "heldout_task"))
        rows.append(row("distilled", "task", "generic", seed, 6.08, "mlm", "unigram_loss", "heldout_task"))
    rows.append(row("teacher", "", "generic", 0, 6.5, "mlm", "loss", "heldout_task"))
    rows.append(row("teacher", "", "generic", 0, 6.7, "mlm", "unigram_loss", "heldout_task"))
    cells = {name: rest for name, *rest in tables.heldout_table(numbers_of(rows)).rows}
    nothing = ["–"] * 3
    assert cells["distilled, task 100 %"] == ["4.10 ± 0.14", "6.08", "30.0 ± 0.0", *nothing]
    assert cells["generic teacher"] == ["6.50", "6.70", "–", *nothing]


def test_teacher_table_goes_by_text_and_language():
    rows = []
    for locale, loss in (("all", 5.0), ("de", 5.5), ("en", 4.5)):
        place = {"test_set": "heldout_generic", "locale": locale, "scope": "all" if locale == "all" else "locale"}
        for metric, value in (("loss", loss), ("accuracy", 0.25), ("unigram_loss", 7.0)):
            rows.append(row("teacher", "", "generic", 0, value, "mlm", metric, **place))
    table = tables.teacher_table(numbers_of(rows))
    assert [cells[:2] for cells in table.rows] == [["generic", "all"], ["generic", "de"], ["generic", "en"]]
    assert table.rows[1] == ["generic", "de", "7.00", "5.50", "25.0"]


def test_text_table_shows_epochs_and_leaves_out_what_was_not_drawn():
    table = tables.text_table(synthetic_inputs(students={}, tasks=()).numbers)
    assert [cells[:2] for cells in table.rows] == [
        ["generic", "generic-en"],
        ["mix50", "generic-en"],
        ["mix50", "task-en"],
        ["task", "task-en"],
    ]
    assert table.rows[-1] == ["task", "task-en", "512,000", "100 %", "8.53", "60,000", "2 %"]


def test_time_table_adds_by_phase_and_leaves_unknown_times_out():
    seconds = {
        "dc-scratch-seed0": 2.0,
        "dc-mlm-task-seed0": 3.0,
        "test-dc-scratch-seed0": float("nan"),
        "prepare": 10.0,
    }
    rows = {cells[0]: cells[1:] for cells in tables.time_table(seconds).rows}
    assert rows["finetune DC, recipe search included"] == ["2", "5"]
    assert rows["evaluate"] == ["1", "–"]
    assert rows["all"] == ["4", "15"]


def test_latency_table_has_a_row_for_each_encoder():
    table = tables.latency_table(LATENCY)
    assert table.header[0] == "Encoder" and table.header[-1] == "64 utterances, times as fast as the teacher"
    teacher, student = table.rows
    assert teacher == [
        "teacher",
        "3 × 192",
        "1,768,000",
        "1,000,000",
        "7.07",
        "1.77",
        "6.00 (7.00)",
        "24.00 (25.00)",
        "reference",
    ]
    assert student[-3:] == ["2.00 (3.00)", "8.00 (9.00)", "3.0"]


def test_the_terminal_table_is_aligned():
    table = tables.terminal_table(numbers_of(dc_rows()))
    lines = aligned_table(table.header, table.rows, rule=True, width=100).splitlines()
    assert lines[0].startswith("Student") and set(lines[1]) == {"-"}
    assert lines[2].index("30.0 ± 0.0") == lines[3].index("20.0 ± 0.0")
