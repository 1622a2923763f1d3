"""Peak memory of commands on a text and on ten times the text, and the resources that a study of many students holds.

python -m tests.faults.resources --workdir=DIR [--texts=5000] [--utterances=500] [--only=text|study] [--seeds=1,10]

Each command runs in its own process on two data sets, one of which has ten times the generic text and ten times the
labeled utterances of the other, with the same model, batches and steps. Compiled programs come from a cache that an
earlier run on the same data has filled, since compiling takes more memory than these models. A study of one distilled
student, one trained by MLM alone and one from scratch for each seed runs in one process, which counts what it holds
after each stage.
"""

import argparse
import json
import os
import pathlib
import shutil
import sys

from kd_jax.text_tables import aligned_table
from tests.faults import forks, tiny
from tests.faults.kills import PREPARED, STUDENT, TEACHER

TIMES = 10
LIMIT = 3600.0

# Name, module, its flags; the runs that they name are those of the same data.
COMMANDS = (
    ("prepare", "prepare", ()),
    ("pretrain", "pretrain", (PREPARED,)),
    ("cache_teacher", "cache_teacher", (PREPARED, TEACHER)),
    ("cache_states", "cache_states", (PREPARED, TEACHER)),
    ("distill", "distill", (PREPARED, TEACHER)),
    (
        *("distill_states", "distill"),
        (
            *(PREPARED, TEACHER, "--config.teacher_cache={cache_states}", "--config.distill.clean=True"),
            *("--config.distill.kl.weight=0", "--config.distill.mlm.weight=0", "--config.distill.hidden.weight=1"),
            "--config.distill.hidden.layers=last",
        ),
    ),
    ("finetune_dc", "finetune_dc", (PREPARED, STUDENT)),
    ("evaluate", "evaluate", (PREPARED, "--config.evaluate.checkpoint={finetune_dc}")),
    ("predict", "predict", ("--model={finetune_dc}", "--input={data}/en.txt", "--output=predictions.jsonl")),
)
CONFIG = (
    f"--config={pathlib.Path(tiny.__file__).resolve()}",
    *("--config.rows.length=64", "--config.states.rows_per_part=64", "--config.cache.rows_per_part=64"),
    "--config.nlu.path={data}",
    "--config.sources.generic.path={data}/{{language}}.txt",
)


def peak_of(arguments: list[str], folder: pathlib.Path) -> float:
    """The peak resident memory, in MiB, of `python -m MODULE ARGUMENTS` in its own process."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    pid = os.fork()
    if not pid:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(folder)
        os.execv(sys.executable, [sys.executable, "-m", *arguments])
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{' '.join(arguments)} ends with {os.waitstatus_to_exitcode(status)}:\n{log.read_text()}")
    return usage.ru_maxrss / 1024


def compare(workdir: pathlib.Path, texts: int, utterances: int) -> list[tuple[str, float, float]]:
    """(command, MiB on the text, MiB on ten times the text) for each command."""
    peaks: dict[str, list[float]] = {name: [] for name, *_ in COMMANDS}
    # Each first run fills the cache: with more text a row can hold more texts, which is another program.
    for size, times in (("once", 1), ("once again", 1), ("ten", TIMES), ("ten again", TIMES)):
        base = workdir / size.replace(" ", "_")
        shutil.rmtree(base, ignore_errors=True)
        tiny.write_data(base / "data", texts * times, utterances * times, held_out=utterances * times // 4)
        runs = {name: f"{base / name}/run" for name, *_ in COMMANDS}
        for name, module, flags in COMMANDS:
            known = {"data": base / "data", **runs}
            config = () if module == "predict" else (*CONFIG, "--workdir=run")
            peak = peak_of([f"kd_jax.main.{module}", *(one.format(**known) for one in (*config, *flags))], base / name)
            print(f"{size} {name}: {peak:.0f} MiB", file=sys.stderr, flush=True)
            if size.endswith("again"):
                peaks[name].append(peak)
    return [(name, one, ten) for name, (one, ten) in peaks.items()]


def held() -> dict[str, float]:
    """What this process holds: open files, threads, children, resident MiB."""
    status = pathlib.Path("/proc/self/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]
    counts = {name: len(os.listdir(f"/proc/self/{folder}")) for name, folder in (("files", "fd"), ("threads", "task"))}
    return {**counts, "children": len(forks.children()), "MiB": int(resident) / 1024}


def study(workdir: pathlib.Path, seeds: int) -> dict:
    """Runs a study with that many seeds in a fork; returns what it held after each stage, and its disk usage."""
    folder = workdir / f"study-{seeds}"
    shutil.rmtree(folder, ignore_errors=True)
    data = workdir / "study-data"
    if not data.is_dir():
        tiny.write_data(data)
    notes = workdir / f"study-{seeds}.jsonl"
    notes.unlink(missing_ok=True)
    seen = f"({','.join(str(seed) for seed in range(seeds))},)"
    arguments = [*(flag.format(data=data) for flag in CONFIG[:1] + CONFIG[-2:]), f"--config.study.seeds={seen}"]

    def watch() -> None:
        from kd_jax.study.run import Study

        run_one = Study.run_one

        def noting(self, stage, title, outputs=None):
            ran = run_one(self, stage, title, outputs)
            with open(notes, "a") as file:
                file.write(json.dumps({"stage": stage.name, **held()}) + "\n")
            return ran

        Study.run_one = noting

    log = workdir / f"study-{seeds}.log"
    log.unlink(missing_ok=True)
    one = forks.start(["kd_jax.main.study", *arguments, "--workdir=run"], folder, log, forks.Board(), before=watch)
    if code := one.wait(LIMIT):
        sys.exit(f"a study with {seeds} seeds ends with {code}:\n{log.read_text()}")
    stages = list((folder / "run/stages").iterdir())
    sizes = {path.name: sum(one.stat().st_size for one in path.rglob("*") if one.is_file()) for path in stages}
    saved = {path.name: len(list((path / "checkpoints").glob("[0-9]*"))) for path in stages}
    lines = [json.loads(line) for line in notes.read_text().splitlines()]
    return {"seeds": seeds, "stages": lines, "bytes": sizes, "checkpoints": saved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--texts", type=int, default=5000, help="generic texts of each language, and ten times that")
    parser.add_argument("--utterances", type=int, default=500, help="train utterances of each locale, likewise")
    parser.add_argument("--only", choices=("text", "study"))
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[1, 10])
    options = parser.parse_args()
    workdir = options.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    forks.keep_programs_in(workdir / "programs")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(workdir / "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["PYTHONPATH"] = os.getcwd()
    found: dict = {}
    if options.only != "study":
        found["memory"] = compare(workdir, options.texts, options.utterances)
        rows = [(name, f"{one:.0f}", f"{ten:.0f}", f"{ten / one:.2f}") for name, one, ten in found["memory"]]
        print(aligned_table(("command", "MiB", f"{TIMES} times the text", "ratio"), rows))
    if options.only != "text":
        found["study"] = [study(workdir, seeds) for seeds in options.seeds]
        rows = []
        for one in found["study"]:
            last, most = one["stages"][-1], max(one["checkpoints"].values())
            counts = (len(one["stages"]), last["files"], last["threads"], last["children"], round(last["MiB"]))
            size = sum(one["bytes"].values()) / 2**20
            rows.append((str(3 * one["seeds"]), *map(str, counts), f"{size:.1f}", str(most)))
        header = ("students", "stages", "open files", "threads", "children", "MiB", "disk MiB", "checkpoints a stage")
        print(aligned_table(header, rows))
    (workdir / "resources.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
