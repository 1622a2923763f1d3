"""Scores and compares predictions of any model: records, then metrics, then whether a difference is due to chance.

python -m docs.examples.evaluation

The "students" here are the gold labels with errors inserted at different rates; replace them by your own predictions.
"""

import random

from kd_jax.data.embedded.utterances import embedded_utterances
from kd_jax.evaluation.records import assign_test_sets, intent_slot_record
from kd_jax.evaluation.results import results
from kd_jax.evaluation.significance import compare, decide, error_counts

SEEDS = (0, 1, 2)
ERROR_RATES = {"generic text": 0.20, "task text": 0.15, "task text, adapted teacher": 0.145}
# Comparisons are declared before any result is seen: the more there are, the stronger each one's evidence must be.
DECLARED = (("task text", "generic text"), ("task text, adapted teacher", "task text"))


def predict(utterance, error_rate: float, rng: random.Random, intents: list[str]) -> tuple[str, list[str]]:
    """(intent, IOB2 tag of each word): the gold labels, with errors at this rate."""
    intent = rng.choice(intents) if rng.random() < error_rate else utterance.intent
    tags = ["O"] * len(utterance.words)
    for span in utterance.spans:
        if rng.random() >= error_rate:
            tags[span.start : span.end] = [f"B-{span.slot}", *[f"I-{span.slot}"] * (span.end - span.start - 1)]
    return intent, tags


def main() -> None:
    utterances = embedded_utterances(["en-US", "de-DE"])
    test = [one for one in utterances if one.partition == "test"]
    train = [one for one in utterances if one.partition == "train"]
    intents = sorted({one.intent for one in train})
    test_sets = assign_test_sets(test, train)  # test, and its subsets test_unseen and tail

    records = {
        name: {
            seed: [
                intent_slot_record(one, sets, *predict(one, rate, random.Random(f"{name} {seed} {one.id}"), intents))
                for one, sets in zip(test, test_sets)
            ]
            for seed in SEEDS
        }
        for name, rate in ERROR_RATES.items()
    }

    for name, by_seed in records.items():
        identity = {"student": name, "transfer_set": "", "teacher": "", "seed": SEEDS[0]}
        rows = results(by_seed[SEEDS[0]], identity=identity)
        found = {
            row["metric"]: f"{row['value']:.3f}"
            for row in rows
            if row["scope"] == "all" and row["test_set"] == "test" and not row["metric"].endswith("error_rate")
        }
        print(f"{name}, seed {SEEDS[0]}: {found}")

    for metric in ("exact_match_error_rate", "semer"):
        counts = {name: error_counts(by_seed, metric, test_set="test") for name, by_seed in records.items()}
        known = {name: one for name, one in counts.items() if one is not None}
        found = decide({(a, b): compare(known[a], known[b]) for a, b in DECLARED})
        print(f"\n{metric}")
        for (a, b), (one, adjusted, status) in found.items():
            change = f"{one.difference:+.4f}, 95 % {one.low:+.4f} to {one.high:+.4f}, adjusted p = {adjusted:.2g}"
            print(f"  {a} against {b}: {status} ({change})")


if __name__ == "__main__":
    main()
