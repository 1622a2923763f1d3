"""What the system says: the processor, how busy it is, and this process's resident memory."""

import ctypes
import gc
import os
import pathlib
import platform
import resource
import sys
import time
from typing import Any

_STAT = pathlib.Path("/proc/stat")
_CPUINFO = pathlib.Path("/proc/cpuinfo")
_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")


def describe(threads: int) -> dict[str, Any]:
    """The hardware that a measurement depends on; threads: config.benchmark.threads."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": threads or os.cpu_count()}


def cpu_name() -> str:
    """The processor's name; on Linux with family and model, because virtual machines shorten the name."""
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.exists() else []
    fields = {key.strip(): value.strip() for key, value in (line.split(":", 1) for line in lines if ":" in line)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {fields['cpu family']} model {fields['model']})" if "cpu family" in fields else name


def busy_cores(seconds: float) -> float | None:
    """How many cores are busy over the next so many seconds; None on systems without /proc.

    While all workers wait, this is what other programs take from the measurement.
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


def peak_bytes() -> int:
    """The largest resident memory since the start, or since `reset_peak`."""
    if _STATUS.exists():
        return _from_status("VmHWM")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # macOS counts bytes, others KiB


def current_bytes() -> int:
    """Resident memory now; without /proc, the peak."""
    return _from_status("VmRSS") if _STATUS.exists() else peak_bytes()


def reset_peak() -> bool:
    """Makes `peak_bytes` count from now on; False where the system cannot."""
    gc.collect()
    # Compilers leave much free memory in the allocator, which would count as used.
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _from_status(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
