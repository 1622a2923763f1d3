"""From records to result objects.

Keys: student, transfer_set, teacher, seed, task, scope, locale, domain, test_set, metric, value, count.

scope is "all", "locale", "domain" or "locale_domain"; a locale or domain that the scope does not name is "all", which
pools the utterances. value is null if the metric is undefined, never NaN. count is the metric's denominator:
utterances, for slot F1 the gold plus predicted spans, for SemER the gold slots plus utterances.

Every metric but macro F1 is a ratio of two sums over utterances (`TERMS`), so significance.py can resample utterances.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2

from kd_jax.evaluation.records import Record
from kd_jax.evaluation.slots import MODES, SlotCounts, count_slots

# The files of an evaluate run.
RECORDS = "records.jsonl"
RESULTS = "results.jsonl"

Term = tuple[float, float]  # numerator, denominator of one utterance

IDENTITY = ("student", "transfer_set", "teacher", "seed")
MASSIVE_METRICS = ("massive_intent_accuracy", "massive_slot_f1", "massive_exact_match")


def _slot_f1(counts: SlotCounts) -> Term:
    """Micro F1 = 2 correct / (gold + predicted), summed over utterances before dividing."""
    spans = 2 * (counts.correct + counts.substitutions) + counts.insertions + counts.deletions
    return 2.0 * counts.correct, spans


def _strict(record: Record) -> SlotCounts:
    return SlotCounts(*(record[name] for name in SlotCounts._fields))


def _massive(record: Record) -> SlotCounts:
    return count_slots(record["gold_tags"], record["predicted_tags"], "massive")


def _semer(record: Record) -> Term:
    counts = _strict(record)
    errors = sum(counts) - counts.correct + (record["predicted_intent"] != record["intent"])
    return float(errors), record["gold_slots"] + 1


def _massive_exact(record: Record) -> bool:
    counts = _massive(record)
    return record["predicted_intent"] == record["intent"] and sum(counts) == counts.correct


def _of_slots(term: Callable[[Record], Term]) -> Callable[[Record], Term]:
    """A term that needs predicted slots: 0 of 0, so that the metric is undefined, if a model predicts none."""
    return lambda record: (0.0, 0.0) if record["predicted_tags"] is None else term(record)


def _share(right: Callable[[Record], bool]) -> Callable[[Record], Term]:
    return lambda record: (float(right(record)), 1)


def _rest(term: Callable[[Record], Term]) -> Callable[[Record], Term]:
    """The error rate of a score: 1 - score, as a ratio with the same denominator."""

    def errors(record: Record) -> Term:
        numerator, denominator = term(record)
        return denominator - numerator, denominator

    return errors


def _f1(record: Record) -> Term:
    return _slot_f1(_strict(record))


_accuracy = _share(lambda record: record["predicted_domain"] == record["domain"])
_intent = _share(lambda record: record["predicted_intent"] == record["intent"])
_exact = _share(lambda record: record["exact"])

TERMS: dict[str, dict[str, Callable[[Record], Term]]] = {
    "dc": {"accuracy": _accuracy, "error_rate": _rest(_accuracy)},
    "icner": {
        "intent_accuracy": _intent,
        "intent_error_rate": _rest(_intent),
        "slot_f1": _of_slots(_f1),
        "slot_error_rate": _of_slots(_rest(_f1)),
        "exact_match": _of_slots(_exact),
        "exact_match_error_rate": _of_slots(_rest(_exact)),
        "semer": _of_slots(_semer),
        "massive_intent_accuracy": _intent,
        "massive_slot_f1": _of_slots(lambda record: _slot_f1(_massive(record))),
        "massive_exact_match": _of_slots(_share(_massive_exact)),
    },
}


def results(records: Sequence[Record], *, identity: dict[str, Any], mode: str = "strict") -> list[dict[str, Any]]:
    """Result objects of one student's records of one task, over test sets, locales and domains.

    identity holds student, transfer_set, teacher and seed. mode "massive" adds the official MASSIVE scores
    (massive_slot_f1, ...) to the strict ones. macro_f1 is null in the scopes of one domain, where precision has no
    meaning. Raises ValueError for another identity or mode, for records of several tasks, or if the records' counts
    give another slot F1 than seqeval computes from their tags.
    """
    if set(identity) != set(IDENTITY):
        raise ValueError(f"identity holds {sorted(identity)}; it must hold exactly {', '.join(IDENTITY)}")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
    if not records:
        return []
    tasks = {record["task"] for record in records}
    if len(tasks) > 1:
        raise ValueError(f"records of several tasks at once: {', '.join(sorted(tasks))}")
    (task,) = tasks
    if task == "icner":
        _check_against_seqeval(records)
    terms = {name: term for name, term in TERMS[task].items() if mode == "massive" or name not in MASSIVE_METRICS}
    # (test set, scope, locale, domain) -> numerator and denominator of each metric; labels of (test set, locale) for DC
    sums: dict[tuple[str, str, str, str], np.ndarray] = defaultdict(lambda: np.zeros((len(terms), 2)))
    labels: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for record in records:
        found = np.array([term(record) for term in terms.values()])
        for test_set in record["test_sets"]:
            for scope, locale, domain in _scopes(record):
                sums[test_set, scope, locale, domain] += found
                if task == "dc" and domain == "all":
                    labels[test_set, locale].append((record["domain"], record["predicted_domain"]))

    rows = []
    for (test_set, scope, locale, domain), bucket in sorted(sums.items(), key=lambda item: item[0]):
        place = {**identity, "task": task, "scope": scope, "locale": locale, "domain": domain, "test_set": test_set}
        for name, (numerator, denominator) in zip(terms, bucket.tolist()):
            value = numerator / denominator if denominator else None
            rows.append({**place, "metric": name, "value": value, "count": int(denominator)})
        if task == "dc":
            pairs = labels[test_set, locale] if domain == "all" else []
            value = macro_f1([gold for gold, _ in pairs], [guess for _, guess in pairs])
            rows.append({**place, "metric": "macro_f1", "value": value, "count": len(pairs)})
    return rows


def macro_f1(gold: Sequence[str], predicted: Sequence[str]) -> float | None:
    """Mean F1 over the labels in gold or prediction, as scikit-learn's f1_score(average="macro"); None without any.

    A gold label that the model never saw in training counts as an error like any other.
    """
    if not len(gold):
        return None
    names, codes = np.unique([*gold, *predicted], return_inverse=True)
    true, guess = codes[: len(gold)], codes[len(gold) :]
    if len(true) != len(guess):
        raise ValueError(f"{len(true)} gold labels but {len(guess)} predicted labels")
    hits = np.bincount(true[true == guess], minlength=len(names))
    totals = np.bincount(true, minlength=len(names)) + np.bincount(guess, minlength=len(names))
    return float(np.mean(2.0 * hits / totals))


def _check_against_seqeval(records: Sequence[Record]) -> None:
    # Ours are sums that can be resampled; seqeval's is the reference that others report.
    records = [record for record in records if record["predicted_tags"] is not None]
    if not records:
        return
    terms = [_f1(record) for record in records]
    spans = sum(denominator for _, denominator in terms)
    ours = sum(numerator for numerator, _ in terms) / spans if spans else 0.0
    tags = [[record[field] for record in records] for field in ("gold_tags", "predicted_tags")]
    settings: dict[str, Any] = {"average": "micro", "mode": "strict", "scheme": IOB2, "zero_division": 0}
    theirs = np.asarray(f1_score(*tags, **settings)).item()
    if abs(ours - theirs) > 1e-9:
        raise ValueError(f"the records' counts give slot F1 {ours:.6f}, seqeval gives {theirs:.6f} from their tags")


def _scopes(record: Record) -> tuple[tuple[str, str, str], ...]:
    locale, domain = record["locale"], record["domain"]
    return (
        ("all", "all", "all"),
        ("locale", locale, "all"),
        ("domain", "all", domain),
        ("locale_domain", locale, domain),
    )
