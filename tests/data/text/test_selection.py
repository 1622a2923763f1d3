import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from kd_jax.config.data import Nlu, Prepare, Rows, Select, Source, TokenizerSettings
from kd_jax.config.settings import block, read
from kd_jax.data.prepared import check_settings
from kd_jax.data.text import selection
from kd_jax.data.text.selection import (
    choose,
    gumbel,
    hashed_ngrams,
    log_ratios,
    log_weights,
    ngram_counts,
)
from kd_jax.types import UserError

TASK = ["wake me up at nine", "play some jazz", "turn off the light", "what is the weather today", "play the news"]


def settings(**changes):
    return read(Select, block(Select, **({"share": 0.1, "buckets": 2**20, "smoothing": 0.5} | changes)), "select")


def generic(number, seed=0):
    """Texts of other words, some longer than others."""
    random = np.random.default_rng(seed)
    words = ["the", "empire", "of", "river", "was", "century", "and", "treaty", "battle", "light", "in", "king"]
    return [" ".join(random.choice(words, random.integers(3, 30))) for _ in range(number)]


def spelled_out(text, longest):
    """The n-grams of a text of lower-case words, as tuples."""
    words = text.split()
    return [tuple(words[i : i + size]) for size in range(1, longest + 1) for i in range(len(words) - size + 1)]


@pytest.mark.parametrize("ngrams", [1, 2, 3])
def test_weights_equal_those_of_counted_ngrams(ngrams):
    # So many buckets that no two n-grams share one: the reference counts the n-grams themselves.
    select = settings(ngrams=ngrams)
    texts = [*generic(200), "play jazz in the river", "unseen words only", "...", "king"]
    target, raw = (Counter(gram for t in side for gram in spelled_out(t, ngrams)) for side in (TASK, texts[:200]))

    def log_p(side, gram):
        return math.log(side[gram] / side.total() + select.smoothing / select.buckets)

    expected = [
        math.fsum(log_p(target, gram) - log_p(raw, gram) for gram in spelled_out(text.strip("."), ngrams))
        for text in texts
    ]
    counts = [ngram_counts(side, select) for side in (TASK, texts[:200])]
    assert [number for _, number in counts] == [5, 200]
    assert counts[1][0].sum() == raw.total() and np.count_nonzero(counts[1][0]) == len(raw)
    got = log_weights(texts, log_ratios(counts[0][0], counts[1][0], select.smoothing), select)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_what_the_target_lacks_never_speaks_for_a_text():
    # With so few utterances, counting rare n-grams of the raw text as likely would choose texts full of them.
    raw = np.array([10**6, 1, 0, 500])
    ratios = log_ratios(np.array([3, 0, 0, 1]), raw, 1.0)
    assert ratios[1] < 0 and ratios[2] == 0 and ratios[3] > 0
    assert np.isfinite(log_ratios(np.zeros(4), raw, 1e-8)).all()


def test_few_buckets_are_shared_and_hold_every_ngram():
    buckets, text = hashed_ngrams(generic(50), 2, 7)
    assert set(buckets) == set(range(7))
    np.testing.assert_array_equal(np.bincount(text), [2 * len(t.split()) - 1 for t in generic(50)])


def test_ngrams_stay_inside_a_text_and_know_their_order():
    def grams(*texts):
        return Counter(zip(*(values.tolist() for values in hashed_ngrams(list(texts), 2, 2**30))))

    apart, swapped, together = grams("wake me", "up"), grams("me wake", "up"), grams("wake me up")
    assert len(apart) == 4 and len(together) == 5
    assert len(apart & swapped) == 3  # the pair alone differs
    assert {bucket for bucket, _ in apart} < {bucket for bucket, _ in together}
    assert grams("Wake, ME!", "“Up”") == apart  # case and punctuation do not count
    assert not grams("stop") & grams("post")
    assert grams("", "...") == Counter()
    assert {text for _, text in grams("", "wake", "", "up")} == {1, 3}


def test_characters_of_scripts_without_spaces_are_words():
    def buckets(text):
        return Counter(hashed_ngrams([text], 2, 2**30)[0].tolist())

    assert buckets("明天天气") == buckets("明 天 天 气")
    assert buckets("ปลุก") == buckets("ป ล ุ ก")
    assert buckets("播放jazz吧") == buckets("播 放 jazz 吧")
    assert buckets("मुझे जगाओ").total() == 3 and buckets("깨워 줘").total() == 3


def test_the_chosen_texts_of_a_mixed_stream_are_the_ones_like_the_task():
    texts = generic(3000)
    random = np.random.default_rng(1)
    like = [" ".join(random.permutation(TASK[i % 5].split())) + f" {i}" for i in range(60)]
    places = np.sort(random.choice(len(texts), len(like), replace=False))
    for place, text in zip(places, like):
        texts[place] = text.capitalize() + "."
    select = settings(share=0.02, buckets=10_000)
    chosen = choose(lambda: iter(texts), TASK, select)
    assert chosen.texts == 3000 and len(chosen.indices) == 60
    assert len(np.intersect1d(chosen.indices, places)) >= 57
    assert list(chosen.of(iter(texts))) == [texts[i] for i in chosen.indices]
    assert not np.intersect1d(choose(lambda: iter(texts), generic(50, seed=2), select).indices, places).size


def test_choosing_is_a_pure_function_of_the_texts(monkeypatch):
    texts = list(dict.fromkeys(generic(2000) + [f"play the light {i}" for i in range(30)]))
    select = settings(share=0.05)
    chosen = choose(lambda: texts, TASK, select)
    monkeypatch.setattr(selection, "_CHUNK_TEXTS", 17)
    np.testing.assert_array_equal(choose(lambda: iter(texts), TASK, select).indices, chosen.indices)
    order = np.random.default_rng(0).permutation(len(texts))
    again = choose(lambda: [texts[i] for i in order], TASK, select)
    assert set(order[again.indices]) == set(chosen.indices)
    assert set(choose(lambda: texts, TASK, settings(share=0.05, seed=1)).indices) != set(chosen.indices)


def test_a_random_choice_favors_neither_likeness_nor_length():
    texts = generic(4000) + [f"play some jazz {i}" for i in range(1000)]
    select = settings(target="random", share=0.4)
    chosen = choose(lambda: texts, [], select)
    assert len(chosen.indices) == 2000
    assert abs((chosen.indices >= 4000).mean() - 0.2) < 0.03  # 2.5 standard deviations are 0.017
    lengths = np.array([len(text.split()) for text in texts])
    assert abs(lengths[chosen.indices].mean() / lengths.mean() - 1) < 0.04
    again = choose(lambda: texts, TASK, select)
    np.testing.assert_array_equal(again.indices, chosen.indices)  # independent of the task text


def test_share_is_of_the_texts_and_equal_texts_are_chosen_from_the_first():
    texts = generic(101)
    for share, wanted in ((1e-6, 1), (0.1, 10), (0.5, 50), (1.0, 101)):
        places = choose(lambda: texts, TASK, settings(share=share)).indices
        assert len(places) == wanted and (np.diff(places) > 0).all()
    same = choose(lambda: ["play jazz"] * 10, TASK, settings(share=0.3))
    np.testing.assert_array_equal(same.indices, [0, 1, 2])
    assert choose(list, TASK, settings()).indices.size == 0


def test_resampling_follows_the_importance_weights():
    """Draws of one text have the probabilities w / sum(w), and a second draw those of what is left."""
    texts = ["play jazz", "play the light", "the river", "of the king", "weather in the empire"]
    select = settings(share=0.2, smoothing=30.0, buckets=64)  # so smooth that no text is certain
    target, raw = (ngram_counts(side, select)[0] for side in (TASK, texts))
    weights = np.exp(log_weights(texts, log_ratios(target, raw, select.smoothing), select))
    p = weights / weights.sum()
    assert p.max() > 1.2 * p.min() and p.max() < 0.6 and p.min() > 0.03, p
    expected = np.zeros((5, 5))
    for i, j in itertools.permutations(range(5), 2):
        expected[min(i, j), max(i, j)] += p[i] * p[j] / (1 - p[i])
    rounds = 2000
    singles, pairs = np.zeros(5), np.zeros((5, 5))
    for seed in range(rounds):
        for share, drawn in ((0.2, singles), (0.4, pairs)):
            drawn[tuple(choose(lambda: texts, TASK, replace(select, seed=seed, share=share)).indices)] += 1 / rounds
    for got, wanted in ((singles, p), (pairs, expected)):
        error = np.sqrt(wanted * (1 - wanted) / rounds)
        assert np.all(np.abs(got - wanted) <= 4 * error + 1e-12), (got, wanted)


def test_noise_is_standard_gumbel():
    noise = gumbel([str(i) for i in range(20_000)], seed=3)
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=4 * math.pi / math.sqrt(6 * 20_000))
    assert np.mean(noise <= 0) == pytest.approx(math.exp(-1), abs=4 * math.sqrt(0.37 * 0.63 / 20_000))
    assert np.corrcoef(noise, gumbel([str(i) for i in range(20_000)], seed=4))[0, 1] == pytest.approx(0, abs=0.03)


def test_a_stream_that_changes_is_noticed():
    texts = generic(20)
    streams = iter((texts, texts[:-1]))
    with pytest.raises(UserError, match="gave 20 texts and then 19"):
        choose(lambda: next(streams), TASK, settings())
    chosen = choose(lambda: texts, TASK, settings())
    with pytest.raises(UserError, match="gave 20 texts and then 21"):
        list(chosen.of([*texts, "one more"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.5}, r"config\.select\.share: 1\.5 is outside"),
        ({"share": float("nan")}, r"config\.select\.share"),
        ({"target": "task"}, r"config\.select\.target: 'task' is unknown"),
        ({"ngrams": 0}, r"config\.select\.ngrams"),
        ({"buckets": 1}, r"config\.select\.buckets"),
        ({"smoothing": 0.0}, r"config\.select\.smoothing"),
    ],
)
def test_wrong_values_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        settings(**changes)


def test_a_selection_without_text_to_choose_from_or_to_be_like_is_refused():
    def check(select, kind="generic"):
        nlu, sources = Nlu(locales=("en-US", "de-DE")), {"web": Source(kind, "text", ("en", "fr", "it"))}
        check_settings(Prepare(nlu, sources, TokenizerSettings(), Rows(), select))

    with pytest.raises(UserError, match=r"config\.select\.target: web has text in fr, it, which no locale"):
        check(settings())
    check(settings(target="all"))
    check(settings(target="random"))
    with pytest.raises(UserError, match="no generic source to select from"):
        check(settings(target="all"), "task")
    check(settings(share=0.0), "task")
    with pytest.raises(UserError, match="no train utterance to compare with"):
        choose(lambda: generic(5), [], settings())
