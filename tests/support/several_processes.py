"""Starts a program as the processes of one job on this machine."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.support.xla_flags import FAST_COMPILATION

ROOT = pathlib.Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def environment(devices: int = 1, compiled: os.PathLike | str = "") -> dict[str, str]:
    """For processes with so many devices each; compiled: a folder where they keep what they compiled."""
    values = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST_COMPILATION}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    if compiled:
        values["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
        values["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return values


def start(count: int, arguments: Sequence[str], devices: int = 1, compiled: os.PathLike | str = "") -> list:
    """`python ARGUMENTS` as process 0 to count - 1 of a job; of a single one without a job's flags."""
    port, found = free_port(), []
    for process in range(count):
        place = [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={process}"]
        found.append(
            subprocess.Popen(
                [sys.executable, *arguments, *(place if count > 1 else ())],
                cwd=ROOT,
                env=environment(devices, compiled),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return found


def ended(processes: list, timeout: float = 240.0) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each; all are killed, and it is an error, when one hangs."""
    until = time.monotonic() + timeout
    try:
        texts = [one.communicate(timeout=max(until - time.monotonic(), 0.1)) for one in processes]
    finally:
        for one in processes:
            one.kill()
    return [(one.returncode, *text) for one, text in zip(processes, texts, strict=True)]


def run(count: int, arguments: Sequence[str], devices: int = 1, compiled: os.PathLike | str = "") -> list:
    """`start` and `ended`; every process must end well."""
    found = ended(start(count, arguments, devices, compiled))
    for code, _, errors in found:
        assert code == 0, errors
    return found
