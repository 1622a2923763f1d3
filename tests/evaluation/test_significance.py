import time

import numpy as np
import pytest
from scipy import stats

from kd_jax.evaluation.significance import (
    ErrorCounts,
    compare,
    error_counts,
    holm,
    over_seeds,
    verdict,
)


def counts(errors, seeds=None):
    errors = np.asarray(errors, float)
    return ErrorCounts(
        errors, np.ones_like(errors), seeds or tuple(range(len(errors))), tuple(map(str, range(errors.shape[1])))
    )


def students(rng, shifts, *, seeds=3, utterances=400, seed_noise=0.05):
    """Simulated wrong answers: the utterance's difficulty, the seed's luck and the student's shift, as probits."""
    difficulty = rng.normal(-1, 1, utterances)
    made = []
    for shift in shifts:
        luck = rng.normal(0, seed_noise, (seeds, 1))
        own = rng.normal(0, 0.7, utterances) + rng.normal(0, 0.7, (seeds, utterances))
        made.append(counts(difficulty + luck + shift + own > 0))
    return made


def true_difference(shift, seed_noise):
    spread = (1 + 2 * 0.49 + seed_noise**2) ** 0.5
    return stats.norm.cdf((-1 + shift) / spread) - stats.norm.cdf(-1 / spread)


def test_mean_and_deviation_over_seeds():
    values = [0.31, 0.28, 0.33]
    assert over_seeds(values) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert over_seeds([0.5]) == (0.5, None)
    with pytest.raises(ValueError):
        over_seeds([])


def test_one_seed_gives_the_usual_paired_error():
    rng = np.random.default_rng(0)
    a, b = students(rng, (-0.3, 0), seeds=1, utterances=2000)
    got = compare(a, b, resamples=4000)
    expected = stats.sem((a.numerator - b.numerator)[0])
    assert got.difference == pytest.approx(float(np.mean(a.numerator - b.numerator)))
    assert (got.high - got.low) / 2 == pytest.approx(1.96 * expected, rel=0.05)
    assert (got.seeds, got.utterances) == (1, 2000)


def test_seed_noise_alone_gives_the_t_interval_over_seeds():
    # Every utterance has the same error rate of its seed, so only the seeds vary.
    a = ErrorCounts(
        np.repeat([[0.1], [0.2], [0.25]], 50, axis=1), np.ones((3, 50)), (0, 1, 2), tuple(map(str, range(50)))
    )
    b = a._replace(numerator=np.repeat([[0.3], [0.2], [0.4]], 50, axis=1))
    got = compare(a, b, resamples=20_000)
    low, high = stats.t.interval(0.95, 2, loc=-0.35 / 3, scale=stats.sem([-0.2, 0.0, -0.15]))
    assert (got.difference, got.low, got.high) == pytest.approx((-0.35 / 3, low, high), rel=0.03)


@pytest.mark.parametrize(("seed_noise", "least"), [(0.0, 0.93), (0.3, 0.86)])
def test_coverage_on_simulated_students(seed_noise, least):
    rng = np.random.default_rng(1)
    truth = true_difference(-0.2, seed_noise)
    hits = 0
    for run in range(150):
        a, b = students(rng, (-0.2, 0), utterances=200, seed_noise=seed_noise)
        got = compare(a, b, resamples=150, seed=run)
        hits += got.low <= truth <= got.high
    assert hits / 150 >= least


def test_relative_change_and_ratio_metrics():
    rng = np.random.default_rng(2)
    denominator = rng.integers(0, 4, 300).astype(float)  # spans an utterance, many without any
    a, b = (
        ErrorCounts(
            rng.binomial(denominator.astype(int), p, (3, 300)) * 1.0, np.tile(denominator, (3, 1)), (0, 1, 2), ids
        )
        for p, ids in ((0.2, tuple(map(str, range(300)))), (0.3, tuple(map(str, range(300)))))
    )
    got = compare(a, b)
    assert got.rate_a == pytest.approx(np.mean(a.numerator.sum(1) / denominator.sum()))
    assert got.relative == pytest.approx(got.rate_a / got.rate_b - 1)
    low, high = got.relative_low, got.relative_high
    assert low is not None and got.relative is not None and high is not None
    assert low < got.relative < high < 0
    # Measured against a perfect baseline the relative change has no meaning.
    perfect = b._replace(numerator=np.zeros_like(b.numerator))
    assert compare(a, perfect).relative is None


def test_equal_students_and_constant_differences():
    a = counts(np.tile([0, 1, 0, 1], (3, 1)))
    assert compare(a, a)[:4] == (0.0, 0.0, 0.0, 1.0)
    all_wrong, all_right = counts(np.ones((3, 4))), counts(np.zeros((3, 4)))
    # Four utterances cannot prove more than a sign test of four: 2 / 2**4.
    assert compare(all_right, all_wrong).p_value == 0.125


def test_only_common_seeds_are_paired_and_mismatches_raise():
    a, b = counts([[0, 1, 0], [1, 1, 0]], (0, 1)), counts([[1, 1, 1], [0, 0, 0]], (1, 2))
    got = compare(a, b)
    assert (got.seeds, got.difference) == (1, pytest.approx(2 / 3 - 1))
    with pytest.raises(ValueError, match="no seed in common"):
        compare(a, b._replace(seeds=(3, 4)))
    with pytest.raises(ValueError, match="different utterances"):
        compare(a, b._replace(ids=("a", "b", "c")))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_verdict_names_a_clear_winner():
    task, mix, generic = students(np.random.default_rng(4), (-0.6, -0.2, 0.0), utterances=3000, seed_noise=0.01)
    got = verdict({"generic": generic, "mix50": mix, "task": task})
    assert got.winner == got.best == "task" and got.tied == ("task",)
    assert got.text.startswith("task wins: task 0.") and "next mix50" in got.text and "3 seeds" in got.text
    assert all(got.comparisons[name].low > 0 for name in ("mix50", "generic"))


def test_verdict_without_a_winner():
    # The best two are alike; the third is far off.
    task, mix, generic = students(np.random.default_rng(5), (-0.6, -0.6, 0.0), utterances=3000, seed_noise=0.01)
    got = verdict({"generic": generic, "mix50": mix, "task": task})
    assert got.winner is None and set(got.tied) == {"task", "mix50"}
    assert got.text.startswith("no winner at this size: ")
    # Two seeds are never enough, however clear.
    task, generic = students(np.random.default_rng(6), (-1.0, 0.0), seeds=2, utterances=3000, seed_noise=0.0)
    got = verdict({"generic": generic, "task": task})
    assert got.winner is None and got.best == "task" and "fewer than 3 seeds" in got.text
    with pytest.raises(ValueError, match="two candidates"):
        verdict({"task": task})


def test_verdict_corrects_for_many_comparisons():
    best, rival = students(np.random.default_rng(4), (-0.15, 0.0), utterances=600, seed_noise=0.0)
    alone = verdict({"best": best, "rival": rival})
    p_value = alone.comparisons["rival"].p_value
    assert 0.01 < p_value < 0.05 and alone.winner == "best"
    # The same evidence against five rivals is worth a fifth.
    many = verdict({"best": best, **{f"rival{i}": rival for i in range(5)}})
    assert list(many.adjusted.values()) == pytest.approx([5 * p_value] * 5)
    assert many.winner is None and len(many.tied) == 6


def record(id, locale, domain, wrong, test_sets=("test",)):
    place = {"id": id, "locale": locale, "domain": domain, "task": "dc", "test_sets": list(test_sets)}
    return {**place, "predicted_domain": "other" if wrong else domain}


def test_error_counts_sum_the_locales_of_one_id():
    runs = {
        seed: [
            record("1", "en-US", "alarm", wrong=seed == 0),
            record("1", "de-DE", "alarm", wrong=True),
            record("2", "en-US", "music", wrong=False, test_sets=("test", "tail")),
        ]
        for seed in (1, 0)
    }
    got = error_counts(runs, "error_rate", test_set="test")
    assert (got.seeds, got.ids) == ((0, 1), ("1", "2"))
    assert got.numerator.tolist() == [[2, 0], [1, 0]] and got.denominator.tolist() == [[2, 1], [2, 1]]
    assert got.rates == pytest.approx([2 / 3, 1 / 3])
    assert error_counts(runs, "error_rate", test_set="tail").ids == ("2",)
    assert error_counts(runs, "error_rate", test_set="test", locale="de-DE").denominator.tolist() == [[1], [1]]
    assert error_counts(runs, "error_rate", test_set="test", domain="iot") is None
    with pytest.raises(ValueError, match="different utterances"):
        error_counts({**runs, 1: runs[1][:2]}, "error_rate", test_set="test")


def test_thousand_resamples_of_three_thousand_utterances_take_less_than_a_second():
    a, b = students(np.random.default_rng(8), (-0.2, 0), utterances=3000)
    start = time.process_time()
    compare(a, b, resamples=1000)
    assert time.process_time() - start < 1.0
