"""Runs commands in forks that can be killed, records their writes, and compares folders.

A fork saves the seconds that the imports take. It is safe here because the parent has no JAX backend and no thread; it
only waits, kills and compares. A child runs exactly what `python -m MODULE ARGUMENTS` runs, in its own folder.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import fnmatch
import functools
import hashlib
import json
import mmap
import os
import pathlib
import re
import runpy
import select
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from typing import Any

from tests.support.xla_flags import FAST_COMPILATION

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", FAST_COMPILATION)

import jax
import orbax.checkpoint as ocp
import tensorstore
from absl import flags
from jax._src import lru_cache

import kd_jax.main.export
import kd_jax.main.study  # imports all other commands too
from kd_jax.data import parts, rows
from kd_jax.runtime import files, watchdog
from kd_jax.runtime.files import unsealed

# Operations during which a kill counts as a kill in a write; a child records them innermost last.
WRITES = ("checkpoint", "row store", "cache part", "folder put in place", "growing file", "small file", "removal")
OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")  # and files opened to write

# Fields that hold a time, a duration, a host, a process or a count of starts. Everything else must be the same.
TIMES = {
    "DONE": (
        *("finished", "goodput", "wall_seconds", "steps_seconds", "data_wait_seconds", "compile_seconds"),
        *("evaluation_seconds", "checkpoint_seconds", "other_seconds", "starts", "lost_steps"),
    ),
    "run.json": ("starts", "commit"),  # the commit of the checkout, which may change meanwhile
    "export.json": ("commit",),
    "goodput.json": ("first_start", "starts", "lost_steps"),
    "attempts/*.json": ("host", "pid", "started", "ended", "started_at", "ended_at"),
    "checkpoints/*/meta/metadata": ("account",),
    "checkpoints/*/_CHECKPOINT_METADATA": ("init_timestamp_nsecs", "commit_timestamp_nsecs"),
    "baseline.json": ("seconds",),
}
TIME_TABLE = b"Wall time of all stages"  # in a report; the numbers after it are left out
# A duration; what a stage printed; a path; checksums of a checkpoint's files, on a store.
ONLY_THERE = ("seconds.json", "attempts/*.log", "commit_success.txt", "checkpoints/*.json")

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose parent has died, so that they can be found."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def keep_programs_in(folder: pathlib.Path) -> None:
    """Lets all forks share compiled programs. JAX writes the files of its cache in place, so a kill would leave a
    truncated one; here they are written atomically.
    """
    # An exported program names the source lines that it comes from, including those of this folder.
    jax.config.update("jax_include_full_tracebacks_in_locations", False)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def put(self: Any, key: str, value: bytes) -> None:
        temporary = folder / f"{key}.{os.getpid()}"
        temporary.write_bytes(value)
        os.replace(temporary, folder / f"{key}-cache")

    lru_cache.LRUCache.put = put


def children() -> list[int]:
    """This process's children, adopted ones included."""
    return [int(one) for one in pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


class Board:
    """Memory that a child shares with its parent: the phase, the writes in progress, counts."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)
        self._lock = threading.Lock()

    def clear(self) -> None:
        self._memory[:] = bytes(4096)

    @property
    def phase(self) -> str:
        return self._memory[128:256].rstrip(b"\0").decode(errors="replace")

    @phase.setter
    def phase(self, name: str) -> None:
        self._memory[128:256] = name.encode()[:127].ljust(128, b"\0")

    @property
    def writing(self) -> list[str]:
        return [name for number, name in enumerate(WRITES) if self._memory[number]]

    def _number(self, place: int, change: int = 0) -> int:
        value = int.from_bytes(self._memory[place : place + 4], "little") + change
        if change:
            self._memory[place : place + 4] = value.to_bytes(4, "little")
        return value

    @property
    def writes(self) -> int:
        """Number of writes begun."""
        return self._number(512)

    @property
    def operations(self) -> int:
        """Number of file-system changes, each counted just before it is made."""
        return self._number(516)

    def begin(self, name: str) -> int:
        with self._lock:
            self._memory[WRITES.index(name)] += 1
            return self._number(512, 1)

    def end(self, name: str) -> None:
        with self._lock:
            self._memory[WRITES.index(name)] -= 1

    def operate(self) -> int:
        with self._lock:
            return self._number(516, 1)


@dataclasses.dataclass
class Start:
    """One start of a command in a fork."""

    pid: int
    board: Board
    signals: int  # the end of a pipe on which the child reports that the chosen write begins
    log: pathlib.Path

    def wait(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None if it has not ended by then."""
        descriptor = os.pidfd_open(self.pid)
        try:
            if not select.select([descriptor], [], [], max(seconds, 0.0))[0]:
                return None
        finally:
            os.close(descriptor)
        os.close(self.signals)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def catches(self, number: signal.Signals) -> bool:
        """Whether the child has a handler for the signal now."""
        status = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught, 16) >> (number - 1) & 1)

    def write_begins(self, seconds: float) -> bool:
        """Whether the chosen write begins before the child ends, and within that time."""
        return bool(select.select([self.signals], [], [], seconds)[0]) and os.read(self.signals, 1) == b"w"


def start(
    arguments: list[str],
    folder: pathlib.Path,
    log: pathlib.Path,
    board: Board,
    *,
    tell_at: int = 0,
    die_at: int = 0,
    die_by: signal.Signals = signal.SIGKILL,
    before: Callable[[], None] = lambda: None,
) -> Start:
    """Starts `python -m MODULE ARGUMENTS` in `folder`.

    tell_at: which write reports its start on the pipe, counted from the first. die_at: before which change to the file
    system the child sends itself the signal die_by. before: called in the child first.
    """
    board.clear()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Start(pid, board, reading, log)
    code = 1
    try:
        os.setpgid(0, 0)
        os.close(reading)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        temporary = folder.parent / f"{folder.name}.tmp"
        temporary.mkdir(exist_ok=True)
        tempfile.tempdir = str(temporary)
        before()
        _watch(board, folder, writing, tell_at, die_at, die_by)
        code = _run(arguments)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        with contextlib.suppress(Exception):
            threading._shutdown()  # type: ignore[attr-defined]  the interpreter waits for threads at exit
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(arguments: list[str]) -> int:
    module, *rest = arguments
    sys.argv = [module, *rest]
    for flag in flags.FLAGS.flags_by_module_dict().get(module, []):  # the module is executed again, as __main__
        delattr(flags.FLAGS, flag.name)
    warnings.simplefilter("ignore", RuntimeWarning)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _watch(board: Board, folder: pathlib.Path, pipe: int, tell_at: int, die_at: int, die_by: signal.Signals) -> None:
    """Records on the board what this process does from now on."""

    def begin(name: str) -> None:
        if board.begin(name) == tell_at:
            os.write(pipe, b"w")

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            begin(name)
            try:
                return function(*args, **kwargs)
            finally:
                board.end(name)

        return inside

    def everywhere(module: Any, name: str, kind: str) -> None:
        """Replaces a function everywhere, including modules that imported it by name."""
        original = getattr(module, name)
        replaced = noted(kind, original)
        for one in list(sys.modules.values()):
            if getattr(one, "__name__", "").startswith("kd_jax") and getattr(one, name, None) is original:
                setattr(one, name, replaced)

    def methods(kind: str, owner: Any, *names: str) -> None:
        for name in names:
            setattr(owner, name, noted(kind, getattr(owner, name)))

    everywhere(files, "write_atomically", "small file")
    everywhere(kd_jax.main.export, "save_file", "cache part")
    methods("growing file", files.GrowingFile, "write")
    methods("row store", rows._ArrayFile, "append", "finish")
    methods("row store", rows.StoreWriter, "finish")
    methods("cache part", parts.PartsWriter, "write", "attach", "finish")
    methods("checkpoint", ocp.CheckpointManager, "save", "_finalize")
    methods("removal", shutil, "rmtree")
    original = os.rename

    @functools.wraps(original)
    def rename(source: Any, target: Any, **options: Any) -> None:
        begin("folder put in place")
        try:
            original(source, target, **options)
        finally:
            board.end("folder put in place")

    os.rename = rename

    alive = watchdog.alive

    def phase(doing: str) -> None:
        board.phase = "".join(" " if letter.isdigit() else letter for letter in doing)
        alive(doing)

    board.phase = "start"
    for one in list(sys.modules.values()):
        if getattr(one, "__name__", "").startswith("kd_jax") and getattr(one, "alive", None) is alive:
            one.alive = phase  # type: ignore[attr-defined]

    def looks(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            flags = args[2]
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in OPERATIONS:
            return
        place, inside = args[0], args[{"os.mkdir": 2, "os.rename": 2}.get(event, 1)] if event != "open" else -1
        if isinstance(place, int):
            return
        place = os.fsdecode(place)
        if isinstance(inside, int) and inside >= 0:  # relative to an open folder
            place = os.path.join(os.readlink(f"/proc/self/fd/{inside}"), place)
        if not os.path.abspath(place).startswith(f"{folder}{os.sep}"):
            return
        if board.operate() == die_at:
            os.kill(os.getpid(), die_by)

    sys.addaudithook(looks)


def in_fork(work: Callable[[], Any]) -> Any:
    """The JSON value of work() in a fork, where it may start threads. Raises RuntimeError with what it raises."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reading)
            try:
                found = {"value": work()}
            except BaseException as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            with os.fdopen(writing, "w") as pipe:
                json.dump(found, pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = json.loads(pipe.read() or '{"error": "nothing was said"}')
    os.waitpid(pid, 0)
    if "error" in found:
        raise RuntimeError(found["error"])
    return found["value"]


def contents(folder: pathlib.Path) -> dict[str, str]:
    """Name -> digest of everything below a folder, empty folders included, without the fields of TIMES.

    The arrays of a checkpoint are compared by name and bytes, since tensorstore gives their files random names.
    """
    found: dict[str, str] = {}
    for place, names, inside in os.walk(folder):
        here = pathlib.Path(place)
        if (here / "manifest.ocdbt").is_file() and here.name == "state":
            for name, digest in _arrays(here).items():
                found[f"{here.relative_to(folder)}:{name}"] = digest
            found[f"{here.relative_to(folder)}/_METADATA"] = _digest((here / "_METADATA").read_bytes())
            names.clear()
            continue
        if not names and not inside:
            found[f"{here.relative_to(folder)}/"] = ""
        for name in inside:
            file = here / name
            found[str(file.relative_to(folder))] = _digest(_without_times(file))
    return dict(sorted(found.items()))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _without_times(file: pathlib.Path) -> bytes:
    name = str(file)
    if any(fnmatch.fnmatch(name, f"*/{one}") for one in ONLY_THERE):
        return b""
    data = file.read_bytes()
    if file.name == "metrics.jsonl":
        lines = [json.loads(line) for line in data.splitlines()]
        lines = [{key: one for key, one in line.items() if not key.startswith("time/")} for line in lines]
        return json.dumps(lines).encode()
    if file.stem == "report":
        before, _, times = data.partition(TIME_TABLE)
        # Its command line may have the watchdog's keys, which decide no result.
        return re.sub(rb" --config\.watchdog_\S+", b"", before) + re.sub(rb"\d+", b"", times)
    for pattern, fields in TIMES.items():
        if fnmatch.fnmatch(name, f"*/{pattern}"):
            # Its checksum covers the times too, so it is verified and left out; that of "meta" depends on the folder.
            values = unsealed(json.loads(data), file.parent if file.name == "metadata" else file)
            return json.dumps({key: one for key, one in values.items() if key not in fields}).encode()
    return data


def _arrays(state: pathlib.Path) -> dict[str, str]:
    spec: Any = {"driver": "ocdbt", "base": f"file://{state}/"}
    store = tensorstore.KvStore.open(spec).result()
    keys = store.list().result()
    return {key.decode(): _digest(bytes(store.read(key).result().value)) for key in keys}


def differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    """A line for each name that is missing, extra, or different."""
    lines = [f"missing: {name}" for name in wanted.keys() - found.keys()]
    lines += [f"stray: {name}" for name in found.keys() - wanted.keys()]
    lines += [f"differs: {name}" for name in wanted.keys() & found.keys() if wanted[name] != found[name]]
    return sorted(lines)
