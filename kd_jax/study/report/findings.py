"""What a study shows: which transfer set won, gains by domain, and the paper's findings held against the numbers.

The paper is Peris et al. 2022, "Knowledge Distillation Transfer Sets and their Impact on Downstream NLU Tasks" (arXiv
2210.04834).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kd_jax.evaluation.significance import (
    MINIMUM_SEEDS,
    Difference,
    ErrorCounts,
    Verdict,
    compare,
    compare_all,
    verdict,
)
from kd_jax.evaluation.similarity import RankCorrelation, rank_correlation
from kd_jax.study.plan import Student
from kd_jax.study.report.inputs import HEADLINE, TASK_NAMES, Numbers, Place, comparable, seed_counts

SEEN, NOT_SEEN, UNDECIDED, NOT_RUN = "seen", "not seen", "undecided", "not run"
ALPHA = 0.05
LOSS = "loss"  # beside the tasks: held-out masked-LM loss on task text
MINUS = "−"


class Answer(NamedTuple):
    """One of SEEN, NOT_SEEN, UNDECIDED, NOT_RUN, and the numbers behind it as a clause."""

    status: str
    reason: str


class Finding(NamedTuple):
    """A finding of the paper, and what this study answers for each task."""

    claim: str
    answers: dict[str, Answer]  # "dc", "icner" or LOSS -> answer


class DomainGain(NamedTuple):
    """One domain's distance from generic text, and its relative error reduction by task text for each task."""

    domain: str
    tokens: int | None
    jsd: float | None
    jsd_matched: float | None
    overlap: float | None
    gains: dict[str, Difference | None]  # task -> task-only against generic-only; the gain is -relative


class Relative(NamedTuple):
    """A relative change as a fraction, with its 95 % interval."""

    value: float
    low: float
    high: float


class SetVerdict(NamedTuple):
    """The verdict among transfer sets; students and their counts by the names that it uses."""

    result: Verdict
    students: dict[str, Student]
    counts: dict[str, ErrorCounts]

    def between(self, a: str, b: str) -> Difference:
        return compare(self.counts[a], self.counts[b])


def signed(value: float, digits: int = 1) -> str:
    """+1.2 or −1.2, with the typographic minus; what rounds to zero has no sign."""
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else (MINUS if value < 0 else "+") + text


def relative(difference: Difference | None) -> Relative | None:
    """The relative change of a difference; None where it is undefined (no error to compare with)."""
    if difference is None or difference.relative is None:
        return None
    assert difference.relative_low is not None and difference.relative_high is not None
    return Relative(difference.relative, difference.relative_low, difference.relative_high)


def relative_text(difference: Difference | None) -> str:
    """Relative change with its interval, in percent; an en dash where it is undefined."""
    change = relative(difference)
    if change is None:
        return "–"
    return f"{signed(100 * change.value)} % [{signed(100 * change.low)}, {signed(100 * change.high)}]"


def judge(difference: Difference, p_value: float) -> str:
    """SEEN: told apart, and lower; NOT_SEEN: told apart, and higher; UNDECIDED otherwise, or with too few seeds."""
    if difference.seeds < MINIMUM_SEEDS or p_value >= ALPHA:
        return UNDECIDED
    return SEEN if difference.difference < 0 else NOT_SEEN


def counts_of(numbers: Numbers, student: Student, what: str) -> ErrorCounts | None:
    """Headline errors of a task, or for LOSS the held-out loss on task text in nats, which is known by seed alone."""
    if what == LOSS:
        return seed_counts(numbers.values(student, "mlm", "loss", Place("heldout_task")))
    return numbers.errors(student, HEADLINE[what])


def comparable_students(numbers: Numbers, students: list[Student], what: str) -> dict[Student, ErrorCounts]:
    """The counts of those students that can all be compared with each other; the first come first."""
    found: dict[Student, ErrorCounts] = {}
    for student in students:
        counts = counts_of(numbers, student, what)
        if counts is not None and all(comparable(other, counts) for other in found.values()):
            found[student] = counts
    # A student alone, or with one seed and no utterances, has nothing to be compared with.
    return found if len(found) > 1 else {}


def task_verdict(numbers: Numbers, what: str) -> SetVerdict | None:
    """Which transfer set won among the students distilled from the generic teacher; None where none can be compared."""
    found = comparable_students(numbers, numbers.distilled("generic"), what)
    if not found:
        return None
    counts = {student.name: errors for student, errors in found.items()}
    return SetVerdict(verdict(counts), {student.name: student for student in found}, counts)


def set_name(numbers: Numbers, student: Student) -> str:
    """The transfer set's part of a student's label."""
    return numbers.label(student).removeprefix("distilled, ").removeprefix("MLM only, ")


def verdict_text(numbers: Numbers, task: str) -> str:
    """One or two sentences for a task."""
    name, measure = TASK_NAMES[task], HEADLINE[task]
    title = "error" if task == "dc" else "semantic error rate"
    judged = task_verdict(numbers, task)
    if judged is None:
        means = {student: numbers.mean(student, task, measure.error) for student in numbers.distilled("generic")}
        known = {student: mean.mean for student, mean in means.items() if mean}
        if len(known) < 2:
            return f"**{name}: nothing to compare.** Fewer than two transfer sets have results."
        best = min(known, key=known.__getitem__)
        return (
            f"**{name}: no winner can be named.** The lowest {title} is {set_name(numbers, best)}'s "
            f"({100 * known[best]:.2f} %), but with one seed and no records of single utterances a difference has no "
            f"interval."
        )
    result, students, _ = judged
    best = students[result.best]
    ranked = sorted(result.comparisons, key=lambda key: result.comparisons[key].rate_a)
    rival = students[result.tied[1] if len(result.tied) > 1 else ranked[0]]
    difference = judged.between(best.name, rival.name)
    rate = f"{100 * min(item.rate_b for item in result.comparisons.values()):.2f} %"
    change = f"{relative_text(difference)}, {plural(difference.seeds, 'seed')}"
    if result.winner:
        return (
            f"**{name}: {set_name(numbers, best)} won** with {article(title)} {title} of {rate}, against the next "
            f"best, "
            f"{set_name(numbers, rival)}: {change}."
        )
    tied = [set_name(numbers, students[key]) for key in result.tied[1:]] or [set_name(numbers, rival)]
    against = f"against {set_name(numbers, rival)}: " if len(tied) > 1 else "relative change "
    few = f"; fewer than {MINIMUM_SEEDS} seeds decide nothing" if difference.seeds < MINIMUM_SEEDS else ""
    return (
        f"**{name}: no winner at this size.** {sentence(set_name(numbers, best))} has the lowest {title} ({rate}) "
        f"but is not told apart from {listed(tied)} ({against}{change}{few})."
    )


def loss_text(numbers: Numbers) -> str | None:
    """The verdict on held-out masked-LM loss on task text; None where it was not measured."""
    judged = task_verdict(numbers, LOSS)
    if judged is None:
        return None
    result, students, _ = judged
    best = set_name(numbers, students[result.best])
    rates = {key: item.rate_a for key, item in result.comparisons.items()}
    lowest = next(iter(result.comparisons.values())).rate_b
    others = listed(
        [f"{rates[key]:.2f} ({set_name(numbers, students[key])})" for key in sorted(rates, key=rates.__getitem__)]
    )
    told = "" if result.winner else "; not all of these are told apart"
    return (
        f"On held-out task text the masked-LM loss of the students distilled from the generic teacher is lowest for "
        f"{best}: "
        f"{lowest:.2f} nats a masked token, against {others}{told}. That is the pretraining objective, not the task."
    )


def unigram_text(numbers: Numbers) -> str | None:
    """Names the students whose held-out loss is nowhere below a unigram's; None where every one is below it."""
    weak = []
    for student in numbers.students:
        below = []
        for kind in ("task", "generic"):
            losses = [numbers.mean(student, "mlm", key, Place(f"heldout_{kind}")) for key in ("loss", "unigram_loss")]
            if losses[0] is not None and losses[1] is not None:
                below.append(losses[0].mean < losses[1].mean)
        if below and not any(below):
            weak.append(numbers.label(student))
    if not weak:
        return None
    measured = [one for one in numbers.students if one.kind != "scratch"]
    who = "every student" if len(weak) == len(measured) else "; ".join(weak)
    return (
        f"No better than a unigram on held-out text, of the task or generic: {who}. Such an encoder has not learned to "
        f"use context yet, so its results after finetuning say little about its transfer set; a longer distillation "
        f"(config.distill.steps) comes first."
    )


def scratch_text(numbers: Numbers) -> str | None:
    """How the best distilled student stands to the student without any distillation, for all tasks in one sentence."""
    parts = []
    for task in numbers.tasks():
        answer = distilled_beats_scratch(numbers, task)
        if answer.status in (SEEN, NOT_SEEN, UNDECIDED):
            words = {SEEN: "better", NOT_SEEN: "worse", UNDECIDED: "not told apart"}[answer.status]
            parts.append(f"{TASK_NAMES[task]} {words} ({answer.reason})")
    return f"Against the same student from scratch: {'; '.join(parts)}." if parts else None


def distilled_beats_scratch(numbers: Numbers, task: str) -> Answer:
    """The best of the students distilled from the generic teacher against the one from scratch, Holm-adjusted."""
    scratch = numbers.scratch
    counts = comparable_students(numbers, [scratch, *numbers.distilled("generic")], task) if scratch else {}
    if scratch is None or scratch not in counts:
        return Answer(NOT_RUN, "no from-scratch student beside a distilled one, or no interval")
    differences, adjusted = compare_all({who.name: errors for who, errors in counts.items()}, scratch.name)
    best = min(differences, key=lambda name: differences[name].rate_a)
    student = next(student for student in counts if student.name == best)
    reason = f"{numbers.label(student)}: {relative_text(differences[best])}"
    return Answer(judge(differences[best], adjusted[best]), reason)


def task_only_is_best(numbers: Numbers, what: str) -> Answer:
    """The task-only transfer set against all others, for a task or for LOSS."""
    judged, task_only = task_verdict(numbers, what), numbers.with_share(1.0)
    if judged is None or task_only is None or task_only.name not in judged.students:
        return Answer(NOT_RUN, "no task-only transfer set beside another, or no interval")
    result, students, _ = judged
    if result.best == task_only.name:
        next_best = min(result.comparisons, key=lambda key: result.comparisons[key].rate_a)
        change = relative_text(judged.between(task_only.name, next_best))
        reason = f"lowest; against the next, {set_name(numbers, students[next_best])}, {change}"
        return Answer(SEEN if result.winner else UNDECIDED, reason)
    difference = judged.between(task_only.name, result.best)
    best = set_name(numbers, students[result.best])
    reason = f"{best} is lowest; task-only against it {relative_text(difference)}"
    return Answer(judge(difference, result.adjusted[task_only.name]), reason)


def adapted_is_better(numbers: Numbers, what: str) -> Answer:
    """The adapted teacher's student against the generic teacher's, over the same text; for a task or for LOSS."""
    adapted = numbers.distilled("adapted")
    if not adapted:
        return Answer(NOT_RUN, "no student was distilled from an adapted teacher")
    student = adapted[-1]  # the largest share of task text
    other = Student("distilled", student.transfer_set, "generic")
    counts = comparable_students(numbers, [student, other], what)
    if not counts:
        return Answer(NOT_RUN, "not both teachers' students have results, or no interval")
    difference = compare(counts[student], counts[other])
    reason = f"over {set_name(numbers, other)}, adapted against generic teacher {relative_text(difference)}"
    return Answer(judge(difference, difference.p_value), reason)


def domain_gains(numbers: Numbers) -> list[DomainGain]:
    """The study's domains, the least similar to generic text last."""
    task_only, generic_only = numbers.with_share(1.0), numbers.with_share(0.0)
    rows = []
    for entry in numbers.inputs.similarity:
        place = Place(domain=entry["domain"])
        gains = {task: numbers.difference(task_only, generic_only, HEADLINE[task], place) for task in numbers.tasks()}
        values = {name: entry[name] for name in ("tokens", "jsd", "jsd_matched", "overlap")}
        rows.append(DomainGain(domain=entry["domain"], gains=gains, **values))
    key = divergence_key(rows)
    return sorted(rows, key=lambda row: (getattr(row, key) is None, getattr(row, key) or 0.0, row.domain))


def divergence_key(rows: list[DomainGain]) -> str:
    """The divergence at matched sizes where most domains have it, else the plain one, which grows as samples shrink."""
    matched = sum(row.jsd_matched is not None for row in rows)
    return "jsd_matched" if matched >= max(3, len(rows) / 2) else "jsd"


def similarity_points(rows: list[DomainGain], task: str) -> list[tuple[str, float, float]]:
    """(domain, divergence, relative error reduction) of the domains in which all three are defined."""
    key = divergence_key(rows)
    points = []
    for row in rows:
        change, divergence = relative(row.gains[task]), getattr(row, key)
        if divergence is not None and change is not None:
            points.append((row.domain, divergence, -change.value))
    return points


def correlation(rows: list[DomainGain], task: str) -> RankCorrelation:
    """Spearman's rho between divergence from generic text and gain: negative means that similar domains gain more."""
    points = similarity_points(rows, task)
    return rank_correlation(np.array([x for _, x, _ in points]), np.array([y for _, _, y in points]))


def correlation_text(found: RankCorrelation) -> str:
    """A rank correlation with its interval and p-value, or that there is none."""
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
    return Answer(SEEN, f"{correlation_text(found)}: the {'less' if found.rho > 0 else 'more'} similar gain more")


def findings(numbers: Numbers, rows: list[DomainGain]) -> list[Finding]:
    """The paper's four findings, each with what this study says to it; `rows` are `domain_gains`."""
    tasks = numbers.tasks()

    def answers(question: Callable[[Numbers, str], Answer], with_loss: bool) -> dict[str, Answer]:
        return {what: question(numbers, what) for what in [*tasks, *([LOSS] if with_loss else [])]}

    by_domain = {task: gain_correlates(rows, task) for task in tasks}
    return [
        Finding("A distilled student beats one from scratch", answers(distilled_beats_scratch, False)),
        Finding("The best transfer set is task text only", answers(task_only_is_best, True)),
        Finding("The gain from task text correlates with similarity to generic text", by_domain),
        Finding("An adapted teacher gives still better students", answers(adapted_is_better, True)),
    ]


def plural(count: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def sentence(text: str) -> str:
    """With a capital letter."""
    return text[:1].upper() + text[1:]


def article(noun: str) -> str:
    """ "a" or "an"."""
    return "an" if noun[0] in "aeiou" else "a"
