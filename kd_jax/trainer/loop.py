"""The training loop that all jobs share: it is handed a step, batches and an evaluation."""

import collections
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kd_jax.config.training import Training
from kd_jax.runtime import distributed, preemption
from kd_jax.runtime.preemption import Preempted
from kd_jax.runtime.progress import Progress
from kd_jax.runtime.watchdog import alive
from kd_jax.trainer.best import Best
from kd_jax.trainer.checkpoint import BEST, Checkpoints
from kd_jax.trainer.goodput import Goodput
from kd_jax.trainer.mesh import global_batch, process_share, replicated, row_multiple
from kd_jax.trainer.metrics import MetricsWriter, Window
from kd_jax.trainer.state import State
from kd_jax.trainer.step_reader import StepReader
from kd_jax.types import Batch, Params, Term

TrainStep = Callable[[State, Any, Mapping[str, jax.Array]], tuple[State, Mapping[str, Term]]]


def count_tokens(batch: Batch) -> tuple[int, int]:
    """(real tokens, all positions) of a packed batch."""
    segments = np.asarray(batch["segment_ids"])
    return int(np.count_nonzero(segments)), segments.size


def fit(
    *,
    initial_state: Callable[[], State],
    abstract: State,
    phases: Sequence[tuple[int, TrainStep, Callable[[], Any]]],
    batch_at: Callable[[int], Batch],
    job: Training,
    mesh: Mesh,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    identity: dict[str, Any],
    evaluate: Callable[[Params, int], Mapping[str, float | None]] | None = None,
    best: Best | None = None,
    tokens_in: Callable[[Batch], tuple[int, int]] = count_tokens,
    goodput: Goodput | None = None,
    description: str = "train",
    lines: Sequence[str] = (),
    progress: bool = False,
) -> State:
    """Trains from the newest checkpoint, or from `initial_state()`, up to `job.steps` and returns the final state.

    With patience the run may stop earlier; `best` then has the parameters to keep.

    abstract: the state as ShapeDtypeStructs with shardings. phases: (start, train_step, constants), ascending from step
    0: from step `start` on, the jitted train_step, which may donate the state and whose metrics hold "loss", is called
    with constants(), which is called when the phase begins. batch_at(step): this process's rows, NumPy, called on a
    thread of its own one step ahead.
    evaluate(params, step): called every `job.evaluate_every` steps and at the end; it may raise Preempted. best:
    records what `evaluate` returns; its state, like goodput's, is saved in every checkpoint, so that a resumed run
    stops at the same step with the same parameters. lines: printed at the start.
    Read from `job`: steps, log_every, evaluate_every, checkpoint_every, skip_non_finite.

    Raises UserError when `identity` is not that of the checkpoint, and when a metric is not finite in more steps than
    `job.skip_non_finite`, and Preempted after the checkpoint that a preemption asks for.
    """
    goodput = goodput or Goodput()
    # 1. This run's own checkpoint, 2. whatever the command starts from.
    checkpoints.check(identity)
    keeps = best is not None and best.patience > 0
    restored = checkpoints.restore({**abstract, BEST: abstract["params"]} if keeps else abstract)
    state, meta = restored if restored is not None else (initial_state(), {})
    kept = state.pop(BEST, None)
    if best is not None and meta:
        best.restore(meta["best"], kept)
    start = int(state["step"])
    goodput.start(meta.get("account"), writer.start(start, meta.get("rows")))
    phase: Any = None
    constants: Any = None

    bar = Progress(description, start, job.steps, lines, shown=progress)
    run = StepReader(job, writer, bar, Window(meta.get("window")), goodput)
    readers = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    with bar, readers as reader, contextlib.ExitStack() as saving:

        def read(step: int) -> tuple[dict[str, jax.Array], Any]:
            local = batch_at(step)
            return global_batch(mesh, local), _over_processes(tokens_in(local), mesh)

        def with_best(state: State) -> State:
            """The content of a checkpoint; before the first evaluation, the current parameters replace the best."""
            return state if best is None or not best.patience else {**state, BEST: best.params or state["params"]}

        def evaluate_now(step: int) -> None:
            if evaluate is not None:
                bar.note(f"evaluating at step {step}")
                alive(f"the evaluation at step {step}")
                with goodput.spent("evaluation"):
                    found = evaluate(state["params"], step)
                    writer.write(step, found)
                if best is not None:  # all processes must stop at the same step
                    best.add(step, distributed.from_first(dict(found)), state["params"])

        # A preemption does not wait for an evaluation that was due: it runs here.
        if meta.get("evaluation_due"):
            evaluate_now(start)
        end = start if best is not None and best.stops else job.steps  # it had stopped before it was killed
        ahead = collections.deque(reader.submit(read, step) for step in range(start, min(start + 1, end)))
        if preemption.reached():  # while the parameters were read, say
            raise Preempted("nothing was to be saved yet")
        saving.enter_context(goodput.spent("steps"))
        for step in range(start + 1, end + 1):
            alive(f"step {step}")
            began = time.perf_counter()
            with goodput.spent("data_wait"):
                batch, tokens = ahead.popleft().result()
            waited = time.perf_counter() - began
            if step < job.steps:
                ahead.append(reader.submit(read, step))
            due = [one for one in phases if one[0] < step][-1]
            compiles = due is not phase
            if compiles:
                run.settle()
                constants = None  # two teachers are never held at once
                phase, constants = due, jax.tree.map(lambda leaf: _on_mesh(leaf, mesh), due[2]())
            with goodput.spent("compile") if compiles else contextlib.nullcontext():
                state, metrics = due[1](state, constants, batch)
            run.dispatched(step, metrics, _summed(tokens), began, waited)

            stop = preemption.reached()
            last = step == job.steps
            evaluation_due = last or (job.evaluate_every > 0 and step % job.evaluate_every == 0)
            if evaluation_due or stop or step % job.checkpoint_every == 0:
                run.settle()
            if evaluation_due and not stop:
                try:
                    evaluate_now(step)
                except Preempted:  # it runs again at the next start, since its progress is unknown
                    stop = True
                if best is not None and best.stops and not last:
                    bar.say(f"{description}: stopped at step {step}, since no score was above that of step {best.step}")
                    last = True
            if last or stop or step % job.checkpoint_every == 0:
                alive(f"the checkpoint of step {step}")
                meta = {
                    "identity": identity,
                    "window": run.window.totals(),
                    "rows": writer.rows,
                    "evaluation_due": evaluation_due and stop,
                    "account": goodput.saved(),
                    **({"best": best.saved()} if best is not None else {}),
                }
                with goodput.spent("checkpoint"):
                    writer.sync()
                    checkpoints.save(step, with_best(state), meta)
            if stop:
                checkpoints.wait()
                raise Preempted(f"step {step} of {job.steps} is saved")
            if last:
                break
        alive("the last checkpoint")
        with goodput.spent("checkpoint"):
            checkpoints.wait()
    return state


def _over_processes(tokens: tuple[int, int], mesh: Mesh) -> Any:
    """The counts of this process's rows as a part of an array [row_multiple, 2], of which `_summed` makes the sum."""
    parts = process_share(mesh)[1]
    if parts == 1:
        return tokens
    local = np.zeros((row_multiple(mesh) // parts, 2), np.int32)
    local[0] = tokens
    return global_batch(mesh, {"tokens": local})["tokens"]


def _summed(tokens: Any) -> Any:
    """(real tokens, all positions) of the batch. Like all that processes compute together, called in step order."""
    return _sum_of_rows(tokens) if isinstance(tokens, jax.Array) else tokens


_sum_of_rows = jax.jit(lambda array: array.sum(axis=0))


def _on_mesh(leaf: Any, mesh: Mesh) -> jax.Array:
    """Host values are placed once, and not again in every step."""
    return leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf, replicated(mesh))
