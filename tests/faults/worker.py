"""A process that runs commands one after the other as `python -m kd_jax.main.NAME` would, and its supervisor."""

import gc
import json
import os
import pathlib
import resource
import runpy
import select
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from typing import Any

from tests.support.xla_flags import FAST_COMPILATION

ROOT = pathlib.Path(__file__).parents[2]
_FLAGS = ("config", "workdir", "coordinator", "processes", "process", "check", "status", "dry-run", "plan", "stage")
_MOST_BYTES = 4 * 2**30  # maximum memory of a worker, above which it is replaced


@dataclass(frozen=True)
class Ended:
    """How a command ended; code is None if it was stopped after `limit` seconds, and negative for a signal."""

    code: int | None
    output: str
    errors: str


class Worker:
    """Runs commands in a process that stays alive, so that imports and compiled steps are paid once.

    compiled: a folder that keeps compiled steps for the next worker.
    """

    def __init__(self, compiled: pathlib.Path) -> None:
        self._compiled = compiled
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, name: str, arguments: list[str], limit: float = 60.0) -> Ended:
        """Runs a command; a worker that dies or exceeds the limit is replaced at the next call."""
        process = self._started()
        assert process.stdin and process.stdout
        with tempfile.TemporaryDirectory() as folder:
            job = {"name": name, "arguments": arguments, "folder": folder}
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            answer = self._answer(limit)
            texts = [
                file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
                for file in (pathlib.Path(folder, "output"), pathlib.Path(folder, "errors"))
            ]
        if answer is None:
            still = process.poll() is None
            self.close()
            return Ended(None if still else process.returncode, *texts)
        if answer["bytes"] > _MOST_BYTES:
            self.close()
        return Ended(answer["code"], *texts)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            environment = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": FAST_COMPILATION,
                "HF_HUB_OFFLINE": "1",
                "PATH": "",  # without git, which every run calls for the commit
                "JAX_COMPILATION_CACHE_DIR": str(self._compiled),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.worker"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._answer(300.0)  # the imports
        return self._process

    def _answer(self, limit: float) -> dict[str, Any] | None:
        """The worker's next line; None if it died, or took `limit` seconds of processor time, or five times as many of
        wall time: on a busy machine a command that does not hang may be slow."""
        assert self._process and self._process.stdout
        began, used = time.monotonic(), _processor_seconds(self._process.pid)
        while not select.select([self._process.stdout], [], [], 1.0)[0]:
            if self._process.poll() is not None or time.monotonic() - began > 5 * limit:
                return None
            if _processor_seconds(self._process.pid) - used > limit:
                return None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            return None
        return json.loads(line)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin and self._process.stdout
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run(name: str, arguments: list[str]) -> int:
    """The exit code of a command, run in this process as `python -m` would run it."""
    from absl import flags

    sys.argv = [name, *arguments]
    try:
        runpy.run_module(f"kd_jax.main.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1 if error.code else 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        # Remove the flags that the command has defined; the next one defines its own.
        for flag in list(flags.FLAGS):
            if flag in _FLAGS or flag.startswith("config."):
                delattr(flags.FLAGS, flag)
    return 0


def serve() -> None:
    """Answers each line that names a command with a line of JSON with the exit code."""
    jobs, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(nothing, number)
    errors = os.dup(2)
    # A request for more memory than there is must end in an error, not in the death of other processes.
    resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, resource.RLIM_INFINITY))
    import kd_jax.jobs.finetune  # noqa: F401  imports what the commands need

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values).encode() + b"\n")
        answers.flush()

    answer(code=0)
    for line in jobs:
        job = json.loads(line)
        for number, file in ((1, "output"), (2, "errors")):
            descriptor = os.open(os.path.join(job["folder"], file), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
            os.close(descriptor)
        code = _run(job["name"], job["arguments"])
        gc.collect()  # warnings from finalizers belong to this command
        gc.freeze()  # the rest is mostly modules and compiled steps: exempt it from collection
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(nothing, 1)
        os.dup2(errors, 2)
        answer(code=code, bytes=_resident())


def _processor_seconds(pid: int) -> float:
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0.0
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _resident() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    serve()
