"""What a study shows: the best transfer set, gains by domain, and the paper's findings checked against the numbers.

Sentences are Markdown. The paper is Peris et al. 2022, "Knowledge Distillation Transfer Sets and their Impact on
Downstream NLU Tasks" (arXiv 2210.04834).
"""

from typing import NamedTuple

import numpy as np

from kd_jax.evaluation.significance import (
    MINIMUM_SEEDS,
    Difference,
    ErrorCounts,
    Verdict,
    compare_all,
    verdict,
)
from kd_jax.evaluation.similarity import RankCorrelation, rank_correlation
from kd_jax.study.plan import Student
from kd_jax.study.report.numbers import HEADLINE, JUDGED, LOSS, TASK_NAMES, Numbers, Place, comparable
from kd_jax.text_tables import escaped

SEEN, NOT_SEEN, UNDECIDED, NOT_RUN = "seen", "not seen", "undecided", "not run"
ALPHA = 0.05
NONE = "–"


class Answer(NamedTuple):
    """One of SEEN, NOT_SEEN, UNDECIDED, NOT_RUN, and the numbers behind it as a clause."""

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


def signed(value: float, digits: int = 1) -> str:
    """+1.2 or −1.2, with the typographic minus; a value that rounds to zero has no sign."""
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else ("−" if value < 0 else "+") + text


def relative(difference: Difference | None) -> tuple[float, float, float] | None:
    """Relative change as a fraction with the ends of its interval; None if there is no error to compare with."""
    if difference is None or difference.relative is None:
        return None
    assert difference.relative_low is not None and difference.relative_high is not None
    return difference.relative, difference.relative_low, difference.relative_high


def relative_text(difference: Difference | None) -> str:
    """Relative change with its interval, in percent; an en dash if undefined."""
    change = relative(difference)
    if change is None:
        return NONE
    value, low, high = (signed(100 * one) for one in change)
    return f"{value} % [{low}, {high}]"


def judge(difference: Difference, p_value: float) -> str:
    """SEEN: significantly lower; NOT_SEEN: significantly higher; UNDECIDED: neither, or too few seeds."""
    if difference.seeds < MINIMUM_SEEDS or p_value >= ALPHA:
        return UNDECIDED
    return SEEN if difference.difference < 0 else NOT_SEEN


def comparable_students(numbers: Numbers, students: list[Student], what: str) -> dict[str, ErrorCounts]:
    """The errors (for LOSS the losses) of the students comparable with the first, by name; empty for fewer than two."""
    found: dict[str, ErrorCounts] = {}
    for student in students:
        counts = numbers.errors(student, *JUDGED[what])
        if counts is not None and all(comparable(other, counts) for other in found.values()):
            found[student.name] = counts
    return found if len(found) > 1 else {}


def task_verdict(numbers: Numbers, what: str) -> Verdict | None:
    """The best transfer set among the students of the generic teacher; None if no two can be compared."""
    counts = comparable_students(numbers, numbers.distilled("generic"), what)
    return verdict(counts) if counts else None


def between(numbers: Numbers, a: str, b: str, what: str) -> Difference:
    """One student against another, by their names, both from one verdict."""
    found = numbers.difference(numbers.named[a], numbers.named[b], *JUDGED[what])
    assert found is not None  # a verdict compares what is comparable
    return found


def label(numbers: Numbers, student: Student) -> str:
    """The student's label as Markdown."""
    return escaped(numbers.label(student))


def set_name(numbers: Numbers, name: str) -> str:
    """The transfer set's part of the label of the student of this name, as Markdown."""
    return escaped(numbers.label(numbers.named[name]).removeprefix("distilled, "))


def verdict_text(numbers: Numbers, task: str) -> str:
    """The verdict on a task in one or two sentences."""
    name, measure = TASK_NAMES[task], HEADLINE[task]
    title = "error" if task == "dc" else "semantic error rate"
    result = task_verdict(numbers, task)
    if result is None:
        means = {who.name: numbers.mean(who, task, measure.error) for who in numbers.distilled("generic")}
        known = {name: mean.mean for name, mean in means.items() if mean}
        if len(known) < 2:
            return f"**{name}: nothing to compare.** Fewer than two transfer sets have results."
        best = min(known, key=known.__getitem__)
        return (
            f"**{name}: no winner can be named.** {sentence(set_name(numbers, best))} has the lowest {title} "
            f"({100 * known[best]:.2f} %), but with one seed and no records of single utterances, a difference has no "
            "interval."
        )
    tied = list(result.tied[1:]) or sorted(result.comparisons, key=lambda key: result.comparisons[key].rate_a)[:1]
    best, rival = set_name(numbers, result.best), set_name(numbers, tied[0])
    difference = between(numbers, result.best, tied[0], task)
    rate = f"{100 * min(item.rate_b for item in result.comparisons.values()):.2f} %"
    change = f"{relative_text(difference)}, {plural(difference.seeds, 'seed')}"
    if result.winner:
        article = "an" if title[0] in "aeiou" else "a"
        return f"**{name}: {best} won** with {article} {title} of {rate}, against the next best, {rival}: {change}."
    against = f"against {rival}: " if len(tied) > 1 else "relative change "
    few = f"; fewer than {MINIMUM_SEEDS} seeds decide nothing" if difference.seeds < MINIMUM_SEEDS else ""
    return (
        f"**{name}: no winner at this size.** {sentence(best)} has the lowest {title} ({rate}), but does not differ "
        f"significantly from {listed([set_name(numbers, one) for one in tied])} ({against}{change}{few})."
    )


def loss_text(numbers: Numbers) -> str | None:
    """The verdict on held-out masked-LM loss on task text; None if it was not measured."""
    result = task_verdict(numbers, LOSS)
    if result is None:
        return None
    rates = {name: item.rate_a for name, item in result.comparisons.items()}
    lowest = next(iter(result.comparisons.values())).rate_b
    others = [f"{rates[name]:.2f} ({set_name(numbers, name)})" for name in sorted(rates, key=rates.__getitem__)]
    doubt = "" if result.winner else "; not all of these differ significantly"
    return (
        "On held-out task text, among the students distilled from the generic teacher, the masked-LM loss is lowest "
        f"for {set_name(numbers, result.best)}: {lowest:.2f} nats per masked token, against {listed(others)}{doubt}. "
        "That is the pretraining objective, not the task."
    )


def unigram_text(numbers: Numbers) -> str | None:
    """Names the students whose held-out loss is nowhere below a unigram's; None if there are none.

    Students of inner states are left out: their masked-LM head is trained little or not at all, and says nothing of the
    encoder.
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
    if not weak:
        return None
    who = "every student" if len(weak) == measured > 1 else "; ".join(weak)
    return (
        f"No better than a unigram on held-out text, of the task or generic: {who}. Such an encoder has not learned to "
        "use context yet, so its results after finetuning say little about its transfer set. Distill longer first "
        "(config.distill.steps)."
    )


def scratch_text(numbers: Numbers) -> str | None:
    """The best distilled student against the one from scratch, for all tasks in one sentence; None if not run."""
    words = {SEEN: "better", NOT_SEEN: "worse", UNDECIDED: "no significant difference"}
    answers = {task: distilled_beats_scratch(numbers, task) for task in numbers.tasks()}
    parts = [
        f"{TASK_NAMES[task]} {words[answer.status]} ({answer.reason})"
        for task, answer in answers.items()
        if answer.status in words
    ]
    return f"Against the same student from scratch: {'; '.join(parts)}." if parts else None


def distilled_beats_scratch(numbers: Numbers, task: str) -> Answer:
    """The best student of the generic teacher against the one from scratch, Holm-adjusted."""
    scratch = numbers.scratch
    counts = comparable_students(numbers, [scratch, *numbers.distilled("generic")], task) if scratch else {}
    if scratch is None or scratch.name not in counts:
        return Answer(NOT_RUN, "no from-scratch student to compare a distilled one with, or no interval")
    differences, adjusted = compare_all(counts, scratch.name)
    best = min(differences, key=lambda name: differences[name].rate_a)
    reason = f"{label(numbers, numbers.named[best])}: {relative_text(differences[best])}"
    return Answer(judge(differences[best], adjusted[best]), reason)


def task_only_is_best(numbers: Numbers, what: str) -> Answer:
    """The task-only transfer set against all others, for a task or for LOSS."""
    result, task_only = task_verdict(numbers, what), numbers.with_share(1.0)
    if result is None or task_only is None or task_only.name not in (result.best, *result.comparisons):
        return Answer(NOT_RUN, "no task-only transfer set to compare with another, or no interval")
    if result.best == task_only.name:
        rival = min(result.comparisons, key=lambda name: result.comparisons[name].rate_a)
        change = relative_text(between(numbers, result.best, rival, what))
        reason = f"lowest; against the next, {set_name(numbers, rival)}, {change}"
        return Answer(SEEN if result.winner else UNDECIDED, reason)
    difference = between(numbers, task_only.name, result.best, what)
    reason = f"{set_name(numbers, result.best)} is lowest; task-only against it {relative_text(difference)}"
    return Answer(judge(difference, result.adjusted[task_only.name]), reason)


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
    reason = f"on {set_name(numbers, other.name)}, adapted against generic teacher {relative_text(difference)}"
    return Answer(judge(difference, difference.p_value), reason)


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
        return Answer(UNDECIDED, correlation_text(found))
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


def plural(count: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def sentence(text: str) -> str:
    """The text with a capital letter first."""
    return text[:1].upper() + text[1:]
