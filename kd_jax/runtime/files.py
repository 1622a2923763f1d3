"""Small files written atomically, JSON and JSON Lines, and one sentence for a full disk; local or on gs:// and s3://."""

import contextlib
import errno
import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kd_jax.runtime.paths import as_path, is_remote, reaching
from kd_jax.types import UserError

# orbax and tensorstore wrap the system's error in their own exceptions, so its message is searched for as well.
_FULL = tuple(os.strerror(number).lower() for number in (errno.ENOSPC, errno.EDQUOT))

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


def write_atomically(path: pathlib.Path, data: bytes | str) -> None:
    """Replaces a file so that a reader finds the old content or the new, never a part.

    Raises UserError when the disk is full, the folder cannot be written to, or the store cannot be reached.
    """
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):  # a single put is atomic
        with reaching(path, missing_is_error=True):
            path.write_bytes(data)
        return
    # The process id keeps two processes that write the same file apart.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with full_disk_is_user_error(path):
            with open(temporary, "wb") as file:
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


def write_json(path: pathlib.Path, values: Any) -> None:
    """`write_atomically` of indented JSON; NaN and infinity are a ValueError, since they are not JSON."""
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """The value of a JSON file; FileNotFoundError if it is missing, UserError if the store cannot be reached."""
    with reaching(path):
        text = path.read_text(encoding="utf-8")
    return json.loads(text)


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
        except ValueError as error:  # a UnicodeDecodeError is one, too
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
