"""Thousands of bad inputs: real files of every kind are damaged, and the command that reads them runs.

python -m tests.faults.inputs --count=1000 --seed=0 [--kind=NAME ...] [--resume=FILE] [--case=NUMBER]

A case may end in one of three ways: "refused", with one sentence on standard error that names the file (or the config
key) and nothing half-written; "same", with the result of the undamaged file; or "other", if the file has no checksum
and an independent reader also finds different content in it, such as another text on a line. A traceback, a hang of
more than 60 s, a half-written output or a changed result is a failure. Prints a table of kinds and outcomes, and each
failure with the command that repeats it.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kd_jax.config import base
from kd_jax.runtime.files import read_json
from kd_jax.text_tables import aligned_table
from tests.faults.fixture import CONFIG, STATES, Fixture, options, text_options
from tests.faults.mutations import HUGE, mutate, of_pool
from tests.faults.worker import Ended, Worker

GOOD = ("refused", "same", "other")
BAD = ("traceback", "died", "hung", "unnamed", "half-written", "changed", "accepted")
OTHER_FORMS = (".tmp", ".partial")  # what a killed process may leave, and no command reads


@dataclass(frozen=True)
class Target:
    """A folder or file of the fixture, which of its files are damaged, and the command that reads it.

    command(fixture, unit, workdir): (name, arguments) for the damaged copy `unit`. result(workdir): what must not
    change. content(unit): what an independent reader finds; None if every file has a checksum, so that no other result
    is right. in_place: the unit is the directory of the run itself.
    """

    unit: str
    files: tuple[str, ...]
    command: Callable[[pathlib.Path, pathlib.Path, pathlib.Path], tuple[str, list[str]]]
    result: Callable[[pathlib.Path], Any]
    content: Callable[[pathlib.Path], Any] | None = None
    in_place: bool = False


def of_prepare(workdir: pathlib.Path) -> Any:
    manifest = read_json(workdir / "manifest.json")
    stores = [{key: value for key, value in one.items() if key != "built_from"} for one in manifest["stores"]]
    return {key: manifest[key] for key in ("fingerprint", "tokenizer_fingerprint", "utterances", "removed")}, stores


def of_training(workdir: pathlib.Path) -> Any:
    scores = [read_json(workdir / name) for name in ("heldout.json", "dev.json") if (workdir / name).is_file()]
    return read_json(workdir / "DONE")["parameters_fingerprint"], scores


def of_evaluate(workdir: pathlib.Path) -> Any:
    return [(workdir / name).read_text() for name in ("records.jsonl", "results.jsonl")]


def of_export(workdir: pathlib.Path) -> Any:
    files = [file for file in sorted(workdir.iterdir()) if file.name != "export.json"]  # it contains times
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def of_predict(workdir: pathlib.Path) -> Any:
    return (workdir / "predictions.jsonl").read_text()


def prepare_with(**changes: str):
    """`prepare` with keys whose values contain the unit's path, as {unit}."""

    def command(fixture: pathlib.Path, unit: pathlib.Path, workdir: pathlib.Path) -> tuple[str, list[str]]:
        keys = {key: value.replace("{unit}", str(unit)) for key, value in changes.items()}
        return "prepare", [*CONFIG, *text_options(fixture), *options(**keys), f"--workdir={workdir}"]

    return command


def job(name: str, *more: str, **changes: str):
    """A command with keys whose values contain the unit's path, as {unit}, or the fixture's, as {fixture}."""

    def command(fixture: pathlib.Path, unit: pathlib.Path, workdir: pathlib.Path) -> tuple[str, list[str]]:
        keys = {"prepared": "{fixture}/prepared", **changes}
        given = options(**{key: one.format(unit=unit, fixture=fixture) for key, one in keys.items()})
        return name, [*CONFIG, *given, *more, f"--workdir={workdir}"]

    return command


def predict_with(model: str, texts: str):
    def command(fixture: pathlib.Path, unit: pathlib.Path, workdir: pathlib.Path) -> tuple[str, list[str]]:
        workdir.mkdir(exist_ok=True)
        names = {"--model": model, "--input": texts, "--output": f"{workdir}/predictions.jsonl"}
        return "predict", [f"{key}={value.format(unit=unit, fixture=fixture)}" for key, value in names.items()]

    return command


def utterance_lines(unit: pathlib.Path) -> Any:
    """The records of a folder of JSON Lines, gzip or not."""
    return {file.name: [json.loads(line) for line in text_of(file)] for file in sorted(unit.iterdir())}


def text_lines(unit: pathlib.Path) -> Any:
    return {file.name: text_of(file) for file in sorted(unit.iterdir())}


def text_of(file: pathlib.Path) -> list[str]:
    data = file.read_bytes()
    data = gzip.decompress(data) if file.name.endswith(".gz") else data
    return [line.strip() for line in data.removeprefix(b"\xef\xbb\xbf").decode().split("\n") if line.strip()]


def parquet_rows(unit: pathlib.Path) -> Any:
    import pyarrow.parquet

    return {file.name: pyarrow.parquet.ParquetFile(file).read().to_pylist() for file in sorted(unit.iterdir())}


def archive_lines(unit: pathlib.Path) -> Any:
    whole = io.BytesIO(gzip.decompress(unit.read_bytes()))
    with tarfile.open(fileobj=whole) as archive:
        return [
            (member.name, [json.loads(line) for line in archive.extractfile(member).read().decode().splitlines()])
            for member in archive
            if member.isfile()
        ]


def json_of(name: str):
    return lambda unit: json.loads((unit / name).read_bytes())


def tensors_of(unit: pathlib.Path) -> Any:
    from safetensors.numpy import load_file

    return {
        file.name: {name: (one.dtype.str, one.shape, one.tobytes()) for name, one in load_file(file).items()}
        for file in sorted(unit.glob("*.safetensors"))
    }


def index_of(unit: pathlib.Path) -> Any:
    return json_of("model.safetensors.index.json")(unit)["weight_map"]


def tokenizer_of(unit: pathlib.Path) -> Any:
    """The values of its JSON files; other files as they are."""
    return {
        file.name: json.loads(file.read_bytes()) if file.suffix == ".json" else file.read_bytes()
        for file in sorted(unit.iterdir())
        if file.name.startswith(("tokenizer", "vocab"))
    }


def checkpoint_files(step: int) -> tuple[str, ...]:
    """The newest checkpoint's files, those with arrays more often."""
    return (f"checkpoints/{step}/**/*", f"checkpoints/{step}/state/d/*", f"checkpoints/{step}/state/manifest.ocdbt")


# The files that mark an output as complete.
LAST: dict[Any, str] = {of_prepare: "manifest.json", of_export: "export.json", of_predict: "predictions.jsonl"}
UTTERANCES = {"nlu__path": "{unit}"}
PARQUET = {"nlu__format": "massive_parquet", **UTTERANCES}
LINES = {"sources__generic__path": "{unit}/{language}.txt"}
RECORDS = {"sources__generic__format": "jsonl", "sources__generic__path": "{unit}/{language}.jsonl"}
LOAD = {"tokenizer__kind": "load", "tokenizer__path": "{unit}"}
TABLES = {"sources__generic__format": "parquet", "sources__generic__path": "{unit}/{language}.parquet"}
TEACHER = {"teacher_checkpoint": "{fixture}/teacher"}
FINETUNE = {"finetune__max_train": "20"}
STUDENT = {**FINETUNE, "finetune__init_from": "{fixture}/student"}
WHOLE = ("--config.pretrain.steps=3", "--config.pretrain.checkpoint_every=1")

pretrain = job("pretrain", *WHOLE, prepared="{unit}")
distill = job("distill", teacher_checkpoint="{unit}")
from_predictions = job("distill", **TEACHER, teacher_cache="{unit}")
from_states = job("distill", *STATES, **TEACHER, teacher_cache="{unit}")
resume = job("pretrain", *WHOLE)
evaluate = job("evaluate", evaluate__checkpoint="{unit}")
import_model = job("import_model", import_model__path="{unit}")
RUN_FILES = ("config.json", "run.json", "DONE")
CACHE_FILES = ("*.npy", "parts/*")

# Each kind of file, with its targets in turns.
KINDS: dict[str, tuple[Target, ...]] = {
    "labeled JSONL": (Target("massive", ("*",), prepare_with(**UTTERANCES), of_prepare, utterance_lines),),
    "JSONL": (Target("jsonl", ("*",), prepare_with(**RECORDS), of_prepare, utterance_lines),),
    "plain text": (
        Target("text", ("*",), prepare_with(**LINES), of_prepare, text_lines),
        Target("text", ("en.txt",), predict_with("{fixture}/dc", "{unit}/en.txt"), of_predict, text_lines),
    ),
    "gzip": (
        Target("massive-gzip", ("*",), prepare_with(**UTTERANCES), of_prepare, utterance_lines),
        Target(
            "text-gzip", ("*",), prepare_with(sources__generic__path="{unit}/{language}.txt.gz"), of_prepare, text_lines
        ),
    ),
    "Parquet": (
        Target("massive-parquet", ("*",), prepare_with(**PARQUET), of_prepare, parquet_rows),
        Target("text-parquet", ("*",), prepare_with(**TABLES), of_prepare, parquet_rows),
    ),
    "tarball": (Target("massive.tar.gz", ("",), prepare_with(**UTTERANCES), of_prepare, archive_lines),),
    "config overrides": (),
    "config.json": (Target("model", ("config.json",), import_model, of_training, json_of("config.json")),),
    "safetensors": (
        Target("model", ("*.safetensors",), import_model, of_training, tensors_of),
        Target("shards", ("*.safetensors",), import_model, of_training, tensors_of),
    ),
    "index": (Target("shards", ("*.index.json",), import_model, of_training, index_of),),
    "tokenizers": (
        Target("model", ("tokenizer*",), prepare_with(**LOAD), of_prepare, tokenizer_of),
        Target("model", ("tokenizer*",), import_model, of_training, tokenizer_of),
        Target("wordpiece", ("*",), prepare_with(**LOAD), of_prepare, tokenizer_of),
    ),
    "manifests": (
        Target("prepared", ("manifest.json", "rows/*/*/manifest.json"), pretrain, of_training),
        Target("prepared", ("manifest.json",), job("finetune_dc", prepared="{unit}", **STUDENT), of_training),
        Target("predictions", ("manifest.json",), from_predictions, of_training),
        Target("states", ("manifest.json",), from_states, of_training),
    ),
    "rows": (
        Target("prepared", ("rows/*/*/*.npy",), pretrain, of_training),
        Target(
            "prepared", ("utterances/*", "tokenizer/*"), job("finetune_dc", prepared="{unit}", **FINETUNE), of_training
        ),
    ),
    "caches": (
        Target("predictions", CACHE_FILES, from_predictions, of_training),
        Target("states", CACHE_FILES, from_states, of_training),
    ),
    "checkpoints": (
        Target("teacher", checkpoint_files(3), distill, of_training),
        Target("stopped", checkpoint_files(2), resume, of_training, in_place=True),
        Target("dc", checkpoint_files(2), evaluate, of_evaluate),
    ),
    "run.json": (
        Target("teacher", RUN_FILES, distill, of_training),
        Target("stopped", ("*.json", "metrics.jsonl"), resume, of_training, in_place=True),
        Target("icner", RUN_FILES, evaluate, of_evaluate),
        Target("student", RUN_FILES, job("finetune_dc", **FINETUNE, finetune__init_from="{unit}"), of_training),
    ),
    "results.jsonl": (
        Target(
            "test-dc",
            ("re*.jsonl", "*.json", "DONE"),
            job("export", export__checkpoint="{fixture}/dc", export__results="{unit}"),
            of_export,
        ),
        Target(
            "labels",
            ("re*.jsonl", "*.json", "DONE"),
            job("finetune_icner", **STUDENT, finetune__labels="{unit}"),
            of_training,
        ),
        Target("icner", ("dev.json",), job("export", export__checkpoint="{unit}", export__int8="True"), of_export),
    ),
    "exported models": (
        Target("served-dc", ("*.json", "*.safetensors"), predict_with("{unit}", "{fixture}/text/en.txt"), of_predict),
        Target(
            "served-icner", ("*.json", "*.safetensors"), predict_with("{unit}", "{fixture}/text/de.txt"), of_predict
        ),
    ),
}


@dataclass(frozen=True)
class Case:
    """One damaged input, and how its command ended."""

    number: int
    kind: str
    outcome: str
    change: str
    said: str = ""
    repaired: bool = False  # whether the same command was run again on the undamaged input

    def to_json(self) -> str:
        return json.dumps(self.__dict__, ensure_ascii=True)


@dataclass
class Harness:
    """Runs cases in `folder`, with the fixture that it makes there."""

    folder: pathlib.Path
    worker: Worker
    seed: int
    references: dict[tuple[str, int], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fixture = self.folder / "fixture"
        if not (self.fixture / "WHOLE").is_file():
            shutil.rmtree(self.fixture, ignore_errors=True)
            Fixture(self.fixture, self.worker).make()
            (self.fixture / "WHOLE").touch()

    def case(self, number: int, kind: str) -> Case:
        """Case `number` of a kind; a function of (seed, kind, number)."""
        rng = np.random.default_rng([self.seed, list(KINDS).index(kind), number])
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        found = self._override(number, rng, place) if not KINDS[kind] else self._damaged(number, kind, rng, place)
        shutil.rmtree(place, ignore_errors=True)
        return found

    def _damaged(self, number: int, kind: str, rng: np.random.Generator, place: pathlib.Path) -> Case:
        which = number % len(KINDS[kind])
        target = KINDS[kind][which]
        # A unique name, since commands cache what they have read by its path.
        unit = self._copy(target, place / f"{self.seed}-{number}")
        workdir = unit if target.in_place else place / "out"
        files = self._files(target, unit)
        file = files[rng.integers(len(files))]
        name = str(file.relative_to(place))
        before = file.read_bytes()
        change = f"{target.unit}: {name.partition('/')[2]}: {mutate(file, files, rng)}"
        reference = self._reference(kind, which)
        ended = self.worker.run(*target.command(self.fixture, unit, workdir))
        done = (workdir / LAST.get(target.result, "DONE")).exists()

        def case(outcome: str, said: str = "", repaired: bool = False) -> Case:
            return Case(number, kind, outcome, change, said or one_line(ended.errors), repaired)

        if ended.code == 0:
            problem = None
            try:
                problem = "" if target.result(workdir) == reference else "changed"
            except Exception as error:  # a partial result, or none
                return case("half-written", f"{type(error).__name__}: {error}")
            if target.content is None or not problem:
                return case(problem or "same")
            return case("other" if self._other_content(target, unit) else problem)
        if failure := failed(ended):
            return case(failure, ended.errors[:2000])
        # A well-formed file with too little content is reported by its config key.
        keys = ("config.nlu", "config.sources.generic") if target.content is not None else ()
        if not names(ended.errors, (str(unit), *keys)):
            return case("unnamed")
        if done:
            return case("half-written", "DONE after an error")
        if number % 3:
            return case("refused")
        # With the undamaged file back in place, the same command must succeed, whatever the failed one left.
        if file.is_dir():
            file.rmdir()
        file.unlink(missing_ok=True)
        file.write_bytes(before)
        again = self.worker.run(*target.command(self.fixture, unit, workdir))
        if again.code != 0:
            return case("half-written", f"on the undamaged file: {one_line(again.errors)}", True)
        if target.result(workdir) != reference:
            return case("half-written", "another result on the undamaged file", True)
        return case("refused", repaired=True)

    def _files(self, target: Target, unit: pathlib.Path) -> list[pathlib.Path]:
        if unit.is_file():
            return [unit]
        return sorted(file for pattern in target.files for file in unit.glob(pattern) if file.is_file())

    def _copy(self, target: Target, place: pathlib.Path) -> pathlib.Path:
        source, unit = self.fixture / target.unit, place / target.unit
        place.mkdir(parents=True)
        if source.is_file():
            os.link(source, unit)
        else:  # a run resumes in its own directory, whose files may be written to
            shutil.copytree(source, unit, copy_function=shutil.copy2 if target.in_place else os.link)
        return unit

    def _reference(self, kind: str, which: int) -> Any:
        if (kind, which) not in self.references:
            target, place = KINDS[kind][which], self.folder / "reference"
            shutil.rmtree(place, ignore_errors=True)
            unit = self._copy(target, place / "unit")
            workdir = unit if target.in_place else place / "out"
            name, arguments = target.command(self.fixture, unit, workdir)
            ended = self.worker.run(name, arguments, limit=300.0)
            assert ended.code == 0, f"{name} {' '.join(arguments)}\n{ended.errors}"
            self.references[kind, which] = target.result(workdir)
        return self.references[kind, which]

    def _other_content(self, target: Target, unit: pathlib.Path) -> bool:
        """Whether an independent reader can read the file, and finds different content in it."""
        assert target.content is not None
        try:
            # As text, since NaN is not equal to itself.
            return repr(target.content(unit)) != repr(target.content(self.fixture / target.unit))
        except Exception:
            return False

    def _override(self, number: int, rng: np.random.Generator, place: pathlib.Path) -> Case:
        commands = list(OVERRIDDEN)
        name = commands[number % len(commands)]
        values = flat(base.get_config().to_dict())
        keys = sorted(key for key in values if key.split(".")[0] in OVERRIDDEN[name])
        key = keys[rng.integers(len(keys))]
        value = bad_value(values[key], rng)
        if key.rpartition(".")[2] in LONG and not isinstance(value, str):
            value = -abs(value)
        if rng.random() < 0.1:
            key = f"{key}x" if rng.random() < 0.5 else key.rpartition(".")[0] or "none"
        value = str(value).encode("utf-8", "replace").decode().replace("\0", "")
        workdir = place / "out"
        command = job(name, **(TEACHER if name == "distill" else {}), **(FINETUNE if name == "finetune_dc" else {}))
        if name == "prepare":
            command = prepare_with()
        _, arguments = command(self.fixture, self.fixture, workdir)
        ended = self.worker.run(name, [*arguments, f"--config.{key}={value}"])
        change = f"{name} --config.{key}={value}"

        def case(outcome: str, said: str = "") -> Case:
            return Case(number, "config overrides", outcome, change, said or one_line(ended.errors))

        if ended.code == 0:
            return case("other")
        if failure := failed(ended):
            return case(failure, ended.errors[:2000])
        # A learning rate of 1e308 is known to be too large once a loss is not finite.
        if not names(ended.errors, (key, "config." + key.partition(".")[0], "is not a finite number")):
            return case("unnamed")
        return case("half-written" if (workdir / "DONE").exists() else "refused")


# Commands, and the config blocks from which their overrides are drawn.
OVERRIDDEN = {
    "prepare": ("nlu", "sources", "tokenizer", "rows", "select"),
    "pretrain": ("transfer", "masking", "teacher", "pretrain", "seed", "compute_dtype", "mesh", "watchdog_seconds"),
    "distill": ("student", "vocabulary", "distill", "sharding", "seed", "teacher_checkpoint", "teacher_cache"),
    "finetune_dc": ("finetune", "student", "prepared", "vocabulary"),
}
# Keys for the amount of work: a huge number is not an error, and only takes long.
LONG = ("steps", "epochs", "max_texts", "num_layers", "evaluate_rows", "slices")


def bad_value(default: Any, rng: np.random.Generator) -> Any:
    """A value for a key with that default: of another type, or of its own type, and huge, negative or unusual."""
    if rng.random() < 0.3:
        return (of_pool("values", rng), of_pool("texts", rng), "nan", "inf")[rng.integers(4)]
    if isinstance(default, bool):
        return ("maybe", "2", "", "None")[rng.integers(4)]
    if isinstance(default, int | float):
        return (*HUGE, 0, -1, 1, 0.5, 7, 1e-30, "nan", "-inf")[rng.integers(len(HUGE) + 8)]
    text = str(of_pool("texts", rng))
    return (text, "/nowhere/" + text, "../..", "", "," + text, "('a',)", "[1, 2]")[rng.integers(7)]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's values by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def failed(ended: Ended) -> str:
    """The failure indicated by an exit code other than 0; "" for a one-sentence error."""
    if ended.code is None:
        return "hung"
    if ended.code < 0:
        return "died"
    if ended.code != 2 or "Traceback (most recent call last)" in ended.errors:
        return "traceback"
    return ""


def names(errors: str, wanted: Sequence[str]) -> bool:
    """Whether there is exactly one line that begins with "error:", and it names one of `wanted`."""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    text = errors[errors.find("error: ") :]
    return len(lines) == 1 and any(name in text for name in wanted)


def one_line(errors: str) -> str:
    """The sentence or the last line of a traceback."""
    lines = [line for line in errors.splitlines() if line.strip()]
    chosen = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "")
    return chosen[:400]


def plan(count: int, kinds: Sequence[str]) -> list[tuple[int, str]]:
    """(number, kind) of that many cases, all kinds in turn."""
    return [(case // len(kinds), kinds[case % len(kinds)]) for case in range(count)]


def run(
    folder: pathlib.Path, cases: Sequence[tuple[int, str]], seed: int, resume: pathlib.Path | None = None
) -> list[Case]:
    """Runs the cases except those already in `resume`; appends one line to it for each."""
    found: dict[tuple[int, str], Case] = {}
    if resume is not None and resume.is_file():
        for line in resume.read_text().splitlines():
            one = Case(**json.loads(line))
            found[one.number, one.kind] = one
    with Worker(folder / "compiled") as worker:
        harness = Harness(folder, worker, seed)
        for number, kind in cases:
            if (number, kind) not in found:
                found[number, kind] = harness.case(number, kind)
                if resume is not None:
                    with open(resume, "a", encoding="utf-8") as file:
                        file.write(found[number, kind].to_json() + "\n")
    return [found[one] for one in cases]


def table(cases: Sequence[Case]) -> str:
    """Kinds and outcomes, with the failures last."""
    counts = Counter((one.kind, one.outcome) for one in cases)
    bad = [name for name in BAD if any(one.outcome == name for one in cases)]
    rows = [["kind", "cases", *GOOD, "repeated", *bad]]
    for kind in [kind for kind in KINDS if any(one.kind == kind for one in cases)] + ["all"]:
        of_kind = [one for one in cases if kind in (one.kind, "all")]
        values = [
            sum(count for (name, outcome), count in counts.items() if outcome == column and kind in (name, "all"))
            for column in (*GOOD, *bad)
        ]
        again = sum(one.repaired for one in of_kind)
        rows.append([kind, str(len(of_kind)), *map(str, values[:3]), str(again), *map(str, values[3:])])
    return aligned_table(rows[0], rows[1:])


def report(cases: Sequence[Case], seed: int) -> str:
    """The table, and below it every failure with the command that repeats it."""
    lines = [table(cases)]
    for one in cases:
        if one.outcome not in GOOD:
            again = f'python -m tests.faults.inputs --seed={seed} --kind="{one.kind}" --case={one.number}'
            lines.append(f"{one.outcome}: {one.change}\n  {one.said}\n  {again}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=tuple(KINDS))
    parser.add_argument("--case", type=int, help="one case of one kind, by its number")
    parser.add_argument(
        "--resume", type=pathlib.Path, help="a file that gets a line for each case; those there are left out"
    )
    parser.add_argument("--folder", type=pathlib.Path, help="keeps the fixture in this folder for the next call")
    given = parser.parse_args()
    kinds = given.kind or list(KINDS)
    cases = plan(given.count, kinds) if given.case is None else [(given.case, kind) for kind in kinds]
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.folder or pathlib.Path(folder), cases, given.seed, given.resume)
    print(report(found, given.seed))
    return int(any(one.outcome not in GOOD for one in found))


if __name__ == "__main__":
    sys.exit(main())
