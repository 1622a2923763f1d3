"""Runs stages of a study at the same time, in processes that each have a share of the host's cores.

A small student is little faster on two cores than on one, so two at once take less time than one after the other. Each
worker runs its stages as the study itself does, with their locks, logs and checkpoints.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from kd_jax.runtime.cluster import cores
from kd_jax.runtime.preemption import EXIT_CODE, Preempted, Preemption, requested
from kd_jax.runtime.watchdog import alive
from kd_jax.study.plan import Stage
from kd_jax.types import UserError

MISTAKE, BROKEN = 2, 1  # answers of a worker, besides 0 and EXIT_CODE
POLL_SECONDS = 0.2


class Workers:
    """Processes that run stages of one study; they start with the first stage.

    program: the command line that calls `serve`. about: the study, as JSON values for `serve`. count: number of
    workers; at most one per core is started.
    """

    def __init__(self, program: Sequence[str], about: Mapping[str, Any], count: int):
        self._program, self._about = list(program), dict(about)
        mine = cores()
        self._shares = [mine[number :: min(count, len(mine))] for number in range(min(count, len(mine)))]
        self._processes: list[subprocess.Popen] = []

    @property
    def count(self) -> int:
        return len(self._shares)

    def run(self, stages: Sequence[Stage], ended: Callable[[Stage], None]) -> None:
        """Runs stages, each once everything that it needs is finished; ended(stage) is called after each.

        Raises what a stage raised (UserError, or Preempted if it was asked to stop), Preempted if this process was, and
        RuntimeError for any other error in a worker. The other workers are then stopped, and keep what they saved.
        """
        waiting, running, over = list(stages), dict[subprocess.Popen, Stage](), set[str]()
        here = {stage.key for stage in stages}
        try:
            while waiting or running:
                for worker in [one for one in self._started() if one not in running]:
                    able = (one for one in waiting if all(need in over or need not in here for need in one.needs))
                    if (stage := next(able, None)) is not None:
                        waiting.remove(stage)
                        running[worker] = stage
                        _send(worker.stdin, stage.folder)
                alive("stages of the study")
                if requested():
                    raise Preempted("stopped between stages; what is finished is saved")
                for worker in _answered(running, POLL_SECONDS):
                    stage = running.pop(worker)
                    _check(worker, stage)
                    over.add(stage.key)
                    ended(stage)
        except BaseException:
            self.close(signal.SIGTERM)
            raise

    def close(self, number: int = 0) -> None:
        """Ends the workers, with a signal if they must stop in the middle of a stage."""
        for worker in self._processes:
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
            if number:
                worker.send_signal(number)
        for worker in self._processes:
            assert worker.stdout is not None
            worker.wait()
            worker.stdout.close()
        self._processes = []

    def _started(self) -> list[subprocess.Popen]:
        while len(self._processes) < len(self._shares):
            share = self._shares[len(self._processes)]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            worker = subprocess.Popen(self._program, **pipes)
            self._processes.append(worker)
            _send(worker.stdin, {**self._about, "cores": share})
        return self._processes


def _send(pipe: IO[str] | None, value: Any) -> None:
    assert pipe is not None
    with contextlib.suppress(BrokenPipeError):  # the worker is gone, as its answer will show
        pipe.write(json.dumps(value) + "\n")
        pipe.flush()


def _answered(running: Mapping[subprocess.Popen, Stage], seconds: float) -> list[subprocess.Popen]:
    """The workers that have answered, or are gone, within that many seconds."""
    with selectors.DefaultSelector() as selector:
        for worker in running:
            assert worker.stdout is not None
            selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return [key.data for key, _ in selector.select(seconds)]


def _check(worker: subprocess.Popen, stage: Stage) -> None:
    """Reads the answer of a worker; raises what its stage raised."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        code = worker.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise UserError(
            f"stage {stage.name}: its worker {how}; start the study again to resume it, with config.study.workers=1 if "
            "memory ran out"
        )
    code, text = json.loads(line)
    if code == MISTAKE:
        raise UserError(text)
    if code == EXIT_CODE:
        raise Preempted(text)
    if code:
        raise RuntimeError(f"stage {stage.name}, in a worker:\n{text}")


def serve(
    open_study: Callable[[Mapping[str, Any]], Any], switched: Callable[[], contextlib.AbstractContextManager]
) -> int:
    """The worker's side: runs stages named on standard input, as JSON lines, until it ends.

    The first line is `about` of `Workers` with the cores to use; each other line is the folder of a stage, which is run
    and answered on standard output with [exit code, message]. open_study(about) is called once. Returns the exit code.
    """
    about = json.loads(sys.stdin.readline() or "null")
    if about is None:
        return 0
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, about["cores"])  # before JAX starts, which makes one thread per visible core
    with Preemption(), _answers() as answers, switched() as outputs:
        study = open_study(about)
        stages: dict[str, Stage] = {}
        for line in sys.stdin:
            folder = json.loads(line)
            if folder not in stages or stages[folder].deferred:  # the recipes have been chosen since
                stages = {stage.folder: stage for stage in study.planned()}
            code, text = 0, ""
            try:
                study.run_one(stages[folder], stages[folder].name, outputs)
            except UserError as error:
                code, text = MISTAKE, str(error)
            except Preempted as error:
                code, text = EXIT_CODE, str(error)
            except Exception:
                code, text = BROKEN, traceback.format_exc()
            _send(answers, [code, text])
            if code:
                return code
    return 0


@contextlib.contextmanager
def _answers() -> Iterator[IO[str]]:
    """Standard output for answers only: what stages print goes to standard error, or to a log."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        yield answers
