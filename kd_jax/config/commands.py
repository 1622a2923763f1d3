"""Settings of the remaining commands: import, baselines, evaluation, export, latency, compile check, study, advice."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from kd_jax.config.settings import check, one_of
from kd_jax.models.encoder_config import Pooling


@dataclass(frozen=True)
class ImportModel:
    """A model of `transformers`, whose tokenizer config.prepared was made with: `config.import_model`.

    path: folder with config.json and safetensors, or a name on the hub, or "embedded": multilingual-e5-small in 4 bits,
        from the pip extra demo; ${VARIABLE} is filled in.
    revision: of a model on the hub: branch, tag or commit; empty takes its main branch.
    evaluate_rows: held-out rows per store for the loss that the model comes with; 0 measures none.
    """

    path: str = ""
    revision: str = ""
    evaluate_rows: int = 256

    def __post_init__(self):
        remedy = "name a folder that `save_pretrained` wrote, or a model of the hub"
        check(bool(self.path), "path", "it is empty", remedy)


@dataclass(frozen=True)
class Baseline:
    """A baseline that students have to beat: `config.baseline`.

    features: ngrams (TF-IDF of words 1-2 and of characters 2-5) | teacher (the frozen teacher_checkpoint: the mean of
        its last layer over the tokens of each utterance).
    tasks: dc, icner or both: ngrams predict intents and slots, the teacher intents only.
    c_values: values of C, the inverse L2 penalty of the logistic regression, > 0; the first with the best dev score
        is used. The CRF for slots tries the same values.
    c_without_dev: C where there is no dev partition.
    max_train, max_dev: labeled train and dev utterances per locale, the same as a student's; 0 takes all, -1 the value
        in config.finetune.
    labels: workdir of an evaluate run of the partition "unlabeled", whose predictions are used as further labels; only
        with a single task.
    """

    features: str = "ngrams"
    tasks: tuple[str, ...] = ("dc", "icner")
    c_values: tuple[float, ...] = (1.0, 10.0, 100.0)
    c_without_dev: float = 10.0
    max_train: int = -1
    max_dev: int = -1
    labels: str = ""

    def __post_init__(self):
        one_of(self.features, ("ngrams", "teacher"), "features")
        for task in self.tasks:
            one_of(task, ("dc", "icner"), "tasks")
        check(len(self.c_values) > 0, "c_values", "it is empty", "give at least one value, such as 10")
        for c in (*self.c_values, self.c_without_dev):
            check(c > 0, "c_values" if c in self.c_values else "c_without_dev", f"{c} is not positive", "10 is usual")
        for name in ("max_train", "max_dev"):
            check(getattr(self, name) >= -1, name, f"{getattr(self, name)} is negative", "0 takes all")


@dataclass(frozen=True)
class Evaluate:
    """Scoring of a finetuned model: `config.evaluate`.

    checkpoint: workdir of a finetune run.
    partition: dev | test | unlabeled (the train utterances that finetune.max_train left out; their predictions can
        serve as labels, see finetune.labels).
    mode: strict (IOB2 after repair) | massive (the official score).
    batch_rows: rows predicted at a time.
    """

    checkpoint: str = ""
    partition: str = "test"
    mode: str = "strict"
    batch_rows: int = 32

    def __post_init__(self):
        check(
            self.partition in ("dev", "test", "unlabeled"),
            "partition",
            f"{self.partition!r} is not a partition to score",
            "use dev, test or unlabeled",
        )
        check(self.mode in ("strict", "massive"), "mode", f"{self.mode!r} is unknown", "use strict or massive")
        check(bool(self.checkpoint), "checkpoint", "it is empty", "give the workdir of a finetune run")


@dataclass(frozen=True)
class Export:
    """What `export` writes for `transformers`: `config.export`.

    checkpoint: workdir of a pretrain, distill, import_model or finetune run.
    int8: DC and ICNER: weights in int8 for `predict` and the program, not those for transformers.
    stablehlo: DC and ICNER: the compiled program too, which runs without kd_jax (needs flatbuffers).
    results: workdir of the `evaluate` run whose test results the model card states; empty looks for one next to it.
    license: stated in the model card, e.g. apache-2.0; empty takes that of the imported models it descends from.
    """

    checkpoint: str = ""
    int8: bool = False
    stablehlo: bool = False
    results: str = ""
    license: str = ""

    def __post_init__(self):
        check(bool(self.checkpoint), "checkpoint", "it is empty", "give the workdir of a finished run")


@dataclass(frozen=True)
class Latency:
    """Size, and the time of one and of 64 utterances, for choosing a student: `config.latency`.

    models: encoder blocks of this config: some of teacher, intermediate, student.
    task: dc | icner: whose heads they have.
    pooling: first | mean | max: how the heads read an utterance, as finetune.pooling; a study sets it.
    calls: timed calls of each, >= 5.
    seconds: most seconds for each model and number of utterances.
    """

    models: tuple[str, ...] = ("teacher", "student")
    task: str = "icner"
    pooling: str = "first"
    calls: int = 200
    seconds: float = 20.0

    def __post_init__(self):
        one_of(self.task, ("dc", "icner"), "task")
        one_of(self.pooling, get_args(Pooling), "pooling")
        check(self.calls >= 5, "calls", f"{self.calls} is too few", "use 5 or more")


@dataclass(frozen=True)
class CompileCheck:
    """What `compile_check` compiles, without the hardware: `config.compile_check`.

    command: pretrain | distill (teacher in the loop) | cached (config.cache, or config.states with distill.clean).
    rows: of a batch; 0 takes the job's batch_size.
    tries: compilations to spend on the largest batch that fits, >= 0.
    price: of a device per hour, in any currency; 0 reports hours only.
    """

    command: str = "distill"
    rows: int = 0
    tries: int = 5
    price: float = 0.0

    def __post_init__(self):
        one_of(self.command, ("pretrain", "distill", "cached"), "command")
        check(self.tries >= 0, "tries", f"{self.tries} is negative", "give the compilations to spend on the search")


@dataclass(frozen=True)
class Study:
    """Which students are compared, and how: `config.study`.

    name: title of the report.
    teacher_import: a model of `transformers` as generic teacher (folder or name on the hub, as import_model.path, which
        the study sets); config.tokenizer and config.teacher must match it. Empty pretrains config.teacher.
    train_head: imported teacher: train its masked-LM head first, with the encoder frozen and config.pretrain as job.
    transfer_sets: name -> task_share.
    selected_sets: the same with selected generic text (config.select) in place of all generic text.
    task_texts: name of a transfer set -> how many texts per store of task text it uses, in place of
        transfer.task_texts.
    adapted_sets: transfer sets also distilled from the adapted teacher,
    schedule_sets: from the generic teacher and, from schedule_switch on, from the adapted one,
    average_sets: from both, their probabilities averaged,
    chain_sets: from config.intermediate, itself distilled from the generic teacher (config.chain).
    schedule_switch: progress, in (0, 1).
    cache: students that share a teacher read its cached predictions, where the terms allow it.
    mlm_sets: transfer sets also learned by MLM alone, without a teacher, from the initialization of the distilled
        students.
    mlm_random: if that is the teacher, also MLM alone from random parameters.
    ngrams: also TF-IDF of n-grams with logistic regression and a CRF, on the students' labels (config.baseline).
    probe: also logistic regression on the frozen generic teacher's states.
    finetune_teacher: also finetune the generic teacher, with the first seed and one recipe, as an upper bound.
    teacher_learning_rate, teacher_encoder_rate, teacher_epochs, teacher_pooling: that recipe. New heads need a far
        higher rate than a pretrained encoder.
    label_unlabeled: also train n-grams and a student from scratch on the given labels plus those that the finetuned
        teacher gives to the train utterances left out by finetune.max_train.
    seeds: of the students.
    workers: processes that run stages at the same time, each on its share of the cores; on CPUs only. Sums are taken
        in the order of a machine with that many cores, so the last bits differ.
    tasks: dc, icner or both.
    latency: measure size and latency of teacher and students, with config.latency.
    recipe_learning_rates, recipe_epochs, recipe_poolings, recipe_encoder_rates: finetuning recipes, all combinations,
        searched on dev for each student with the first seed; if the last two are empty, all use finetune.pooling and
        finetune.encoder_rate.
    require_teacher_better_than_unigram: stop before distilling from a teacher whose loss on task text is no better
        than a unigram's.
    """

    name: str = "study"
    teacher_import: str = ""
    train_head: bool = True
    transfer_sets: Mapping[str, float] = field(default_factory=lambda: {"generic": 0.0, "mix50": 0.5, "task": 1.0})
    selected_sets: Mapping[str, float] = field(default_factory=dict)
    task_texts: Mapping[str, int] = field(default_factory=dict)
    adapted_sets: tuple[str, ...] = ("task",)
    schedule_sets: tuple[str, ...] = ()
    average_sets: tuple[str, ...] = ()
    chain_sets: tuple[str, ...] = ()
    schedule_switch: float = 0.5
    cache: bool = True
    mlm_sets: tuple[str, ...] = ("task",)
    mlm_random: bool = True
    ngrams: bool = True
    probe: bool = True
    finetune_teacher: bool = False
    teacher_learning_rate: float = 2e-3
    teacher_encoder_rate: float = 0.05
    teacher_epochs: int = 15
    teacher_pooling: str = "mean"
    label_unlabeled: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    workers: int = 1
    tasks: tuple[str, ...] = ("dc", "icner")
    latency: bool = True
    recipe_learning_rates: tuple[float, ...] = (1e-3,)
    recipe_epochs: tuple[int, ...] = (10,)
    recipe_poolings: tuple[str, ...] = ()
    recipe_encoder_rates: tuple[float, ...] = ()
    require_teacher_better_than_unigram: bool = True

    def __post_init__(self):
        for key in ("transfer_sets", "selected_sets"):
            for name, share in getattr(self, key).items():
                check(0.0 <= share <= 1.0, f"{key}.{name}", f"{share} is outside [0, 1]", "give a number from 0 to 1")
        twice = sorted(set(self.transfer_sets) & set(self.selected_sets))
        check(not twice, "selected_sets", f"{', '.join(twice)} is a transfer set too", "choose another name")
        for name, limit in self.task_texts.items():
            share = {**self.transfer_sets, **self.selected_sets}.get(name, 0.0)
            check(share > 0, "task_texts", f"{name} is no transfer set with task text", "name one, or leave it out")
            check(limit > 0, f"task_texts.{name}", f"{limit} is not above 0", "leave it out to use all task text")
        switch = self.schedule_switch
        check(0 < switch < 1, "schedule_switch", f"{switch} is outside (0, 1)", "0.5 switches half-way")
        for name in self.recipe_poolings:
            one_of(name, get_args(Pooling), "recipe_poolings")
        for rate in self.recipe_encoder_rates:
            check(0 < rate <= 1, "recipe_encoder_rates", f"{rate} is outside (0, 1]", "1.0 is the rate of the heads")
        check(self.workers >= 1, "workers", f"{self.workers} is below 1", "1 runs one stage after the other")
        check(len(self.seeds) > 0, "seeds", "there is no seed", "give at least one, preferably three")
        check(self.teacher_learning_rate > 0, "teacher_learning_rate", "it is not above 0", "2e-3 is usual")
        slow = self.teacher_encoder_rate
        check(0 < slow <= 1, "teacher_encoder_rate", f"{slow} is outside (0, 1]", "0.05 of 2e-3 is usual")
        one_of(self.teacher_pooling, get_args(Pooling), "teacher_pooling")
        check(self.teacher_epochs >= 0, "teacher_epochs", "it is negative", "0 uses config.finetune.steps")
        labels = self.finetune_teacher or not self.label_unlabeled
        check(labels, "label_unlabeled", "no teacher is finetuned that could label", "set finetune_teacher to True too")


@dataclass(frozen=True)
class Advise:
    """Which pilots `advise` runs, and when their differences count: `config.advise`.

    budget_minutes: > 0, for all stages that the advice is based on, including earlier starts; a rung of pilots starts
        only if it is expected to fit.
    shares: of task text, in [0, 1]: the transfer sets that are compared, at least two.
    steps: of the pilots of each rung, as shares of distill.steps, ascending in (0, 1].
    seeds: number of pilots of a transfer set in each rung, one for each of `steps`.
    drop_below: probability of being the best, in [0, 1), below which a transfer set of the worse half is dropped after
        a rung; 0 drops none.
    margin: >= 0, error points; a smaller difference does not matter.
    amounts: shares of the task text, in (0, 1), with which the best transfer set is also tried, for the learning curve;
        () fits none.
    adapt: try the best transfer set with the adapted teacher too, where the teacher can be adapted.
    """

    budget_minutes: float = 30.0
    shares: tuple[float, ...] = (0.0, 0.5, 1.0)
    steps: tuple[float, ...] = (0.25, 0.5, 1.0)
    seeds: tuple[int, ...] = (1, 2, 3)
    drop_below: float = 0.1
    margin: float = 0.5
    amounts: tuple[float, ...] = (0.1, 0.3)
    adapt: bool = True

    def __post_init__(self):
        check(self.budget_minutes > 0, "budget_minutes", f"{self.budget_minutes} is not above 0", "30 is usual")
        for share in self.shares:
            check(0 <= share <= 1, "shares", f"{share} is outside [0, 1]", "give numbers from 0 to 1")
        two = len(self.shares) == len(set(self.shares)) >= 2
        check(two, "shares", f"{self.shares} leaves nothing to compare", "give two or more shares of task text")
        rising = list(self.steps) == sorted(set(self.steps))
        within = bool(self.steps) and rising and min(self.steps) > 0 and max(self.steps) <= 1
        check(within, "steps", f"{self.steps} does not rise from above 0 to at most 1", "(0.25, 0.5, 1.0) is usual")
        matched = len(self.seeds) == len(self.steps) and min(self.seeds) >= 1
        check(matched, "seeds", f"{self.seeds} for {self.steps}", "give a number of at least 1 for each of steps")
        below = self.drop_below
        check(0 <= below < 1, "drop_below", f"{below} is outside [0, 1)", "0.1 is usual, 0 drops none")
        check(self.margin >= 0, "margin", f"{self.margin} is negative", "0.5 is usual")
        for amount in self.amounts:
            check(0 < amount < 1, "amounts", f"{amount} is outside (0, 1)", "give shares of the task text")
