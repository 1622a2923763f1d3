"""Reads files and hub data sets of the user; what is wrong with them becomes one clear sentence."""

import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kd_jax.runtime.paths import reaching
from kd_jax.types import UserError

# What a reader does with a broken record: `raise_error`, or note the error, after which the next record is read.
Report = Callable[[UserError], None]


def raise_error(error: UserError) -> None:
    """The default Report: the first broken record ends the reading."""
    raise error from None


def fill_path(path: str, language: str = "", *, key: str = "path") -> str:
    """Fills {language}, ${VARIABLE} and a leading ~; UserError names an unset variable and the config `key`."""

    def variable(match: re.Match[str]) -> str:
        value = os.environ.get(match[1], "")
        if not value:
            raise UserError(
                f"{key}: environment variable {match[1]} is not set, but the value is {path!r}; "
                f"export {match[1]}=FOLDER or write the folder in its place"
            )
        return value

    filled = re.sub(r"\$\{(\w+)\}", variable, path)
    return os.path.expanduser(filled.replace("{language}", language))


def find_files(path: str, suffixes: tuple[str, ...], *, key: str = "path") -> list[Path]:
    """What `path` means, sorted: the file, the folder's files with these suffixes (subfolders too), or the glob's."""
    if not path:
        raise UserError(f"{key}: is empty; name a file, a folder or a glob")
    named = Path(path)
    if named.is_file():
        return [named]
    if named.is_dir():
        found = sorted(file for file in named.rglob("*") if file.name.endswith(suffixes) and file.is_file())
        problem = f"the folder {path} holds no file that ends in {' or '.join(suffixes)}"
    else:
        found = sorted(file for name in glob.glob(path, recursive=True) if (file := Path(name)).is_file())
        problem = f"no file {path}"
    if not found:
        raise UserError(f"{key}: {problem}; check the path")
    return found


def states_of(path: str) -> list[tuple[str, int, int]]:
    """(name, bytes, time in ns) of the files that `path` names, sorted: a file, a folder's files, or a glob's."""
    named = Path(path)
    found = (
        [named]
        if named.is_file()
        else named.rglob("*")
        if named.is_dir()
        else map(Path, glob.glob(path, recursive=True))
    )
    states = [(str(file), file.stat()) for file in found if file.is_file()]
    return sorted((name, state.st_size, state.st_mtime_ns) for name, state in states)


def decode_lines(lines: Iterable[bytes], name: str, report: Report = raise_error) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end); for bytes that are not UTF-8 a UserError with `name:line`."""
    for number, raw in enumerate(lines, 1):  # line by line: a text reader would also break lines at U+2028
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            at = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
            report(UserError(f"{name}:{number}: {at} is not UTF-8; convert the file to UTF-8"))
            continue
        if number == 1:
            text = text.removeprefix("\ufeff")  # the byte order mark
            # A file with the line endings of old Mac OS would be read as one text.
            if not text.endswith("\n") and "\r" in text.rstrip("\r"):
                problem = "lines end in a carriage return alone"
                report(UserError(f"{name}:1: {problem}; convert the line ends, tr '\\r' '\\n' < OLD > NEW"))
                return
        yield number, text.rstrip("\r\n")


def check_text(text: str, where: str) -> None:
    """Raises UserError for text that is not Unicode, as tokenizers and files need it.

    Half of a surrogate pair comes from a JSON escape such as "\\ud83d", or from bytes on the command line that are not
    UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = (
            f"byte 0x{code - 0xDC00:02x}, which is not UTF-8" if 0xDC80 <= code <= 0xDCFF else "half a surrogate pair"
        )
        raise UserError(f"{where}: character {error.start + 1} is {byte}; fix or remove the text") from None


def numbered_lines(path: Path, report: Report = raise_error) -> Iterator[tuple[int, str]]:
    """Streams the numbered lines of a UTF-8 file, decompressed when its name ends in .gz.

    Raises UserError for the file as a whole; what is wrong with a line goes to `report`.
    """
    try:
        with reaching(path), path.open("rb") as file, _unpacked(file, path.name) as lines:
            yield from decode_lines(lines, str(path), report)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: is not a whole gzip file ({error}); copy or download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path and its rights") from None


def _unpacked(file: Any, name: str) -> Any:
    return gzip.open(file) if name.endswith(".gz") else file


def json_records(
    lines: Iterable[tuple[int, str]], name: str, report: Report = raise_error
) -> Iterator[tuple[str, dict[str, Any]]]:
    """("name:line", the JSON object) of numbered lines that are not blank; broken ones go to `report`."""
    for number, line in lines:
        if not line.strip():
            continue
        where, record = f"{name}:{number}", None
        try:
            record = json.loads(line)
            problem = f"holds a JSON {type(record).__name__}"
        except json.JSONDecodeError as error:
            problem = f"broken JSON ({error.msg} at column {error.colno})"
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand nested lists
            problem = f"broken JSON ({error})"
        if isinstance(record, dict):
            try:
                if "\\u" in line:  # only an escape can encode half of a surrogate pair, and most lines have none
                    for field, value in record.items():
                        check_text(field, f"{where}: the name of a field")
                        check_text(value if isinstance(value, str) else "", f"{where}: field {field!r}")
            except UserError as error:
                report(error)
            else:
                yield where, record
        else:
            report(UserError(f"{where}: {problem}; write one JSON object on the line"))


def load_hub(name: str, subset: str | None = None, **options: Any) -> Any:
    """`datasets.load_dataset(name, subset, **options)`, for a hub name or local folder; a failure is a UserError.

    NAME@REVISION names a branch, tag or commit of a data set on the hub. In refs/convert/parquet, the automatic export,
    `subset` is a folder, since that branch has no configurations.
    """
    import datasets  # takes about a second, which plain files need not pay

    path, at, revision = name.partition("@")
    chosen: str | None = subset
    if not at or Path(name).exists():
        path = name
    else:
        options["revision"] = revision
        if revision.startswith("refs/convert/"):
            chosen, options["data_dir"] = None, subset
    try:
        return datasets.load_dataset(path, chosen, **options)
    except Exception as error:
        raise hub_error(name, subset, error) from error


def hub_error(name: str, subset: str | None, error: Exception) -> UserError:
    """The error for a data set that the hub, the network or the `datasets` library could not deliver."""
    reason = str(error).strip().splitlines() or [""]
    what = f"{name} ({subset})" if subset else name
    return UserError(
        f"data set {what} cannot be read: {type(error).__name__}: {reason[0]}; check the name, its configuration "
        "and split, and the network, or download it and set `path` to the folder"
    )
