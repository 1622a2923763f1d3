"""What a report is made from, and one place to ask it for numbers."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from kd_jax.evaluation.records import Record
from kd_jax.evaluation.significance import Difference, ErrorCounts, Interval, compare, error_counts, mean_interval
from kd_jax.study.plan import OTHER_TEACHERS, Student

KINDS = ("scratch", "mlm", "distilled")
TEACHERS = ("generic", *OTHER_TEACHERS)
TEACHER_LABELS = {
    "adapted": "adapted teacher",
    "schedule": "generic then adapted teacher",
    "average": "both teachers averaged",
    "chain": "by way of an intermediate",
}
TEST = "test"  # the test set of every table and figure that names no other

RecordKey = tuple[str, str, str, int, str]


@dataclass(frozen=True)
class ReportInputs:
    """Everything a finished study left behind.

    results: result objects (kd_jax/evaluation/results.py), and rows of task "mlm" for held-out masked-LM loss; a
    teacher is
    student "teacher". records: (student, transfer_set, teacher, seed, task) -> records; where they are missing,
    intervals cover
    seeds only. task_shares: transfer set -> share in [0, 1]. realized: transfer set -> `TransferSet.describe`. curves:
    label ->
    [(step, metrics)]. similarity: {domain, jsd, jsd_matched, overlap, tokens}. recipes: {student, task, learning_rate,
    epochs,
    dev_score, chosen}. notes: warnings.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    results: Sequence[Mapping[str, Any]] = ()
    records: Mapping[RecordKey, Sequence[Record]] = field(default_factory=dict)
    task_shares: Mapping[str, float] = field(default_factory=dict)
    selected: Sequence[str] = ()  # transfer sets whose generic text was selected for likeness to the task's
    realized: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[int, Mapping[str, float | None]]]] = field(default_factory=dict)
    similarity: Sequence[Mapping[str, Any]] = ()
    recipes: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    latency: Mapping[str, Any] | None = None  # what `latency` wrote; None where it was not measured

    @cached_property
    def numbers(self) -> "Numbers":
        return Numbers(self)


class Measure(NamedTuple):
    """A compared quantity: `error` is what differences are taken of (lower is better), `shown` what tables print."""

    task: str
    error: str
    shown: str
    title: str
    error_title: str


MEASURES = (
    Measure("dc", "error_rate", "error_rate", "DC error", "DC error"),
    Measure("icner", "intent_error_rate", "intent_error_rate", "Intent error", "Intent error"),
    Measure("icner", "slot_error_rate", "slot_f1", "Slot F1", "Slot error (1 − F1)"),
    Measure("icner", "exact_match_error_rate", "exact_match", "Exact match", "Exact-match error"),
    Measure("icner", "semer", "semer", "SemER", "Semantic error rate"),
)
# What a verdict on a task is about.
HEADLINE = {"dc": MEASURES[0], "icner": MEASURES[4]}
TASK_NAMES = {"dc": "DC", "icner": "ICNER"}


class Place(NamedTuple):
    """Which utterances a number is about."""

    test_set: str = TEST
    locale: str = "all"
    domain: str = "all"

    @property
    def scope(self) -> str:
        return "_".join(name for name in ("locale", "domain") if getattr(self, name) != "all") or "all"


WHOLE_TEST = Place()


class Numbers:
    """Looks numbers up in the results and compares students; everything missing is None or empty, never an error."""

    def __init__(self, inputs: ReportInputs):
        self.inputs = inputs
        self._values: dict[tuple, dict[int, tuple[float, int]]] = defaultdict(dict)
        found, places = set(), set()
        for row in inputs.results:
            student = Student(row["student"], row["transfer_set"], row["teacher"])
            place = (row["scope"], row["locale"], row["domain"], row["test_set"])
            if row["value"] is not None:
                key = (student, row["task"], row["metric"], *place)
                self._values[key][row["seed"]] = (float(row["value"]), int(row["count"] or 0))
            found.add(student)
            places.add((row["task"], *place))
        self.students = sorted((student for student in found if student.kind in KINDS), key=self._order)
        self.teachers = [Student("teacher", "", name) for name in TEACHERS if Student("teacher", "", name) in found]
        self._places = places
        self._buckets: dict[RecordKey, dict[tuple[str, str], list]] = {}
        self._errors: dict[tuple, ErrorCounts | None] = {}
        self._differences: dict[tuple, Difference | None] = {}

    def _order(self, student: Student) -> tuple:
        teacher = TEACHERS.index(student.teacher) if student.teacher in TEACHERS else -1
        return KINDS.index(student.kind), teacher, self.share(student) or 0.0, student.transfer_set

    def share(self, student: Student) -> float | None:
        """Share of task text in the student's transfer set; None without one."""
        shares = self.inputs.task_shares
        return float(shares[student.transfer_set]) if student.transfer_set in shares else None

    def label(self, student: Student) -> str:
        """How tables and figures name a student or teacher."""
        if student.kind == "teacher":
            return f"{student.teacher} teacher"
        if student.kind == "scratch":
            return "from scratch"
        share = self.share(student)
        text = student.transfer_set if share is None else "generic only" if share == 0 else f"task {percent(share)}"
        if student.transfer_set in self.inputs.selected:
            text = "selected generic" if share == 0 else f"{text} and selected generic"
        elif self._names_needed(student):
            text += f" ({student.transfer_set})"
        kind = "MLM only" if student.kind == "mlm" else "distilled"
        return f"{kind}, {text}" + (f", {TEACHER_LABELS[student.teacher]}" if student.teacher in TEACHER_LABELS else "")

    def _names_needed(self, student: Student) -> bool:
        """Whether two transfer sets have the same share, so that the share alone is no name."""
        shares = [share for name, share in self.inputs.task_shares.items() if name not in self.inputs.selected]
        share = self.share(student)
        return share is not None and shares.count(share) > 1

    def tasks(self) -> list[str]:
        return [task for task in ("dc", "icner") if any(place[0] == task for place in self._places)]

    def measures(self) -> list[Measure]:
        return [measure for measure in MEASURES if measure.task in self.tasks()]

    def seeds(self) -> list[int]:
        keys = (key for key in self._values if key[0].kind in KINDS)
        return sorted({seed for key in keys for seed in self._values[key]})

    def test_sets(self, task: str) -> list[str]:
        return sorted({place[4] for place in self._places if place[0] == task and place[1] == "all"})

    def locales(self, task: str) -> list[str]:
        return sorted({place[2] for place in self._places if place[0] == task and place[1] == "locale"})

    def values(self, student: Student, task: str, metric: str, place: Place = WHOLE_TEST) -> dict[int, float]:
        """Seed -> value."""
        key = (student, task, metric, place.scope, place.locale, place.domain, place.test_set)
        return {seed: value for seed, (value, _) in sorted(self._values.get(key, {}).items())}

    def count(self, student: Student, task: str, metric: str, place: Place = WHOLE_TEST) -> int | None:
        """The denominator of a value: utterances, or what results.py says; None where there is no value."""
        key = (student, task, metric, place.scope, place.locale, place.domain, place.test_set)
        return next((count for _, count in self._values.get(key, {}).values()), None)

    def mean(self, student: Student, task: str, metric: str, place: Place = WHOLE_TEST) -> Interval | None:
        values = list(self.values(student, task, metric, place).values())
        return mean_interval(values) if values else None

    def errors(self, student: Student, measure: Measure, place: Place = WHOLE_TEST) -> ErrorCounts | None:
        """The error rate by seed and utterance; by seed alone where records are missing."""
        key = (student, measure.task, measure.error, place)
        if key not in self._errors:
            self._errors[key] = self._error_counts(student, measure, place)
        return self._errors[key]

    def _error_counts(self, student: Student, measure: Measure, place: Place) -> ErrorCounts | None:
        values = self.values(student, measure.task, measure.error, place)
        who = (student.kind, student.transfer_set, student.teacher)
        records = {seed: self._records((*who, seed, measure.task), place) for seed in values}
        if values and all(records.values()):
            return error_counts(records, measure.error, test_set=place.test_set)
        return seed_counts(values)

    def _records(self, key: RecordKey, place: Place) -> Sequence[Record]:
        """The records of one locale and domain, sorted once: with many locales, going through all each time is slow."""
        if key not in self._buckets:
            buckets = self._buckets[key] = defaultdict(list)
            for record in self.inputs.records.get(key, ()):
                for locale in ("all", record["locale"]):
                    for domain in ("all", record["domain"]):
                        buckets[locale, domain].append(record)
        return self._buckets[key].get((place.locale, place.domain), ())

    def difference(
        self,
        student: Student | None,
        reference: Student | None,
        measure: Measure,
        place: Place = WHOLE_TEST,
    ) -> Difference | None:
        """Student against reference; None where either is missing or nothing but one seed's rates is known."""
        key = (student, reference, measure.task, measure.error, place)
        if key not in self._differences:
            self._differences[key] = self._difference(student, reference, measure, place)
        return self._differences[key]

    def _difference(self, student, reference, measure: Measure, place: Place) -> Difference | None:
        if student is None or reference is None or student == reference:
            return None
        a, b = self.errors(student, measure, place), self.errors(reference, measure, place)
        return compare(a, b) if a is not None and b is not None and comparable(a, b) else None

    def distilled(self, teacher: str) -> list[Student]:
        """The students distilled from one teacher, by share of task text."""
        return [student for student in self.students if student.kind == "distilled" and student.teacher == teacher]

    def with_share(self, share: float, teacher: str = "generic") -> Student | None:
        """The student distilled over a transfer set of exactly this share."""
        return next((student for student in self.distilled(teacher) if self.share(student) == share), None)

    @property
    def scratch(self) -> Student | None:
        return next((student for student in self.students if student.kind == "scratch"), None)


def seed_counts(values: Mapping[int, float]) -> ErrorCounts | None:
    """Rates known by seed alone, in the form that `compare` takes; its intervals then cover seeds only."""
    if not values:
        return None
    rates = np.array(list(values.values()))[:, None]
    return ErrorCounts(rates, np.ones_like(rates), tuple(values), ("all",))


def comparable(a: ErrorCounts, b: ErrorCounts) -> bool:
    """Whether an interval of the difference can be had: common seeds, and more than one seed or utterance."""
    if a.ids != b.ids:
        return False
    shared = set(a.seeds) & set(b.seeds)
    return len(shared) > 1 or (len(shared) == 1 and len(a.ids) > 1)


def percent(share: float) -> str:
    """0.5 -> "50 %", 0.125 -> "12.5 %"."""
    return f"{100 * share:.4g} %"
