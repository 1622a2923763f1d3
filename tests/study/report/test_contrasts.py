"""The declared comparisons and the verdict from them, on results with a known answer."""

import numpy as np
import pytest

from kd_jax.evaluation.significance import HIGHER, LOWER, UNDECIDED
from kd_jax.study.plan import Student
from kd_jax.study.report import contrasts, tables
from kd_jax.study.report.contrasts import GENERIC, MLM, NGRAMS, SCRATCH
from kd_jax.study.report.numbers import Numbers, ReportInputs
from kd_jax.study.report.recommendation import recommendation
from kd_jax.study.report.report import WIDTH, compose, summary_text
from tests.support.report_inputs import dc_record

SHARES = {"generic": 0.0, "half": 0.5, "task": 1.0}
INITIALIZED = "initialized"
TASK, GENERIC_TEXT = ("distilled", "task", "generic"), ("distilled", "generic", "generic")
UTTERANCES = 900
SEEDS = (0, 1, 2)


def answers(who, rate, seed, *, noise=0.02):
    """Wrong answers on the same hard utterances for all students, with a little noise per student and seed."""
    hard = np.random.default_rng(7).random(UTTERANCES)
    own = np.random.default_rng([*map(ord, "-".join(who)), seed or 0])
    return hard + noise * own.standard_normal(UTTERANCES) < rate


def study(rates, seeds=SEEDS, **changes) -> Numbers:
    """rates: (kind, transfer set, teacher) -> DC error rate; n-grams and probe have no seed."""
    rows, records = [], {}
    for who, rate in rates.items():
        for seed in (None,) if who[0] in ("ngrams", "probe") else seeds:
            wrong = answers(who, rate, seed)
            records[(*who, seed, "dc")] = [
                dc_record(number, "en-US", "alarm", not one) for number, one in enumerate(wrong)
            ]
            place = {"scope": "all", "locale": "all", "domain": "all", "test_set": "test", "count": UTTERANCES}
            name = dict(zip(("student", "transfer_set", "teacher", "seed"), (*who, seed)))
            rows.append({**name, "task": "dc", "metric": "error_rate", "value": float(wrong.mean()), **place})
    return ReportInputs(**{"name": "x", "results": rows, "records": records, "task_shares": SHARES, **changes}).numbers


ALL = {
    ("ngrams", "", ""): 0.20,
    ("scratch", "", ""): 0.26,
    (INITIALIZED, "", ""): 0.22,
    ("mlm", "task", ""): 0.25,
    ("mlm", "task", INITIALIZED): 0.21,
    GENERIC_TEXT: 0.21,
    TASK: 0.15,
}


def test_everything_is_compared_with_the_student_on_most_task_text():
    numbers = study(ALL)
    found = contrasts.declared(numbers, "dc")
    assert list(found) == [GENERIC, SCRATCH, INITIALIZED, MLM, NGRAMS]
    assert {one.student for one in found.values()} == {Student(*TASK)}
    # MLM alone from the same initialization is preferred to MLM alone from a random one.
    assert found[MLM].reference == Student("mlm", "task", INITIALIZED)
    assert {one.status for one in found.values()} == {LOWER}
    p_values = [one.decision.difference.p_value for one in found.values() if one.decision]
    adjusted = [one.decision.adjusted for one in found.values() if one.decision]
    assert max(adjusted) >= 2 * min(p_values) and all(a >= p for a, p in zip(adjusted, p_values))
    # In a study whose largest share is half, that is the declared student, wherever the lowest error is.
    half = study({("distilled", "half", "generic"): 0.3, GENERIC_TEXT: 0.2})
    assert contrasts.declared_student(half) == Student("distilled", "half", "generic")


def test_the_declared_student_is_not_the_one_with_the_lowest_error():
    numbers = study({TASK: 0.22, ("distilled", "half", "generic"): 0.15, GENERIC_TEXT: 0.20, ("scratch", "", ""): 0.25})
    assert contrasts.declared_student(numbers) == Student(*TASK)
    text = contrasts.verdict_text(numbers, "dc")
    assert text.startswith("**DC: generic text wins over task text.** Distilled students have an error of ")


def test_a_clear_study_says_who_won_and_that_distillation_helps():
    text = contrasts.verdict_text(study(ALL), "dc")
    assert text.startswith("**DC: task text wins over generic text.** ")
    assert "**Distillation helps.** Against masked LM alone (MLM only from the teacher, task 100 %): −" in text
    assert "Against its own start without distillation: −" in text and "Against training from scratch: −" in text


@pytest.mark.parametrize("rival", [(INITIALIZED, "", ""), ("mlm", "task", INITIALIZED)])
def test_distillation_helps_only_if_it_beats_its_own_start_and_masked_lm_alone(rival):
    """Being far better than from scratch is not enough."""
    numbers = study({**ALL, rival: ALL[TASK]})
    found = contrasts.declared(numbers, "dc")
    assert found[SCRATCH].status == LOWER
    text = contrasts.verdict_text(numbers, "dc")
    assert "Distillation helps" not in text
    assert "**Distillation is not shown to help.**" in text
    assert "That it beats training from scratch may be due to its initialization or its text alone." in text
    worse = contrasts.verdict_text(study({**ALL, rival: 0.10}), "dc")
    assert "**Distillation does not help.**" in worse


def test_without_masked_lm_alone_whether_distillation_helps_is_open():
    rates = {who: rate for who, rate in ALL.items() if who[0] != "mlm"}
    text = contrasts.verdict_text(study(rates), "dc")
    assert "**Whether distillation itself helps is open.** No student was trained by masked LM alone." in text


def test_no_student_beats_the_ngrams_is_the_first_sentence():
    numbers = study({**ALL, ("ngrams", "", ""): 0.10})
    text = contrasts.verdict_text(numbers, "dc")
    assert text.startswith("**DC: no student beats n-grams.** Counts of words and letters, without any encoder, have ")
    assert "the best student, distilled, task 100 %, has" in text and ", higher)." in text
    lines = summary_text(numbers.inputs).splitlines()
    assert lines[2].startswith("Domains (DC): keep the n-grams. Evidence: good") and max(map(len, lines)) <= WIDTH
    # A lower error that may be chance is not enough; any student that is significantly lower is.
    tied = contrasts.verdict_text(study({**ALL, ("ngrams", "", ""): 0.151}), "dc")
    assert tied.startswith("**DC: no student ")
    beaten = study({**ALL, TASK: 0.205, ("distilled", "half", "generic"): 0.10})
    assert contrasts.verdict_text(beaten, "dc").startswith("**DC: no winner at this size.**")


def test_ngrams_without_slots_are_compared_on_intents():
    rows = []
    for who, seed, errors in (
        *((TASK, seed, {"semer": 0.4, "intent_error_rate": 0.3 + seed / 100}) for seed in SEEDS),
        (("ngrams", "", ""), None, {"semer": None, "intent_error_rate": 0.1}),
    ):
        for metric, value in errors.items():
            place = {"scope": "all", "locale": "all", "domain": "all", "test_set": "test", "count": 10}
            name = dict(zip(("student", "transfer_set", "teacher", "seed"), (*who, seed)))
            rows.append({**name, "task": "icner", "metric": metric, "value": value, **place})
    numbers = ReportInputs(name="x", results=rows, task_shares=SHARES).numbers
    found = contrasts.declared(numbers, "icner")[NGRAMS]
    assert found.measure.error == "intent_error_rate" and found.status == HIGHER
    assert "have an intent error of 10.00 %" in contrasts.verdict_text(numbers, "icner")


def icner_study(semer, intents) -> Numbers:
    """semer, intents: (kind, transfer set, teacher) -> errors of three seeds, or of one row without a seed."""
    rows = []
    for metric, errors in (("semer", semer), ("intent_error_rate", intents)):
        for who, values in errors.items():
            for seed, value in enumerate(values):
                place = {"scope": "all", "locale": "all", "domain": "all", "test_set": "test", "count": 10}
                seeds = {"seed": seed if len(values) > 1 else None}
                name = dict(zip(("student", "transfer_set", "teacher"), who)) | seeds
                rows.append({**name, "task": "icner", "metric": metric, "value": value, **place})
    return ReportInputs(name="x", results=rows, task_shares=SHARES).numbers


def test_intent_errors_are_a_separate_family():
    ngrams = ("ngrams", "", "")
    semer = {ngrams: (0.3,), TASK: (0.4, 0.41, 0.42), GENERIC_TEXT: (0.45, 0.46, 0.47)}
    numbers = icner_study(semer, {ngrams: (0.5,), TASK: (0.3, 0.31, 0.32), GENERIC_TEXT: (0.35, 0.36, 0.37)})
    both = [contrasts.declared(numbers, "icner", *which)[NGRAMS] for which in ((), (contrasts.INTENT_ERROR,))]
    assert [one.status for one in both] == [HIGHER, LOWER]
    table = tables.declared_table(numbers)
    assert [row[0] for row in table.rows] == ["ICNER, semantic error rate"] * 2 + ["ICNER, intent error"] * 2
    said = recommendation(numbers, "icner")
    assert said.title.endswith("keep the n-grams")
    assert "On intents alone the student on task text is better than they are: 38 % fewer errors" in said.reason
    assert said.evidence.startswith("good; both comparisons behind this are decided")


def test_an_interval_without_zero_never_appears_with_no_winner():
    for seeds, words in (((0,), "one seed"), ((0, 1), "two seeds")):
        numbers = study(ALL, seeds)
        text = contrasts.verdict_text(numbers, "dc")
        assert f"ask text against generic text: lower on these utterances; {words} cannot decide.**" in text
        assert "Run the study again with `--config.study.seeds='(0,1,2,3,4)'`." in text
        assert "no winner" not in text and " wins " not in text and "Distillation helps" not in text
        assert {one.status for one in contrasts.declared(numbers, "dc").values()} == {UNDECIDED}


def test_a_difference_lost_to_the_adjustment_is_reported():
    """Lower on its own, but not after adjusting for five comparisons."""
    numbers = study({**ALL, **dict.fromkeys(ALL, 0.2), TASK: 0.196})
    found = contrasts.declared(numbers, "dc")
    words = {contrasts.reading(one.decision, 5) for one in found.values() if one.decision}
    for one in found.values():
        assert one.decision
        alone, said = one.decision.difference.p_value < 0.05, contrasts.reading(one.decision, 5)
        if one.status == UNDECIDED:
            assert said.startswith("lower on its own, but not after adjusting for 5") == alone
    assert any(said.startswith("lower on its own") for said in words)


def test_an_interval_of_one_seed_that_contains_zero_is_uninformative():
    text = contrasts.verdict_text(study({**ALL, TASK: ALL[GENERIC_TEXT]}, (0,)), "dc")
    assert "ask text against generic text: too few seeds to tell.**" in text and "no winner" not in text


def test_an_uninformative_interval_becomes_words():
    def rows(who, values):
        place = {"scope": "all", "locale": "all", "domain": "all", "test_set": "test", "count": 10}
        name = dict(zip(("student", "transfer_set", "teacher"), who))
        return [
            {**name, "seed": seed, "task": "dc", "metric": "error_rate", "value": value, **place}
            for seed, value in enumerate(values)
        ]

    results = rows(TASK, (0.15, 0.3, 0.2)) + rows(GENERIC_TEXT, (0.2, 0.3, 0.25))
    numbers = ReportInputs(name="x", results=results, task_shares=SHARES).numbers
    text = contrasts.verdict_text(numbers, "dc")
    assert text.startswith("**DC: task text against generic text: too few seeds to tell.**") and "[" not in text
    assert tables.result_table(numbers).rows[1][1].endswith("\ntoo few seeds to tell")


def test_comparisons_that_were_not_run_are_reported():
    numbers = study({TASK: 0.15, GENERIC_TEXT: 0.21})
    found = contrasts.declared(numbers, "dc")
    assert found[GENERIC].status == LOWER and found[NGRAMS].decision is None
    assert contrasts.left_out(numbers, "dc") == [
        "DC: not compared with training from scratch, because no student was trained from scratch.",
        "DC: not compared with its own start without distillation, because no student started from the teacher without "
        "distillation.",
        "DC: not compared with masked LM alone, because no student was trained by masked LM alone.",
        "DC: not compared with n-grams, because there are no n-grams.",
    ]
    section = compose(numbers.inputs, [])["Declared comparisons"]
    assert "- DC: not compared with n-grams" in section
    # Only comparisons that were made count for the adjustment.
    decision = found[GENERIC].decision
    assert decision and decision.adjusted == decision.difference.p_value


def test_the_trend_along_the_share_is_reported_separately():
    numbers = study({**ALL, ("distilled", "half", "generic"): 0.18})
    text = contrasts.trend_text(numbers, "dc")
    assert text and text.startswith(
        "DC: on a straight line from no task text to task text only, the error changes by −"
    )
    assert text.endswith("(3 seeds): more task text is better.")
    section = compose(numbers.inputs, [])["Declared comparisons"]
    assert "not adjusted with them" in section and text in section
    one_seed = contrasts.trend_text(study({**ALL, ("distilled", "half", "generic"): 0.18}, (0,)), "dc")
    assert one_seed and one_seed.endswith("it falls on these utterances; one seed cannot decide.")
    assert contrasts.trend_text(study(ALL), "dc") is None  # two shares are the difference itself
    selected = study({**ALL, ("distilled", "half", "generic"): 0.18}, selected=("half",))
    assert contrasts.trend_text(selected, "dc") is None


def test_the_report_says_what_has_no_seed_and_what_is_exploratory():
    numbers = study(ALL)
    sections = compose(numbers.inputs, [])
    assert "(no seed, so no spread: n-grams)" in sections["Results"]
    by_name = {cells[0]: cells[1] for cells in tables.result_table(numbers).rows}
    assert "±" not in by_name["n-grams"] and "±" in by_name["from scratch"]
    assert "Rows without a seed (n-grams) are deterministic" in sections["Declared comparisons"]
    assert "Everything else in this report is exploratory" in sections["Declared comparisons"]
    for name in ("Results", "Unseen and tail utterances"):
        assert "Exploratory: " in sections[name] or "There are no results" in sections[name]
    assert "over 3 seeds" in sections["Results"]
    assert [student.kind for student in numbers.students][:3] == ["ngrams", "scratch", INITIALIZED]


def test_ids_that_are_not_translations_are_reported():
    def inputs(intents):
        rows = []
        for number in range(40):
            for locale, intent in zip(("de-DE", "en-US"), intents):
                rows.append({**dc_record(number, locale, "alarm", True), "intent": intent})
        place = {"scope": "all", "locale": "all", "domain": "all", "test_set": "test", "count": 80}
        who = {"student": "scratch", "transfer_set": "", "teacher": "", "seed": 0}
        row = {**who, "task": "dc", "metric": "error_rate", "value": 0.0, **place}
        return ReportInputs(name="x", results=[row], records={("scratch", "", "", 0, "dc"): rows})

    same, other = inputs(("set", "set")), inputs(("set", "stop"))
    assert len(same.numbers.errors(Student("scratch"), contrasts.HEADLINE["dc"]).ids) == 40
    assert len(other.numbers.errors(Student("scratch"), contrasts.HEADLINE["dc"]).ids) == 80
    assert "All locales of one utterance count together" in compose(same, [])["Results"]
    assert "40 of 40 test ids that locales share have different intents" in compose(other, [])["Results"]
