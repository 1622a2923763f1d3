"""Kills every command at random moments, starts it again, and compares the result with that of an undisturbed run.

python -m tests.faults.kills --count=1000 --workdir=DIR [--seed=0] [--workers=2] [--commands=prepare,distill]
    [--case=N]      repeats one case alone and keeps its folder
    [--fault=kill]  kill    SIGKILL
                    term    SIGTERM: it ends with 75, and the same command resumes
                    stop    SIGSTOP for --seconds, with a watchdog that would end the command sooner; meanwhile a
                            second start of it is refused
                    clock   the wall clock jumps by a day, forward or back, up to three times
                    store   workdir and inputs are on a store where one operation in ten is slow, and one in ten
                            fails, then ever fewer until a start succeeds; each one that does not ends with 2 and one
                            sentence

A case is one command in a fresh folder: it is started and disturbed until a start succeeds (after at most 6 kills, 40
for a study). Its files must then equal those of an undisturbed run, and none of its processes may be alive. The same
command resumes where DIR/FAULT.jsonl ends. A kill comes
    at a time       after a random share of the time that an undisturbed run takes,
    in a write      0 to 5 ms after the start of a random write,
    at a change     just before a random change that Python makes to files below the folder.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from kd_jax.runtime import copies
from kd_jax.text_tables import aligned_table
from tests.faults import forks, tiny
from tests.support import fake_store

LIMIT = 1200.0  # seconds that a start may take; the machine may be busy
DAY = 86400.0


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, the runs of others that it reads, and how often it is tried.

    share: of the undisturbed time, by which a kill comes at the latest.
    """

    name: str
    flags: tuple[str, ...] = ()
    weight: int = 2
    most_kills: int = 6
    share: float = 1.0


PREPARED, TEACHER = "--config.prepared={prepare}", "--config.teacher_checkpoint={pretrain}"
STUDENT = "--config.finetune.init_from={distill}"
COMMANDS = (
    Command("prepare", weight=4),
    Command("pretrain", (PREPARED,)),
    Command("cache_teacher", (PREPARED, TEACHER), weight=3),
    Command("cache_states", (PREPARED, TEACHER), weight=3),
    Command("distill", (PREPARED, TEACHER, "--config.teacher_cache={cache_teacher}"), weight=4),
    Command("finetune_dc", (PREPARED, STUDENT), weight=3),
    Command("finetune_icner", (PREPARED, STUDENT, "--config.finetune.domain=each")),
    Command("evaluate", (PREPARED, "--config.evaluate.checkpoint={finetune_dc}")),
    Command("export", ("--config.export.checkpoint={finetune_dc}", "--config.export.stablehlo=True")),
    Command("study", weight=1, most_kills=40, share=0.25),
)
NAMES = tuple(one.name for one in COMMANDS)
NOT_ON_A_STORE = ("finetune_icner", "export", "study")


class Bench:
    """The data, the undisturbed runs, and the cache of compiled programs, in one folder.

    store: the runs are on a store, s3://bucket/NAME.
    """

    def __init__(self, folder: pathlib.Path, *, store: bool = False):
        self.folder, self.store = folder, store
        self.references = folder / ("on-a-store" if store else "reference")

    def case_of(self, name: str) -> pathlib.Path:
        """The folder of the undisturbed run of a command."""
        return self.references / (f"{name}-case" if self.store else name)

    def arguments(self, command: Command, more: tuple[str, ...] = ()) -> list[str]:
        runs = {name: f"s3://bucket/{name}" if self.store else f"{self.case_of(name)}/run" for name in NAMES}
        return [
            f"kd_jax.main.{command.name}",
            f"--config={pathlib.Path(tiny.__file__).resolve()}",
            f"--config.nlu.path={self.folder}/data",
            f"--config.sources.generic.path={self.folder}/data/{{language}}.txt",
            *(flag.format(**runs) for flag in command.flags),
            *more,
            # Relative, so that the files of all runs contain the same folder name.
            f"--workdir={runs[command.name] if self.store else 'run'}",
        ]

    def left(self, case: pathlib.Path, name: str) -> dict[str, str]:
        """The files that the run in the folder of a case left."""
        return forks.in_fork(lambda: forks.contents(case / "store/buckets/bucket" / name if self.store else case))

    def changed(self, command: Command, reference: dict) -> list[str]:
        """What has changed by now in the undisturbed run."""
        return forks.differences(reference["contents"], self.left(self.case_of(command.name), command.name))

    def buckets(self, case: pathlib.Path, command: Command, faults: Callable[[], None]) -> Callable[[], None]:
        """Sets up a child that works on the store: its own bucket, with the runs that the command reads."""

        def install() -> None:
            bucket = case / "store/buckets/bucket"
            bucket.mkdir(parents=True, exist_ok=True)
            for one in needed((command.name,)):
                if one is not command and not (bucket / one.name).exists():
                    (bucket / one.name).symlink_to(self.case_of(one.name) / "store/buckets/bucket" / one.name)
            copies.keep_copies_in("")
            os.environ["KD_JAX_CACHE"] = str(case / "local")
            fake_store.install(case / "store", faults)

        return install if self.store else lambda: None

    def prepare(self, wanted: tuple[str, ...]) -> dict[str, dict]:
        """Runs what is missing; returns for each command its files, seconds, writes and changes."""
        if not (self.folder / "data").is_dir():
            shutil.rmtree(self.folder / "data.new", ignore_errors=True)
            tiny.write_data(self.folder / "data.new")
            os.rename(self.folder / "data.new", self.folder / "data")
        self.references.mkdir(exist_ok=True)
        found = {}
        for command in needed(wanted):
            file = self.references / f"{command.name}.json"
            if not file.is_file():
                file.write_text(json.dumps(self._reference(command)))
            found[command.name] = json.loads(file.read_text())
        return found

    def _reference(self, command: Command) -> dict:
        """Runs the command twice, since the first run compiles; both must leave the same files."""
        contents, values = [], {}
        for _ in range(2):
            case = self.case_of(command.name)
            log = case.with_name(f"{case.name}.log")
            clear(case)
            board, began = forks.Board(), time.monotonic()
            before = self.buckets(case, command, lambda: None)
            if code := forks.start(self.arguments(command), case, log, board, before=before).wait(LIMIT):
                sys.exit(f"{command.name} undisturbed ends with {code}:\n{log.read_text()}")
            values = {"seconds": time.monotonic() - began, "writes": board.writes, "operations": board.operations}
            contents.append(self.left(case, command.name))
        if lines := forks.differences(*contents):
            sys.exit(f"two undisturbed runs of {command.name} differ:\n" + "\n".join(lines))
        return {**values, "contents": contents[0]}


def temporary_of(case: pathlib.Path) -> pathlib.Path:
    return case.with_name(f"{case.name}.tmp")


def clear(case: pathlib.Path) -> None:
    for one in (case, temporary_of(case)):
        shutil.rmtree(one, ignore_errors=True)


def needed(wanted: tuple[str, ...]) -> list[Command]:
    """These commands and those whose runs they read, in the order of COMMANDS."""
    names = set(wanted)
    for command in reversed(COMMANDS):
        if command.name in names:
            names |= {name for name in NAMES for flag in command.flags if f"{{{name}}}" in flag}
    return [command for command in COMMANDS if command.name in names]


def chosen(case: int, names: tuple[str, ...]) -> Command:
    """The command of a case: each in turn, according to its weight."""
    commands = [one for one in COMMANDS if one.name in names]
    turns = [one for turn in range(max(one.weight for one in commands)) for one in commands if turn < one.weight]
    return turns[case % len(turns)]


class Case:
    """One command in a fresh folder, disturbed until it succeeds."""

    def __init__(
        self, bench: Bench, command: Command, reference: dict, number: int, options: Any, folder: pathlib.Path
    ):
        self.bench, self.command, self.reference, self.number = bench, command, reference, number
        self.folder, self.options = folder, options
        self.log, self.board = folder.with_name(f"{folder.name}.log"), forks.Board()
        self.chance = random.Random(f"{options.seed} {number}")
        self.kills: list[dict] = []
        self.problems: list[str] = []
        clear(folder)
        self.log.unlink(missing_ok=True)

    def run(self, *, keep: bool = False) -> dict:
        """The record of the case; its folder is removed unless there is a problem."""
        getattr(self, f"_{self.options.fault}")()
        self.problems += orphans()
        found = self.bench.left(self.folder, self.command.name)
        lines = forks.differences(self.reference["contents"], found)
        # The latter's command line has the watchdog's keys, which a resume may change.
        allowed = {
            "term": self._follows_from_a_stop,
            "stop": lambda line: line.endswith(("/config.json", "/run.json", "/export.json")),
        }
        self.problems += [line for line in lines if not allowed.get(self.options.fault, lambda line: False)(line)]
        self.problems += [f"stray: {one.name} among temporary files" for one in temporary_of(self.folder).iterdir()]
        if not (self.problems or keep):
            clear(self.folder)
            self.log.unlink()
        names = {"case": self.number, "command": self.command.name}
        return {**names, "kills": self.kills, "problems": self.problems[:20]}

    def _start(self, **how: Any) -> forks.Start:
        how = {"before": self.bench.buckets(self.folder, self.command, lambda: None), **how}
        more = how.pop("more", ())
        return forks.start(self.bench.arguments(self.command, more), self.folder, self.log, self.board, **how)

    def _wrong(self, code: int | None) -> None:
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        self.problems.append(f"exit code {code} after {len(self.kills)} disturbances: {lines[-1][:300]}")
        shutil.copy(self.log, self.log.with_name(f"{self.log.name}.{len(self.kills)}"))

    def _hit(self) -> dict:
        """The phase in which a start was disturbed."""
        return {"phase": self.board.phase, "writing": self.board.writing, "left": half_written(self.folder)}

    def _planned(self) -> dict:
        """When the next kill comes."""
        share = self.command.share
        kind = self.chance.choices(("time", "write", "change"), (35, 40, 25))[0]
        if kind == "time":
            return {"kind": kind, "after": self.chance.uniform(0.0, share * self.reference["seconds"])}
        counted = {"write": self.reference["writes"], "change": self.reference["operations"]}[kind]
        more = {"after": 5e-3 * self.chance.random() ** 3} if kind == "write" else {}
        return {"kind": kind, kind: self.chance.randint(1, max(round(share * counted), 1)), **more}

    def _ended(self, one: forks.Start, kill: dict, by: signal.Signals) -> int | None:
        """Sends the signal as planned, unless the start ends before; returns its exit code."""
        if kill["kind"] == "time":
            code = one.wait(kill["after"])
        elif kill["kind"] == "write" and one.write_begins(LIMIT):
            time.sleep(kill["after"])
            code = None
        else:
            code = one.wait(LIMIT)
        if code is None:
            kill |= {**self._hit(), "caught": one.catches(by)}
            os.kill(one.pid, by)
            code = one.wait(LIMIT)
        return code

    def _kill(self, by: signal.Signals = signal.SIGKILL, expected: tuple[int, ...] = (-signal.SIGKILL,)) -> None:
        while True:
            kill = self._planned() if len(self.kills) < self.command.most_kills else {"kind": "none"}
            began = time.monotonic()
            one = self._start(tell_at=kill.get("write", 0), die_at=kill.get("change", 0), die_by=by)
            code = self._ended(one, kill, by)
            self.problems += orphans()
            if "phase" in kill or code in expected:  # if the start signals itself, the board still shows that moment
                kill = {**kill, **({} if "phase" in kill else self._hit()), "code": code}
                self.kills.append({**kill, "seconds": round(time.monotonic() - began, 3)})
            if code not in expected:
                if code:
                    self._wrong(code)
                return

    def _term(self) -> None:
        # Without a handler, before the work begins, SIGTERM ends the process at once.
        self._kill(signal.SIGTERM, (75, -signal.SIGTERM))
        for kill in self.kills:
            if kill.get("caught") and kill["code"] not in (0, 75):
                self.problems.append(f"SIGTERM killed it during {kill['phase']}")

    def _follows_from_a_stop(self, line: str) -> bool:
        """Whether a line of `differences` follows from a request to stop.

        The stop saves a checkpoint at its own step, so another of the older ones may be kept. Before the last
        evaluation, the next start runs that evaluation and keeps the last checkpoint as it is.
        """
        if kept := re.fullmatch(r"(?:missing|stray|differs): (.*/checkpoints)/(\d+)(?:/.*)?", line):
            steps = [int(one.name) for one in (self.folder / kept[1]).iterdir() if one.name.isdigit()]
            if steps and int(kept[2]) < max(steps):
                return len(steps) <= 2  # keep_checkpoints
        found = re.fullmatch(r"differs: (.*/checkpoints/\d+)/(meta/metadata|state:best.*)", line)
        return (
            found is not None and json.loads((self.folder / found[1] / "meta/metadata").read_text())["evaluation_due"]
        )

    def _stop(self) -> None:
        seconds = self.options.seconds
        more = (f"--config.watchdog_seconds={0.75 * seconds}", "--config.watchdog_exit=True")
        one = self._start(more=more)
        if one.wait(self.chance.uniform(0.1, 1.0) * self.reference["seconds"]) is not None:
            return
        os.kill(one.pid, signal.SIGSTOP)
        self.kills.append({"kind": "time", **self._hit()})
        began = time.monotonic()
        names = {name for _, _, names in os.walk(self.folder / "run") for name in names}
        finished = {"DONE", "manifest.json"} & set(os.listdir(self.folder / "run")) if names else set()
        if ".owner" in names and not finished:
            other = self.log.with_suffix(".second")
            arguments = self.bench.arguments(self.command, more)
            code = forks.start(arguments, self.folder, other, forks.Board()).wait(LIMIT)
            text = other.read_text()
            if code != 2 or not ("has been writing here" in text or "is running it" in text):
                self.problems.append(f"a second start while the first is stopped: exit code {code}, {text[-300:]!r}")
            other.unlink()
            self.kills[-1]["refused"] = True
        time.sleep(max(seconds - (time.monotonic() - began), 0.0))
        os.kill(one.pid, signal.SIGCONT)
        if code := one.wait(LIMIT):
            self._wrong(code)
        self.problems += [f"stray: {name}" for name in os.listdir(self.folder) if name.startswith("stalled")]

    def _clock(self) -> None:
        jumps = [
            (self.chance.uniform(0.0, self.reference["seconds"]), self.chance.choice((-DAY, DAY)))
            for _ in range(self.chance.randint(1, 3))
        ]
        self.kills = [{"kind": "time", "after": after, "jump": by, "phase": "", "writing": []} for after, by in jumps]
        if code := self._start(before=lambda: jump(jumps)).wait(LIMIT):
            self._wrong(code)
        self.problems += impossible_times(self.folder)

    def _store(self) -> None:
        # s3fs and gcsfs retry by themselves; here every failure reaches us. Fewer and fewer, so that a start finally
        # succeeds.
        for attempt in range(40):
            chance, share = random.Random(f"{self.options.seed} {self.number} {attempt}"), 0.1 * 0.75**attempt

            def faults(chance: random.Random = chance, share: float = share) -> None:
                if chance.random() < 0.1:
                    time.sleep(0.05)
                if chance.random() < share:
                    raise ConnectionError("503, slow down")

            self.log.unlink(missing_ok=True)
            code = self._start(before=self.bench.buckets(self.folder, self.command, faults)).wait(LIMIT)
            if code == 0:
                return
            lines = [line for line in self.log.read_text().splitlines() if line.startswith("error: ")]
            if code != 2 or len(lines) != 1 or "s3://" not in lines[0]:
                self._wrong(code)
            self.kills.append({"kind": "store", **self._hit(), "said": (lines or [""])[-1][:100]})


def jump(jumps: list[tuple[float, float]]) -> None:
    """Makes the wall clock of this process jump: (seconds from now, size of the jump in seconds) for each jump."""
    began, clock, clock_ns = time.monotonic(), time.time, time.time_ns

    def shift() -> float:
        return sum(by for after, by in jumps if time.monotonic() - began >= after)

    time.time = lambda: clock() + shift()
    time.time_ns = lambda: clock_ns() + int(shift() * 1e9)

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Jumping":
            return cls.fromtimestamp(time.time(), tz)

    datetime.datetime = Jumping


def impossible_times(folder: pathlib.Path) -> list[str]:
    """Durations below 0 and shares outside 0 to 1, in the files that contain them."""
    found = []

    def look(file: pathlib.Path, values: Any) -> None:
        for name, value in values.items() if isinstance(values, dict) else [("seconds", values)]:
            wrong = isinstance(value, int | float) and (value < 0 or (name.endswith("goodput") and value > 1))
            if wrong and ("seconds" in name or "goodput" in name):
                found.append(f"{file.relative_to(folder)}: {name} is {value}")

    for file in folder.rglob("*"):
        if file.name in ("DONE", "goodput.json", "seconds.json"):
            look(file, json.loads(file.read_text()))
        elif file.name == "metrics.jsonl":
            for line in file.read_text().splitlines():
                look(file, json.loads(line))
    return found


def half_written(folder: pathlib.Path) -> list[str]:
    """The kinds of temporary files and folders that remain."""
    kinds = {".partial": "folder", "orbax-checkpoint-tmp": "checkpoint", ".tmp": "file"}
    names = [name for _, folders, names in os.walk(folder) for name in (*folders, *names)]
    return sorted({kind for part, kind in kinds.items() for name in names if part in name})


def orphans(seconds: float = 20.0) -> list[str]:
    """Kills and returns descendants of this process that outlived the command."""
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not (found := forks.children()):
            return []
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    names = [pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200] for pid in found]
    for pid in found:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [f"orphan: {name}" for name in names]


def records(file: pathlib.Path) -> list[dict]:
    """The finished cases; a line that a kill of this script truncated is skipped."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def work(bench: Bench, file: pathlib.Path, options: argparse.Namespace, references: dict, worker: int) -> None:
    """Runs every --workers-th case until there are enough kills."""
    forks.adopt_orphans()
    done, number = {one["case"] for one in records(file)}, worker
    while sum(len(one["kills"]) for one in records(file)) < options.count:
        if number not in done:
            command = chosen(number, options.commands)
            folder = file.with_name(f"{options.fault}-{number}")
            record = Case(bench, command, references[command.name], number, options, folder).run()
            with open(file, "a", encoding="utf-8") as opened:
                opened.write(json.dumps(record) + "\n")
            if record["problems"]:
                print(f"case {number}, {command.name}: {record['problems'][0]}", flush=True)
        number += options.workers


def report(found: list[dict]) -> str:
    """The tables of what was hit, and the cases that failed."""
    kills = [(one["command"], kill) for one in found for kill in one["kills"]]
    rows = []
    for name in (*NAMES, "all"):
        mine = [kill for command, kill in kills if name in (command, "all")]
        cases = [one for one in found if name in (one["command"], "all")]
        if cases:
            share = sum(bool(kill["writing"]) for kill in mine) / max(len(mine), 1)
            failed = sum(bool(one["problems"]) for one in cases)
            rows.append((name, str(len(mine)), f"{share:.0%}", str(len(cases)), str(failed)))
    lines = [aligned_table(("command", "hits", "in a write", "runs", "failed"), rows)]
    writes = collections.Counter(kill["writing"][0] for _, kill in kills if kill["writing"])
    phases = collections.Counter(short(kill["phase"]) for _, kill in kills)
    for title, counts in (("in a write", writes), ("during", phases)):
        lines += ["", aligned_table((title, "hits"), [(name, str(count)) for name, count in counts.most_common()])]
    for one in found:
        if one["problems"]:
            lines.append(f"case {one['case']} ({one['command']}): {'; '.join(one['problems'][:3])}")
    return "\n".join(lines)


def short(phase: str) -> str:
    """A phase up to its first comma, without numbers."""
    return " ".join(phase.partition(",")[0].split()) or "the start"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="kills, or other disturbances, in total")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--commands", type=lambda text: tuple(text.split(",")), default=NAMES)
    parser.add_argument("--case", type=int, help="only this one, whose folder is kept")
    parser.add_argument("--fault", choices=("kill", "term", "stop", "clock", "store"), default="kill")
    parser.add_argument("--seconds", type=float, default=120.0, help="stop: for so long")
    options = parser.parse_args()
    store = options.fault == "store"
    if store:
        options.commands = tuple(name for name in options.commands if name not in NOT_ON_A_STORE)
    workdir = options.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    forks.keep_programs_in(workdir / "programs")
    bench = Bench(workdir, store=store)
    references = bench.prepare(options.commands)
    if options.case is not None:
        forks.adopt_orphans()
        command, folder = chosen(options.case, options.commands), workdir / f"again-{options.case}"
        case = Case(bench, command, references[command.name], options.case, options, folder)
        print(json.dumps(case.run(keep=True), indent=1))
        return
    file = workdir / f"{options.fault}.jsonl"
    began, before = time.monotonic(), sum(len(one["kills"]) for one in records(file))
    workers = []
    for worker in range(options.workers):
        if pid := os.fork():
            workers.append(pid)
            continue
        code = 1
        try:
            work(bench, file, options, references, worker)
            code = 0
        except BaseException as error:
            print(f"worker {worker}: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
    found = records(file)
    print(report(found))
    changed = [line for one in needed(options.commands) for line in bench.changed(one, references[one.name])]
    print("\n".join(["the undisturbed runs, which the others read, have changed:", *changed] if changed else []))
    count = sum(len(one["kills"]) for one in found)
    print(f"{count} times, {count - before} of them in {time.monotonic() - began:.0f} s")
    sys.exit(1 if changed or any(codes) or any(one["problems"] for one in found) else 0)


if __name__ == "__main__":
    main()
