"""The files that describe a run in its directory: config.json, run.json, and DONE, written last."""

import contextlib
import datetime
import importlib.metadata
import json
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax

from kd_jax.config import differences, identity
from kd_jax.config.execution import Execution
from kd_jax.runtime import distributed
from kd_jax.runtime.cluster import cores
from kd_jax.runtime.files import digest_of, read_json, read_json_object, write_sealed
from kd_jax.runtime.lock import owned, tidy
from kd_jax.runtime.paths import as_path, is_there, make_folder
from kd_jax.runtime.watchdog import Watchdog
from kd_jax.types import UserError

CONFIG = "config.json"
RUN = "run.json"
DONE = "DONE"
SUMS = "sha256"  # in DONE: checksums of these files
# Files of a finished run that later commands read: lists and lines, which contain no checksum of their own. They may be
# missing if nothing was measured.
RESULT_FILES = (
    "heldout.json",
    "dev.json",
    *(f"{task}{name}" for task in ("", "dc/", "icner/") for name in ("records.jsonl", "results.jsonl")),
)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")


class RunDirectory:
    """Claims a directory for one command with one resolved config, or resumes the same run in it.

    config: the resolved config as plain values. Raises UserError, with the differences, when the directory belongs to
    another command or to a config that differs in more than `kd_jax.config.MAY_CHANGE`.
    """

    def __init__(self, workdir: str | pathlib.Path, command: str, config: dict[str, Any]):
        self.path, self.config = as_path(workdir), config
        if jax.process_index() == 0:
            self._claim(json.loads(json.dumps({"command": command, "config": config})))
        distributed.barrier()
        if not is_there(self.path / CONFIG):
            raise UserError(
                f"{self.path}: process {jax.process_index()} does not see what process 0 wrote there; give a --workdir "
                "on storage that all hosts share"
            )

    def _claim(self, values: dict[str, Any]) -> None:
        file = self.path / CONFIG
        if is_there(file):
            old = read_json(file, "remove the folder, or choose a new --workdir")
            changed = differences(identity(old), identity(values))
            if changed:
                lines = "".join(f"\n  {line}" for line in changed)
                raise UserError(
                    f"{self.path}: holds a run that differs (old -> new); go back to the old values, or choose a new "
                    f"--workdir:{lines}"
                )
            if old == values or is_done(self.path):
                return
        make_folder(self.path)
        write_sealed(file, values)

    @property
    def done(self) -> bool:
        """Whether process 0 finds the run finished; the same answer in all processes."""
        return distributed.from_first(is_done(self.path))

    def start(self, **notes: Any) -> None:
        """Writes run.json: `provenance()`, the notes (data fingerprint and the like), and the times of all starts."""
        if jax.process_index() != 0:
            return
        file = self.path / RUN
        starts = read_json_object(file).get("starts", []) if is_there(file) else []
        write_sealed(file, {**provenance(), **notes, "starts": [*starts, _now()]})


def run_once(
    workdir: str | pathlib.Path,
    command: str,
    config: dict[str, Any],
    execution: Execution,
    work: Callable[[RunDirectory], dict[str, Any] | None],
) -> None:
    """Runs a command in its directory unless it is done there; config: its resolved config as plain values.

    work(directory) starts or resumes, and returns the content of DONE, or None if more is left to do. Raises UserError
    if another process runs in the directory.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            tidy(as_path(workdir))
            if not is_done(workdir):
                # Several machines may write one cache, each its own part.
                part = f"-{execution.cache_part}" if execution.cache_parts > 1 else ""
                stack.enter_context(owned(as_path(workdir), part))
        directory = RunDirectory(workdir, command, config)
        if directory.done:
            return
        with Watchdog(execution.watchdog_seconds, directory.path, exits=execution.watchdog_exit):
            notes = work(directory)
        if notes is not None:
            mark_done(directory.path, **notes)


def mark_done(workdir: str | pathlib.Path, **notes: Any) -> None:
    """Writes the DONE marker (JSON: the time, the notes, and checksums of RESULT_FILES) into a directory once all
    processes get here."""
    distributed.barrier()
    if jax.process_index() == 0:
        folder = as_path(workdir)
        sums = {name: digest_of(folder / name) for name in RESULT_FILES if is_there(folder / name)}
        write_sealed(folder / DONE, {"finished": _now(), **notes, **({SUMS: sums} if sums else {})})
    distributed.barrier()


def is_done(workdir: str | pathlib.Path) -> bool:
    """Whether a directory holds the DONE marker."""
    return is_there(as_path(workdir) / DONE)


def command_line() -> str:
    """This command as it can be entered again: python -m MODULE instead of the path of the module's file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return shlex.join(sys.argv)
    return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])


def provenance() -> dict[str, Any]:
    """Command line, git commit (None outside a clone), package versions, Python, platform, cores and devices."""
    devices = jax.devices()
    return {
        "command_line": command_line(),
        "commit": _commit(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(cores()),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the clone that contains this file, with "+changes" when tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(pathlib.Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None
