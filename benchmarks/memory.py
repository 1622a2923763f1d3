"""Resident memory of this process, from /proc where there is one."""

import ctypes
import gc
import pathlib
import resource
import sys

_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """The largest resident memory since the start, or since `reset_peak`."""
    if _STATUS.exists():
        return _from_status("VmHWM")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def current_bytes() -> int:
    """Resident memory now; without /proc, the peak."""
    return _from_status("VmRSS") if _STATUS.exists() else peak_bytes()


def reset_peak() -> bool:
    """Gives back what is free and makes `peak_bytes` count from now on; False where the system cannot.

    Compilers leave much free memory in the allocator, which would count as used.
    """
    gc.collect()
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
