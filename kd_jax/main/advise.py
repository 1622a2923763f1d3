"""Recommends a transfer set from small pilots, within a budget of minutes; docs/advisor.md.

python -m kd_jax.main.advise --config=configs/FILE.py --workdir=DIR [--config.advise.budget_minutes=30]

The pilots are stages of studies in that folder: the same command resumes, and the full study, whose config is
DIR/study.py, reuses the finished stages that belong to it.
"""

import contextlib
import math
import pathlib
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from kd_jax.config import base, fingerprint, require, to_dict
from kd_jax.config.commands import Advise
from kd_jax.config.data import Transfer
from kd_jax.config.settings import read
from kd_jax.data.prepared import Prepared
from kd_jax.evaluation.records import read_records
from kd_jax.evaluation.results import RECORDS
from kd_jax.evaluation.similarity import jensen_shannon, vocabulary_overlap
from kd_jax.jobs.masked_lm import transfer_set_of
from kd_jax.main import command
from kd_jax.main.study import open_study
from kd_jax.runtime import distributed
from kd_jax.runtime.files import read_json, write_atomically, write_json, write_json_lines
from kd_jax.runtime.preemption import interruptible
from kd_jax.study import advice, overview
from kd_jax.study.advise import (
    MOST_SEEDS,
    Belief,
    Candidate,
    Evidence,
    Outcome,
    Outcomes,
    Pilot,
    adapting,
    believe,
    compared,
    curve_points,
    decide,
    learning_curve,
    outcome,
    search,
    swarm,
    table,
)
from kd_jax.study.estimate import product_rate
from kd_jax.study.plan import REPORT, Stage, Student
from kd_jax.study.report.facts import domains_against_generic
from kd_jax.study.run import Study, read_seconds, steps_seconds, switched
from kd_jax.study.timing import duration, kinds
from kd_jax.types import UserError

FEWEST = 4  # dev utterances; with fewer, their covariance is useless
STUDY = "study.py"  # the config of the full study
SHARED = ("prepare", "import_model", "pretrain", "cache_states")  # stages that serve several pilots
FULL_SEEDS = 5  # of the full study, enough for differences of 10 to 15 % (docs/comparisons.md)


class Pilots:
    """Runs pilots as stages of studies in one folder, skips those that are finished, and keeps to the budget."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, settings: Advise):
        self.config, self.workdir, self.settings = config, workdir, settings
        self.used: dict[str, float] = {}  # folder -> seconds of the stages that the advice is based on
        self.stages: dict[Pilot, list[Stage]] = {}
        self.outcomes: dict[Pilot, Outcome] = {}
        self._studies: dict[Pilot, Study] = {}
        self._opened: dict[str, Study] = {}  # by the hash of its config, since pilots share studies
        self._texts = 0  # in the largest store of task text
        self._finished: list[tuple[Stage, tuple, float, float]] = []  # with kind, seconds, and those of its steps
        self._flops: dict[int, dict[str, float]] = {}
        self._rate = 0.0  # FLOPs per second: of matrix products, and then of the first pilot
        self._outputs = None
        self._writes = jax.process_index() == 0
        self.budget = 60 * settings.budget_minutes

    @property
    def spent(self) -> float:
        """Seconds of all stages used so far."""
        return sum(self.used.values())

    def study(self, pilot: Pilot) -> Study:
        """The study that a pilot belongs to: text, teacher, cache and recipe are the same for equal steps."""
        if pilot not in self._studies:
            config = pilot_config(self.config, self.settings, pilot, self._texts)
            key = fingerprint(to_dict(config))
            if key not in self._opened:
                together = {"writes": self._writes, "agree": distributed.from_first}
                self._opened[key] = open_study(config, self.workdir, **together)
                self._opened[key].choose()
            self._studies[pilot] = self._opened[key]
        return self._studies[pilot]

    def plan(self, pilot: Pilot) -> list[Stage]:
        """The stages of a pilot in order; its scores come from those of `evaluate`."""
        if pilot not in self.stages:
            study = self.study(pilot)
            planner, one = study.planner, pilot.candidate
            student = Student("distilled", one.set_name, one.teacher)
            found = [planner.prepare(), planner.imported(), *planner.teachers().values(), *planner.cached(one.teacher)]
            found.append(planner.encoder(student, pilot.seed))
            for task in study.settings.tasks:
                finetuned = planner.finetune(student, pilot.seed, task, planner.recipes[0])
                found += [finetuned, planner.evaluate(finetuned, "dev")]
            self.stages[pilot] = list({stage.folder: stage for stage in found if stage is not None}.values())
        return self.stages[pilot]

    def __call__(self, pilots: Sequence[Pilot]) -> Outcomes | None:
        """The outcomes of the pilots; in the first call of those that fit, in later calls None unless all fit."""
        first = not self.outcomes
        if not first and not self.fit(pilots):
            return None
        for pilot in interruptible(pilots, "the pilots"):
            if first and self.outcomes and not self.fit([pilot]):
                break
            if pilot not in self.outcomes:
                self.run(pilot)
        tried = {one.candidate for one in self.outcomes}
        if len(tried) < 2:
            own = sum(self.used[one.folder] for one in self.plan(pilots[0]) if one.command not in SHARED)
            problem = f"two transfer sets cannot be compared; one pilot takes {duration(own)}"
            raise self.too_small(self.spent + own, problem)
        return {one: self.outcomes[one] for one in pilots if one in self.outcomes}

    def tasks(self, pilot: Pilot) -> tuple[str, ...]:
        """The tasks that a pilot is scored on."""
        return self.study(pilot).settings.tasks

    def run(self, pilot: Pilot) -> None:
        """Runs the unfinished stages of a pilot. Raises UserError if the first one does not fit into the budget."""
        study, stages = self.study(pilot), self.plan(pilot)
        for number, stage in enumerate(stages):
            if not self.outcomes and not distributed.from_first(study.done(stage)):
                needed = self.spent + sum(self.seconds(study, one) for one in stages[number:])
                if not distributed.from_first(needed <= self.budget):
                    raise self.too_small(needed, f"the text, the teacher and one pilot take about {duration(needed)}")
            study.run_one(stage, stage.name, self._outputs)
            self.note(study, stage)
            if stage.command == "prepare" and not self._texts:
                self.check(Prepared(str(study.folder(stage))))
            if stage.folder == study.planner.teacher().folder:
                study.check_teachers()
        records = {}
        for task, stage in zip(self.tasks(pilot), [one for one in stages if one.command == "evaluate"], strict=True):
            records[task] = read_records(study.folder(stage) / RECORDS)
        found = outcome(records)
        if found is None:
            raise UserError(f"config.nlu: {' or '.join(records)} has no defined error on dev; give more dev utterances")
        self.outcomes[pilot] = found
        if self._writes:
            write_json_lines(self.workdir / "pilots.jsonl", self.lines())
            who = f"{pilot.candidate.label}, {pilot.steps} steps, seed {pilot.seed}"
            spent = f"{duration(self.spent)} of {duration(self.budget)}"
            print(f"{who}: error {found.error:.2f} points · {spent}", flush=True)

    def note(self, study: Study, stage: Stage) -> None:
        """Counts the time of a finished stage, once."""
        if stage.folder in self.used:
            return
        seconds, steps = read_seconds(study.folder(stage)), steps_seconds(study.folder(stage))
        self.used[stage.folder] = seconds = 0.0 if math.isnan(seconds) else seconds
        if stage.command == "distill" and steps and not any(one.command == "distill" for one, *_ in self._finished):
            self._rate = self.flops(study, stage) / steps
        self._finished.append((stage, kinds(stage), seconds, steps))

    def fit(self, pilots: Iterable[Pilot]) -> bool:
        """Whether the stages of these pilots that are not finished yet are expected to fit into the budget."""
        left = {one.folder: (self.study(pilot), one) for pilot in pilots for one in self.plan(pilot)}
        expected = sum(self.seconds(*one) for folder, one in left.items() if folder not in self.used)
        return distributed.from_first(self.spent + expected <= self.budget)

    def seconds(self, study: Study, stage: Stage) -> float:
        """How long a stage will take: 0 if it is done, else as long as others of its kind, else from its FLOPs."""
        if study.done(stage):
            return 0.0
        exact, loose = kinds(stage)[0], kinds(stage)[-1]
        same = sorted(seconds for _, kind, seconds, _ in self._finished if kind[0] == exact)
        if same:
            others = same[:-1] or same  # the slowest also compiled
            return sum(others) / len(others)
        near = [(one.job, seconds, steps) for one, kind, seconds, steps in self._finished if kind[-1] == loose]
        paces = [steps / job.steps for job, _, steps in near if job]
        if stage.job and paces:  # of another length
            return min(seconds - steps for _, seconds, steps in near) + max(paces) * stage.job.steps
        if not study.done(study.planner.prepare()):
            return 0.0
        if not self._rate and jax.default_backend() == "cpu":
            self._rate = product_rate()
        return self.flops(study, stage) / self._rate if self._rate else 0.0

    def flops(self, study: Study, stage: Stage) -> float:
        """The FLOPs of a stage; 0 where none are counted."""
        if id(study) not in self._flops:
            self._flops[id(study)] = overview.flops_of(study)
        return self._flops[id(study)].get(stage.folder, 0.0)

    def left(self, full: ConfigDict) -> float:
        """Seconds that the unfinished stages of the full study will take."""
        study = open_study(full, self.workdir)
        return sum(self.seconds(study, one) for one in study.planned() if one.command != REPORT)

    def too_small(self, needed: float, why: str) -> UserError:
        """The error for a budget that is too small for a comparison."""
        enough = math.ceil(1.2 * needed / 60)
        return UserError(
            f"config.advise.budget_minutes: {self.settings.budget_minutes:g} is too little: {why}; give at least "
            f"{max(enough, 1)} (what is finished is kept)"
        )

    def check(self, prepared: Prepared) -> None:
        """Refuses text from which the transfer sets cannot be made, and a dev partition too small to compare them."""
        limit = self.config.transfer.task_texts or math.inf
        counts = [min(store.texts, limit) for store in prepared.stores("train") if store.kind == "task"]
        self._texts = int(max(counts, default=0))
        dev = sum(one.partition == "dev" for one in prepared.utterances)
        problem = (
            f"there are {dev} dev utterances, too few to compare pilots on" if dev else "there is no dev partition"
        )
        remedy = f'give at least {FEWEST} utterances, preferably hundreds, the partition "dev"'
        require(dev >= FEWEST, "nlu", problem, remedy)
        transfer = self.config.transfer.to_dict()
        for share in self.settings.shares:
            settings = read(Transfer, {**transfer, "task_share": share, "generic": "generic"}, "transfer")
            transfer_set_of(settings, prepared, 0)

    def adaptable(self, pilot: Pilot) -> bool:
        """Whether the teacher has a trained masked-LM head, without which it cannot be adapted."""
        study = self.study(pilot)
        return bool(study.heldout(study.planner.teacher()))

    def realized(self, pilot: Pilot) -> float:
        """The share of task text in the tokens that a pilot was distilled on."""
        (stage,) = (one for one in self.plan(pilot) if one.command == "distill" and one.name.startswith("distilled-"))
        kinds_seen = read_json(self.study(pilot).folder(stage) / "run.json")["realized"]["kinds"]
        return kinds_seen["task"]["tokens_share"] if "task" in kinds_seen else 0.0

    def prepared(self, pilot: Pilot) -> Prepared:
        """The text that a pilot was distilled on."""
        study = self.study(pilot)
        return Prepared(str(study.folder(study.planner.prepare())))

    def texts(self, pilot: Pilot) -> int:
        """About how many task texts a pilot could draw from."""
        limit = round(pilot.candidate.amount * self._texts)
        stores = self.prepared(pilot).stores("train")
        return sum(min(store.texts, limit) for store in stores if store.kind == "task")

    def lines(self) -> list[dict[str, Any]]:
        """pilots.jsonl: each pilot with its errors in points, the stages with its records, and the seconds of the
        stages that it does not share."""
        rows = []
        for pilot, found in self.outcomes.items():
            own = [one for one in self.plan(pilot) if one.command not in SHARED]
            scored = [one.folder for one in own if one.command == "evaluate"]
            who = {**pilot.candidate._asdict(), "steps": pilot.steps, "seed": pilot.seed}
            numbers = {"error": found.error, "tasks": dict(found.tasks), "utterances": len(found.ids)}
            where = {"scored": dict(zip(self.tasks(pilot), scored)), "seconds": sum(self.used[o.folder] for o in own)}
            rows.append({**who, "full_steps": self.config.distill.steps, **numbers, **where})
        return rows

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Sends the output of stages to attempts/STAGE.log, unless --verbosity keeps it on the terminal."""
        if not self._writes or logging.get_verbosity() > logging.WARNING:
            yield
            return
        with switched() as self._outputs:
            yield
        self._outputs = None


def pilot_config(config: ConfigDict, settings: Advise, pilot: Pilot, texts: int) -> ConfigDict:
    """The config of the study that a pilot belongs to; texts: in the largest store of task text.

    States are cached once for all transfer sets and amounts; a cache of predictions depends on seeds and steps, so each
    pilot has its own. All stages have the settings of the full study except the steps and the recipe: the first one,
    with the lowest of its encoder rates, which suits distilled students.
    """
    new, one = config.copy_and_resolve_references(), pilot.candidate
    masked = not new.distill.clean or new.distill.masked_from < 1
    shares = (one.share,) if masked else settings.shares
    study = new.study
    study.transfer_sets = ConfigDict({Candidate(share).set_name: float(share) for share in shares})
    study.selected_sets = ConfigDict()
    limited = shares if one.amount < 1 else ()
    limit = max(round(one.amount * texts), 1)
    study.task_texts = ConfigDict({Candidate(share).set_name: limit for share in limited if share > 0})
    for name in ("schedule_sets", "average_sets", "chain_sets", "adapted_sets"):
        study[name] = ()
    study.adapted_sets = (one.set_name,) if one.teacher == "adapted" else ()
    study.mlm_sets = (Candidate(shares[0]).set_name,)
    study.update({"finetune_teacher": False, "label_unlabeled": False, "latency": False})
    study.seeds = (pilot.seed,) if masked else tuple(config.study.seeds)
    study.recipe_learning_rates, study.recipe_epochs = study.recipe_learning_rates[:1], study.recipe_epochs[:1]
    study.recipe_poolings = study.recipe_poolings[:1]
    study.recipe_encoder_rates = (min(study.recipe_encoder_rates),) if study.recipe_encoder_rates else ()
    job = new.distill
    job.warmup_steps = min(round(job.warmup_steps * pilot.steps / job.steps), pilot.steps)
    job.steps = pilot.steps
    return new


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Runs or resumes the pilots, writes the advice and prints it."""
    settings = read(Advise, config.advise, "advise")
    for kind in ("generic", "task"):
        there = any(source.kind == kind for source in config.sources.values())
        require(there, "sources", f"there is no {kind} text", f"add a source of kind {kind!r}; advice compares both")
    given, steps = tuple(config.study.seeds), config.distill.steps
    seeds = (*given, *(seed for seed in range(len(given) + MOST_SEEDS) if seed not in given))
    pilots = Pilots(config, workdir, settings)
    first = Pilot(Candidate(settings.shares[0]), steps, seeds[0])
    with pilots.quiet():
        evidence = search(settings, steps, seeds, lambda: pilots.adaptable(first), pilots)
    if jax.process_index() == 0:
        belief = believe(compared(evidence.outcomes), steps)
        full = full_config(config, settings, evidence, belief)
        where = f"--config={shlex.quote(str(workdir / STUDY))} --workdir={shlex.quote(str(workdir))}"
        values = {**advise(settings, pilots, evidence, belief, pilots.left(full)), "command": f"kd-jax study {where}"}
        ratios, metrics = swarm(pilots.outcomes, pilots.realized)
        written = {"ratios.csv": ratios, "metrics.csv": metrics, STUDY: config_file(full, values["command"])}
        for name, text in {**written, "advice.md": advice.markdown(values)}.items():
            write_atomically(workdir / name, text)
        write_json(workdir / "advice.json", values)
        print(f"\n{advice.terminal(values)}")


def advise(settings: Advise, pilots: Pilots, evidence: Evidence, belief: Belief, full_seconds: float) -> dict[str, Any]:
    """advice.json: the recommendation, its evidence, and what it and the full study cost."""
    choice = decide(settings, belief)
    one = next(iter(evidence.outcomes))
    less = curve_points(evidence)
    texts = {pilot.candidate.amount: pilots.texts(pilot) for pilot in less}
    curve = learning_curve(less, texts, settings.margin, belief.luck) if less else None
    budget = f"it did not fit into {settings.budget_minutes:g} minutes"
    no_curve = "advise.amounts is empty" if not settings.amounts else budget
    if choice.candidate.share == 0 and not less:
        no_curve = "the recommended transfer set has none"
    elif less and curve is None:
        no_curve = "there are too few task texts for three different amounts"
    no_head = (
        "its masked-LM head is not trained, and masked LM is how it would be adapted (study.train_head trains one)"
    )
    no_adapted = "advise.adapt is False" if not settings.adapt else budget if pilots.adaptable(one) else no_head
    adapted = adapting(settings, belief)
    of = choice.candidate
    named = {"set": of.set_name, "share": of.share, "text": of.text, "verdict": choice.verdict}
    return {
        "choice": {**named, "best": choice.best, "within": choice.within, "regret": choice.regret},
        "margin": settings.margin,
        "sets": table(settings, evidence, belief),
        "adapting": adapted or {"why": no_adapted},
        "task_text": {**curve._asdict(), "of": evidence.of and evidence.of.text} if curve else {"why": no_curve},
        "cost": {
            "pilots": len(evidence.outcomes),
            "minutes": round(pilots.spent / 60, 2),
            "budget_minutes": settings.budget_minutes,
            "stopped": evidence.stopped,
            "untried": [one.set_name for one in map(Candidate, settings.shares) if one not in belief.candidates],
            "full_minutes": round(full_seconds / 60, 2),
        },
        "data": data(pilots.prepared(one)),
    }


def data(prepared: Prepared) -> dict[str, Any]:
    """Sizes of the text, and how similar task and generic text are: overall, and for each domain."""
    utterances = Counter(one.partition for one in prepared.utterances)
    size = prepared.tokenizer.vocab_size
    counts = {kind: np.zeros(size, np.int64) for kind in ("generic", "task")}
    texts = dict.fromkeys(counts, 0)
    for store in prepared.stores("train"):
        if store.kind in counts:
            counts[store.kind] += store.token_counts(size)
            texts[store.kind] += store.texts
    return {
        "utterances": dict(utterances),
        "texts": texts,
        "tokens": {kind: int(found.sum()) for kind, found in counts.items()},
        "jsd": jensen_shannon(counts["generic"], counts["task"]),
        "overlap": vocabulary_overlap(counts["generic"], counts["task"]),
        "domains": domains_against_generic(prepared),
    }


def full_config(config: ConfigDict, settings: Advise, evidence: Evidence, belief: Belief) -> ConfigDict:
    """The full study: the recommended transfer set, those that may still be better, generic and task text alone."""
    new = config.copy_and_resolve_references()
    rows, chosen = table(settings, evidence, belief), decide(settings, belief).candidate
    kept = {chosen.share, 0.0, 1.0} | {row["share"] for row in rows if row["best"] >= settings.drop_below}
    new.study.transfer_sets = ConfigDict({Candidate(share).set_name: float(share) for share in sorted(kept)})
    new.study.mlm_sets = (chosen.set_name,)
    for name in ("adapted_sets", "schedule_sets", "average_sets", "chain_sets"):
        new.study[name] = ()
    adapted = adapting(settings, belief)
    if adapted and adapted["pays"] >= 0.5:
        new.study.adapted_sets = (chosen.set_name,)
    given = tuple(new.study.seeds)
    more = (seed for seed in range(len(given) + FULL_SEEDS) if seed not in given)
    new.study.seeds = (*given, *more)[: max(FULL_SEEDS, len(given))]
    return new


def config_file(config: ConfigDict, command_line: str) -> str:
    """A config as a Python file that sets what differs from the defaults."""
    lines = [
        f'"""The full study that `kd-jax advise` proposes.\n\n    {command_line}\n"""\n',
        "from ml_collections import ConfigDict\n",
        "from kd_jax.config import base\n\n",
        "def get_config() -> ConfigDict:",
        "    config = base.get_config()",
        *(f"    {line}" for line in assignments(config, base.get_config(), "config")),
        "    return config",
    ]
    return "\n".join(lines) + "\n"


def assignments(config: ConfigDict, defaults: ConfigDict, name: str) -> Iterator[str]:
    """The lines that turn the defaults into the config."""
    for key, value in config.items():
        if not isinstance(value, ConfigDict):
            if value != defaults[key]:
                yield f"{name}.{key} = {value!r}"
        elif set(value) == set(defaults[key]):
            yield from assignments(value, defaults[key], f"{name}.{key}")
        else:
            yield f"{name}.{key} = ConfigDict({value.to_dict()!r})"


if __name__ == "__main__":
    command.main(run, description="Recommends a transfer set from small pilots, within a budget of minutes.")
