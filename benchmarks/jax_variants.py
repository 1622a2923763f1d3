"""The variants of kd_jax: distillation in several layouts and sizes, finetuning, prediction, and the GEMM peak.

Each variant is a function of the spec (see worker.Variant). Models compute in the spec's dtype.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.layouts import labeled_text_a_row, one_text_a_row, same_shape
from benchmarks.worker import Run
from benchmarks.workloads import read_arrays, read_batches, read_tree
from kd_jax.config.execution import Mesh
from kd_jax.config.settings import read
from kd_jax.config.training import KL, Term, Training
from kd_jax.losses.logits import kl_divergence, masked_cross_entropy
from kd_jax.models.attention_kernels import find_kernel
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.flops import cached_flops, distill_flops
from kd_jax.models.functional import Functional, flops_per_row
from kd_jax.models.heads import gather_positions
from kd_jax.models.projection import WithProjections
from kd_jax.steps.distill import DistillSettings, make_distill_objective
from kd_jax.steps.finetune import make_icner_objective
from kd_jax.steps.objective import Objective, scaled_sum
from kd_jax.steps.teacher_logits import TeacherForm
from kd_jax.steps.train_step import make_train_step
from kd_jax.trainer.mesh import global_batch, make_mesh, replicated
from kd_jax.trainer.optimizer import make_optimizer, make_schedule
from kd_jax.trainer.state import new_state

Spec = Mapping[str, Any]
Arrays = dict[str, np.ndarray]
Built = tuple[dict[str, Any], Run]
FRAMEWORK = f"jax {jax.__version__}"
MULTIPLE = 8  # rows and row lengths are rounded up to this, so that there are few shapes to compile
FIRST_TOKEN = 5  # ids below are those of special tokens


def training(
    objective: Objective, job: Mapping[str, Any], params, frozen, batches: Sequence, metrics, mesh=None
) -> Run:
    """Jitted training steps over fixed batches, which return the named metrics; on a mesh, data-parallel."""
    settings = read(Training, job, "job")
    optimizer, schedule = make_optimizer(settings), make_schedule(settings)
    step = make_train_step(objective, optimizer, schedule, steps=settings.steps, accumulation=settings.accumulation)
    whole = None if mesh is None else replicated(mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=whole)
    state = jax.jit(lambda params: new_state(params, optimizer), out_shardings=whole)(params)
    frozen = jax.device_put({**frozen, "seed": np.int32(0)}, whole)

    def run(first: int, steps: int) -> list[dict[str, float]]:
        nonlocal state
        terms = []
        for number in range(first, first + steps):
            batch = batches[number % len(batches)]
            state, of_step = jitted(state, frozen, batch if mesh is None else global_batch(mesh, batch))
            terms.append({name: of_step[name] for name in metrics})
        jax.block_until_ready(state)  # only here: the trainer does not wait between steps either
        return [{name: float(total / weight) for name, (total, weight) in one.items()} for one in jax.device_get(terms)]

    return run


def model(spec: Spec, name: str) -> Functional:
    """The masked LM that the spec describes under a name."""
    kernel = find_kernel("auto", make_mesh(Mesh(), jax.devices()[:1]))
    return Functional("mlm", EncoderConfig(**spec["models"][name]), compute_dtype=spec["dtype"], attention=kernel)


def weights(spec: Spec, name: str) -> Any:
    """Parameters that the benchmark saved under a name."""
    return read_tree(f"{spec['weights']}/{name}.npz")


def distill(spec: Spec, batches: Sequence[Arrays], objective: Objective, frozen, flops: float) -> Built:
    """A student's step over batches of one shape; flops: of one step."""
    run = training(objective, spec["job"], weights(spec, "student"), frozen, batches, ("kl", "mlm"))
    rows, length = batches[0]["tokens"].shape
    return {"framework": FRAMEWORK, "rows": rows, "length": length, "flops": flops * len(batches)}, run


def packed_masked(spec: Spec) -> Built:
    """The step of kd_jax.main.distill: packed rows, logits at the masked positions, the teacher in the loop."""
    student, teacher = model(spec, "student"), model(spec, "teacher")
    batches = read_batches(spec["batches"])
    objective = make_distill_objective(WithProjections(student), (teacher,), settings_of(spec))
    (rows, length), slots = batches[0]["tokens"].shape, batches[0]["masked_positions"].shape[1]
    flops = distill_flops(student.config, teacher.config, rows, length, slots, narrow=True)
    return distill(spec, batches, objective, {"teachers": (weights(spec, "teacher"),)}, flops)


def packed_cached(spec: Spec) -> Built:
    """The same with the teacher's features from a cache: only its decoder is left in memory."""
    student, teacher = model(spec, "student"), model(spec, "teacher")
    batches = read_batches(spec["cached_batches"])
    decoder = read_arrays(f"{spec['weights']}/decoder.npz")
    objective = make_distill_objective(WithProjections(student), (), settings_of(spec, cached=True))
    (rows, length), slots = batches[0]["tokens"].shape, batches[0]["masked_positions"].shape[1]
    flops = cached_flops(student.config, teacher.config, rows, length, slots)
    return distill(spec, batches, objective, {"decoder": (decoder["table"], decoder.get("bias"))}, flops)


def packed_all(spec: Spec) -> Built:
    """Packed rows, logits of both models at every column."""
    return everywhere(spec, read_batches(spec["batches"]))


def padded_all(spec: Spec) -> Built:
    """One text a row, as long as the longest of all batches, so that one program serves all; logits at every column."""
    rows = [one_text_a_row(batch, spec["pad_id"]) for batch in read_batches(spec["batches"])]
    return everywhere(spec, same_shape(rows, MULTIPLE, spec["pad_id"]))


def everywhere(spec: Spec, batches: Sequence[Arrays]) -> Built:
    """The step with logits at every column, of which the losses use the masked ones."""
    student, teacher = model(spec, "student"), model(spec, "teacher")
    rows, length = batches[0]["tokens"].shape
    flops = distill_flops(student.config, teacher.config, rows, length, length)
    objective = everywhere_objective(student, teacher, spec)
    return distill(spec, batches, objective, {"teacher": weights(spec, "teacher")}, flops)


def settings_of(spec: Spec, cached: bool = False) -> DistillSettings:
    """What kd_jax.main.distill makes of the same config: KL and cross entropy with constant weights."""
    kl, mlm = KL(spec["kl_weight"], temperature=spec["temperature"]), Term(spec["mlm_weight"])
    return DistillSettings(kl, mlm, block_positions=spec["block"], form=TeacherForm(cached=cached))


def everywhere_objective(student: Functional, teacher: Functional, spec: Spec) -> Objective:
    """The losses of `packed_masked` from logits that are formed at every column."""

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

    def denominators(batch):
        masked = jnp.sum(batch["masked_weights"])
        return {"kl": masked, "mlm": masked}

    return Objective(denominators, lambda progress: {"kl": spec["kl_weight"], "mlm": spec["mlm_weight"]}, loss)


def scaling(spec: Spec) -> Built:
    """The step of `packed_masked` at spec["size"] (rows, length, slots, vocabulary, layers of the student, devices), on
    full rows of random tokens and with fresh weights.
    """
    size = spec["size"]

    def resized(name: str, **changes: int) -> Functional:
        one = model(spec, name)
        longest = max(one.config.max_positions, size["length"])
        shape = dataclasses.replace(one.config, vocab_size=size["vocabulary"], max_positions=longest, **changes)
        return dataclasses.replace(one, config=shape)

    student, teacher = resized("student", num_layers=size["layers"]), resized("teacher")
    params, frozen = (jax.jit(one.init)(jax.random.key(n)) for n, one in enumerate((student, teacher)))
    objective = make_distill_objective(WithProjections(student), (teacher,), settings_of(spec))
    mesh = make_mesh(Mesh(-1, 1, 1)) if size["devices"] > 1 else None
    rows, length, slots = size["rows"], size["length"], size["slots"]
    batches = [synthetic_batch(rows, length, slots, size["vocabulary"])]
    run = training(objective, spec["job"], params, {"teachers": (frozen,)}, batches, ("kl", "mlm"), mesh)
    flops = distill_flops(student.config, teacher.config, rows, length, slots, narrow=True)
    return {"framework": FRAMEWORK, "rows": rows, "length": length, "flops": flops}, run


def synthetic_batch(rows: int, length: int, slots: int, vocabulary: int) -> Arrays:
    """A masked-LM batch without padding: two texts of equal length in each row, every mask slot used."""
    rng = np.random.default_rng(0)
    columns = np.arange(length, dtype=np.int32)
    half = length // 2
    masked = np.sort(rng.permuted(np.tile(columns, (rows, 1)), axis=1)[:, :slots], axis=1).astype(np.int32)
    return {
        "tokens": rng.integers(FIRST_TOKEN, vocabulary, (rows, length), np.int32),
        "segment_ids": np.tile(1 + (columns >= half).astype(np.int32), (rows, 1)),
        "positions": np.tile(np.where(columns < half, columns, columns - half).astype(np.int32), (rows, 1)),
        "masked_positions": masked,
        "masked_targets": rng.integers(FIRST_TOKEN, vocabulary, (rows, slots), np.int32),
        "masked_weights": np.ones((rows, slots), np.float32),
    }


def labeled(spec: Spec) -> tuple[Functional, list[Arrays]]:
    """The student with the ICNER heads, and its batches in spec["layout"]; see sections.LAYOUTS."""
    model = Functional("icner", EncoderConfig(**spec["models"]["student"]), compute_dtype="float32", **spec["sizes"])
    batches, pad_id = read_batches(spec["batches"]), spec["pad_id"]
    if spec["layout"] == "packed":
        return model, batches
    rows = [labeled_text_a_row(batch, pad_id) for batch in batches]
    if spec["layout"] == "padded":
        return model, same_shape(rows, MULTIPLE, pad_id, batches[0]["tokens"].shape[1])
    return model, [same_shape([batch], MULTIPLE, pad_id)[0] for batch in rows]


def about_labeled(model: Functional, batches: Sequence[Arrays], training: bool) -> dict[str, Any]:
    """What "prepare" answers; the FLOPs leave out the heads, which have few classes."""
    shapes = [batch["tokens"].shape for batch in batches]
    flops = sum(rows * flops_per_row(model.config, length, 0, 0, training) for rows, length in shapes)
    rows, length = (int(np.mean(sizes)) for sizes in zip(*shapes))
    return {"framework": FRAMEWORK, "rows": rows, "length": length, "flops": float(flops)}


def finetune(spec: Spec) -> Built:
    """Training steps of ICNER, which return the losses."""
    model, batches = labeled(spec)
    classes = {"utterance_classes": model.intents, "tag_classes": model.tags}
    frozen = {name: np.zeros(size, np.float32) for name, size in classes.items()}
    objective = make_icner_objective(model, 0.0, 1.0)
    run = training(objective, spec["job"], weights(spec, "icner"), frozen, batches, ("intent", "tags"))
    return about_labeled(model, batches, training=True), run


def predict(spec: Spec) -> Built:
    """The best intent of each utterance and the tag scores of each token, fetched as kd_jax.main.predict does.

    The values are means over utterances and over the first tokens of words.
    """
    model, batches = labeled(spec)
    params = jax.tree.map(jnp.asarray, weights(spec, "icner"))

    @jax.jit
    def scores(params, batch):
        intents_RxSxI, tags_RxLxT = model.intent_and_tag_logits(params, batch)
        return jnp.argmax(intents_RxSxI, axis=-1), tags_RxLxT, jnp.max(intents_RxSxI, axis=-1)

    def run(first: int, steps: int) -> list[dict[str, float]]:
        values = []
        for step in range(first, first + steps):
            batch = batches[step % len(batches)]
            _, tags_RxLxT, best_RxS = jax.device_get(scores(params, batch))
            intent = np.average(best_RxS, weights=batch["utterance_weights"])
            tags = np.average(tags_RxLxT.max(axis=-1), weights=batch["tag_weights"])
            values.append({"intent": float(intent), "tags": float(tags)})
        return values

    return about_labeled(model, batches, training=False), run


def gemm(spec: Spec) -> Built:
    """The machine's peak: a step is one product of two large square matrices."""
    size = spec["gemm_size"]
    left = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(spec["dtype"]))
    right = left / size**0.5
    multiply = jax.jit(jnp.matmul)

    def run(first: int, steps: int) -> list[dict[str, float]]:
        del first
        product = left
        for _ in range(steps):
            product = multiply(product, right)
        product.block_until_ready()
        return [{} for _ in range(steps)]

    return {"framework": FRAMEWORK, "flops": 2.0 * size**3 * spec["gemm_steps"]}, run
