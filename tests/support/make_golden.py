"""Writes tests/golden/parity.npz: what PyTorch `transformers` computes with the weights of golden_models.py.

Needs PyTorch (the extra `parity`): PYTHONPATH=.:tests python tests/support/make_golden.py
"""

import pathlib

import numpy as np
import torch  # type: ignore[reportMissingImports]  of the extra `parity`, not in .venv

from kd_jax.models.huggingface.checkpoint import TIED
from kd_jax.models.huggingface.config import family as huggingface_family
from tests.models import test_parity
from tests.support import golden_models


def computed(family: str) -> dict[str, np.ndarray]:
    """{"hidden", "logits"} of every token of the texts, one text at a time, without padding."""
    model = test_parity.their_model(family).eval()
    state, config = model.state_dict(), golden_models.our_config(family)
    wanted = {name: torch.tensor(values) for name, values in golden_models.weights(config).items()}
    with torch.no_grad():
        for name, values in wanted.items():
            state[name].copy_(values)
    model.tie_weights()
    left = {name for name, _ in model.named_parameters()} - set(wanted) - set(TIED[huggingface_family(config)])
    assert not left, f"left as they were drawn: {left}"
    hidden, logits = [], []
    with torch.no_grad():
        for text in golden_models.texts():
            ids = torch.tensor(text)[None]
            hidden.append(model.base_model(input_ids=ids)[0][0].numpy())
            logits.append(model(input_ids=ids).logits[0].numpy())
    return {"hidden": np.concatenate(hidden), "logits": np.concatenate(logits)}


def main() -> None:
    found = {}
    for family in golden_models.FAMILIES:
        found |= {f"{family}.{name}": values for name, values in computed(family).items()}
    file = pathlib.Path(__file__).parent / golden_models.FILE
    file.parent.mkdir(exist_ok=True)
    np.savez_compressed(file, **found)
    print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
