import types

import numpy as np

from kd_jax.jobs.masked_lm import unigram_log_probabilities


def test_selected_text_is_not_counted_twice():
    def store(kind, counts):
        return types.SimpleNamespace(kind=kind, token_counts=lambda vocabulary: np.array(counts))

    def prepared(*stores):
        tokenizer = types.SimpleNamespace(vocab_size=4, special_ids=(0,))
        return types.SimpleNamespace(tokenizer=tokenizer, stores={"train": stores}.__getitem__)

    stores = [store("generic", [0, 5, 0, 1]), store("task", [0, 0, 2, 2]), store("generic", [0, 1, 0, 0])]
    expected = {"generic": [1e-9, 7, 1, 2], "task": [1e-9, 1, 3, 3]}
    for more in ([], [store("selected", [0, 0, 0, 1])]):
        got = unigram_log_probabilities(prepared(*stores, *more))  # type: ignore[arg-type]
        assert got.keys() == expected.keys()
        for kind, counts in expected.items():
            np.testing.assert_allclose(got[kind], np.log(np.array(counts) / sum(counts)), rtol=1e-6)
