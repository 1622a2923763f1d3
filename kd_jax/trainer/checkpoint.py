"""Asynchronous checkpoints with orbax: a run's own, to resume it, and another run's, to start from its parameters."""

import contextlib
import functools
import inspect
import json
import logging
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from kd_jax.config import differences
from kd_jax.runtime.files import full_disk_is_user_error, is_full_disk, sealed, unsealed
from kd_jax.runtime.mirror import Mirror, fetch_newest
from kd_jax.runtime.paths import as_path, is_remote, is_there, reaching, scheme_of
from kd_jax.trainer.state import State, from_plain, params_fingerprint, to_plain
from kd_jax.types import Params, UserError

FOLDER = "checkpoints"  # inside a run's directory
_STATE = "state_fingerprint"  # fingerprint of a checkpoint's content, in its "meta"
_OWN = "remove that folder, and the run goes on from the checkpoint before it or from its start"
_OTHERS = "restore it from a copy, or run its command again in another directory"
BEST = "best"  # part of a run's state: the parameters of its best evaluation so far, with early stopping


class _OrbaxNoise(logging.Filter):
    """Hides orbax's absl logs below the level of errors, and the tracebacks of its threads on a full disk, which raises
    an exception anyway."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        known = record.levelno < logging.ERROR or (error is not None and is_full_disk(error))
        return not known or "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_OrbaxNoise())

# Orbax measures its limits with the wall clock, which may jump: 20 minutes for a save, and 5 for the wait for a folder
# that another thread makes, hence no such thread. The watchdog reports a save that hangs.
_SAVE_SECONDS = 30 * 86_400


class Checkpoints:
    """The newest `keep` checkpoints of one run, each with the items "state" (arrays) and "meta" (JSON).

    A checkpoint is written to a temporary folder that is renamed at the end, so a half-written one is never read, and
    what a killed run left is removed here. On gs:// orbax writes a marker file last instead; for s3:// `Mirror` does. A
    full disk or an unreachable store is a UserError, from whichever call notices it.
    """

    def __init__(self, folder: str | pathlib.Path, keep: int):
        self._folder = absolute(as_path(folder))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(timeout_secs=_SAVE_SECONDS, create_directories_asynchronously=False),
        )
        with self._writing():
            self._mirror = Mirror(self._folder) if needs_mirror(self._folder) else None
            folder = self._mirror.folder if self._mirror else self._folder
            self._manager = ocp.CheckpointManager(folder, options=options, item_names=("state", "meta"))
            for step in sorted(self._manager.all_steps())[:-keep]:  # a kill may have left a half-removed one
                self._manager.delete(step)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with full_disk_is_user_error(self._folder), reaching(self._folder, missing_is_error=True):
            yield

    def save(self, step: int, state: State, meta: dict[str, Any]) -> None:
        """Starts to save; returns when the state is copied from the devices, so it may be donated to the next step.

        Waits for the previous save if it is still being written. Does nothing for a step that is already saved.
        """
        if self.latest_step() == step:
            return
        plain = to_plain(state)
        noted = sealed({**meta, _STATE: params_fingerprint(plain)}, "meta")
        items = ocp.args.Composite(state=ocp.args.StandardSave(plain), meta=ocp.args.JsonSave(noted))
        with self._writing():
            if self._mirror is not None:
                self._mirror.wait()
            self._manager.save(step, args=items, force=True)
            if self._mirror is not None:
                self._mirror.put(step, self._manager.wait_until_finished, self._manager.all_steps)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def check(self, identity: dict[str, Any]) -> None:
        """Raises UserError, with the differences, when the newest checkpoint is of a run with another identity.

        identity: JSON values that a run and its resume must share (config, data fingerprint).
        """
        step = self.latest_step()
        if step is None:
            return
        with reading(self._folder / str(step), _OWN):
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            changed = differences(self._meta(step, meta)["identity"], json.loads(json.dumps(identity)))
        if changed:
            lines = "".join(f"\n  {line}" for line in changed)
            raise UserError(
                f"{self._folder}: the checkpoint of step {step} belongs to a run that differs (old -> new); go back to "
                f"the old values, or start in a new directory:{lines}"
            )

    def restore(self, abstract: State) -> tuple[State, dict[str, Any]] | None:
        """The newest (state, meta), or None if nothing is saved; abstract: ShapeDtypeStructs with shardings."""
        step = self.latest_step()
        if step is None:
            return None
        items = ocp.args.Composite(state=ocp.args.StandardRestore(to_plain(abstract)), meta=ocp.args.JsonRestore())
        with reading(self._folder / str(step), _OWN):
            restored = self._manager.restore(step, args=items)
            state, meta = restored["state"], self._meta(step, restored["meta"])
            if meta.pop(_STATE, None) not in (None, params_fingerprint(state)):
                raise _damaged(self._folder / str(step), "its arrays are not those that were saved", _OWN)
            return from_plain(state, abstract), meta

    def _meta(self, step: int, meta: dict[str, Any]) -> dict[str, Any]:
        return unsealed(meta, self._folder / str(step) / "meta", _OWN)

    def wait(self) -> None:
        """Blocks until everything saved is on the disk or the store."""
        with self._writing():
            self._manager.wait_until_finished()
            if self._mirror is not None:
                self._mirror.wait()

    def close(self) -> None:
        with self._writing():
            self._manager.close()
            if self._mirror is not None:
                self._mirror.wait()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def load_params(workdir: str | pathlib.Path, abstract: Params, best_step: int | None = None) -> Params:
    """The parameters of another run's newest checkpoint, without its optimizer state.

    abstract: all of the parameters or some of their top-level entries, as ShapeDtypeStructs with shardings. best_step:
    of the best evaluation of a finished run that kept its parameters, which are then read. Raises UserError if the
    directory holds no checkpoint, or one of another model, naming the first difference.
    """
    none = UserError(f"{workdir}: holds no checkpoint; give the workdir of a run that has saved one")
    folder = absolute(as_path(workdir) / FOLDER)
    if needs_mirror(folder):
        folder = fetch_newest(folder)
    if folder is None or not is_there(folder):
        raise none
    handlers = {"state": ocp.PyTreeCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder, item_handlers=handlers, options=options) as manager:
        step = manager.latest_step()
        if step is None:
            raise none
        with reading(folder / str(step), _OTHERS):
            # The last checkpoint may predate its evaluation, which a preemption postponed.
            part = "params" if best_step in (None, step) else BEST
            saved = manager.item_metadata(step)["state"].tree[part]
            for problem in _mismatches({name: saved[name] for name in abstract if name in saved}, abstract):
                raise UserError(
                    f"{folder / str(step)}: a checkpoint of another model: {problem}; give the workdir of a run of "
                    "this model, or change the model's config to that run's"
                )
            item = {part: abstract}
            arguments = ocp.args.PyTreeRestore(
                item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
            )
            return manager.restore(step, args=ocp.args.Composite(state=arguments))["state"][part]


@contextlib.contextmanager
def reading(checkpoint: pathlib.Path, remedy: str) -> Iterator[None]:
    """Turns what orbax and tensorstore raise for a damaged checkpoint into a UserError; not out-of-memory errors."""
    _hide_late_callbacks()  # installed first, since callbacks can run before the except clause below does
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the type depends on which part of them noticed it
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise _damaged(checkpoint, f"{type(error).__name__}: {reason[:200]}", remedy) from error


@functools.cache
def _hide_late_callbacks() -> None:
    """Hides tracebacks that follow the failure of one array: tensorstore reports the others to orbax's event loop,
    which is closed by then, nobody retrieves the errors of its tasks, and reads that are cut short raise once more."""
    own = sys.unraisablehook

    def hook(found: Any) -> None:
        closed = isinstance(found.exc_value, RuntimeError) and "Event loop is closed" in str(found.exc_value)
        cut_short = inspect.iscoroutine(found.object) and "orbax" in found.object.cr_code.co_filename
        if not (closed or cut_short):
            own(found)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda record: "was never retrieved" not in record.getMessage())


def _damaged(checkpoint: pathlib.Path, reason: str, remedy: str) -> UserError:
    return UserError(f"{checkpoint}: the checkpoint was damaged and cannot be read ({reason}); {remedy}")


def absolute(folder: pathlib.Path) -> pathlib.Path:
    """The folder in the form that orbax accepts."""
    return folder if is_remote(folder) else folder.absolute()


def needs_mirror(folder: pathlib.Path) -> bool:
    """Whether orbax cannot write there itself; it supports local paths and gs://."""
    return scheme_of(folder) not in ("", "gs")


def _mismatches(saved: Any, wanted: Params) -> Iterator[str]:
    """The differences in names and shapes, sorted by name."""

    def shapes(tree) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}

    old, new = shapes(saved), shapes(wanted)
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            yield f"it has no parameter {name}, which has shape {new[name]} here"
        elif name not in new:
            yield f"its parameter {name} {old[name]} does not exist here"
        elif old[name] != new[name]:
            yield f"its parameter {name} has shape {old[name]}, here {new[name]}"
