"""The distillation step at any size: synthetic full rows, fresh weights, one or more virtual devices."""

import dataclasses
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.jax_variants import JaxSteps, Spec, masked_objective, model
from kd_jax.models.flops import distill_flops
from kd_jax.trainer.mesh import make_mesh

FIRST_PIECE = 5  # ids below are those of special tokens


class ScaledDistill:
    """Packed rows of two texts each, masked positions only, at spec["size"]: rows, length, slots, vocabulary, layers of
    the student, devices.
    """

    def __init__(self, spec: Spec):
        self.spec, self.size = spec, spec["size"]
        self.student, self.teacher = (self._resized(name) for name in ("student", "teacher"))

    def _resized(self, name: str):
        size = self.size
        one = model(self.spec, name)
        changes = {"vocab_size": size["vocabulary"], "max_positions": max(one.config.max_positions, size["length"])}
        if name == "student":
            changes["num_layers"] = size["layers"]
        return dataclasses.replace(one, config=dataclasses.replace(one.config, **changes))

    def prepare(self) -> dict[str, Any]:
        """Draws batch and weights, and makes the step."""
        size = self.size
        student, teacher = (
            jax.jit(one.init)(jax.random.key(number)) for number, one in enumerate((self.student, self.teacher))
        )
        objective, frozen = masked_objective(self.student, self.teacher, self.spec, teacher)
        mesh = make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})) if size["devices"] > 1 else None
        batch = synthetic_batch(size["rows"], size["length"], size["slots"], size["vocabulary"])
        self._steps = JaxSteps(objective, self.spec["job"], student, frozen, [batch], ("kl", "mlm"), mesh)
        shape = (size["rows"], size["length"], size["slots"])
        flops = distill_flops(self.student.config, self.teacher.config, *shape, narrow=True)
        return {"framework": f"jax {jax.__version__}", "rows": size["rows"], "length": size["length"], "flops": flops}

    def run(self, first: int, steps: int) -> list[dict[str, float]]:
        """See worker.Variant."""
        return self._steps.run(first, steps)


def synthetic_batch(rows: int, length: int, slots: int, vocabulary: int) -> dict[str, np.ndarray]:
    """A masked-LM batch without padding: two texts of equal length a row, every slot used."""
    rng = np.random.default_rng(0)
    columns = np.arange(length, dtype=np.int32)
    half = length // 2
    masked = np.sort(rng.permuted(np.tile(columns, (rows, 1)), axis=1)[:, :slots], axis=1).astype(np.int32)
    return {
        "tokens": rng.integers(FIRST_PIECE, vocabulary, (rows, length), np.int32),
        "segment_ids": np.tile(1 + (columns >= half).astype(np.int32), (rows, 1)),
        "positions": np.tile(np.where(columns < half, columns, columns - half).astype(np.int32), (rows, 1)),
        "masked_positions": masked,
        "masked_targets": rng.integers(FIRST_PIECE, vocabulary, (rows, slots), np.int32),
        "masked_weights": np.ones((rows, slots), np.float32),
    }
