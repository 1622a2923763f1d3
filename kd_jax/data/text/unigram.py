"""A unigram language-model vocabulary, trained the same way each time.

The trainer of the `tokenizers` library walks a hash map in random order and gives other scores each time. This one
follows the same plan (Kudo 2018, "Subword Regularization", arXiv 1804.10959): a large seed of frequent substrings, then
rounds of EM that drop what costs the least likelihood. The E step counts pieces in the best segmentation rather than in
all; the counts are then whole numbers, so no sum depends on its order.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.special import digamma
from tokenizers import Tokenizer
from tokenizers.models import Unigram

_SEEDS_PER_PIECE = 6
_MAX_LENGTH = 12  # characters of a piece
_SEED_WORDS = 60_000  # the most frequent words, whose substrings are counted
_KEPT = 0.75  # of the pieces in each round
_SCORE_DIGITS = 4  # the scores are rounded, so that the last bit of a logarithm cannot matter
_UNUSED = 0.5  # count given to a piece that no segmentation uses

Scores = dict[str, float]


def train_unigram(words: Mapping[str, int], characters: Iterable[str], size: int) -> Scores:
    """Log probabilities of at most `size` pieces: the characters, always, and longer pieces, most probable first.

    `words` are counts of words made of these characters only.
    """
    single = sorted(set(characters))
    common = sorted(words, key=lambda word: (-words[word], word))
    counts = _seed(common[:_SEED_WORDS], words, single, max(size - len(single), 0) * _SEEDS_PER_PIECE)
    scores = _maximize(counts)
    weights = np.array([words[word] for word in common], np.int64)
    while True:
        for _ in range(2):
            counts = _expect(scores, common, weights, single)
            scores = _maximize(counts)
        if len(scores) <= size:
            return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))
        scores = _prune(scores, counts, single, max(size, int(len(scores) * _KEPT)))


def _seed(common: Sequence[str], words: Mapping[str, int], single: Sequence[str], size: int) -> dict[str, float]:
    """Counts of all characters and of the `size` substrings that cover most of the text."""
    found: defaultdict[str, int] = defaultdict(int)
    letters: Counter[str] = Counter(dict.fromkeys(single, 0))
    for word in common:
        weight = words[word]
        for start in range(len(word)):
            letters[word[start]] += weight
            for end in range(start + 2, min(start + _MAX_LENGTH, len(word)) + 1):
                found[word[start:end]] += weight
    repeated = [piece for piece, count in found.items() if count > 1]
    repeated.sort(key=lambda piece: (-found[piece] * len(piece), piece))
    return {piece: max(letters[piece], _UNUSED) for piece in single} | {p: found[p] for p in repeated[:size]}


def _maximize(counts: Mapping[str, float]) -> Scores:
    """Scores by the digamma of the counts, as in SentencePiece: it takes more from the rare than the logarithm."""
    values = np.fromiter(counts.values(), np.float64, len(counts))
    scores = np.round(digamma(values) - digamma(values.sum()), _SCORE_DIGITS)
    return dict(zip(counts, scores.tolist()))


def _expect(scores: Scores, common: Sequence[str], weights: np.ndarray, single: Sequence[str]) -> dict[str, float]:
    """How often each piece stands in the best segmentations of the words; unused pieces but characters are left out."""
    unknown = "\0"  # required by the library; no word holds it
    model = Tokenizer(Unigram([(unknown, 0.0), *scores.items()], 0, False))
    encodings = model.encode_batch_fast(list(common), add_special_tokens=False)
    lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
    ids = np.concatenate([np.array(encoding.ids, np.int64) for encoding in encodings])
    counts = np.zeros(len(scores) + 1, np.int64)
    np.add.at(counts, ids, np.repeat(weights, lengths))
    always = set(single)
    pairs = zip(scores, counts[1:].tolist())
    return {piece: max(count, _UNUSED) for piece, count in pairs if count or piece in always}


def _prune(scores: Scores, counts: Mapping[str, float], single: Sequence[str], size: int) -> Scores:
    """The characters, and of the rest those whose loss would lower the likelihood of the corpus most."""
    always = set(single)
    losses = {
        piece: counts[piece] * (scores[piece] - _without(piece, scores)) for piece in scores if piece not in always
    }
    kept = sorted(losses, key=lambda piece: (-round(losses[piece], _SCORE_DIGITS), piece))[: size - len(always)]
    return {piece: scores[piece] for piece in [*single, *kept]}


def _without(piece: str, scores: Scores) -> float:
    """Score of the best segmentation of a piece into other pieces."""
    best = [0.0]
    for end in range(1, len(piece) + 1):
        options = (
            best[start] + scores[piece[start:end]]
            for start in range(end)
            if end - start < len(piece) and piece[start:end] in scores
        )
        best.append(max(options))
    return best[-1]
