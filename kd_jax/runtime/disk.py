"""Small files written whole or not at all, wherever they lie, and a full disk told in one sentence."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from kd_jax.runtime.paths import write_whole
from kd_jax.types import UserError

# orbax and tensorstore pass the system's message on inside exceptions of their own.
_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


@contextlib.contextmanager
def full_disk_is_user_error(place: str | os.PathLike) -> Iterator[None]:
    """Turns "no space left" and "quota exceeded", from the system or from a storage library, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(message.lower() in str(error).lower() for message in _FULL):
            raise UserError(
                f"{place}: the disk is full or over its quota; free some space and start the same command again, "
                "it goes on from the last checkpoint"
            ) from error
        raise


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a reader finds the old content or the new, never a part; UserError: full disk."""
    with full_disk_is_user_error(path):
        write_whole(path, text.encode())


def write_json(path: pathlib.Path, values: Any) -> None:
    """`write_atomically` of indented JSON; NaN and infinity are a ValueError, since they are not JSON."""
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
