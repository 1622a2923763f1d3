"""Where a training step's time goes, in parts that add up, and how fast its matrix products run on their own.

python -m benchmarks.parts [--cores=1] [--vocabulary=8000,21050] [--seconds=1.0] [--json=FILE]    # ten minutes

Each part is a separate program, and they are measured in turn: "forward" is the loss alone, "backward" what its
gradient adds without the token table, "table" what the table's gradient adds, "optimizer" clipping and AdamW. "rest" is
what the whole step takes beyond these or, if negative, saves by being one program. "products" are all matrix products
of the gradient, one program per shape, as often as the step computes them: a lower bound on the step's time. Rows are
full and random, so that nothing depends on the data.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

STATES_WIDTH = 384  # of multilingual-e5-small


@dataclasses.dataclass(frozen=True)
class Step:
    """A step to measure: its objective, parameters, constants and batch."""

    objective: Any
    params: Any
    frozen: Mapping[str, Any]
    batch: Mapping[str, Any]
    settings: Any


def steps(vocabulary: int) -> dict[str, Callable[[], Step]]:
    """The steps that dominate a study, by name: 64 rows of 64 tokens, or 32 utterances when finetuning."""
    import jax
    import numpy as np

    from benchmarks.jax_variants import synthetic_batch
    from kd_jax.config import base
    from kd_jax.config.training import KL, Distill, Finetune, Hidden, Term
    from kd_jax.models.encoder_config import encoder_config
    from kd_jax.models.functional import Functional
    from kd_jax.models.projection import WithProjections
    from kd_jax.steps.distill import STATES, DistillSettings, make_distill_objective
    from kd_jax.steps.finetune import make_icner_objective
    from kd_jax.steps.teacher_logits import TeacherForm

    rows, length, slots = 64, 64, 10
    rng = np.random.default_rng(0)

    def model(kind: Any, preset: str, **more: Any) -> Functional:
        shape = encoder_config(base.encoder(preset).to_dict(), vocabulary)
        plain = dataclasses.replace(shape, dropout=0.0, attention_dropout=0.0)
        return Functional(kind, plain, compute_dtype="float32", **more)

    student, teacher = model("mlm", "student_small"), model("mlm", "teacher_small")
    masked = synthetic_batch(rows, length, slots, vocabulary)
    clean = {name: masked[name] for name in ("tokens", "segment_ids", "positions")}

    def drawn(one: Any, seed: int = 0) -> Any:
        return jax.jit(one.init)(jax.random.key(seed))

    def from_states() -> Step:
        last, width = 11, student.config.hidden_size
        off = {"kl": KL(0.0), "mlm": Term(0.0)}
        settings = DistillSettings(
            **off, hidden=Hidden(1.0), clean=True, hidden_layers=((1, last),), form=TeacherForm("states", cached=True)
        )
        mapped = WithProjections(student, (("hidden_0", width, STATES_WIDTH),))
        states = rng.normal(size=(rows, length, STATES_WIDTH)).astype(np.float16)
        batch = {**clean, STATES.format(last): states}
        return Step(make_distill_objective(mapped, (), settings), drawn(mapped), {}, batch, Distill())

    def logits(cached: bool) -> Step:
        settings = DistillSettings(form=TeacherForm(cached=cached))
        objective = make_distill_objective(WithProjections(student), () if cached else (teacher,), settings)
        theirs = drawn(teacher, 1)
        frozen = {"decoder": teacher.decoder(theirs)} if cached else {"teachers": (theirs,)}
        features = rng.normal(size=(rows, slots, teacher.config.hidden_size)).astype(np.float16)
        batch = masked | ({"teacher_features": features} if cached else {})
        return Step(objective, drawn(WithProjections(student)), frozen, batch, Distill())

    def finetuning() -> Step:
        texts, few, intents, tags = 4, 10, 60, 111
        one = model("icner", "student_small", intents=intents, tags=tags)
        firsts = np.tile(np.arange(texts, dtype=np.int32) * (length // texts), (few, 1))
        batch = {
            **{name: values[:few] for name, values in clean.items()},
            "first_positions": firsts,
            "segment_ids": np.repeat(np.arange(1, texts + 1, dtype=np.int32), length // texts)[None].repeat(
                few, axis=0
            ),
            "utterance_labels": rng.integers(0, intents, (few, texts)).astype(np.int32),
            "utterance_weights": np.ones((few, texts), np.float32),
            "tag_labels": rng.integers(0, tags, (few, length)).astype(np.int32),
            "tag_weights": np.ones((few, length), np.float32),
        }
        frozen = {"utterance_classes": np.zeros(intents, np.float32), "tag_classes": np.zeros(tags, np.float32)}
        return Step(make_icner_objective(one, 0.0, 1.0), drawn(one), frozen, batch, Finetune())

    return {
        "states from a cache": from_states,
        "logits from a cache": lambda: logits(True),
        "teacher in the loop": lambda: logits(False),
        "finetuning, 32 utterances": finetuning,
    }


def parts_of(step: Step, seconds: float) -> dict[str, float]:
    """Milliseconds of each part of a step, of the whole, and of its products; GFLOP of the products."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kd_jax.steps.train_step import make_train_step
    from kd_jax.trainer.optimizer import make_optimizer, make_schedule
    from kd_jax.trainer.state import new_state

    frozen = jax.device_put({**step.frozen, "seed": np.int32(0)})
    batch = jax.device_put(dict(step.batch))
    objective, params = step.objective, step.params

    def loss(params: Any, table: Any, frozen: Any, batch: Any) -> Any:
        scales = {name: c / objective.weights(batch)[name] for name, c in objective.coefficients(0.0).items()}
        return objective.loss(with_table(params, table), frozen, batch, jax.random.key(0), scales, jnp.float32(0.0))

    table = params["encoder"]["embeddings"]["tokens"]
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    without = jax.value_and_grad(loss, argnums=0, has_aux=True)
    optimizer, schedule = make_optimizer(step.settings), make_schedule(step.settings)
    whole = make_train_step(objective, optimizer, schedule, steps=step.settings.steps)
    state = jax.jit(lambda params: new_state(params, optimizer))(params)
    cut = with_table(params, jnp.zeros((0, table.shape[1]), table.dtype))
    update = jax.jit(lambda grads, state: optimizer.update(grads, state["opt_state"], state["params"]))
    programs = {
        "forward": (jax.jit(loss), (cut, table, frozen, batch)),
        "without": (jax.jit(without), (cut, table, frozen, batch)),
        "gradient": (jax.jit(gradient), (cut, table, frozen, batch)),
        "optimizer": (update, (params, state)),
        "step": (jax.jit(whole), (state, frozen, batch)),
    }
    took = timed(programs, seconds)
    counted = products(gradient, cut, table, frozen, batch)
    alone = timed({str(number): (dot, args) for number, (dot, args, _, _) in enumerate(counted)}, seconds / 4)
    times = [count for _, _, count, _ in counted]
    return {
        "forward": took["forward"],
        "backward": took["without"] - took["forward"],
        "table": took["gradient"] - took["without"],
        "optimizer": took["optimizer"],
        "rest": took["step"] - took["gradient"] - took["optimizer"],
        "step": took["step"],
        "products": sum(count * alone[str(number)] for number, count in enumerate(times)),
        "gflop": sum(count * flops for _, _, count, flops in counted) / 1e9,
    }


def with_table(params: Any, table: Any) -> Any:
    """The same parameters with another token table."""
    encoder = params["encoder"]
    return {**params, "encoder": {**encoder, "embeddings": {**encoder["embeddings"], "tokens": table}}}


def timed(programs: Mapping[str, tuple[Callable, tuple]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each program; they take turns until each has run that many seconds, and five times."""
    import jax

    found: dict[str, list[float]] = {name: [] for name in programs}
    for call, args in programs.values():
        jax.block_until_ready(call(*args))
    while any(sum(each) < seconds or len(each) < 5 for each in found.values()):
        for name, (call, args) in programs.items():
            if sum(found[name]) < seconds or len(found[name]) < 5:
                start = time.perf_counter()
                jax.block_until_ready(call(*args))
                found[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(each) for name, each in found.items()}


def products(call: Callable, *args: Any) -> list[tuple[Callable, tuple, int, float]]:
    """Each kind of matrix product in a function: (the product, operands of its shapes, count, FLOPs)."""
    import jax
    import jax.numpy as jnp

    counts: collections.Counter = collections.Counter()

    def visit(jaxpr: Any, times: int) -> None:
        for equation in jaxpr.eqns:
            inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
            for value in equation.params.values():
                for one in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(one, "eqns") or hasattr(one, "jaxpr"):
                        visit(getattr(one, "jaxpr", one), inner)
            if equation.primitive.name == "dot_general":
                left, right = ((tuple(one.aval.shape), str(one.aval.dtype)) for one in equation.invars)
                dimensions = equation.params["dimension_numbers"]
                counts[left, right, dimensions, str(equation.params["preferred_element_type"])] += times

    visit(jax.make_jaxpr(call)(*args).jaxpr, 1)
    found = []
    for (left, right, dimensions, dtype), count in counts.items():
        preferred = None if dtype == "None" else jnp.dtype(dtype)

        def dot(a: Any, b: Any, dimensions: Any = dimensions, preferred: Any = preferred) -> Any:
            return jax.lax.dot_general(a, b, dimensions, preferred_element_type=preferred)

        operands = tuple(jax.random.normal(jax.random.key(0), shape, jnp.dtype(kind)) for shape, kind in (left, right))
        out = jax.eval_shape(dot, *operands)
        summed = 1
        for axis in dimensions[0][0]:
            summed *= left[0][axis]
        found.append((jax.jit(dot), operands, count, 2.0 * out.size * summed))
    return found


def peak(seconds: float) -> float:
    """GFLOP/s of the product of two 2048 × 2048 matrices."""
    import jax
    import jax.numpy as jnp

    one = jax.random.normal(jax.random.key(0), (2048, 2048), jnp.float32)
    return 2 * 2048**3 / 1e6 / timed({"gemm": (jax.jit(jnp.matmul), (one, one))}, seconds)["gemm"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=0, help="number of cores to use; 0 takes all")
    parser.add_argument("--vocabulary", default="8000,21050", help="sizes of the vocabulary, separated by commas")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds to measure each program")
    parser.add_argument("--json", type=pathlib.Path, help="also writes the numbers there")
    options = parser.parse_args()
    if options.cores:  # before JAX starts, which makes one thread per visible core
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])

    from benchmarks.machine import describe
    from kd_jax.text_tables import aligned_table

    best, found = peak(options.seconds), []
    for vocabulary in map(int, options.vocabulary.split(",")):
        for name, make in steps(vocabulary).items():
            found.append({"step": name, "vocabulary": vocabulary, "ms": parts_of(make(), options.seconds)})
            print(f"measured: {name}, {vocabulary:,} tokens", file=sys.stderr, flush=True)
    columns = ("forward", "backward", "table", "optimizer", "rest", "step", "products")
    rows = []
    for one in found:
        took = one["ms"]
        share, rate = took["products"] / took["step"], took["gflop"] / took["step"] * 1000 / best
        times = [f"{took[name]:.1f}" for name in columns]
        rows.append([one["step"], f"{one['vocabulary']:,}", *times, f"{share:.2f}", f"{100 * rate:.0f}"])
    cores = len(os.sched_getaffinity(0))
    print(f"{describe(cores)}, product of two 2048 x 2048 matrices: {best:.0f} GFLOP/s\n")
    print(aligned_table(["ms", "V", *columns, "products / step", "% of peak"], rows))
    if options.json:
        options.json.write_text(json.dumps({"cores": cores, "gemm_gflops": best, "steps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
