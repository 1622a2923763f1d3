import numpy as np
import pytest
from scipy import stats

from kd_jax.evaluation.significance import (
    HIGHER,
    LOWER,
    UNDECIDED,
    ErrorCounts,
    comparable,
    compare,
    decide,
    error_counts,
    holm,
    over_seeds,
    trend,
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
    got = compare(a, b)
    expected = stats.sem((a.numerator - b.numerator)[0])
    assert got.difference == pytest.approx(float(np.mean(a.numerator - b.numerator)))
    assert (got.high - got.low) / 2 == pytest.approx(stats.t.ppf(0.975, 1999) * expected)
    assert (got.seeds, got.utterances) == (1, 2000)


def test_seed_noise_alone_gives_welchs_interval_over_seeds():
    # Every utterance has the same error rate of its seed, so only the seeds vary.
    ids = tuple(map(str, range(50)))
    rates = [0.1, 0.2, 0.25], [0.3, 0.2, 0.4, 0.1]
    a, b = (
        ErrorCounts(np.repeat(np.c_[one], 50, axis=1), np.ones((len(one), 50)), tuple(range(len(one))), ids)
        for one in rates
    )
    got, expected = compare(a, b), stats.ttest_ind(*rates, equal_var=False)
    assert (got.low, got.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert got.p_value == pytest.approx(expected.pvalue)
    assert got.seeds == 3


def test_the_noise_of_single_answers_is_counted_once():
    """If each seed draws its answers anew, the variance is that of S N independent answers."""
    rng = np.random.default_rng(3)
    a, b = (counts(rng.random((200, 1000)) < 0.3) for _ in range(2))
    got = compare(a, b)
    expected = 1.96 * (2 * 0.3 * 0.7 / (200 * 1000)) ** 0.5
    assert (got.high - got.low) / 2 == pytest.approx(expected, rel=0.15)


def test_an_interval_is_no_narrower_than_that_of_the_seeds_alone():
    """The utterances' degrees of freedom must not narrow the interval when seeds agree by chance."""
    rng = np.random.default_rng(5)
    of_seeds, of_utterances = np.array([0.40, 0.42, 0.41]), rng.normal(0, 0.16, 400)
    student = counts(of_seeds[:, None] + of_utterances - of_utterances.mean())
    got = compare(student, counts(np.zeros((1, 400)), (None,)))
    low, high = stats.t.interval(0.95, 2, loc=0.41, scale=stats.sem(of_seeds))
    assert (got.low, got.high) == pytest.approx((low, high))
    # Where the utterances vary more, they decide.
    got = compare(student, counts(rng.random((1, 400)) < 0.5, (None,)))
    assert got.high - got.low > 1.5 * (high - low)


def test_a_baseline_without_a_seed_counts_for_every_seed():
    ngrams, student = counts([[1, 1, 0, 1, 0]], (None,)), counts([[0, 1, 0, 1, 0], [0, 0, 0, 1, 0], [0, 1, 0, 0, 0]])
    got = compare(student, ngrams)
    assert (got.seeds, got.utterances) == (3, 5)
    assert got.difference == pytest.approx(4 / 15 - 3 / 5)
    # As if each seed had been compared with it: the spread of the seeds and of the utterances.
    again = compare(student, counts(np.repeat(ngrams.numerator, 3, axis=0)))
    assert (got.low, got.high, got.p_value) == pytest.approx((again.low, again.high, again.p_value))
    # Two of them are compared over utterances alone, and no number of seeds is too small.
    probe = counts([[0, 0, 0, 1, 0]], (None,))
    alone = compare(probe, ngrams)
    assert alone.seeds == 0 and comparable(probe, ngrams)
    assert (alone.high - alone.low) / 2 == pytest.approx(
        stats.t.ppf(0.975, 4) * stats.sem((probe.numerator - ngrams.numerator)[0])
    )


@pytest.mark.parametrize(("seed_noise", "least"), [(0.0, 0.93), (0.3, 0.91)])
def test_coverage_on_simulated_students(seed_noise, least):
    rng = np.random.default_rng(1)
    truth = true_difference(-0.2, seed_noise)
    hits = 0
    for _ in range(300):
        got = compare(*students(rng, (-0.2, 0), utterances=200, seed_noise=seed_noise))
        hits += got.low <= truth <= got.high
    assert hits / 300 >= least


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


def test_students_may_have_other_seeds_but_not_other_utterances():
    a, b = counts([[0, 1, 0], [1, 1, 0]], (0, 1)), counts([[1, 1, 1], [0, 0, 0], [1, 0, 0]], (1, 2, 5))
    got = compare(a, b)
    assert (got.seeds, got.difference) == (2, pytest.approx(1 / 2 - 4 / 9))
    with pytest.raises(ValueError, match="different utterances"):
        compare(a, b._replace(ids=("a", "b", "c")))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_decisions_are_adjusted_for_all_that_were_declared():
    best, rival = students(np.random.default_rng(4), (-0.12, 0.0), utterances=300, seed_noise=0.0)
    one = compare(best, rival)
    assert 0.01 < one.p_value < 0.05
    assert decide({"alone": one})["alone"].status == LOWER
    assert decide({"alone": compare(rival, best)})["alone"].status == HIGHER
    # The same evidence among five is worth a fifth.
    many = decide(dict.fromkeys("abcde", one))
    assert [found.adjusted for found in many.values()] == pytest.approx([5 * one.p_value] * 5)
    assert {found.status for found in many.values()} == {UNDECIDED}
    assert decide({}) == {}


def test_too_few_seeds_decide_nothing_however_clear():
    rng = np.random.default_rng(6)
    for seeds, status in ((1, UNDECIDED), (2, UNDECIDED), (3, LOWER)):
        task, generic = students(rng, (-1.0, 0.0), seeds=seeds, utterances=3000, seed_noise=0.0)
        one = decide({"task": compare(task, generic)})["task"]
        assert one.difference.high < 0 and one.adjusted < 0.01
        assert one.status == status
    ngrams = generic._replace(numerator=generic.numerator[:1], denominator=generic.denominator[:1], seeds=(None,))
    probe = task._replace(numerator=task.numerator[:1], denominator=task.denominator[:1], seeds=(None,))
    assert decide({"probe": compare(probe, ngrams)})["probe"].status == LOWER
    assert decide({"task": compare(task, ngrams)})["task"].status == LOWER


def test_a_trend_is_the_slope_of_the_least_squares_line():
    rng = np.random.default_rng(9)
    made, shares = students(rng, (0.0, -0.3, -0.2, -0.5)), (0.0, 0.25, 0.5, 1.0)
    got = trend(made, shares)
    assert got.slope == pytest.approx(stats.linregress(shares, [one.rates.mean() for one in made]).slope)
    assert got.low < got.slope < got.high < 0
    assert (got.seeds, got.utterances) == (3, 400)
    # Of two students it is their difference.
    ends, difference = trend(made[::3], (0.0, 1.0)), compare(made[3], made[0])
    assert ends[:4] == pytest.approx(difference[:4])
    assert trend(made[::3], (0.0, 0.5)).slope == pytest.approx(2 * difference.difference)
    with pytest.raises(ValueError, match="two different shares"):
        trend(made[:2], (0.5, 0.5))


def record(id, locale, domain, wrong, test_sets=("test",), intent="any"):
    place = {"id": id, "locale": locale, "domain": domain, "intent": intent, "task": "dc", "test_sets": list(test_sets)}
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


def test_ids_with_different_intents_are_not_translations():
    """Utterances with the same id count together only if they can be translations of each other."""

    def runs(differing):
        found = [
            record(str(number), locale, "alarm", wrong=True, intent=f"{locale if number < differing else 'set'}")
            for number in range(20)
            for locale in ("de-DE", "en-US")
        ]
        return {0: found}

    assert error_counts(runs(0), "error_rate", test_set="test").numerator.tolist() == [[2.0] * 20]
    assert len(error_counts(runs(2), "error_rate", test_set="test").ids) == 20  # labels that were corrected
    got = error_counts(runs(12), "error_rate", test_set="test")
    assert len(got.ids) == 40 and "de-DE 7" in got.ids and got.numerator.tolist() == [[1.0] * 40]
    assert got.rates.tolist() == [1.0]
    # Within one locale too, so that all numbers of a study count the same units; and a caller may know better.
    assert "de-DE 7" in error_counts(runs(12), "error_rate", test_set="test", locale="de-DE").ids
    assert len(error_counts(runs(12), "error_rate", test_set="test", parallel=True).ids) == 20


def test_a_baseline_without_a_seed_has_one_row():
    runs = {None: [record("1", "en-US", "alarm", wrong=True), record("2", "en-US", "alarm", wrong=False)]}
    got = error_counts(runs, "error_rate", test_set="test")
    assert got.seeds == (None,) and got.seedless and got.numerator.tolist() == [[1, 0]]
