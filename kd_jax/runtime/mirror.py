"""Checkpoints on s3://, which orbax cannot write to: made on this host, and put on the store when they are complete.

<checkpoints>/<step>/...    the files as orbax made them
<checkpoints>/<step>.json   put last: the step, and size and checksum of each file; without it there is no checkpoint
"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from kd_jax.runtime.copies import LocalCopy, describe, outgoing, put
from kd_jax.runtime.files import full_disk_is_user_error, read_json, write_sealed
from kd_jax.runtime.paths import make_folder, names_in, reaching
from kd_jax.types import UserError


def steps_in(remote: pathlib.Path) -> list[int]:
    """The steps, ascending, of the complete checkpoints in a remote folder."""
    stems = (name.removesuffix(".json") for name in names_in(remote) if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def fetch_newest(remote: pathlib.Path) -> pathlib.Path | None:
    """A local folder with the newest checkpoint of a remote one, its checksums verified; None if there is none."""
    for step in reversed(steps_in(remote)):
        # Its run may have removed it since it was listed, when it had saved a newer one.
        with contextlib.suppress(FileNotFoundError), full_disk_is_user_error(remote):
            return LocalCopy(remote, read_json(remote / f"{step}.json"), background=False).part()
    return None


class Mirror:
    """The local folder that orbax writes checkpoints to, and the thread that puts each on the store.

    The store counts: whatever an earlier start left in the local folder is removed, and the newest remote checkpoint is
    fetched into it. Raises UserError with several processes, each of which would write a part of a checkpoint.
    """

    def __init__(self, remote: pathlib.Path):
        if jax.process_count() > 1:
            raise UserError(
                f"{remote}: {jax.process_count()} processes cannot write one checkpoint to s3://; use gs:// or a "
                "folder that all hosts share as --workdir"
            )
        self._remote, self.folder = remote, outgoing(remote)
        self._putter = ThreadPoolExecutor(1, thread_name_prefix="put checkpoint")
        self._pending: Future | None = None
        shutil.rmtree(self.folder, ignore_errors=True)
        make_folder(self.folder)
        newest = fetch_newest(remote)
        if newest is not None:
            shutil.copytree(newest, self.folder, copy_function=os.link, dirs_exist_ok=True)
            shutil.rmtree(newest)  # the links keep its files

    def put(self, step: int, finished: Callable[[], None], kept: Callable[[], Collection[int]]) -> None:
        """Starts to put a checkpoint that orbax has begun to write; `finished` waits for orbax.

        kept: gives the steps to keep once this one is on the store; others are then removed.
        """
        self.wait()
        self._pending = self._putter.submit(self._put, step, finished, kept)

    def _put(self, step: int, finished: Callable[[], None], kept: Callable[[], Collection[int]]) -> None:
        finished()
        found = (file for file in (self.folder / str(step)).rglob("*") if file.is_file())
        files = describe(self.folder, sorted(file.relative_to(self.folder).as_posix() for file in found))
        put(self.folder, self._remote, files)
        write_sealed(self._remote / f"{step}.json", {"step": step, "files": files})
        for old in set(steps_in(self._remote)).difference(kept()):
            with reaching(self._remote), contextlib.suppress(FileNotFoundError):
                # The manifest first: a checkpoint that is removed halfway must not look complete.
                (self._remote / f"{old}.json").unlink()
                (self._remote / str(old)).rmtree()  # type: ignore[attr-defined]  epath has it

    def wait(self) -> None:
        """Returns when the last checkpoint is on the store; raises what prevented it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
