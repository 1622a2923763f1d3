"""What a report is made from (`ReportInputs`), and every number that can be asked of it (`Numbers`)."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from kd_jax.config.training import FEATURE_TERMS
from kd_jax.data.text.utterances import SharedIds
from kd_jax.evaluation.records import Record
from kd_jax.evaluation.significance import (
    Difference,
    ErrorCounts,
    SeedMean,
    comparable,
    compare,
    error_counts,
    over_seeds,
    parallel_ids,
)
from kd_jax.study.plan import INITIALIZED, LABELED, OTHER_TEACHERS, Student

KINDS = ("ngrams", "probe", "finetuned", "scratch", INITIALIZED, "mlm", "distilled")  # in this order in tables
TRAINED = ("scratch", INITIALIZED, "mlm", "distilled")  # students; the other rows are their references
TEACHERS = ("generic", *OTHER_TEACHERS)
TEACHER_LABELS = {
    "adapted": "adapted teacher",
    "schedule": "generic then adapted teacher",
    "average": "both teachers averaged",
    "chain": "by way of an intermediate",
}
KIND_LABELS = {
    "ngrams": "n-grams",
    "probe": "teacher, frozen, linear probe",
    "finetuned": "teacher, finetuned",
    "scratch": "from scratch",
    INITIALIZED: "from the teacher, not distilled",
}
TEST = "test"  # the test set of every table and figure that names no other

# Student, transfer set, teacher, seed, task; the seed is None for a deterministic row.
RecordKey = tuple[str, str, str, int | None, str]


@dataclass(frozen=True)
class ReportInputs:
    """Everything that a finished study left behind.

    Without `records` all intervals cover seeds only.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    # Result objects of evaluation/results.py; also those of task "mlm", the held-out masked-LM loss. A teacher's have
    # student "teacher".
    results: Sequence[Mapping[str, Any]] = ()
    records: Mapping[RecordKey, Sequence[Record]] = field(default_factory=dict)
    task_shares: Mapping[str, float] = field(default_factory=dict)  # transfer set -> share of task text in [0, 1]
    selected: Sequence[str] = ()  # transfer sets whose generic text config.select chose
    task_texts: Mapping[str, int] = field(default_factory=dict)  # transfer set -> its limit of task texts per store
    realized: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # transfer set -> TransferSet.describe
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # label -> rows of metrics.jsonl
    similarity: Sequence[Mapping[str, Any]] = ()  # domain, jsd, jsd_matched, overlap, tokens
    # Student, task, dev_score, chosen, and learning_rate, epochs and pooling, or part and c.
    recipes: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()  # warnings that affect the recommendation
    remarks: Sequence[str] = ()  # on how the rows were made
    latency: Mapping[str, Any] | None = None  # latency.json; None where nothing was measured

    @cached_property
    def numbers(self) -> "Numbers":
        return Numbers(self)


class Measure(NamedTuple):
    """A compared metric: differences are taken of `error` (lower is better), tables show `shown`."""

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
HEADLINE = {"dc": MEASURES[0], "icner": MEASURES[4]}  # what the verdict on each task is about
TASK_NAMES = {"dc": "DC", "icner": "ICNER"}
LOSS = "loss"  # judged like a task: held-out masked-LM loss on task text, known by seed only
JUDGED_NAMES = {**TASK_NAMES, LOSS: "held-out task loss"}


class Place(NamedTuple):
    """The utterances that a number covers."""

    test_set: str = TEST
    locale: str = "all"
    domain: str = "all"

    @property
    def scope(self) -> str:
        return "_".join(name for name in ("locale", "domain") if getattr(self, name) != "all") or "all"


WHOLE_TEST = Place()
JUDGED = {
    **{task: (measure, WHOLE_TEST) for task, measure in HEADLINE.items()},
    LOSS: (Measure("mlm", "loss", "loss", "Loss", "Loss"), Place("heldout_task")),
}


class Numbers:
    """Looks numbers up in the results and compares students; anything missing is None or empty, never an error."""

    def __init__(self, inputs: ReportInputs):
        self.inputs = inputs
        self._values: dict[tuple, dict[int | None, tuple[float, int]]] = defaultdict(dict)  # -> seed -> value, count
        students, self._places = set(), set()
        for row in inputs.results:
            student = Student(row["student"], row["transfer_set"], row["teacher"])
            students.add(student)
            place = Place(row["test_set"], row["locale"], row["domain"])
            if place.scope != row["scope"]:  # a domain or locale of the user's is called "all"
                continue
            self._places.add((row["task"], place))
            if row["value"] is not None:
                key = (student, row["task"], row["metric"], place)
                self._values[key][row["seed"]] = (float(row["value"]), int(row["count"] or 0))
        self.students = sorted((student for student in students if student.kind in KINDS), key=self._order)
        self.named = {student.name: student for student in self.students}
        self.teachers = [Student("teacher", "", name) for name in TEACHERS if Student("teacher", "", name) in students]
        self._buckets: dict[RecordKey, dict[tuple[str, str], list]] = {}
        self._errors: dict[tuple, ErrorCounts | None] = {}
        self._differences: dict[tuple, Difference | None] = {}

    def _order(self, student: Student) -> tuple:
        others = ("", LABELED, INITIALIZED, *TEACHERS)
        teacher = others.index(student.teacher) if student.teacher in others else -1
        limit = self.inputs.task_texts.get(student.transfer_set, math.inf)
        return KINDS.index(student.kind), teacher, self.share(student) or 0.0, limit, student.transfer_set

    def share(self, student: Student) -> float | None:
        """Share of task text in the student's transfer set; None if it has none."""
        shares = self.inputs.task_shares
        return float(shares[student.transfer_set]) if student.transfer_set in shares else None

    def plain(self, student: Student) -> bool:
        """Whether its transfer set mixes all generic and all task text."""
        return student.transfer_set not in {*self.inputs.selected, *self.inputs.task_texts}

    def task_texts(self, student: Student) -> float:
        """How many different task texts the student read in distillation."""
        read = self.inputs.realized.get(student.transfer_set, {}).get("kinds", {})
        return float(read.get("task", {}).get("unique_utterances", 0))

    def label(self, student: Student) -> str:
        """The name of a student or teacher in tables and figures, as plain text."""
        if student.kind == "teacher":
            return f"{student.teacher} teacher"
        if student.kind in KIND_LABELS:
            return KIND_LABELS[student.kind] + (", labels by the teacher" if student.teacher == LABELED else "")
        share, selected = self.share(student), self.inputs.selected
        text = student.transfer_set if share is None else "generic only" if share == 0 else f"task {percent(share)}"
        if student.transfer_set in selected:
            drawn = self.inputs.config["select"]["target"] == "random"
            generic = "a random part of generic" if drawn else "selected generic"
            text = generic if share == 0 else f"{text} and {generic}"
        limits = self.inputs.task_texts
        if student.transfer_set in limits:
            text += f" of {limits[student.transfer_set]:,} texts"
        elif share is not None and student.transfer_set not in selected:
            apart = {*selected, *limits}
            same = [name for name, one in self.inputs.task_shares.items() if one == share and name not in apart]
            text += f" ({student.transfer_set})" if len(same) > 1 else ""  # the share alone would be ambiguous
        kind = "distilled" if student.kind == "distilled" else "MLM only"
        kind += " from the teacher" if student.teacher == INITIALIZED else ""
        return f"{kind}, {text}" + (f", {TEACHER_LABELS[student.teacher]}" if student.teacher in TEACHER_LABELS else "")

    def tasks(self) -> list[str]:
        return [task for task in TASK_NAMES if any(found == task for found, _ in self._places)]

    def measures(self) -> list[Measure]:
        return [measure for measure in MEASURES if measure.task in self.tasks()]

    def seeds(self) -> list[int]:
        """The seeds of the students; deterministic rows have none."""
        found = {seed for key, values in self._values.items() if key[0].kind in KINDS for seed in values}
        return sorted(seed for seed in found if seed is not None)

    def test_sets(self, task: str) -> list[str]:
        return sorted({place.test_set for found, place in self._places if found == task and place.scope == "all"})

    def locales(self, task: str) -> list[str]:
        return sorted({place.locale for found, place in self._places if found == task and place.scope == "locale"})

    def values(self, student: Student, task: str, metric: str, place: Place = WHOLE_TEST) -> dict[int | None, float]:
        """Seed -> value; the seed is None for a deterministic row."""
        found = self._values.get((student, task, metric, place), {})
        return {seed: found[seed][0] for seed in sorted(found, key=lambda seed: -1 if seed is None else seed)}

    def count(self, student: Student, task: str, metric: str, place: Place = WHOLE_TEST) -> int | None:
        """The denominator of a value, as results.py defines it for each metric; None if there is no value."""
        found = self._values.get((student, task, metric, place), {})
        return next((count for _, count in found.values()), None)

    def mean(self, student: Student, task: str, metric: str, place: Place = WHOLE_TEST) -> SeedMean | None:
        values = list(self.values(student, task, metric, place).values())
        return over_seeds(values) if values else None

    def errors(self, student: Student, measure: Measure, place: Place = WHOLE_TEST) -> ErrorCounts | None:
        """The error rate by seed and utterance; by seed only if records are missing."""
        key = (student, measure.task, measure.error, place)
        if key not in self._errors:
            values = self.values(student, measure.task, measure.error, place)
            who = (student.kind, student.transfer_set, student.teacher)
            records = {seed: self._records((*who, seed, measure.task), place) for seed in values}
            if not values:
                self._errors[key] = None
            elif all(records.values()):
                parallel = self.shared_ids.parallel
                self._errors[key] = error_counts(records, measure.error, test_set=place.test_set, parallel=parallel)
            else:  # as if each seed had one utterance
                rates = np.array(list(values.values()))[:, None]
                self._errors[key] = ErrorCounts(rates, np.ones_like(rates), tuple(values), ("all",))
        return self._errors[key]

    @cached_property
    def shared_ids(self) -> SharedIds:
        """The ids that locales share in the test set, which is the same for all students."""
        return parallel_ids(next(iter(self.inputs.records.values()), ()))

    def _records(self, key: RecordKey, place: Place) -> Sequence[Record]:
        """The records of one locale and domain."""
        if key not in self._buckets:
            # Sorted into buckets once: with many locales, filtering all records for each of them is slow.
            buckets = self._buckets[key] = defaultdict(list)
            for record in self.inputs.records.get(key, ()):
                for locale in ("all", record["locale"]):
                    for domain in ("all", record["domain"]):
                        buckets[locale, domain].append(record)
        return self._buckets[key].get((place.locale, place.domain), ())

    def seedless(self, student: Student) -> bool:
        """Whether the row is deterministic, so that it was run once and has no seed."""
        return any(None in seeds for key, seeds in self._values.items() if key[0] == student)

    def difference(
        self, student: Student | None, reference: Student | None, measure: Measure, place: Place = WHOLE_TEST
    ) -> Difference | None:
        """Student against reference; None if either is missing, or if one seed's rates are all that is known."""
        if student is None or reference is None or student == reference:
            return None
        key = (student, reference, measure.task, measure.error, place)
        if key not in self._differences:  # several tables ask for the same pair
            a, b = self.errors(student, measure, place), self.errors(reference, measure, place)
            self._differences[key] = compare(a, b) if a is not None and b is not None and comparable(a, b) else None
        return self._differences[key]

    def distilled(self, teacher: str) -> list[Student]:
        """The students of one teacher, in the order of their share of task text."""
        return [student for student in self.students if student.kind == "distilled" and student.teacher == teacher]

    def with_share(self, share: float, teacher: str = "generic") -> Student | None:
        """The student distilled on a transfer set of exactly this share, on all text rather than a part of it."""
        found = [student for student in self.distilled(teacher) if self.share(student) == share]
        return max(found, key=self.plain, default=None)

    @property
    def scratch(self) -> Student | None:
        return next((student for student in self.students if student == Student("scratch")), None)

    def compared(self) -> list[Student]:
        """The few students in a breakdown: from scratch, generic only, task only, and of the adapted teacher."""
        wanted = [self.scratch, self.with_share(0.0), self.with_share(1.0), *self.distilled("adapted")[-1:]]
        return [student for student in wanted if student]

    @property
    def distills_states(self) -> bool:
        """Whether the distilled students learn the teacher's inner states."""
        if "distill" not in self.inputs.config:
            return False
        terms = self.inputs.config["distill"]
        return any(terms[name]["weight"] > 0 for name in FEATURE_TERMS if name in terms)

    def unigram_loss(self, who: Student, kind: str, locale: str = "all") -> float | None:
        """Loss of a unigram on the model's own held-out "task" or "generic" tokens, in nats per masked token.

        It depends on the vocabulary: a student with a trimmed one predicts among fewer tokens than its teacher.
        """
        found = self.mean(who, "mlm", "unigram_loss", Place(f"heldout_{kind}", locale))
        return found.mean if found else None

    def heldout_locales(self, kind: str) -> list[str]:
        """ "all", then the languages of "task" or "generic" held-out text."""
        rows = (row for row in self.inputs.results if row["task"] == "mlm" and row["student"] == "teacher")
        found = {row["locale"] for row in rows if row["test_set"] == f"heldout_{kind}"}
        return [name for name in ["all", *sorted(found - {"all"})] if name in found]


def percent(share: float) -> str:
    """0.5 -> "50 %", 0.125 -> "12.5 %"."""
    return f"{100 * share:.4g} %"
