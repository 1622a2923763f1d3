import json
import types
from typing import Any

import numpy as np

from kd_jax.config.settings import block, read
from kd_jax.config.training import Distill
from kd_jax.jobs import masked_lm
from kd_jax.jobs.masked_lm import heldout_evaluation, unigram_log_probabilities


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


def test_a_head_that_is_not_trained_has_no_held_out_loss(tmp_path, monkeypatch):
    def terms(**weights):
        changes = {f"{name}.weight": weight for name, weight in weights.items()}
        config = block(Distill)
        config.update_from_flattened_dict(changes)
        return read(Distill, config, "distill")

    states, mixed = terms(hidden=1.0, kl=0.0, mlm=0.0), terms(hidden=1.0, kl=0.0)
    assert (states.trains_head, mixed.trains_head, terms(mlm=0.0).trains_head) == (False, True, True)
    row = {"kind": "task", "loss": 5.0, "accuracy": 0.1, "count": 10}
    monkeypatch.setattr(masked_lm, "heldout_rows", lambda *_: [row])
    anything: Any = None
    for settings, rows in ((states, []), (mixed, [row])):
        what = (anything, anything, anything, anything, settings, tmp_path)
        found = heldout_evaluation(*what, measures=settings.trains_head)({}, 0)
        assert json.loads((tmp_path / "heldout.json").read_text()) == rows and len(found) == 2 * len(rows)
