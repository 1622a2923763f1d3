"""The command kd-jax: runs any of the commands in kd_jax/main, and writes a first config."""

import difflib
import os
import pathlib
import runpy
import sys
from collections.abc import Sequence

import kd_jax

STARTER = pathlib.Path(__file__).parent / "config" / "starter.py"
MISTAKE = 2  # exit code of a user's mistake; kd_jax.main.command has the same, but importing it imports jax

# One line on each, written here so that --help imports no command. First the study, then its parts in their order.
COMMANDS = {
    "init": "Writes DIR/config.py, a commented config for a study of your own data.",
    "advise": "Recommends a transfer set from small pilots, within a budget of minutes.",
    "study": "Runs the whole comparison of transfer sets, from text to report.",
    "prepare": "Reads, tokenizes and packs all text once; --check only looks for errors in it.",
    "import_model": "Reads a masked LM of `transformers` as a teacher.",
    "pretrain": "Trains a masked LM from scratch, or continues from another run.",
    "initialize": "Starts a student from layers of its teacher, without training it.",
    "baseline": "Fits a baseline that students have to beat: n-grams or a probe of the teacher.",
    "cache_teacher": "Writes a teacher's predictions once for all of its students.",
    "cache_states": "Writes a teacher's states of unmasked text once for all of its students.",
    "distill": "Distills a student from a teacher over a transfer set.",
    "finetune_dc": "Finetunes a model for domain classification.",
    "finetune_icner": "Finetunes a model for intents and slots together.",
    "evaluate": "Scores a finetuned model on the dev or test partition.",
    "export": "Writes a trained model as a folder that `transformers` loads.",
    "predict": "Prints domain, intent and slots of texts.",
    "latency": "Measures size and latency of a study's models.",
    "compile_check": "Compiles a training step for TPUs or GPUs without the hardware.",
}


def usage() -> str:
    """What `kd-jax --help` prints."""
    listed = "\n".join(f"  {name:<16}{line}" for name, line in COMMANDS.items())
    return f"""kd-jax: on which text should a student be distilled?

  kd-jax COMMAND --config=FILE.py[:argument] --workdir=DIR [--config.key=value ...]
  kd-jax COMMAND --help
  kd-jax init DIR

Commands:
{listed}

`python -m kd_jax.main.COMMAND` runs the same commands."""


def init(folder: pathlib.Path) -> None:
    """Writes folder/config.py and says how to go on. Raises FileExistsError when the file is there already."""
    file = folder / "config.py"
    folder.mkdir(parents=True, exist_ok=True)
    with open(file, "x", encoding="utf-8") as output:  # "x": never replaces a config that someone has edited
        output.write(STARTER.read_text(encoding="utf-8"))
    print(
        f"{file} is written. Its comments say where your utterances and texts go. Then:\n"
        f"  kd-jax prepare --config={file} --check     checks the data\n"
        f"  kd-jax study --config={file} --workdir={folder / 'run'}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, unless a command ends the process with its own."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    if name in ("-h", "--help", "-help", "help"):
        print(usage())
    elif name == "--version":
        print(f"kd_jax {kd_jax.__version__}")
    elif name == "init":
        if len(given) != 2 or given[1].startswith("-"):
            return _mistake("init takes one folder: kd-jax init DIR")
        try:
            init(pathlib.Path(given[1]))
        except FileExistsError as error:
            return _mistake(f"{error.filename} exists already; remove it or choose another folder")
        except OSError as error:
            return _mistake(f"{error.filename or given[1]} cannot be written: {error.strerror}")
    elif name in COMMANDS:
        # Configs may import each other (`from configs import quickstart`), as they can under `python -m`. The current
        # folder comes last, so that a checkout in it does not replace the installed kd_jax.
        sys.path.append(os.getcwd())
        sys.argv = [name, *given[1:]]
        # With alter_sys the command is __main__, just as under `python -m`: the command line that a run records is
        # `python -m kd_jax.main.NAME ...`, which can be pasted.
        runpy.run_module(f"kd_jax.main.{name}", run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(name.replace("-", "_"), COMMANDS, n=1)
        meant = f"; did you mean {near[0]}?" if near else "; kd-jax --help lists them"
        return _mistake(f"there is no command {name!r}{meant}" if name else "name a command; kd-jax --help lists them")
    return 0


def _mistake(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
