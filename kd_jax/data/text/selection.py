"""Generic texts chosen for their likeness to the task's text: importance resampling on hashed n-grams.

DSIR: Xie, Santurkar, Ma and Liang 2023, "Data Selection for Language Models via Importance Resampling", arXiv
2302.03169. Two bags of hashed n-grams are estimated, one of the target (the task's text) and one of all raw texts; a
text's log importance weight is the sum of log p_target - log p_raw over its n-grams; and the texts are resampled
without replacement in proportion to these weights, by adding Gumbel noise to each and keeping the largest.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from kd_jax.config.data import Select
from kd_jax.data.permutation import counter_keys, name_key, splitmix64
from kd_jax.data.text.splits import normalize
from kd_jax.types import UserError

_CHUNK_TEXTS = 4096

# First code points of scripts written without spaces between words, each with the first after it: Thai to Tibetan,
# Myanmar, Khmer, Japanese kana, Chinese characters (three times). Their characters stand for words.
_UNSPACED = np.array(
    [0x0E00, 0x1000, 0x1000, 0x10A0, 0x1780, 0x1800, 0x3040, 0x3100, 0x3400, 0xA000, 0xF900, 0xFB00, 0x20000, 0x40000]
)


class Chosen(NamedTuple):
    """Which texts of a stream were chosen: int64 [chosen] indices, ascending, and how many texts the stream has."""

    indices: np.ndarray
    texts: int

    def of(self, texts: Iterable[str]) -> Iterator[str]:
        """The chosen texts of the same stream, in its order. Raises UserError if the stream has changed."""
        indices = iter(self.indices.tolist())
        wanted, number = next(indices, None), 0
        for number, text in enumerate(texts, 1):
            if number - 1 == wanted:
                yield text
                wanted = next(indices, None)
        _same_number(number, self.texts)


def choose(read: Callable[[], Iterable[str]], target: Iterable[str], select: Select) -> Chosen:
    """Resamples round(share * texts) of the texts, at least one.

    `read` gives the texts and is called twice, to count their n-grams and to weigh them. Memory is a chunk of texts
    and 32 bytes for each chosen one. A pure function of texts, target and settings: a text's noise is a hash of the
    text, so reading the texts in another order chooses the same (except for ties between equal texts).
    With select.target=random all weights are equal. Raises UserError if a target is needed and has no text.
    """
    if select.target == "random":
        ratios, total = None, sum(1 for _ in read())
    else:
        target_counts, target_texts = ngram_counts(target, select)
        if not target_texts:
            raise UserError(
                "config.select: there is no train utterance to compare with; check config.nlu or set share to 0"
            )
        raw_counts, total = ngram_counts(read(), select)
        ratios = log_ratios(target_counts, raw_counts, select.smoothing)
    wanted = min(max(round(select.share * total), 1), total)
    scores, indices, seen = [np.empty(0)], [np.empty(0, np.int64)], 0
    for texts in _chunks(read()):
        weights = 0.0 if ratios is None else log_weights(texts, ratios, select)
        scores.append(weights + gumbel(texts, select.seed))
        indices.append(np.arange(seen, seen + len(texts)))
        seen += len(texts)
        # Cut back only once twice as many have gathered: the work per text stays constant, and so does the memory.
        if sum(map(len, scores)) >= 2 * wanted + _CHUNK_TEXTS:
            scores, indices = ([kept] for kept in _largest(np.concatenate(scores), np.concatenate(indices), wanted))
    _same_number(seen, total)
    return Chosen(_largest(np.concatenate(scores), np.concatenate(indices), wanted)[1], total)


def ngram_counts(texts: Iterable[str], select: Select) -> tuple[np.ndarray, int]:
    """(how often each bucket's n-grams occur, int64 [buckets]; how many texts were read)."""
    counts, number = np.zeros(select.buckets, np.int64), 0
    for chunk in _chunks(texts):
        counts += np.bincount(hashed_ngrams(chunk, select.ngrams, select.buckets)[0], minlength=select.buckets)
        number += len(chunk)
    return counts, number


def log_ratios(target_counts: np.ndarray, raw_counts: np.ndarray, smoothing: float) -> np.ndarray:
    """float64 [buckets]: log p_target - log p_raw, where p is the share of a bucket plus smoothing / buckets.

    As in DSIR, both probabilities get the same constant. Added to the counts, it would weigh more in the smaller text,
    and n-grams that are rare in the raw text and absent from the task's would look like the task's.
    """
    constant = smoothing / len(raw_counts)
    target, raw = (np.log(counts / max(counts.sum(), 1) + constant) for counts in (target_counts, raw_counts))
    return target - raw


def log_weights(texts: list[str], ratios: np.ndarray, select: Select) -> np.ndarray:
    """float64 [texts]: the log importance weight of each text, `ratios` (float64 [buckets]) summed over its n-grams.

    As in DSIR, the sum is not divided by the text's length: it is the log likelihood ratio of the whole text. Generic
    n-grams are below 0 on average, so of two similar texts the shorter one weighs more.
    """
    buckets, text = hashed_ngrams(texts, select.ngrams, select.buckets)
    return np.bincount(text, weights=ratios[buckets], minlength=len(texts))


def gumbel(texts: list[str], seed: int) -> np.ndarray:
    """float64 [texts]: standard Gumbel noise, a hash of the text and the seed.

    The k largest of log w + Gumbel noise are k draws without replacement in proportion to w (Vieira 2014; Kool, van
    Hoof and Welling 2019, arXiv 1903.06059).
    """
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8, person=b"selection").digest() for text in texts)
    hashes = counter_keys(name_key("selection", seed), np.frombuffer(digests, "<u8"))
    uniform = ((hashes >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def hashed_ngrams(texts: list[str], ngrams: int, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """(bucket int64 [n], text int64 [n]) of every n-gram of 1 to `ngrams` words inside a text.

    Words are those of the normalized text, without case and punctuation. Utterances have neither, so n-grams with
    punctuation would separate written from spoken form rather than one subject from another.
    """
    words, text = _hashed_words([normalize(text) for text in texts])
    grams, of_text = words, text
    found = [(grams, of_text)]
    for size in range(2, ngrams + 1):
        grams = counter_keys(grams[:-1], words[size - 1 :])
        inside = text[: len(grams)] == text[size - 1 :]
        found.append((grams[inside], text[size - 1 :][inside]))
    grams, of_text = (np.concatenate(parts) for parts in zip(*found))
    return (grams % np.uint64(buckets)).astype(np.int64), of_text


def _hashed_words(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hash uint64 [words], text int64 [words]) of the words of normalized texts.

    Works on the code points of all texts at once in NumPy; a loop over words in Python would take most of the time.
    """
    codes = np.frombuffer("\n".join(texts).encode("utf-32-le"), np.uint32)
    ends = codes == ord("\n")
    blank = ends | (codes == ord(" "))
    alone = np.searchsorted(_UNSPACED, codes, side="right") % 2 == 1 if codes.size and codes.max() >= 0x0E00 else blank
    starts_here = ~blank
    starts_here[1:] &= blank[:-1] | alone[:-1] | alone[1:]
    starts = np.flatnonzero(starts_here)
    if not starts.size:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    column = np.arange(len(codes)) - starts[np.cumsum(starts_here) - 1]  # within the word
    # A word's hash is the mixed sum of the hashes of its (character, column) pairs: sums need no loop over words.
    pairs = splitmix64(codes.astype(np.uint64) | (column.astype(np.uint64) << np.uint64(32)))
    pairs[blank] = 0
    return splitmix64(np.add.reduceat(pairs, starts)), np.cumsum(ends)[starts]


def _largest(values: np.ndarray, indices: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The `number` largest values and their indices, in ascending order of the latter; of equal values the first."""
    kept = np.sort(np.argsort(-values, kind="stable")[:number])
    return values[kept], indices[kept]


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, _CHUNK_TEXTS)):
        yield chunk


def _same_number(number: int, expected: int) -> None:
    if number != expected:
        raise UserError(
            f"config.sources: gave {expected} texts and then {number}; leave their files alone while prepare runs"
        )
