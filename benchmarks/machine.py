"""The machine that is measured on, and whether anything else keeps it busy."""

import os
import pathlib
import platform
import time
from typing import Any

_STAT = pathlib.Path("/proc/stat")
_CPUINFO = pathlib.Path("/proc/cpuinfo")


def busy_cores(seconds: float) -> float | None:
    """How many cores are busy over the next so many seconds; None where the system does not tell.

    Asked while all workers sleep, it is what other programs take from the measurement.
    """
    if not _STAT.exists():
        return None
    busy, start = _busy_seconds(), time.monotonic()
    time.sleep(seconds)
    return (_busy_seconds() - busy) / (time.monotonic() - start)


def _busy_seconds() -> float:
    """Seconds that all cores together have worked since the system started."""
    _, user, nice, system, _, _, interrupt, soft_interrupt, *_ = _STAT.read_text().splitlines()[0].split()
    return sum(map(int, (user, nice, system, interrupt, soft_interrupt))) / os.sysconf("SC_CLK_TCK")


def describe(threads: int) -> dict[str, Any]:
    """What measurements depend on beside the software; `threads` is config.benchmark.threads."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": threads or os.cpu_count()}


def cpu_name() -> str:
    """The processor's name, on Linux with its family and model, since virtual machines leave much out of the name."""
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.exists() else []
    fields = {key.strip(): value.strip() for key, value in (line.split(":", 1) for line in lines if ":" in line)}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    if not {"cpu family", "model"} <= fields.keys():
        return fields["model name"]
    return f"{fields['model name']} (family {fields['cpu family']} model {fields['model']})"
