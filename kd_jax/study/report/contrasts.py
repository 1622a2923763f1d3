"""The comparisons that decide a study's verdict, declared here and so before any result is seen.

One student represents distillation: that of the generic teacher on the most task text, selected by the config and not
by a result. On each task it is compared with the same student on generic text, from scratch, started from the teacher
without distillation, trained by masked LM alone (from the same initialization if there is one), and with n-grams. Their
p-values are adjusted together (Holm). The same comparisons of intent errors are a separate family. A trend along the
share of task text is reported separately. Everything else is exploratory. Sentences are Markdown.
"""

from typing import NamedTuple

from kd_jax.evaluation.significance import (
    HIGHER,
    LOWER,
    MINIMUM_SEEDS,
    UNDECIDED,
    Decision,
    Difference,
    ErrorCounts,
    Trend,
    comparable,
    decide,
    significance,
    trend,
)
from kd_jax.study.plan import INITIALIZED, Student
from kd_jax.study.report.numbers import HEADLINE, MEASURES, TASK_NAMES, TRAINED, Measure, Numbers
from kd_jax.study.report.wording import (
    label,
    leaves_out_zero,
    plural,
    relative_text,
    sentence,
    set_name,
    signed,
    uninformative,
)

GENERIC, SCRATCH, MLM, NGRAMS = "generic", "scratch", "mlm", "ngrams"
# What the student is compared with -> why a study may lack it.
DECLARED = {
    GENERIC: "no student was distilled on generic text alone",
    SCRATCH: "no student was trained from scratch",
    INITIALIZED: "no student started from the teacher without distillation",
    MLM: "no student was trained by masked LM alone",
    NGRAMS: "there are no n-grams",
}
AGAINST = {
    GENERIC: "generic text",
    SCRATCH: "training from scratch",
    INITIALIZED: "its own start without distillation",
    MLM: "masked LM alone",
    NGRAMS: "n-grams",
}
MANY_SEEDS = 5  # find a difference of 10 to 15 % (docs/comparisons.md)
FEWEST_SHARES = 3  # of a trend; with two it is their difference
INTENT_ERROR = MEASURES[1]


class Contrast(NamedTuple):
    """A declared comparison on one task; without a decision, `missing` says why there is none."""

    student: Student | None
    reference: Student | None
    measure: Measure
    decision: Decision | None
    missing: str

    @property
    def status(self) -> str | None:
        """LOWER, HIGHER or UNDECIDED; None without a decision."""
        return self.decision.status if self.decision else None


def declared_student(numbers: Numbers) -> Student | None:
    """The student that represents distillation: of the generic teacher, on the most task text."""
    shares = {one: share for one in numbers.distilled("generic") if (share := numbers.share(one)) is not None}
    return max(shares, key=lambda one: (numbers.plain(one), shares[one]), default=None)


def declared(numbers: Numbers, task: str, measure: Measure | None = None) -> dict[str, Contrast]:
    """The declared comparisons of a task by what the student is compared with, in the order of DECLARED.

    They compare the task's headline error, which decides the verdict, or `measure`.
    """
    student = declared_student(numbers)
    measures = {name: measure or _measure(numbers, name, task) for name in DECLARED}
    pairs = {name: (_reference(numbers, name, student), measures[name]) for name in DECLARED}
    differences: dict[str, Difference] = {}
    for name, (reference, measure) in pairs.items():
        difference = numbers.difference(student, reference, measure)
        if difference is not None:
            differences[name] = difference
    decisions = decide(differences)
    return {
        name: Contrast(student, reference, measure, decisions.get(name), _missing(numbers, name, student, *pairs[name]))
        for name, (reference, measure) in pairs.items()
    }


def _reference(numbers: Numbers, name: str, student: Student | None) -> Student | None:
    if name == GENERIC:
        return numbers.with_share(0.0)
    rows = [one for one in numbers.students if one.kind == name]
    if name == MLM:
        # Prefer the initialization of the distilled student, then the same text.
        same = student.transfer_set if student else ""
        return min(rows, key=lambda one: (one.teacher != INITIALIZED, one.transfer_set != same), default=None)
    return next((one for one in rows if one == Student(name)), None)


def _measure(numbers: Numbers, name: str, task: str) -> Measure:
    """The task's headline error; the intent error against n-grams that predict no slots."""
    measure, ngrams = HEADLINE[task], Student(NGRAMS)
    if name == NGRAMS and task == INTENT_ERROR.task and numbers.mean(ngrams, task, measure.error) is None:
        return INTENT_ERROR
    return measure


def _missing(numbers: Numbers, name: str, student: Student | None, reference: Student | None, measure: Measure) -> str:
    if student is None:
        return "no student of the generic teacher has a known share of task text"
    if reference is None:
        return DECLARED[name]
    if reference == student:
        return "the only distilled students are of generic text"
    for one in (student, reference):
        if numbers.mean(one, measure.task, measure.error) is None:
            return f"{label(numbers, one)} has no {error_name(measure)}"
    return "with one seed and no records of single utterances, a difference has no interval"


def error_name(measure: Measure) -> str:
    """ "error", "intent error" or "semantic error rate"."""
    return "error" if measure.task == "dc" else measure.error_title.lower()


def reading(decision: Decision, together: int) -> str:
    """A decision in words; together: how many were decided at once."""
    one = decision.difference
    if decision.status != UNDECIDED:
        return decision.status
    if not leaves_out_zero(one):
        return uninformative(one) or "no significant difference"
    side = LOWER if one.difference < 0 else HIGHER
    if 0 < one.seeds < MINIMUM_SEEDS:
        return f"{side} on these utterances; {('one seed', 'two seeds')[one.seeds - 1]} cannot decide"
    if together > 1:
        return f"{side} on its own, but not after adjusting for {together} comparisons"
    return f"{side}, but chance is not ruled out"


def clause(decision: Decision, together: int) -> str:
    """Relative change and reading: "−3.1 % [−5.0, −1.2], lower"."""
    said = reading(decision, together)
    return said if uninformative(decision.difference) else f"{relative_text(decision.difference)}, {said}"


def verdict_text(numbers: Numbers, task: str) -> str:
    """The verdict on a task as a paragraph, from the declared comparisons; n-grams first if no student beats them."""
    found = declared(numbers, task)
    parts = [_ngrams(numbers, found), _texts(numbers, found), _helps(numbers, found)]
    said = [part for part in parts if part]
    (head, rest), *others = said
    first = f"**{TASK_NAMES[task]}: {head}.** {rest}"
    return " ".join([first, *(f"**{sentence(head)}.** {rest}" for head, rest in others)])


def against_ngrams(numbers: Numbers, found: dict[str, Contrast]) -> dict[Student, Decision]:
    """Each trained student against the n-grams; empty if a student is shown to beat them, or nothing is known."""
    contrast = found[NGRAMS]
    against: dict[Student, Difference] = {}
    for student in numbers.students:
        difference = numbers.difference(student, contrast.reference, contrast.measure)
        if student.kind in TRAINED and difference is not None:
            against[student] = difference
    decisions = decide(against)
    beaten = LOWER in (contrast.status, *(one.status for one in decisions.values()))
    return {} if beaten else decisions


def _ngrams(numbers: Numbers, found: dict[str, Contrast]) -> tuple[str, str] | None:
    """The statement that no student beats the n-grams; None if one does, or if it is not known."""
    decisions = against_ngrams(numbers, found)
    if not decisions:
        return None
    best = min(decisions, key=lambda one: decisions[one].difference.rate_a)
    one = decisions[best].difference
    head = "no student beats n-grams" if one.difference >= 0 else "no student is shown to beat n-grams"
    return head, (
        f"Counts of words and letters, without any encoder, have {_article(found[NGRAMS].measure)} of "
        f"{100 * one.rate_b:.2f} %; the best student, {label(numbers, best)}, has {100 * one.rate_a:.2f} % "
        f"({clause(decisions[best], len(decisions))})."
    )


def _texts(numbers: Numbers, found: dict[str, Contrast]) -> tuple[str, str]:
    """Whether task text or generic text won."""
    contrast, together = found[GENERIC], _decided(found)
    student, reference, decision = contrast.student, contrast.reference, contrast.decision
    if student is None or reference is None or decision is None:
        return "no verdict on the transfer sets", f"{sentence(contrast.missing)}."
    names, one = [text_of(numbers, who) for who in (student, reference)], decision.difference
    rates = f"{100 * one.rate_a:.2f} % on {names[0]}, {100 * one.rate_b:.2f} % on {names[1]}"
    change = uninformative(one) or f"{relative_text(one)}, {plural(one.seeds, 'seed')}"
    if decision.status != UNDECIDED:
        best, other = names if decision.status == LOWER else names[::-1]
        head = f"{best} wins over {other}"
    elif leaves_out_zero(one) or uninformative(one):
        head = f"{names[0]} against {names[1]}: {reading(decision, together)}"
        change = f"{plural(one.seeds, 'seed')}" if uninformative(one) else change
    else:
        head = "no winner at this size"
        change += f"; fewer than {MINIMUM_SEEDS} seeds decide nothing" if one.seeds < MINIMUM_SEEDS else ""
        return head, (
            f"{sentence(names[0])} and {names[1]} do not differ significantly: {_article(contrast.measure)} of {rates} "
            f"({change})."
        )
    more = f" Run the study again with {more_seeds(numbers)}." if decision.status == UNDECIDED else ""
    return head, f"Distilled students have {_article(contrast.measure)} of {rates} ({change}).{more}"


def more_seeds(numbers: Numbers) -> str:
    """The override that adds seeds, as Markdown: up to five, or twice as many; finished stages stay finished."""
    seeds = numbers.seeds()
    count = MANY_SEEDS if len(seeds) < MANY_SEEDS else 2 * len(seeds)
    new = (number for number in range(count + len(seeds)) if number not in seeds)
    return f"`--config.study.seeds='({','.join(map(str, [*seeds, *new][:count]))})'`"


def _helps(numbers: Numbers, found: dict[str, Contrast]) -> tuple[str, str] | None:
    """Whether distillation itself helps: it must beat masked LM alone and, if that is the teacher, its own start."""
    clauses = []
    for name in (MLM, INITIALIZED, SCRATCH):
        reference, decision = found[name].reference, found[name].decision
        if reference and decision:
            which = f" ({label(numbers, reference)})" if name == MLM else ""
            clauses.append(f"Against {AGAINST[name]}{which}: {clause(decision, _decided(found))}.")
    if not clauses:
        return None
    text = " ".join(clauses)
    answer = helps(found)
    if answer is None:
        missing = found[INITIALIZED] if found[MLM].decision else found[MLM]
        return "whether distillation itself helps is open", f"{sentence(missing.missing)}. {text}"
    if answer == LOWER:
        return "distillation helps", text
    if found[SCRATCH].status == LOWER:
        text += " That it beats training from scratch may be due to its initialization or its text alone."
    return ("distillation does not help" if answer == HIGHER else "distillation is not shown to help"), text


def helps(found: dict[str, Contrast]) -> str | None:
    """LOWER if distillation makes fewer errors than every control without it, HIGHER if it makes more than any of them;
    None if a needed comparison is missing."""
    needed = [found[MLM], *([found[INITIALIZED]] if found[INITIALIZED].reference else [])]
    if not all(one.decision for one in needed):
        return None
    statuses = {one.status for one in needed}
    return HIGHER if HIGHER in statuses else LOWER if statuses == {LOWER} else UNDECIDED


def _decided(found: dict[str, Contrast]) -> int:
    return sum(one.decision is not None for one in found.values())


def text_of(numbers: Numbers, student: Student) -> str:
    """The text of a transfer set, by its share of task text."""
    return {0.0: "generic text", 1.0: "task text"}.get(numbers.share(student) or 0.0) or set_name(numbers, student)


def _article(measure: Measure) -> str:
    name = error_name(measure)
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def left_out(numbers: Numbers, task: str) -> list[str]:
    """A sentence for each declared comparison that the study could not make."""
    found = declared(numbers, task)
    return [
        f"{TASK_NAMES[task]}: not compared with {AGAINST[name]}, because {one.missing}."
        for name, one in found.items()
        if one.decision is None
    ]


def mixture_trend(numbers: Numbers, task: str) -> Trend | None:
    """The slope of a task's headline error along the share of task text; None for fewer than three shares.

    It covers the students of the generic teacher whose text was neither selected nor limited.
    """
    counts: list[ErrorCounts] = []
    shares: list[float] = []
    for student in numbers.distilled("generic"):
        share, found = numbers.share(student), numbers.errors(student, HEADLINE[task])
        if share is None or found is None or not numbers.plain(student):
            continue
        if all(comparable(found, other) for other in counts):
            counts.append(found)
            shares.append(share)
    return trend(counts, shares) if len(set(shares)) >= FEWEST_SHARES else None


def trend_text(numbers: Numbers, task: str) -> str | None:
    """A sentence on the trend along the share of task text; None if there is none."""
    found = mixture_trend(numbers, task)
    if found is None:
        return None
    status = significance(found.slope, found.p_value, found.seeds)
    words = {LOWER: "more task text is better", HIGHER: "more task text is worse", UNDECIDED: "no significant trend"}
    said = words[status]
    if status == UNDECIDED and (found.low > 0 or found.high < 0):
        few = ("one seed", "two seeds")[found.seeds - 1]
        said = f"it {'falls' if found.slope < 0 else 'rises'} on these utterances; {few} cannot decide"
    value, low, high = (signed(100 * one, 2) for one in (found.slope, found.low, found.high))
    return (
        f"{TASK_NAMES[task]}: on a straight line from no task text to task text only, the {error_name(HEADLINE[task])} "
        f"changes by {value} points [{low}, {high}] ({plural(found.seeds, 'seed')}): {said}."
    )
