import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from kd_jax.evaluation.classification import accuracy, error_rate, macro_f1


def test_against_scikit_learn():
    rng = np.random.default_rng(0)
    gold = [f"d{i}" for i in rng.integers(0, 6, 200)]
    predicted = [g if rng.random() < 0.6 else f"d{rng.integers(0, 8)}" for g in gold]
    assert accuracy(gold, predicted) == pytest.approx(accuracy_score(gold, predicted))
    assert error_rate(gold, predicted) == pytest.approx(1 - accuracy_score(gold, predicted))
    assert macro_f1(gold, predicted) == pytest.approx(f1_score(gold, predicted, average="macro"), abs=1e-12)


def test_label_unseen_in_train_is_an_error():
    # The model can only answer "a" or "b".
    gold, predicted = ["a", "b", "new", "a"], ["a", "b", "b", "a"]
    assert accuracy(gold, predicted) == 0.75
    assert macro_f1(gold, predicted) == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_nothing_to_score_is_undefined_and_unequal_lengths_raise():
    assert accuracy([], []) is None and error_rate([], []) is None and macro_f1([], []) is None
    for metric in (accuracy, macro_f1):
        with pytest.raises(ValueError):
            metric(["a", "b"], ["a"])
