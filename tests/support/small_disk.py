"""A file system of a few kB, so that real libraries run into a full disk."""

import contextlib
import pathlib
import subprocess
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
    """The folder, with room for `size` bytes; skips the test if mounting is not allowed."""
    folder.mkdir()
    if _mount(folder, f"size={size}"):
        pytest.skip("a small disk needs the right to mount one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def grow(folder: pathlib.Path, size: int) -> None:
    """Enlarges the small disk."""
    assert _mount(folder, f"remount,size={size}") == 0


def _mount(folder: pathlib.Path, options: str) -> int:
    try:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode
    except FileNotFoundError:
        return 1
