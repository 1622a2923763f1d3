"""The report's recommendation: only what the declared comparisons decided, without statistical terms."""

import dataclasses

import pytest

from kd_jax.study.report.recommendation import recommendation
from kd_jax.study.report.report import compose
from tests.study.report.test_contrasts import ALL, GENERIC_TEXT, INITIALIZED, TASK, study
from tests.study.report.test_findings import rows_of
from tests.support.report_inputs import synthetic_inputs

MLM = ("mlm", "task", "")
SURER = "add seeds: `--config.study.seeds='(0,1,2,3,4)'`"


@pytest.mark.parametrize(
    ("rates", "title"),
    [
        (ALL, "use task text and distill"),
        ({TASK: 0.22, GENERIC_TEXT: 0.18, MLM: 0.25}, "use generic text and distill"),
        ({TASK: 0.22, GENERIC_TEXT: 0.27, MLM: 0.15}, "use task text, and do not distill"),
        ({**ALL, ("mlm", "task", INITIALIZED): 0.15}, "use task text; whether to distill is open"),
        ({TASK: 0.15, GENERIC_TEXT: 0.21}, "use task text; whether to distill is open"),
        ({TASK: 0.2, MLM: 0.25}, "distill; which text is better is open"),
        ({TASK: 0.2, GENERIC_TEXT: 0.2, MLM: 0.2}, "nothing is decided yet"),
        ({**ALL, ("ngrams", "", ""): 0.10}, "keep the n-grams"),
        ({**ALL, ("ngrams", "", ""): 0.149}, "keep the n-grams"),
        (
            {**ALL, ("ngrams", "", ""): 0.153},
            "keep the n-grams until a student is shown to beat them; for students, use task text and distill",
        ),
    ],
)
def test_the_recommendation_follows_from_the_decisions(rates, title):
    assert recommendation(study(rates), "dc").title == f"domains (DC): {title}"


@pytest.mark.parametrize("seeds, words", [((0,), "one seed"), ((0, 1), "two seeds")])
def test_too_few_seeds_recommend_nothing_but_more_of_them(seeds, words):
    found = recommendation(study({TASK: 0.15, GENERIC_TEXT: 0.21, MLM: 0.25}, seeds), "dc")
    assert found.title == "domains (DC): nothing is decided yet" and found.next_step == SURER
    assert found.reason.count(f"fewer errors on these utterances, but {words} cannot decide") == 2
    assert found.evidence.startswith("weak; nothing behind this is decided; every student was trained ")


def test_evidence_counts_the_decided_comparisons_and_the_seeds():
    assert recommendation(study(ALL), "dc").evidence == (
        "good; all 4 comparisons behind this are decided; every student was trained 3 times"
    )
    five = recommendation(study(ALL, (0, 1, 2, 3, 4)), "dc")
    assert five.evidence.startswith("strong; ")
    assert five.next_step.endswith("'(0,1,2,3,4,5,6,7,8,9)'`")
    partial = recommendation(study({**ALL, ("mlm", "task", INITIALIZED): 0.15}), "dc")
    assert partial.evidence.startswith("partial; 3 of the 4 comparisons behind this are decided")


def test_a_gain_is_reported_with_its_range():
    found = recommendation(study(ALL), "dc")
    assert found.reason.startswith(
        "A student distilled on task text has 15.5 % wrong domains, one on generic text 22.0 %: "
    )
    assert "29 % fewer errors (between 24 and 35 %)" in found.reason
    assert "(n-grams), without a neural network: 28 % fewer errors (between" in found.reason


def test_ngrams_that_win_and_students_that_learned_nothing_ask_for_longer_training():
    config = {"distill": {"steps": 50}}
    found = recommendation(study({**ALL, ("ngrams", "", ""): 0.10}, config=config), "dc")
    assert found.next_step == "distill longer: `--config.distill.steps=200`"
    assert "(n-grams), without a neural network, have 9.6 % wrong domains; the best student" in found.reason
    inputs = study(ALL, config=config).inputs
    place = {"task": "mlm", "test_set": "heldout_task"}
    losses = [
        row
        for metric, value in (("loss", 8.0), ("unigram_loss", 7.0))
        for row in rows_of(*TASK, (value,) * 3, metric=metric, **place)
    ]
    weak = dataclasses.replace(inputs, results=[*inputs.results, *losses])
    assert recommendation(weak.numbers, "dc").next_step.startswith("distill longer")


@pytest.mark.parametrize(
    ("rates", "other"), [({TASK: 0.2, MLM: 0.25}, "generic text alone"), ({GENERIC_TEXT: 0.2, MLM: 0.25}, "task text")]
)
def test_a_missing_transfer_set_is_suggested(rates, other):
    assert other in recommendation(study(rates), "dc").next_step


def test_it_uses_no_statistical_terms():
    top = compose(synthetic_inputs(size=60), [])["What to do"]
    assert "Intents and slots (ICNER): use task text and distill" in top
    for word in ("ρ", "Holm", "p-value", "p =", "masked LM", "adjusted", "contrast", "null"):
        assert word not in top
