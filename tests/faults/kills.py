"""Kills every command at random moments, starts it again, and compares its end with that of a run nobody killed.

python -m tests.faults.kills --count=1000 --workdir=DIR [--seed=0] [--workers=2] [--commands=prepare,distill]
    [--case=N]          repeats one case alone and keeps its folder
    [--signal=KILL]     TERM: asks to stop (exit 75); STOP: stops for --seconds, then lets it go on

A case is one command in a fresh folder: it is started and killed until a start gets to its end (at most 4 kills, 30 of
a study). What it leaves must then be, file by file, what an undisturbed run leaves, and none of its processes may live.
The same command again goes on where DIR/cases.jsonl ends. A kill comes
    at a time       after a random share of the time that an undisturbed run takes,
    in a write      0 to 5 ms after a random one of the writes begins,
    at a change     exactly before a random one of the changes that Python makes to files below the folder.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time

from kd_jax.text_tables import aligned_table
from tests.faults import forks, tiny

FILE = "cases.jsonl"
LIMIT = 600.0  # seconds that a start may take; the machine may be busy


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, the runs of others that it reads, and how often and how hard it is tried."""

    name: str
    module: str
    flags: tuple[str, ...] = ()
    weight: int = 2
    most_kills: int = 4
    share: float = 1.0  # of the undisturbed time after which a kill comes at the latest


PREPARED, TEACHER = "--config.prepared={prepare}", "--config.teacher_checkpoint={pretrain}"
STUDENT = "--config.finetune.init_from={distill}"
COMMANDS = (
    Command("prepare", "prepare", weight=4),
    Command("pretrain", "pretrain", (PREPARED,)),
    Command("cache_teacher", "cache_teacher", (PREPARED, TEACHER), weight=3),
    Command("cache_states", "cache_states", (PREPARED, TEACHER), weight=3),
    Command("distill", "distill", (PREPARED, TEACHER, "--config.teacher_cache={cache_teacher}"), weight=4),
    Command("finetune_dc", "finetune_dc", (PREPARED, STUDENT), weight=3),
    Command("finetune_icner", "finetune_icner", (PREPARED, STUDENT, "--config.finetune.domain=each")),
    Command("evaluate", "evaluate", (PREPARED, "--config.evaluate.checkpoint={finetune_dc}")),
    Command("export", "export", ("--config.export.checkpoint={finetune_dc}", "--config.export.stablehlo=True")),
    Command("study", "study", weight=1, most_kills=30, share=0.25),
)
NAMES = tuple(one.name for one in COMMANDS)


class Bench:
    """The data, the undisturbed runs, and the cache of compiled programs, in one folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._data = [
            f"--config.nlu.path={folder}/data",
            f"--config.sources.generic.path={folder}/data/{{language}}.txt",
        ]
        self._tiny = str(pathlib.Path(tiny.__file__).resolve())

    def run_of(self, name: str) -> pathlib.Path:
        """The undisturbed run of a command."""
        return self.folder / "reference" / name / "run"

    def arguments(self, command: Command) -> list[str]:
        runs = {name: self.run_of(name) for name in NAMES}
        return [
            f"kd_jax.main.{command.module}",
            f"--config={self._tiny}",
            *self._data,
            *(flag.format(**runs) for flag in command.flags),
            "--workdir=run",  # relative, so that every run's files name the same folder
        ]

    def prepare(self, wanted: tuple[str, ...]) -> dict[str, dict]:
        """Runs what is missing; returns for each wanted command what it leaves, seconds, writes and changes."""
        if not (self.folder / "data").is_dir():
            shutil.rmtree(self.folder / "data.new", ignore_errors=True)
            tiny.write_data(self.folder / "data.new")
            os.rename(self.folder / "data.new", self.folder / "data")
        found = {}
        for command in needed(wanted):
            file = self.folder / "reference" / f"{command.name}.json"
            if not file.is_file():
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(self._reference(command)))
            found[command.name] = json.loads(file.read_text())
        return found

    def _reference(self, command: Command) -> dict:
        """Runs the command twice, since the first run compiles; both must leave the same."""
        contents, values = [], {}
        for name in (f"{command.name}.first", command.name):
            case = self.run_of(name).parent
            for one in (case, case.with_name(f"{name}.tmp")):
                shutil.rmtree(one, ignore_errors=True)
            board, began = forks.Board(), time.monotonic()
            log = case.with_name(f"{name}.log")
            one = forks.start(self.arguments(command), case, log, board)
            if code := one.wait(LIMIT):
                sys.exit(f"{command.name} undisturbed ends with {code}:\n{log.read_text()}")
            values = {"seconds": time.monotonic() - began, "writes": board.writes, "operations": board.operations}
            contents.append(forks.in_fork(lambda case=case: forks.contents(case)))
        if lines := forks.differences(*contents):
            sys.exit(f"two undisturbed runs of {command.name} differ:\n" + "\n".join(lines))
        return {**values, "contents": contents[0]}


def needed(wanted: tuple[str, ...]) -> list[Command]:
    """These commands and those whose runs they read, in the order of COMMANDS."""
    names = set(wanted)
    for command in reversed(COMMANDS):
        if command.name in names:
            names |= {name for name in NAMES for flag in command.flags if f"{{{name}}}" in flag}
    return [command for command in COMMANDS if command.name in names]


def chosen(case: int, commands: list[Command]) -> Command:
    """The command of a case: each in turn, as often as its weight says."""
    turns = [one for turn in range(max(one.weight for one in commands)) for one in commands if turn < one.weight]
    return turns[case % len(turns)]


def run_case(bench: Bench, command: Command, reference: dict, case: int, seed: int, folder: pathlib.Path) -> dict:
    """Kills a command until a start ends by itself; returns the record of the case. A folder without problem is removed."""
    chance = random.Random(f"{seed} {case}")
    log, board = folder.with_name(f"{folder.name}.log"), forks.Board()
    temporary = folder.with_name(f"{folder.name}.tmp")
    for one in (folder, temporary):
        shutil.rmtree(one, ignore_errors=True)
    log.unlink(missing_ok=True)
    arguments, kills, problems = bench.arguments(command), [], []
    while True:
        kill = planned(chance, command, reference) if len(kills) < command.most_kills else {"kind": "none"}
        began = time.monotonic()
        one = forks.start(
            arguments, folder, log, board, tell_at=kill.get("write", 0), die_at=kill.get("change", 0)
        )
        code = ended(one, kill)
        problems += orphans()
        if code != -signal.SIGKILL:
            if code:
                problems.append(f"exit code {code} after {len(kills)} kills: {_last_line(log)}")
            break
        leftover = half_written(folder)
        hit = {"phase": board.phase, "writing": board.writing, "left": leftover}
        kills.append({**kill, **hit, "seconds": round(time.monotonic() - began, 3)})
    found = forks.in_fork(lambda: forks.contents(folder))
    if not problems:
        problems += forks.differences(reference["contents"], found)
        problems += [f"stray: {one.name} in the temporary folder" for one in temporary.iterdir()]
    record = {"case": case, "command": command.name, "kills": kills, "problems": problems[:20]}
    if not problems:
        for one in (folder, temporary):
            shutil.rmtree(one)
        log.unlink()
    return record


def planned(chance: random.Random, command: Command, reference: dict) -> dict:
    """When the next kill comes."""
    kind = chance.choices(("time", "write", "change"), (45, 35, 20))[0]
    if kind == "time":
        return {"kind": kind, "after": chance.uniform(0.0, command.share * reference["seconds"])}
    counted = {"write": reference["writes"], "change": reference["operations"]}[kind]
    number = chance.randint(1, max(round(command.share * counted), 1))
    more = {"after": 5e-3 * chance.random() ** 3} if kind == "write" else {}
    return {"kind": kind, kind: number, **more}


def ended(one: forks.Start, kill: dict) -> int:
    """Kills the start as planned, unless it ends before; its exit code."""
    code = None
    if kill["kind"] == "time":
        code = one.wait(kill["after"])
    elif kill["kind"] == "write":
        if one.write_begins(LIMIT):
            time.sleep(kill["after"])
        else:
            code = one.wait(LIMIT)
    else:
        code = one.wait(LIMIT)
    if code is None:
        os.kill(one.pid, signal.SIGKILL)
        code = one.wait(LIMIT)
    assert code is not None
    return code


def half_written(folder: pathlib.Path) -> list[str]:
    """The kinds of temporary files and folders that a kill left."""
    kinds = {".partial": "folder", "orbax-checkpoint-tmp": "checkpoint", ".tmp": "file"}
    names = [name for _, folders, names in os.walk(folder) for name in (*folders, *names)]
    return sorted({kind for part, kind in kinds.items() for name in names if part in name})


def orphans(seconds: float = 10.0) -> list[str]:
    """Children of this process that live on after the command; they are then killed."""
    until = time.monotonic() + seconds
    while True:
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                return []
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    found = forks.children()
    names = [pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200] for pid in found]
    for pid in found:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [f"orphan: {name}" for name in names]


def _last_line(log: pathlib.Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1][:300]


def records(workdir: pathlib.Path) -> list[dict]:
    """The finished cases."""
    file = workdir / FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # this script was killed while it wrote the line
            continue
    return found


def work(bench: Bench, workdir: pathlib.Path, options: argparse.Namespace, references: dict, worker: int) -> None:
    """Every --workers-th case until there are enough kills."""
    forks.adopt_orphans()
    commands = [one for one in COMMANDS if one.name in options.commands]
    done, case = {one["case"] for one in records(workdir)}, worker
    while sum(len(one["kills"]) for one in records(workdir)) < options.count:
        if case not in done:
            command = chosen(case, commands)
            folder = workdir / f"case-{case}"
            record = run_case(bench, command, references[command.name], case, options.seed, folder)
            with open(workdir / FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if record["problems"]:
                print(f"case {case}, {command.name}: {record['problems'][0]}", flush=True)
        case += options.workers


def report(found: list[dict]) -> str:
    """The table of what was hit, and the cases that failed."""
    kills = [(one["command"], kill) for one in found for kill in one["kills"]]
    rows = []
    for name in (*NAMES, "all"):
        mine = [kill for command, kill in kills if name in (command, "all")]
        cases = [one for one in found if name in (one["command"], "all")]
        if cases:
            share = sum(bool(kill["writing"]) for kill in mine) / max(len(mine), 1)
            failed = sum(bool(one["problems"]) for one in cases)
            rows.append((name, str(len(mine)), f"{share:.0%}", str(len(cases)), str(failed)))
    lines = [aligned_table(("command", "kills", "in a write", "runs", "failed"), rows)]
    writes = collections.Counter(kill["writing"][0] for _, kill in kills if kill["writing"])
    phases = collections.Counter(short(kill["phase"]) for _, kill in kills)
    for title, counts in (("in a write", writes), ("during", phases)):
        lines += ["", aligned_table((title, "kills"), [(name, str(count)) for name, count in counts.most_common()])]
    for one in found:
        if one["problems"]:
            lines.append(f"case {one['case']} ({one['command']}): {'; '.join(one['problems'][:3])}")
    return "\n".join(lines)


def short(phase: str) -> str:
    """A phase without what comes after its first comma, and without numbers."""
    return " ".join(phase.partition(",")[0].split()) or "the start"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="kills in total")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--commands", type=lambda text: tuple(text.split(",")), default=NAMES)
    parser.add_argument("--case", type=int, help="only this one, whose folder is kept")
    options = parser.parse_args()
    workdir = options.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    bench = Bench(workdir)
    forks.keep_programs_in(workdir / "programs")
    references = bench.prepare(options.commands)
    if options.case is not None:
        forks.adopt_orphans()
        command = chosen(options.case, [one for one in COMMANDS if one.name in options.commands])
        folder = workdir / f"again-{options.case}"
        print(json.dumps(run_case(bench, command, references[command.name], options.case, options.seed, folder)))
        return
    began, before = time.monotonic(), sum(len(one["kills"]) for one in records(workdir))
    workers = []
    for worker in range(options.workers):
        if pid := os.fork():
            workers.append(pid)
            continue
        code = 1
        try:
            work(bench, workdir, options, references, worker)
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
    found = records(workdir)
    print(report(found))
    count = sum(len(one["kills"]) for one in found)
    print(f"{count} kills, {count - before} of them in {time.monotonic() - began:.0f} s")
    sys.exit(1 if any(codes) or any(one["problems"] for one in found) else 0)


if __name__ == "__main__":
    main()
