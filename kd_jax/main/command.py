"""The form that every command shares: --config, --workdir, one-sentence errors, exit codes."""

import dataclasses
import functools
import pathlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from kd_jax.config import resolved
from kd_jax.config.execution import read_execution
from kd_jax.runtime import cluster, distributed
from kd_jax.runtime.copies import keep_copies_in
from kd_jax.runtime.files import full_disk_is_user_error, system_errors_are_user_errors
from kd_jax.runtime.paths import as_path
from kd_jax.runtime.preemption import EXIT_CODE, Preempted, Preemption
from kd_jax.trainer.run_directory import RunDirectory, run_once
from kd_jax.types import UserError

MISTAKE = 2  # exit code of a user's mistake
NO_CONFIG = (
    "--config is missing; name a config file, e.g. --config=configs/quickstart.py (`kd-jax init DIR` writes one to "
    "start from)"
)

Run = Callable[[ConfigDict, pathlib.Path], Any]
Work = Callable[[RunDirectory], dict[str, Any] | None]
Instead = Callable[[ConfigDict, pathlib.Path | None], Any]


class Tuples(tuple_parser.TupleParser):
    """Reads the value of a tuple flag, with or without quotes: en-US,de-DE or (en-US,de-DE)."""

    def parse(self, argument: Any) -> tuple[Any, ...]:
        values = super().parse(argument)
        if not isinstance(argument, str) or values != (argument,) or "," not in argument:
            return values
        inside = argument.strip().removeprefix("(").removesuffix(")")
        return tuple(part.strip() for part in inside.split(",") if part.strip())


config_flags.register_flag_parser_for_type(tuple, Tuples())


@dataclasses.dataclass(frozen=True)
class Command:
    """A command whose directory holds config.json, run.json and DONE, and which the same command line resumes.

    keys(config): the config keys that decide what it computes. work(config, workdir): refuses whatever is wrong before
    the directory is claimed, and returns the function that starts or resumes in it; that returns what DONE is to say,
    or None where more is left to do. resolve(config): fills in values that follow from others, before the config is
    recorded. show(config, workdir): prints what came of it.
    """

    name: str
    description: str
    keys: Callable[[ConfigDict], tuple[str, ...]]
    work: Callable[[ConfigDict, pathlib.Path], Work]
    resolve: Callable[[ConfigDict], ConfigDict] = lambda config: config
    show: Callable[[ConfigDict, pathlib.Path], None] = lambda config, workdir: None

    def run(self, config: ConfigDict, workdir: pathlib.Path) -> None:
        """Runs the command in its directory, unless it is done there."""
        config = self.resolve(config)
        work = self.work(config, workdir)
        run_once(workdir, self.name, resolved(config, self.keys(config)), read_execution(config), work)

    def main(self) -> None:
        """Runs the command with the config and the directory of the command line."""

        def run_and_show(config: ConfigDict, workdir: pathlib.Path) -> None:
            self.run(config, workdir)
            self.show(config, workdir)

        main(run_and_show, description=self.description)


def main(
    run: Run,
    *,
    description: str,
    instead: Mapping[str, tuple[Instead, str]] | None = None,
    needs_workdir: bool = True,
) -> None:
    """Parses the flags and calls run(config, workdir); a UserError becomes one sentence and exit code 2.

    instead: switches, name -> (function, help): --NAME calls the function in place of `run`, with None where there is
    no --workdir. Without needs_workdir `run` may also get None, and runs as a single process.
    """
    instead = instead or {}
    switches = {name: flags.DEFINE_boolean(name, False, text) for name, (_, text) in instead.items()}
    config_flag = config_flags.DEFINE_config_file("config", None, "File with the config: configs/FILE.py[:argument].")
    workdir_flag = flags.DEFINE_string("workdir", None, "Directory of this run; the same again resumes it.")
    coordinator_flag = flags.DEFINE_string("coordinator", None, "Several processes: HOST:PORT of process 0.")
    processes_flag = flags.DEFINE_integer("processes", None, "Several processes: how many; 1 runs this one alone.")
    process_flag = flags.DEFINE_integer("process", None, "Several processes: number of this one, from 0.")
    usage = (
        f"{description}\n\n"
        f"  python -m {_module()} --config=configs/FILE.py[:argument] --workdir=DIR [--config.key=value ...]"
        "\n\nStart the same command in each of several processes. Without TPU, SLURM, Open MPI or Kubernetes, which "
        "number\nthem, add --coordinator=HOST:PORT --processes=N --process=I (docs/multi-host.md)."
    )
    usage += "".join(f"\n  --{name}: {text}" for name, (_, text) in instead.items())
    app.usage = lambda *args, **kwargs: print(usage)

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except (flags.Error, AttributeError, KeyError, ValueError, TypeError) as error:
            named = any(word.lstrip("-").partition("=")[0] == "config" for word in argv[1:])
            fail(explain_flags(error, argv) if named else NO_CONFIG)
        if len(rest) > 1:
            meant = rest[1].partition(":")[0].endswith(".py")
            remedy = f"did you mean --config={rest[1]}?" if meant else "options have the form --config.key=value"
            fail(f"unexpected argument {rest[1]!r}; {remedy}")
        config, workdir = config_flag.value, workdir_flag.value
        chosen = [f"--{name}" for name, switch in switches.items() if switch.value]
        if len(chosen) > 1:
            fail(f"{' and '.join(chosen)} exclude each other; give one")
        if config is None:
            fail(NO_CONFIG)
        if not (workdir or chosen or not needs_workdir):
            fail("--workdir is missing; name the directory that the run writes to, e.g. --workdir=runs/first")
        try:
            config.keys()  # a file that cannot be loaded raises only here
        except OSError as error:
            given = next((word for word in argv if word.startswith("--config=")), "--config")
            fail(f"{given}: cannot be loaded ({str(error).strip().splitlines()[-1].strip()}); name a file of configs/")
        given = Counter(
            word.lstrip("-").partition("=")[0] for word in argv[1:] if word.lstrip("-").startswith("config.")
        )
        for name, count in given.items():
            value = functools.reduce(lambda block, key: block[key], name.split(".")[1:], config)
            if count > 1 and isinstance(value, tuple):  # absl would join the values, while other flags replace them
                fail(f"--{name} is given {count} times; give it once, with all of its values")
        return rest

    def execute(_) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # jax logs missing backends through absl
        config, workdir = config_flag.value, workdir_flag.value
        assert config is not None, "checked by parse"
        for name, switch in switches.items():
            if switch.value:
                sys.exit(guarded(on_storage(instead[name][0]), config, workdir or None))
        if not needs_workdir:
            sys.exit(guarded(on_storage(run), config, workdir or None))
        assert workdir, "checked by parse"
        try:
            place = cluster.from_flags(coordinator_flag.value, processes_flag.value, process_flag.value)
        except UserError as error:
            fail(str(error))
        sys.exit(guarded(on_storage(run), config, workdir, place))

    app.run(execute, flags_parser=parse)


def _module() -> str:
    """The name of the command that runs."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else "..."


def on_storage(run: Callable[[ConfigDict, Any], Any]) -> Callable[[ConfigDict, Any], Any]:
    """The command as a function of the workdir as given: a local path, gs:// or s3://."""

    def run_there(config: ConfigDict, workdir: str | None) -> Any:
        keep_copies_in(config.storage.local)
        return run(config, None if workdir is None else as_path(workdir))

    return run_there


def explain_flags(error: Exception, argv: Sequence[str] = ()) -> str:
    """One sentence for what went wrong while the flags and the config were read."""
    if isinstance(error, UserError):
        return str(error)
    text: Any = error
    # str() of a KeyError is a repr, and ml_collections wraps one in another.
    while isinstance(text, AttributeError | KeyError) and text.args:
        text = text.args[0]
    message = " ".join(str(text).split())
    if isinstance(error, AttributeError | KeyError) or "config." in message:
        words = [word.lstrip("-").partition("=")[0] for word in argv]
        keys = [word for word in words if word.startswith("config.") and f"'{word.rpartition('.')[2]}'" in message]
        where = f"--{keys[0]}: " if keys and "config." not in message else ""
        return f"{where}{message}; kd_jax/config/base.py declares every key"
    return message


def fail(message: str) -> NoReturn:
    """Ends the program with one line on standard error."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(MISTAKE)


def guarded(
    run: Callable[[ConfigDict, Any], Any],
    config: ConfigDict,
    workdir: pathlib.Path | str | None,
    place: cluster.Place | None = None,
) -> int:
    """Runs a command and returns its exit code: 0, 2 for a user's mistake, 75 when preempted after a checkpoint.

    place: this process's place in a job of several processes; an error in one of them ends all with the same code.
    """
    try:
        # Until the processes have met, SIGTERM ends this one at once: it has nothing to save.
        # Any library may run out of space, so the error is translated here, once for all commands.
        disk = full_disk_is_user_error(workdir or "the temporary folder")
        with distributed.joined(place, outcome), Preemption(), system_errors_are_user_errors(), disk:
            run(config, workdir)
    except (UserError, Preempted) as error:
        code, text = outcome(error)
        print(text, file=sys.stderr)
        return code
    return 0


def outcome(error: BaseException) -> tuple[int, str]:
    """(exit code, message) of an error."""
    if isinstance(error, UserError):
        return MISTAKE, f"error: {error}"
    if isinstance(error, Preempted):
        return EXIT_CODE, f"preempted: {error}; the same command resumes the run"
    return 1, "".join(traceback.format_exception(error))
