"""Small files written atomically, JSON and JSON Lines, and one sentence for a full disk; local or on gs:// and s3://."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, TextIO

from kd_jax.runtime.paths import as_path, digest, is_remote, reaching
from kd_jax.types import UserError

# The remedy for a damaged file that kd_jax wrote.
RESTORE = "restore it from a copy, or remove its folder and run the command again that wrote it"

# orbax and tensorstore wrap the system's error in their own exceptions, so its message is searched for as well.
_FULL = tuple(os.strerror(number).lower() for number in (errno.ENOSPC, errno.EDQUOT))

# Key in a file of `write_sealed`: the digest of everything else in it.
_CHECKSUM = "checksum"

# Object stores refuse more than about one put of the same object per second.
_SECONDS_BETWEEN_PUTS = 10.0


def is_full_disk(error: BaseException) -> bool:
    """Whether an error of the system or of a storage library says "no space left" or "quota exceeded"."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(message in str(error).lower() for message in _FULL)


@contextlib.contextmanager
def full_disk_is_user_error(path: str | os.PathLike, remedy: str = "or choose another folder") -> Iterator[None]:
    """Turns "no space left" and "quota exceeded", from the system or from a storage library, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_full_disk(error):
            raise UserError(
                f"{os.fspath(path)}: the disk is full or over its quota; free some space, {remedy}, and start the "
                "same command again"
            ) from error
        raise


@contextlib.contextmanager
def system_errors_are_user_errors() -> Iterator[None]:
    """Turns system errors about a named file, such as a missing one, and out-of-memory errors of NumPy and jax, into
    UserError."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        name, reason = os.fsdecode(error.filename), error.strerror or type(error).__name__
        raise UserError(f"{name}: cannot be read or written ({reason}); check the path and its rights") from error
    except Exception as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise UserError(
            f"there is not enough memory ({reason[:200]}); choose smaller batches, rows or models"
        ) from error


def write_atomically(path: pathlib.Path, data: bytes | str) -> None:
    """Replaces a file so that a reader finds the old content or the new, never a part.

    `kd_jax.runtime.lock.tidy` removes the temporary file of a killed process. Raises UserError if the disk is full, the
    folder cannot be written to, or the store cannot be reached.
    """
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):  # a single put is atomic
        with reaching(path, missing_is_error=True):
            path.write_bytes(data)
        return
    # The process id keeps two processes that write the same file apart.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with full_disk_is_user_error(path), _opened(temporary) as file:
            file.write(data)
            file.flush()
            # Without fsync, a power cut after the rename can leave an empty file under the final name.
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _opened(temporary: pathlib.Path) -> BinaryIO:
    """A new file, locked while it is open, so that `tidy` can tell it from one whose process is gone."""
    while True:
        file = open(temporary, "wb")  # noqa: SIM115  closed by the caller
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # removed between the two calls


def write_json(path: pathlib.Path, values: Any) -> None:
    """`write_atomically` of indented JSON; NaN and infinity are a ValueError, since they are not JSON."""
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def whole_text_file(path: pathlib.Path) -> Iterator[TextIO]:
    """A local text file that is written in the block, and appears under its name if the block succeeds."""
    if path.exists() and not path.is_file():  # a pipe or a device, which cannot be replaced
        with open(path, "w", encoding="utf-8") as file:
            yield file
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sealed(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A JSON object with a checksum over its values and its file's name, which `unsealed` verifies and removes."""
    plain = json.loads(json.dumps(values))
    return {**plain, _CHECKSUM: digest([name, plain])}


def unsealed(values: Any, path: pathlib.Path, remedy: str = RESTORE) -> Any:
    """The inverse of `sealed`; values without a checksum are returned unchanged. Raises UserError if damaged."""
    if not isinstance(values, dict) or _CHECKSUM not in values:
        return values
    plain = {key: value for key, value in values.items() if key != _CHECKSUM}
    if values[_CHECKSUM] != digest([path.name, plain]):
        raise UserError(f"{path}: was changed or damaged since it was written; {remedy}")
    return plain


def write_sealed(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """`write_json` of an object with its own checksum, for files that only kd_jax writes."""
    write_json(path, sealed(values, path.name))


class _Object(dict[str, Any]):
    """The object of a JSON file; a missing key raises a UserError that names the file."""

    def __init__(self, values: dict[str, Any], path: pathlib.Path, remedy: str):
        super().__init__(values)
        self._path, self._remedy = path, remedy

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self._path}: lacks {key!r}; {self._remedy}")


def read_json(path: pathlib.Path, remedy: str = RESTORE) -> Any:
    """The value of a JSON file. Raises FileNotFoundError if it is missing; a key that its object lacks is a UserError.

    Raises UserError for a file that cannot be read, is not JSON or was changed since `write_sealed`, and for a store
    that cannot be reached.
    """
    try:
        with reaching(path):
            text = path.read_bytes()
        values = unsealed(json.loads(text), path, remedy)
        return _Object(values, path, remedy) if isinstance(values, dict) else values
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path and its rights") from None
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise UserError(f"{path}: broken JSON ({error}); {remedy}") from None


def digest_of(path: pathlib.Path) -> str:
    """SHA-256 (hex) of a small file, local or remote."""
    with reaching(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def read_json_object(path: pathlib.Path, remedy: str = RESTORE) -> dict[str, Any]:
    """`read_json` of a file that must hold an object."""
    values = read_json(path, remedy)
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a JSON object; {remedy}")
    return values


def write_json_lines(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """`write_atomically` of one JSON object per line."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_atomically(as_path(path), text)


def read_json_lines(path: str | os.PathLike, *, growing: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; UserError names file and line.

    growing: the file may be missing (no rows) or still be written to, so a last line without a newline is left out.
    """
    path = as_path(path)
    try:
        with reaching(path):
            content = path.read_bytes()
    except OSError as error:
        if growing and isinstance(error, FileNotFoundError):
            return []
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path and its rights") from None
    if growing:
        content = content[: content.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
            raise UserError(f"{path}:{number}: broken JSON ({error}); write one JSON object on the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: holds a JSON {type(row).__name__}; write one JSON object on the line")
        rows.append(row)
    return rows


class GrowingFile:
    """A text file that lines are appended to: a local one is flushed at once, a remote one is put again as a whole.

    Puts happen in a thread, every ten seconds at most, and in `sync` and `close`. One that fails is repeated with the
    next; `sync` and `close` raise UserError.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file = None if is_remote(path) else open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self._lines: list[str] = []
        if self._file is None:
            with contextlib.suppress(FileNotFoundError), reaching(path):
                # Not str.splitlines, which also splits at characters inside a text, such as U+2028.
                self._lines = [f"{line}\n" for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        self._stored, self._last_put = len(self._lines), 0.0
        self._putter = ThreadPoolExecutor(1, thread_name_prefix="growing file")  # one thread: puts keep their order

    def write(self, line: str) -> None:
        """Appends a line, which ends in a newline."""
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._lines.append(line)
        if time.monotonic() - self._last_put >= _SECONDS_BETWEEN_PUTS:
            self._last_put = time.monotonic()
            self._putter.submit(self._put)

    def sync(self) -> None:
        """Returns when every line so far is in the store."""
        if self._file is None:
            self._putter.submit(self._put).result()

    def close(self) -> None:
        """`sync`, and the end."""
        try:
            self.sync()
        finally:
            self._putter.shutdown()
            if self._file is not None:
                self._file.close()

    def _put(self) -> None:
        count = len(self._lines)
        if count > self._stored:
            write_atomically(self._path, "".join(self._lines[:count]))
            self._stored = count
