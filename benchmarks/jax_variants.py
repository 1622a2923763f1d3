"""This project's distillation step in the layouts that are compared; and what it is made of, for other sections."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.handover import read_arrays, read_batches, read_tree
from benchmarks.layouts import one_text_a_row, same_shape
from kd_jax.losses.logits import kl_divergence, masked_cross_entropy
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.flops import cached_flops, distill_flops
from kd_jax.models.functional import Functional
from kd_jax.models.heads import gather_positions
from kd_jax.models.projection import WithProjections
from kd_jax.steps.distill import DistillSettings, Weight, make_cached_objective, make_distill_objective
from kd_jax.steps.objective import Objective, scaled_sum
from kd_jax.steps.train_step import make_train_step
from kd_jax.trainer.mesh import global_batch, replicated
from kd_jax.trainer.optimizer import make_optimizer, make_schedule
from kd_jax.trainer.state import new_state

Spec = Mapping[str, Any]
MULTIPLE = 8  # rows and row lengths are rounded up to this


class JaxSteps:
    """A jitted training step over fixed batches, which wrap around. `values` name the metrics that are handed back for
    each step; on a mesh, rows lie along its devices and parameters are whole on each.
    """

    def __init__(
        self, objective: Objective, job: Mapping[str, Any], params, frozen, batches: Sequence, values, mesh=None
    ):
        keys = ConfigDict(dict(job))
        optimizer, schedule = make_optimizer(keys), make_schedule(keys)
        step = make_train_step(objective, optimizer, schedule, steps=keys.steps, accumulation=keys.accumulation)
        whole = None if mesh is None else replicated(mesh)
        self._step = jax.jit(step, donate_argnums=0, out_shardings=whole)
        self._state = jax.jit(lambda params: new_state(params, optimizer), out_shardings=whole)(params)
        self._frozen = jax.device_put({**frozen, "seed": np.int32(0)}, whole)
        self._batches, self._values, self._mesh = batches, values, mesh

    def run(self, first: int, steps: int) -> list[dict[str, float]]:
        """Takes the steps without waiting in between, as the trainer does."""
        metrics = []
        for step in range(first, first + steps):
            batch = self._batches[step % len(self._batches)]
            if self._mesh is not None:
                batch = global_batch(self._mesh, batch)
            self._state, of_step = self._step(self._state, self._frozen, batch)
            metrics.append({name: of_step[name] for name in self._values})
        jax.block_until_ready(self._state)
        fetched = jax.device_get(metrics)
        return [{name: float(total / weight) for name, (total, weight) in one.items()} for one in fetched]


class JaxDistill:
    """A student's distillation step with the teacher in the loop."""

    values = ("kl", "mlm")

    def __init__(self, spec: Spec):
        self.spec = spec
        self.student, self.teacher = (model(spec, name) for name in ("student", "teacher"))

    def batches_file(self) -> str:
        """Where the packed batches are."""
        return self.spec["batches"]

    def layout(self, batches: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """The packed batches in the layout of this variant."""
        return batches

    def objective(self) -> tuple[Objective, dict[str, Any]]:
        """What is minimized, and what it reads from `frozen`."""
        teacher = read_tree(f"{self.spec['weights']}/teacher.npz")
        return masked_objective(self.student, self.teacher, self.spec, teacher)

    def flops(self, batch: Mapping[str, np.ndarray]) -> float:
        """Of a step."""
        rows, length = batch["tokens"].shape
        logits = self.logits_a_row(batch)
        return distill_flops(self.student.config, self.teacher.config, rows, length, logits, narrow=logits < length)

    def logits_a_row(self, batch: Mapping[str, np.ndarray]) -> int:
        """How many positions of a row logits are formed at."""
        return batch["masked_positions"].shape[1]

    def prepare(self) -> dict[str, Any]:
        """Reads batches and weights, and makes the step."""
        batches = self.layout(read_batches(self.batches_file()))
        objective, frozen = self.objective()
        params = read_tree(f"{self.spec['weights']}/student.npz")
        self._steps = JaxSteps(objective, self.spec["job"], params, frozen, batches, self.values)
        shape = batches[0]["tokens"].shape
        return {
            "framework": f"jax {jax.__version__}",
            "rows": shape[0],
            "length": shape[1],
            "flops": self.flops(batches[0]) * len(batches),
        }

    def run(self, first: int, steps: int) -> list[dict[str, float]]:
        """See worker.Variant."""
        return self._steps.run(first, steps)


class EverywhereDistill(JaxDistill):
    """Logits of both models at every column; the losses at the masked ones."""

    def objective(self):
        """See JaxDistill."""
        objective = everywhere_objective(self.student, self.teacher, self.spec)
        return objective, {"teacher": read_tree(f"{self.spec['weights']}/teacher.npz")}

    def logits_a_row(self, batch):
        """See JaxDistill."""
        return batch["tokens"].shape[1]


class PaddedDistill(EverywhereDistill):
    """One text a row, every row as long as the longest text of all batches, so that there is one program."""

    def layout(self, batches):
        """See JaxDistill."""
        pad_id = self.spec["pad_id"]
        return same_shape([one_text_a_row(batch, pad_id) for batch in batches], MULTIPLE, pad_id)


class CachedDistill(JaxDistill):
    """Packed rows with the features that the teacher's decoder turns into logits; no teacher is in memory."""

    def objective(self):
        """See JaxDistill."""
        decoder = read_arrays(f"{self.spec['weights']}/decoder.npz")
        frozen = {"decoder": (decoder["table"], decoder.get("bias"))}
        return make_cached_objective(WithProjections(self.student), settings_of(self.spec)), frozen

    def flops(self, batch):
        """See JaxDistill."""
        rows, length = batch["tokens"].shape
        return cached_flops(self.student.config, self.teacher.config, rows, length, self.logits_a_row(batch))

    def batches_file(self):
        """See JaxDistill."""
        return self.spec["cached_batches"]


packed_masked = JaxDistill
packed_cached = CachedDistill
packed_all = EverywhereDistill
padded_all = PaddedDistill


def model(spec: Spec, name: str) -> Functional:
    """The masked LM that the spec describes under a name, in float32, which is fastest on a CPU."""
    return Functional("mlm", EncoderConfig(**spec["models"][name]), compute_dtype="float32")


def settings_of(spec: Spec) -> DistillSettings:
    """What kd_jax.main.distill makes of the same config: KL and cross entropy with constant weights."""
    kl, mlm = (Weight(spec[f"{name}_weight"], spec[f"{name}_weight"]) for name in ("kl", "mlm"))
    temperature = spec["temperature"]
    return DistillSettings(kl, mlm, temperature=temperature, final_temperature=temperature, block=spec["block"])


def masked_objective(student: Functional, teacher: Functional, spec: Spec, params) -> tuple[Objective, dict[str, Any]]:
    """The objective that kd_jax.main.distill trains with, and its frozen arrays; `params` are the teacher's."""
    return make_distill_objective(WithProjections(student), (teacher,), settings_of(spec)), {"teachers": (params,)}


def everywhere_objective(student: Functional, teacher: Functional, spec: Spec) -> Objective:
    """The same losses from logits that are formed at every column, of which those at the masked ones are taken."""

    def at_masked(model: Functional, params, batch, key=None):
        # The barrier keeps the compiler from forming only the logits that are used.
        logits_RxLxV = jax.lax.optimization_barrier(model.mlm_logits(params, model.hidden(params, batch, key)))
        return gather_positions(logits_RxLxV, jnp.asarray(batch["masked_positions"]))

    def loss(params, frozen, batch, key, scales, progress):
        del progress
        ours_RxKxV = at_masked(student, params, batch, key)
        theirs_RxKxV = jax.lax.stop_gradient(at_masked(teacher, frozen["teacher"], batch))
        weights = batch["masked_weights"]
        terms = {
            "kl": kl_divergence(ours_RxKxV, theirs_RxKxV, weights, spec["temperature"]),
            "mlm": masked_cross_entropy(ours_RxKxV, batch["masked_targets"], weights),
        }
        return scaled_sum(terms, scales)

    def weights(batch):
        masked = jnp.sum(batch["masked_weights"])
        return {"kl": masked, "mlm": masked}

    return Objective(weights, lambda progress: {"kl": spec["kl_weight"], "mlm": spec["mlm_weight"]}, loss)
