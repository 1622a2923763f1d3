"""Accuracy and macro F1 over label names; a gold label that the model has never seen is an error like any other."""

from collections.abc import Sequence

import numpy as np


def accuracy(gold: Sequence[str], predicted: Sequence[str]) -> float | None:
    """Share of equal labels; None without any."""
    return float(np.mean([a == b for a, b in zip(gold, predicted, strict=True)])) if len(gold) else None


def error_rate(gold: Sequence[str], predicted: Sequence[str]) -> float | None:
    """1 - accuracy; None without any."""
    value = accuracy(gold, predicted)
    return None if value is None else 1.0 - value


def macro_f1(gold: Sequence[str], predicted: Sequence[str]) -> float | None:
    """Mean F1 over the labels in gold or prediction, as scikit-learn's f1_score(average="macro"); None without any."""
    if not len(gold):
        return None
    names, codes = np.unique([*gold, *predicted], return_inverse=True)
    true, guess = codes[: len(gold)], codes[len(gold) :]
    if len(true) != len(guess):
        raise ValueError(f"{len(true)} gold labels but {len(guess)} predicted labels")
    hits = np.bincount(true[true == guess], minlength=len(names))
    totals = np.bincount(true, minlength=len(names)) + np.bincount(guess, minlength=len(names))
    return float(np.mean(2.0 * hits / totals))
