"""One record for each utterance: gold and prediction by name. All metrics are computed from records.

Fields of every record: id, locale, domain, intent, partition, test_sets (list), task ("dc" or "icner"), words (list).
A DC record adds predicted_domain. An ICNER record adds gold_tags, predicted_intent, predicted_tags (IOB2, one for each
word), the counts of strict scoring (gold_slots, correct, substitutions, insertions, deletions) and exact (intent and
all spans right). For a model that predicts no slots, predicted_tags and the fields after it are null.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from kd_jax.data.text.splits import text_key
from kd_jax.data.text.utterances import Utterance
from kd_jax.evaluation.slots import SlotCounts, count_slots
from kd_jax.runtime.files import read_json_lines
from kd_jax.types import UserError

Record = dict[str, Any]

FIELDS = ("id", "locale", "domain", "intent", "partition", "test_sets", "task", "words")
TASK_FIELDS = {
    "dc": ("predicted_domain",),
    "icner": ("gold_tags", "predicted_intent", "predicted_tags", "gold_slots", *SlotCounts._fields, "exact"),
}


def assign_test_sets(utterances: Sequence[Utterance], train: Iterable[Utterance]) -> list[list[str]]:
    """The test sets of each utterance: its partition, and in the test partition possibly two more.

    train: the utterances whose labels were used. test_unseen: no such utterance of its locale has the same `text_key`.
    tail: at least one of its words, ignoring case, occurs in no such utterance of its locale.
    """
    texts: dict[str, set[str]] = defaultdict(set)
    words: dict[str, set[str]] = defaultdict(set)
    for utterance in train:
        texts[utterance.locale].add(text_key(utterance.text))
        words[utterance.locale].update(word.casefold() for word in utterance.words)
    assigned = []
    for utterance in utterances:
        sets = [utterance.partition]
        if utterance.partition == "test":
            if text_key(utterance.text) not in texts[utterance.locale]:
                sets.append("test_unseen")
            if any(word.casefold() not in words[utterance.locale] for word in utterance.words):
                sets.append("tail")
        assigned.append(sets)
    return assigned


def domain_record(utterance: Utterance, test_sets: Sequence[str], predicted_domain: str) -> Record:
    """The DC record of one utterance."""
    return {**_common(utterance, test_sets, "dc"), "predicted_domain": predicted_domain}


def intent_slot_record(
    utterance: Utterance, test_sets: Sequence[str], predicted_intent: str, predicted_tags: Sequence[str] | None
) -> Record:
    """The ICNER record of one utterance. Raises ValueError unless predicted_tags has one tag for each word.

    predicted_tags: None for a model that predicts no slots.
    """
    known = {
        **_common(utterance, test_sets, "icner"),
        "gold_tags": list(utterance.tags),
        "predicted_intent": predicted_intent,
    }
    if predicted_tags is None:
        return {**known, **dict.fromkeys(("predicted_tags", "gold_slots", *SlotCounts._fields, "exact"))}
    counts = count_slots(utterance.tags, predicted_tags)
    return {
        **known,
        "predicted_tags": list(predicted_tags),
        "gold_slots": counts.correct + counts.substitutions + counts.deletions,
        **counts._asdict(),
        "exact": predicted_intent == utterance.intent and sum(counts) == counts.correct,
    }


def _common(utterance: Utterance, test_sets: Sequence[str], task: str) -> Record:
    of_utterance = {name: getattr(utterance, name) for name in ("id", "locale", "domain", "intent", "partition")}
    return {**of_utterance, "test_sets": list(test_sets), "task": task, "words": list(utterance.words)}


def read_records(path: str | os.PathLike) -> list[Record]:
    """The records of a file; raises UserError with file and line."""
    records = read_json_lines(path)
    for number, record in enumerate(records, 1):
        task = record.get("task")
        if task not in TASK_FIELDS:
            raise UserError(f"{path}:{number}: task is {task!r}; it must be dc or icner, write the records again")
        missing = [field for field in FIELDS + TASK_FIELDS[task] if field not in record]
        if missing:
            raise UserError(f"{path}:{number}: field {missing[0]!r} is missing; write the records again")
    return records
