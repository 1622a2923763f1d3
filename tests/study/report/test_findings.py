"""Verdicts, gains by domain and the paper's findings on results whose answer is known."""

import dataclasses

import pytest

from kd_jax.study.report import findings
from kd_jax.study.report.contrasts import verdict_text
from kd_jax.study.report.numbers import LOSS, ReportInputs
from kd_jax.study.report.wording import signed
from tests.support.report_inputs import DOMAINS, synthetic_inputs

SHARES = {"generic": 0.0, "task": 1.0}


def rows_of(student, set_name, teacher, values, task="dc", metric="error_rate", test_set="test"):
    place = {"scope": "all", "locale": "all", "domain": "all", "test_set": test_set, "count": 100}
    who = {"student": student, "transfer_set": set_name, "teacher": teacher, "task": task, "metric": metric}
    return [{**who, **place, "seed": seed, "value": value} for seed, value in enumerate(values)]


def numbers_of(*groups, **more):
    return ReportInputs(
        name="x", results=[row for group in groups for row in group], task_shares=SHARES, **more
    ).numbers


GENERIC = rows_of("distilled", "generic", "generic", (0.200, 0.201, 0.199))
TASK = rows_of("distilled", "task", "generic", (0.100, 0.102, 0.099))
SCRATCH = rows_of("scratch", "", "", (0.150, 0.151, 0.148))


def test_a_clear_winner_is_named_with_its_interval():
    text = verdict_text(numbers_of(GENERIC, TASK), "dc")
    assert text.startswith(
        "**DC: task text wins over generic text.** Distilled students have an error of 10.03 % on task text, 20.00 % "
        "on generic text (−49.8 % ["
    )


def test_seeds_that_disagree_give_no_winner():
    wide = rows_of("distilled", "task", "generic", (0.17, 0.22, 0.19))
    text = verdict_text(numbers_of(GENERIC, wide), "dc")
    assert text.startswith(
        "**DC: no winner at this size.** Task text and generic text do not differ significantly: an error of 19.33 % on"
    )


def test_task_only_has_to_beat_every_other_transfer_set():
    half = rows_of("distilled", "half", "generic", (0.101, 0.100, 0.103))
    inputs = numbers_of(GENERIC, TASK, half).inputs
    numbers = dataclasses.replace(inputs, task_shares={**SHARES, "half": 0.5}).numbers
    answer = findings.task_only_is_best(numbers, "dc")
    assert answer.status == findings.OPEN and answer.reason.startswith("lowest; against the next, task 50 %, −")


def test_findings_are_seen_not_seen_or_undecided():
    numbers = numbers_of(GENERIC, TASK, SCRATCH)
    assert findings.distilled_beats_scratch(numbers, "dc").status == findings.SEEN
    assert findings.task_only_is_best(numbers, "dc").status == findings.SEEN
    assert findings.adapted_is_better(numbers, "dc").status == findings.NOT_RUN
    # Turned round: generic text wins, and both students are worse than from scratch.
    swapped = numbers_of(
        rows_of("distilled", "generic", "generic", (0.200, 0.201, 0.199)),
        rows_of("distilled", "task", "generic", (0.300, 0.302, 0.299)),
        SCRATCH,
    )
    assert findings.distilled_beats_scratch(swapped, "dc").status == findings.NOT_SEEN
    assert findings.task_only_is_best(swapped, "dc").status == findings.NOT_SEEN
    two_seeds = numbers_of(GENERIC[:2], TASK[:2], SCRATCH[:2])
    assert findings.distilled_beats_scratch(two_seeds, "dc").status == findings.OPEN


def test_adapted_teacher_is_compared_on_the_same_transfer_set():
    adapted = rows_of("distilled", "task", "adapted", (0.090, 0.091, 0.088))
    answer = findings.adapted_is_better(numbers_of(GENERIC, TASK, adapted), "dc")
    assert answer.status == findings.SEEN
    assert answer.reason.startswith("on task 100 %, adapted against generic teacher −10.6 % [")


def test_heldout_loss_has_its_own_verdict():
    place = {"task": "mlm", "metric": "loss", "test_set": "heldout_task"}
    numbers = numbers_of(
        rows_of("distilled", "generic", "generic", (7.00, 7.05, 7.10), **place),
        rows_of("distilled", "task", "generic", (4.60, 4.63, 4.69), **place),
    )
    text = findings.loss_text(numbers)
    assert text is not None
    assert "lowest for task 100 %: 4.64 nats per masked token, against 7.05 (generic only)." in text
    assert findings.task_only_is_best(numbers, LOSS).status == findings.SEEN


def test_students_no_better_than_a_unigram_are_named():
    def heldout(student, set_name, teacher, task_loss, generic_loss):
        rows = []
        for kind, loss, unigram in (("task", task_loss, 7.4), ("generic", generic_loss, 8.1)):
            place = {"task": "mlm", "test_set": f"heldout_{kind}"}
            rows += rows_of(student, set_name, teacher, (loss, loss), metric="loss", **place)
            rows += rows_of(student, set_name, teacher, (unigram, unigram), metric="unigram_loss", **place)
        return rows

    # The generic one is below the unigram on its own kind of text, which is enough to have learned something.
    learned = heldout("distilled", "generic", "generic", 8.3, 7.9)
    plateau = heldout("distilled", "task", "generic", 7.4, 9.0)
    text = findings.unigram_text(numbers_of(learned, plateau))
    assert text.startswith("No better than a unigram on held-out text, of the task or generic: distilled, task 100 %.")
    assert findings.unigram_text(numbers_of(learned, SCRATCH)) is None
    weights = {"hidden": {"weight": 1.0}, "kl": {"weight": 0.0}}
    inner = numbers_of(learned, plateau, config={"distill": weights})
    assert findings.unigram_text(inner) is None, "their heads say nothing of the states they learned"


def test_domain_gains_are_relative_error_reductions():
    inputs = synthetic_inputs(size=120, tasks=("dc",))
    gains = findings.domain_gains(inputs.numbers)
    assert [gain.domain for gain in gains] == list(DOMAINS)  # in the order of their divergence

    def rate(set_name: str, domain: str) -> float:
        wrong = total = 0
        for seed in (0, 1, 2):
            for record in inputs.records["distilled", set_name, "generic", seed, "dc"]:
                if record["domain"] == domain:
                    wrong += record["predicted_domain"] != domain
                    total += 1
        return wrong / total

    for domain, divergence, gain in findings.similarity_points(gains, "dc"):
        assert gain == pytest.approx(1 - rate("task", domain) / rate("generic", domain))
        assert divergence == pytest.approx(0.25 + 0.04 * DOMAINS.index(domain))


def test_unmatched_divergence_is_used_where_texts_are_too_short_to_match():
    inputs = synthetic_inputs(size=12, tasks=("dc",))
    short = [{**row, "jsd_matched": None} for row in inputs.similarity]
    rows = findings.domain_gains(dataclasses.replace(inputs, similarity=short).numbers)
    assert findings.divergence_key(rows) == "jsd"
    assert findings.divergence_key(findings.domain_gains(inputs.numbers)) == "jsd_matched"


def test_too_few_domains_have_no_correlation():
    inputs = synthetic_inputs(size=60, tasks=("dc",))
    numbers = dataclasses.replace(inputs, similarity=inputs.similarity[:2]).numbers
    answer = findings.gain_correlates(findings.domain_gains(numbers), "dc")
    assert answer.status == findings.NOT_RUN and "2 domains" in answer.reason


@pytest.mark.parametrize(("value", "text"), [(1.25, "+1.2"), (-0.04, "0.0"), (-12.0, "−12.0"), (0.0, "0.0")])
def test_signed_numbers(value, text):
    assert signed(value) == text
