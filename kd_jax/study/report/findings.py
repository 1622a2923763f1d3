"""What a study shows: the best transfer set, gains by domain, and the paper's findings checked against the numbers.

Sentences are Markdown. The paper is Peris et al. 2022, "Knowledge Distillation Transfer Sets and their Impact on
Downstream NLU Tasks" (arXiv 2210.04834).
"""

from typing import NamedTuple

import numpy as np

from kd_jax.evaluation.significance import HIGHER, LOWER, UNDECIDED, Decision, Difference, decide
from kd_jax.evaluation.similarity import RankCorrelation, rank_correlation
from kd_jax.study.plan import Student
from kd_jax.study.report.contrasts import SCRATCH, declared
from kd_jax.study.report.numbers import HEADLINE, JUDGED, LOSS, Numbers, Place
from kd_jax.study.report.wording import label, listed, plural, relative, relative_text, set_name, signed

SEEN, NOT_SEEN, OPEN, NOT_RUN = "seen", "not seen", "undecided", "not run"
STATUSES = {LOWER: SEEN, HIGHER: NOT_SEEN, UNDECIDED: OPEN}
ALPHA = 0.05
FEWEST_DOMAINS = 5  # for a rank correlation: among four, even the clearest order has p = 2 / 24


class Answer(NamedTuple):
    """One of SEEN, NOT_SEEN, OPEN, NOT_RUN, and its numbers as a clause."""

    status: str
    reason: str


class DomainGain(NamedTuple):
    """One domain's distance from generic text, and its relative error reduction by task text for each task."""

    domain: str
    tokens: int | None
    jsd: float | None
    jsd_matched: float | None
    overlap: float | None
    gains: dict[str, Difference | None]  # task -> task-only against generic-only; the gain is -relative


def against_others(numbers: Numbers, student: Student, what: str) -> dict[Student, Decision]:
    """One student of the generic teacher against each other one, for a task or for LOSS, decided together."""
    differences: dict[Student, Difference] = {}
    for other in numbers.distilled("generic"):
        difference = numbers.difference(student, other, *JUDGED[what])
        if difference is not None:
            differences[other] = difference
    return decide(differences)


def loss_text(numbers: Numbers) -> str | None:
    """The verdict on held-out masked-LM loss on task text; None if no two students can be compared."""
    measure, place = JUDGED[LOSS]
    means = {one: numbers.mean(one, measure.task, measure.error, place) for one in numbers.distilled("generic")}
    known = {one: mean.mean for one, mean in means.items() if mean is not None}
    if len(known) < 2:
        return None
    best, *others = sorted(known, key=known.__getitem__)
    decisions = against_others(numbers, best, LOSS)
    if not decisions:
        return None
    values = [f"{known[one]:.2f} ({set_name(numbers, one)})" for one in others]
    sure = all(one in decisions and decisions[one].status == LOWER for one in others)
    doubt = "" if sure else "; not all of these differ significantly"
    return (
        "On held-out task text, among the students distilled from the generic teacher, the masked-LM loss is lowest "
        f"for {set_name(numbers, best)}: {known[best]:.2f} nats per masked token, against {listed(values)}{doubt}. "
        "That is the pretraining objective, not the task."
    )


def unigram_students(numbers: Numbers) -> list[str]:
    """The labels of the students whose held-out loss is nowhere below a unigram's; "every student" if that is all.

    Students of inner states are left out: their masked-LM head is hardly trained and says nothing about the encoder.
    """
    weak, measured = [], 0
    for student in numbers.students:
        if student.kind == "distilled" and numbers.distills_states:
            continue
        below = []
        for kind in ("task", "generic"):
            losses = [numbers.mean(student, "mlm", key, Place(f"heldout_{kind}")) for key in ("loss", "unigram_loss")]
            if losses[0] is not None and losses[1] is not None:
                below.append(losses[0].mean < losses[1].mean)
        measured += bool(below)
        # Below the unigram on either kind of text is enough: a student of generic text need not know the task's.
        if below and not any(below):
            weak.append(label(numbers, student))
    return ["every student"] if len(weak) == measured > 1 else weak


def unigram_text(numbers: Numbers) -> str | None:
    """Names the students that learned no more than token frequencies; None if there are none."""
    weak = unigram_students(numbers)
    if not weak:
        return None
    return (
        f"No better than a unigram on held-out text, of the task or generic: {'; '.join(weak)}. Such an encoder has "
        "not learned to use context yet, so its results after finetuning say little about its transfer set. "
        "Distill longer first (config.distill.steps)."
    )


def distilled_beats_scratch(numbers: Numbers, task: str) -> Answer:
    """The declared comparison of the distilled student with the one from scratch."""
    found = declared(numbers, task)[SCRATCH]
    if found.decision is None or found.student is None:
        return Answer(NOT_RUN, found.missing)
    reason = f"{label(numbers, found.student)}: {relative_text(found.decision.difference)}"
    return Answer(STATUSES[found.decision.status], reason)


def task_only_is_best(numbers: Numbers, what: str) -> Answer:
    """The task-only transfer set against each other one, for a task or for LOSS: lower than all, or higher than one."""
    task_only = numbers.with_share(1.0)
    decisions = against_others(numbers, task_only, what) if task_only else {}
    if not decisions:
        return Answer(NOT_RUN, "no task-only transfer set to compare with another, or no interval")
    nearest = min(decisions, key=lambda one: decisions[one].difference.rate_b)
    difference = decisions[nearest].difference
    change = relative_text(difference)
    if difference.difference < 0:
        reason = f"lowest; against the next, {set_name(numbers, nearest)}, {change}"
    else:
        reason = f"{set_name(numbers, nearest)} is lowest; task-only against it {change}"
    statuses = {one.status for one in decisions.values()}
    return Answer(NOT_SEEN if HIGHER in statuses else SEEN if statuses == {LOWER} else OPEN, reason)


def adapted_is_better(numbers: Numbers, what: str) -> Answer:
    """The adapted teacher's student against the generic teacher's on the same text, for a task or for LOSS."""
    adapted = numbers.distilled("adapted")
    if not adapted:
        return Answer(NOT_RUN, "no student was distilled from an adapted teacher")
    student = adapted[-1]  # the largest share of task text
    other = Student("distilled", student.transfer_set, "generic")
    difference = numbers.difference(student, other, *JUDGED[what])
    if difference is None:
        return Answer(NOT_RUN, "only one of the two teachers' students has results, or no interval")
    reason = f"on {set_name(numbers, other)}, adapted against generic teacher {relative_text(difference)}"
    return Answer(STATUSES[decide({other: difference})[other].status], reason)


def domain_gains(numbers: Numbers) -> list[DomainGain]:
    """The study's domains, from the most to the least similar to generic text."""
    task_only, generic_only = numbers.with_share(1.0), numbers.with_share(0.0)
    rows = []
    for entry in numbers.inputs.similarity:
        place = Place(domain=entry["domain"])
        gains = {task: numbers.difference(task_only, generic_only, HEADLINE[task], place) for task in numbers.tasks()}
        values = {name: entry[name] for name in ("domain", "tokens", "jsd", "jsd_matched", "overlap")}
        rows.append(DomainGain(**values, gains=gains))
    key = divergence_key(rows)
    return sorted(rows, key=lambda row: (getattr(row, key) is None, getattr(row, key) or 0.0, row.domain))


def divergence_key(rows: list[DomainGain]) -> str:
    """The divergence at matched sizes if most domains have it, else the plain one, which grows as samples shrink."""
    matched = sum(row.jsd_matched is not None for row in rows)
    return "jsd_matched" if matched >= max(3, len(rows) / 2) else "jsd"


def similarity_points(rows: list[DomainGain], task: str) -> list[tuple[str, float, float]]:
    """(domain, divergence, relative error reduction) of the domains for which both are defined."""
    key = divergence_key(rows)
    points = []
    for row in rows:
        change, divergence = relative(row.gains[task]), getattr(row, key)
        if divergence is not None and change is not None:
            points.append((row.domain, divergence, -change[0]))
    return points


def correlation(rows: list[DomainGain], task: str) -> RankCorrelation:
    """Spearman's rho between divergence from generic text and gain: negative means that similar domains gain more."""
    points = similarity_points(rows, task)
    if len(points) < FEWEST_DOMAINS:
        return RankCorrelation(None, None, None, None, len(points))
    return rank_correlation(np.array([x for _, x, _ in points]), np.array([y for _, _, y in points]))


def correlation_text(found: RankCorrelation) -> str:
    """A rank correlation with its interval and p-value, or a clause that there is none."""
    if found.rho is None or found.low is None or found.high is None:
        return f"no rank correlation from {plural(found.count, 'domain')}"
    interval = f"[{signed(found.low, 2)}, {signed(found.high, 2)}]"
    return f"Spearman's ρ {signed(found.rho, 2)} {interval}, p = {found.p_value:.2g}, {plural(found.count, 'domain')}"


def gain_correlates(rows: list[DomainGain], task: str) -> Answer:
    """Whether gain and divergence are rank-correlated; the paper's abstract does not say in which direction."""
    found = correlation(rows, task)
    if found.rho is None or found.p_value is None:
        return Answer(NOT_RUN, correlation_text(found))
    if found.p_value >= ALPHA:
        return Answer(OPEN, correlation_text(found))
    return Answer(SEEN, f"{correlation_text(found)}: {'less' if found.rho > 0 else 'more'} similar domains gain more")


def findings(numbers: Numbers, gains: list[DomainGain]) -> dict[str, dict[str, Answer]]:
    """The paper's four findings: claim -> task or LOSS -> this study's answer."""
    tasks = numbers.tasks()
    return {
        "A distilled student beats one from scratch": {task: distilled_beats_scratch(numbers, task) for task in tasks},
        "The best transfer set is task text only": {what: task_only_is_best(numbers, what) for what in [*tasks, LOSS]},
        "The gain from task text correlates with similarity to generic text": {
            task: gain_correlates(gains, task) for task in tasks
        },
        "An adapted teacher gives still better students": {
            what: adapted_is_better(numbers, what) for what in [*tasks, LOSS]
        },
    }
