"""Checkpoints on a store that orbax does not write to itself (s3://): made on this host, put when they are whole.

<checkpoints>/<step>/...    the files as orbax made them
<checkpoints>/<step>.json   put last: the step, and size and checksum of each file; without it there is no checkpoint
"""

import contextlib
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Collection
from typing import Any

import jax

from kd_jax.runtime.copies import LocalCopy, describe, outgoing, put
from kd_jax.runtime.files import full_disk_is_user_error, read_json, write_json
from kd_jax.runtime.paths import make_folder, names_in, reaching
from kd_jax.types import UserError


def steps_in(remote: pathlib.Path) -> list[int]:
    """The steps, ascending, of the whole checkpoints of a remote folder."""
    stems = (name.removesuffix(".json") for name in names_in(remote) if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def fetch_newest(remote: pathlib.Path) -> pathlib.Path | None:
    """A folder of this host that holds the newest checkpoint of a remote one, checked; None where there is none."""
    for step in reversed(steps_in(remote)):
        try:
            manifest: dict[str, Any] = read_json(remote / f"{step}.json")
        except FileNotFoundError:  # its run has just removed it, and has a newer one
            continue
        with full_disk_is_user_error(remote):
            return LocalCopy(remote, manifest, background=False).part()
    return None


class Mirror:
    """The local folder that orbax writes checkpoints to, and the thread that puts each on the remote one.

    What lies on the remote counts: whatever an earlier start left in the local folder is removed, and the newest remote
    checkpoint is fetched into it. Raises UserError where several processes would each write a part of a checkpoint.
    """

    def __init__(self, remote: pathlib.Path):
        if jax.process_count() > 1:
            raise UserError(
                f"{remote}: {jax.process_count()} processes cannot write one checkpoint to s3://; use gs:// or a "
                "folder that all hosts share as --workdir"
            )
        self._remote = remote
        self.folder = outgoing(remote)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        shutil.rmtree(self.folder, ignore_errors=True)
        make_folder(self.folder)
        newest = fetch_newest(remote)
        if newest is not None:
            shutil.copytree(newest, self.folder, copy_function=os.link, dirs_exist_ok=True)
            shutil.rmtree(newest)  # the links keep its files

    def put(self, step: int, finished: Callable[[], None], kept: Callable[[], Collection[int]]) -> None:
        """Starts to put a checkpoint that orbax has begun to write; `finished` waits for orbax.

        kept: the steps to keep, asked for when this one is there; others are then removed.
        """
        self.wait()

        def run() -> None:
            try:
                finished()
                names = [file.relative_to(self.folder).as_posix() for file in (self.folder / str(step)).rglob("*")]
                files = describe(self.folder, sorted(name for name in names if (self.folder / name).is_file()))
                put(self.folder, self._remote, files)
                write_json(self._remote / f"{step}.json", {"step": step, "files": files})
                self._remove(kept())
            except Exception as error:  # `wait` raises it in the thread of the run
                self._error = error

        self._thread = threading.Thread(target=run, name="put checkpoint")
        self._thread.start()

    def _remove(self, kept: Collection[int]) -> None:
        for step in steps_in(self._remote):
            if step not in kept:
                with reaching(self._remote), contextlib.suppress(FileNotFoundError):
                    (self._remote / f"{step}.json").unlink()
                    (self._remote / str(step)).rmtree()  # type: ignore[attr-defined]  epath has it

    def wait(self) -> None:
        """Returns when the last checkpoint is on the remote; raises what kept it from getting there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
