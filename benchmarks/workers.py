"""The parent's side of the workers: start them, ask them in alternation, stop them."""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from kd_jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Worker:
    """A process that serves one variant; its standard error goes to `folder`/NAME.log."""

    def __init__(self, name: str, variant: str, spec: Mapping[str, Any], folder: pathlib.Path, devices: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.log = name, folder / f"{name}.log"
        spec_file = folder / f"{name}.json"
        spec_file.write_text(json.dumps(spec), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.worker", f"--variant={variant}", f"--spec={spec_file}"]
        with open(self.log, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(devices),
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
            raise UserError(f"benchmark: the worker of {self.name} failed ({reply['error']}); {self.log} has the rest")
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


def environment(devices: int) -> dict[str, str]:
    """This process's environment for a worker: on the CPU, with so many jax devices and no network."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    if devices > 1:
        flags += f" --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    return {
        **os.environ,
        "XLA_FLAGS": flags.strip(),
        "JAX_PLATFORMS": "cpu",
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
