"""From a finetuned model and utterances to one record for each utterance, over packed rows."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.data.batches import process_slice
from kd_jax.data.labeled import LabeledSet, packed
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.data.text.utterances import LabelMaps, Utterance
from kd_jax.evaluation.records import Record, assign_test_sets, domain_record, intent_slot_record
from kd_jax.evaluation.slots import decode_bio_batch, repair_bio
from kd_jax.models.functional import Functional
from kd_jax.runtime.preemption import interruptible
from kd_jax.types import Array, Batch, Params

Predict = Callable[[Params, Mapping[str, Array], Mapping[str, Array]], Any]
Probabilities = Literal["none", "label", "all"]  # which probabilities records have


class Spread(NamedTuple):
    """How the rows of a batch are divided among devices and processes; by default this process has all of them."""

    place: Callable[[Batch], Mapping[str, Array]]  # this process's rows, in NumPy -> the batch on the devices
    fetch: Callable[[Any], np.ndarray] = np.asarray  # what was computed of the batch -> this process's rows
    share: tuple[int, int] = (0, 1)  # which part of the rows is this process's, of how many
    from_all: Callable[[bytes], list[bytes]] = lambda value: [value]  # this process's value -> those of all


@functools.cache
def compiled_predict(model: Functional) -> Predict:
    """Jitted (params, class masks, batch) -> class ids int32 [R, S], probabilities float32 [R, S, C], tag scores.

    Tag scores are float32 [R, L, T] for ICNER and None for DC. The class masks are added to the logits: they exclude
    classes that only pad a label map.
    """

    def classes(logits_RxSxC, masks):
        logits_RxSxC = logits_RxSxC + masks["utterance_classes"][None, None, :]
        return jnp.argmax(logits_RxSxC, axis=-1), jax.nn.softmax(logits_RxSxC.astype(jnp.float32), axis=-1)

    def predict_dc(params, masks, batch):
        return *classes(model.domain_logits(params, batch), masks), None

    def predict_icner(params, masks, batch):
        intent_RxSxI, tag_RxLxT = model.intent_and_tag_logits(params, batch)
        return *classes(intent_RxSxI, masks), tag_RxLxT.astype(jnp.float32) + masks["tag_classes"][None, None, :]

    return jax.jit(predict_dc if model.kind == "dc" else predict_icner)


def predict_records(
    model: Functional,
    params: Params,
    masks: Mapping[str, Array],
    utterances: Sequence[Utterance],
    train: Sequence[Utterance],
    tokenizer: Tokenizer,
    maps: LabelMaps,
    *,
    length: int,
    batch_rows: int,
    spread: Spread,
    probabilities: Probabilities = "none",
) -> list[Record]:
    """Records in the order of `utterances`, the same in every process; `train`, whose labels the model
    saw, decides test_unseen and tail.

    Each process predicts and decodes its part of the rows; then all exchange the results. With probabilities="label" a
    record also has "probability", of its domain or intent; with "all" also "class_probabilities", of all of them, and
    "tag_probabilities" from `probabilities_of_tags`.
    """
    labeled = LabeledSet(utterances, tokenizer, maps, model.kind, length)
    predict = compiled_predict(model)
    mine = slice(*process_slice(batch_rows, *spread.share))
    names = maps.domains if model.kind == "dc" else maps.intents
    # Index of the utterance, its class, its tags, and the probabilities of both. Plain values, because they cross
    # processes as JSON.
    found: list[tuple[int, int, list[str], list[float], list[float | None]]] = []
    for batch, index_RxS in interruptible(packed(labeled, length, batch_rows), "the predictions"):
        batch, index_RxS = {name: values[mine] for name, values in batch.items()}, index_RxS[mine]
        classes_RxS, chances_RxSxC, scores_RxLxT = jax.tree.map(
            spread.fetch, predict(params, masks, spread.place(batch))
        )
        rows, slots = np.nonzero(index_RxS >= 0)
        chosen, labels = index_RxS[rows, slots], classes_RxS[rows, slots]
        tags: Sequence[list[str]] = [[]] * len(chosen)
        likely: Sequence[list[float | None]] = [[]] * len(chosen)
        if model.kind == "icner":
            firsts = np.asarray(batch["first_positions"])[rows, slots]
            tags = decode_rows(labeled, chosen, scores_RxLxT[rows], firsts, maps.tags)
            if probabilities == "all":
                likely = probabilities_of_tags(labeled, chosen, scores_RxLxT[rows], firsts, maps, tags)
        chances = chances_RxSxC[rows, slots, : len(names)]
        if probabilities != "all":
            chances = chances.max(axis=-1, keepdims=True)
        found += zip(chosen.tolist(), labels.tolist(), tags, chances.tolist(), likely, strict=True)
    records: list[Record] = [{} for _ in utterances]
    test_sets = assign_test_sets(utterances, train)
    for part in spread.from_all(json.dumps(found).encode()):
        for number, label, one, chances, likely in json.loads(part):
            who = (utterances[number], test_sets[number])
            if model.kind == "dc":
                records[number] = domain_record(*who, names[label])
            else:
                records[number] = intent_slot_record(*who, names[label], one)
            if probabilities != "none":
                records[number]["probability"] = max(chances)
            if probabilities == "all":
                records[number] |= {"class_probabilities": chances, "tag_probabilities": likely}
    return records


def word_columns(labeled: LabeledSet, number: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the words of utterance `number` that have a token in their row, the indices and the columns of first tokens.

    `first` is the column where the utterance starts. A word may have no token: cut off, or emptied by the tokenizer.
    """
    inside = slice(labeled.offsets[number], labeled.offsets[number + 1])
    starts = np.flatnonzero(labeled.word_starts[inside])
    return labeled.words[inside][starts], first + 1 + starts


def decode_rows(
    labeled: LabeledSet, chosen: np.ndarray, scores_NxLxT: np.ndarray, firsts: np.ndarray, tags: Sequence[str]
) -> list[list[str]]:
    """Valid IOB2 tags of each chosen utterance, from its row's scores and the column where it starts.

    A word counts by its first token; one without a token is "O". A character that shares the token of the character
    before it continues that character's slot.
    """
    found = [word_columns(labeled, number, first) for number, first in zip(chosen, firsts)]
    lengths = np.array([len(words) for words, _ in found], np.int64)  # empty if a process has only empty rows
    scores = np.zeros((len(chosen), lengths.max(initial=1), len(tags)), np.float32)
    for row, (_, columns) in enumerate(found):
        scores[row, : len(columns)] = scores_NxLxT[row, columns, : len(tags)]
    decoded = []
    for number, (words, _), of_tokens in zip(chosen, found, decode_bio_batch(scores, lengths, tags)):
        utterance = labeled.utterances[number]
        shares = utterance.characters
        by_word = dict(zip(words.tolist(), of_tokens))
        of_words: list[str] = []
        for word in range(len(utterance.words)):
            slot = of_words[-1][2:] if shares and of_words else ""
            of_words.append(by_word.get(word, f"I-{slot}" if slot else "O"))
        decoded.append(repair_bio(of_words))
    return decoded


def probabilities_of_tags(
    labeled: LabeledSet,
    chosen: np.ndarray,
    scores_NxLxT: np.ndarray,
    firsts: np.ndarray,
    maps: LabelMaps,
    decoded: Sequence[Sequence[str]],
) -> list[list[float | None]]:
    """The probability of each word's decoded tag, by the softmax at its first token alone; None without a token."""
    found = []
    for row, (number, first, tags) in enumerate(zip(chosen, firsts, decoded, strict=True)):
        words, columns = word_columns(labeled, number, first)
        ids = np.array([maps.tag_id(str(tags[word])) for word in words], np.int64)
        scores = scores_NxLxT[row, columns, : len(maps.tags)]
        shifted = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
        chances = shifted[np.arange(len(ids)), ids] / shifted.sum(axis=-1)
        by_word = dict(zip(words.tolist(), chances.tolist()))
        found.append([by_word.get(word) for word in range(len(tags))])
    return found
