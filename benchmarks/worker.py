"""One variant in a process of its own, asked by the benchmark: JSON lines in, JSON lines out.

python -m benchmarks.worker VARIANT SPEC_FILE      (started by the benchmark)

    {"do": "prepare"}                     -> {"framework": ..., "flops": of one pass, ...}
    {"do": "run", "first": i, "steps": n} -> {"seconds": s, "values": [{"kl": ..., ...} for each step]}
    {"do": "forget_peak"}                 -> {"works": whether the peak is counted anew from here}
    {"do": "memory"}                      -> {"base": after the imports, "peak": since the start or forget_peak}

Sizes are bytes. A failure is answered with {"error": text} and ends the worker. Everything else that a library prints
goes to standard error.
"""

import contextlib
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from benchmarks import machine
from kd_jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]

# run(first, steps) takes steps first .. first + steps - 1 over the fixed batches, which repeat, and returns what each
# computed.
Run = Callable[[int, int], list[dict[str, float]]]
# Reads, builds and places everything that is not part of a step: spec -> (what "prepare" answers, run).
Variant = Callable[[Mapping[str, Any]], tuple[dict[str, Any], Run]]

# Variant -> its module and function. The import brings the framework.
VARIANTS = {
    **{
        name: f"jax_variants:{name}"
        for name in ("padded_all", "packed_all", "packed_masked", "packed_cached", "finetune", "predict", "scaling")
    },
    **{f"pytorch_{name}": f"pytorch_variants:{name}" for name in ("eager", "compiled", "best", "narrow")},
    **{f"gemm_{name}": f"{name}_variants:gemm" for name in ("jax", "pytorch")},
}


class Worker:
    """The benchmark's side of a worker process; its standard error goes to `folder`/NAME.log."""

    def __init__(self, name: str, variant: str, spec: Mapping[str, Any], folder: pathlib.Path, devices: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.log = name, folder / f"{name}.log"
        spec_file = folder / f"{name}.json"
        spec_file.write_text(json.dumps(spec), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.worker", variant, str(spec_file)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with open(self.log, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command, stderr=log, env=environment(devices, spec.get("device", "cpu")), **pipes
            )

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Sends one request and waits for its answer. Raises UserError when the worker failed."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps({"do": do, **values}) + "\n")
            stdin.flush()
            line = stdout.readline()
        reply = json.loads(line) if line else {"error": f"it ended with code {self._process.wait()}"}
        if "error" in reply:
            raise UserError(f"benchmark: the worker of {self.name} failed ({reply['error']}); see {self.log}")
        return reply

    def stop(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def environment(devices: int, device: str) -> dict[str, str]:
    """This process's environment for a worker: on the CPU with that many jax devices, or on a GPU; and no network."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    if devices > 1:
        flags += f" --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    return {
        **os.environ,
        "XLA_FLAGS": flags.strip(),
        "JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda,cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the workers share one GPU's memory
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),  # large pages: fewer faults
        "PYTHONPATH": path,
    }


@contextlib.contextmanager
def running(workers: Mapping[str, Worker]) -> Iterator[Mapping[str, Worker]]:
    """Stops all workers when the block ends, however it ends."""
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.stop()


def pin(threads: int) -> None:
    """Keeps the process to its first `threads` cores, where the system allows; must precede jax and PyTorch."""
    if threads and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def serve(variant: Variant, spec: Mapping[str, Any], base: int, requests: TextIO, answers: TextIO) -> int:
    """Answers requests until there are no more, or one fails; the exit code."""
    run: Run | None = None
    for line in requests:
        try:
            match request := json.loads(line):
                case {"do": "prepare"}:
                    reply, run = variant(spec)
                case {"do": "run"} if run:
                    start = time.perf_counter()
                    values = run(request["first"], request["steps"])
                    reply = {"seconds": time.perf_counter() - start, "values": values}
                case {"do": "forget_peak"}:
                    reply = {"works": machine.reset_peak()}
                case {"do": "memory"}:
                    reply = {"base": base, "peak": machine.peak_bytes()}
                case _:
                    raise ValueError(f"unknown request {request}")
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
        if "error" in reply:
            return 1
    return 0


def main() -> int:
    """Reads the arguments, then serves standard input."""
    name, file = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    spec = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
    pin(spec["threads"])
    module, function = VARIANTS[name].split(":")
    variant = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    return serve(variant, spec, machine.current_bytes(), sys.stdin, answers)


if __name__ == "__main__":
    sys.exit(main())
