"""Settings of the training jobs: steps and optimizer, the terms of the distillation loss, finetuning."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args

from kd_jax.config.settings import check, one_of
from kd_jax.models.encoder_config import Pooling

SCHEDULES = ("linear", "cosine", "constant")
Distance = Literal["cosine", "mse"]


@dataclass(frozen=True)
class Training:
    """Length, optimizer and logging of one training job: `config.adapt`, `config.chain`, and part of every other job.

    steps: optimizer steps, >= 1.
    batch_size: rows (utterances when finetuning) per step over all devices, >= 1.
    accumulation: micro-batches per step; divides batch_size.
    learning_rate: peak, > 0.
    warmup_steps: linear from 0; in [0, steps].
    schedule: after warm-up: linear | cosine | constant.
    final_learning_rate: what linear and cosine end at, in [0, learning_rate].
    weight_decay: >= 0, on matrices only, never on norms and biases.
    clip_norm: global gradient norm, >= 0; 0 turns clipping off.
    beta1, beta2, epsilon: AdamW's.
    log_every: steps, >= 1.
    evaluate_every: steps; 0 evaluates at the end only.
    evaluate_rows: masked-LM jobs: most held-out rows per store.
    checkpoint_every: steps, >= 1; a checkpoint is always written at the end.
    keep_checkpoints: >= 1, newest ones kept.
    table_rate: >= 0, factor on the learning rate (and weight decay) of the token table; 0 freezes it.
    skip_non_finite: steps of a run whose loss is not finite and whose update is therefore skipped; one more ends the
        run, and 0 allows none.
    """

    steps: int = 1000
    batch_size: int = 64
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    schedule: str = "linear"
    final_learning_rate: float = 0.0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-6
    log_every: int = 20
    evaluate_every: int = 0
    evaluate_rows: int = 256
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    table_rate: float = 1.0
    skip_non_finite: int = 0

    @property
    def of_step(self) -> "Training":
        """Only what the compiled step depends on, so that jobs that differ in the rest share one compilation."""
        ignored = ("batch_size", "log_every", "evaluate_every", "evaluate_rows", "checkpoint_every", "keep_checkpoints")
        values = {one.name: getattr(self, one.name) for one in fields(Training) if one.name not in ignored}
        return Training(**values, batch_size=self.accumulation)

    @property
    def rates(self) -> dict[str, float]:
        """Path of a subtree of the parameters -> factor on its learning rate, if not 1; factors of nested subtrees are
        multiplied."""
        return {} if self.table_rate == 1 else {"encoder/embeddings/tokens": self.table_rate}

    def __post_init__(self):
        def require(condition: bool, name: str, wanted: str) -> None:
            check(condition, name, f"{getattr(self, name)!r} is out of range", f"give {wanted}")

        require(self.steps > 0, "steps", "a number of steps of at least 1")
        require(self.accumulation > 0, "accumulation", "a number of micro-batches of at least 1")
        require(self.batch_size > 0, "batch_size", "at least 1")
        divides = self.batch_size % self.accumulation == 0
        require(divides, "accumulation", f"a divisor of batch_size = {self.batch_size}")
        require(self.learning_rate > 0, "learning_rate", "a rate above 0")
        require(0 <= self.warmup_steps <= self.steps, "warmup_steps", f"0 to steps = {self.steps}")
        require(self.schedule in SCHEDULES, "schedule", " or ".join(SCHEDULES))
        below = 0 <= self.final_learning_rate <= self.learning_rate
        require(below, "final_learning_rate", f"0 to learning_rate = {self.learning_rate}")
        require(self.weight_decay >= 0, "weight_decay", "0 or more")
        require(self.clip_norm >= 0, "clip_norm", "a norm above 0, or 0 to turn clipping off")
        require(0 <= self.beta1 < 1, "beta1", "0 to below 1")
        require(0 <= self.beta2 < 1, "beta2", "0 to below 1")
        require(self.epsilon > 0, "epsilon", "a number above 0")
        require(self.log_every > 0, "log_every", "a number of steps of at least 1")
        require(self.evaluate_every >= 0, "evaluate_every", "a number of steps, or 0 to evaluate at the end only")
        require(self.checkpoint_every > 0, "checkpoint_every", "a number of steps of at least 1")
        require(self.keep_checkpoints > 0, "keep_checkpoints", "at least 1")
        check(self.table_rate >= 0, "table_rate", f"{self.table_rate} is negative", "0 freezes the table")
        require(self.skip_non_finite >= 0, "skip_non_finite", "a number of steps, or 0 to stop at the first")


@dataclass(frozen=True)
class Pretrain(Training):
    """Masked-LM pretraining: `config.pretrain`.

    model: teacher | student: which encoder is trained.
    init_from: workdir of a run to continue from, with a fresh optimizer; empty trains from scratch.
    """

    model: str = "teacher"
    init_from: str = ""

    def __post_init__(self):
        super().__post_init__()
        one_of(self.model, ("teacher", "student"), "model")


@dataclass(frozen=True)
class Term:
    """A term of the distillation loss: its weight as a function of progress, which runs from 0 to 1.

    weight: >= 0; a term whose weight is 0 throughout is not computed.
    final_weight: the weight moves linearly to this; below 0 it stays as it is.
    begin: progress at which the weight starts to move.
    end: progress at which it arrives; the same as `begin` makes it a switch.
    """

    weight: float = 0.0
    final_weight: float = -1.0
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        check(self.weight >= 0, "weight", f"{self.weight} is negative", "give 0 or more")
        ordered = 0 <= self.begin <= self.end <= 1
        check(ordered, "begin", f"{self.begin} to {self.end} is not a span of progress", "0 <= begin <= end <= 1")

    @property
    def last(self) -> float:
        """The weight at the end of training."""
        return self.final_weight if self.final_weight >= 0 else self.weight

    @property
    def used(self) -> bool:
        return self.weight > 0 or self.last > 0


@dataclass(frozen=True)
class KL(Term):
    """KL(teacher || student) * temperature ** 2 (Hinton et al. 2015).

    temperature: > 0, of both softmaxes.
    final_temperature: the temperature moves linearly to this at the last step; 0 keeps it.
    """

    weight: float = 1.0
    temperature: float = 2.0
    final_temperature: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check(self.temperature > 0, "temperature", f"{self.temperature} is not positive", "2.0 is usual")
        final = self.final_temperature
        check(final >= 0, "final_temperature", f"{final} is negative", "0 keeps the temperature")

    @property
    def last_temperature(self) -> float:
        """The temperature at the end of training."""
        return self.final_temperature or self.temperature


@dataclass(frozen=True)
class Hidden(Term):
    """Distance of hidden states after matched layers, at every real token.

    For unmasked text (clean), the states of the last layer are those after the final norm.


    distance: cosine | mse.
    layers: uniform | last | "0:3,1:7": pairs student:teacher, counted from 0 (-1 is the last).
    projection: auto (where the widths differ) | always | never: a learned map to the teacher's width.
    """

    distance: Distance = "cosine"
    layers: str = "uniform"
    projection: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        one_of(self.distance, ("cosine", "mse"), "distance")


@dataclass(frozen=True)
class Embeddings(Term):
    """Distance of the states before layer 0; see Hidden."""

    distance: Distance = "mse"
    projection: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        one_of(self.distance, ("cosine", "mse"), "distance")


RELATION_PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class Relations(Term):
    """KL between scaled dot products among queries, among keys and among values (MiniLMv2, Wang et al. 2021).

    heads: relation heads, which must divide both widths; 0 takes the student's attention heads.
    layers: as for Hidden.
    parts: some of query, key and value.
    """

    heads: int = 0
    layers: str = "last"
    parts: tuple[str, ...] = RELATION_PARTS

    def __post_init__(self):
        super().__post_init__()
        for part in self.parts:
            check(part in RELATION_PARTS, "parts", f"{part!r} is unknown", "use query, key and value")
        check(bool(self.parts), "parts", "it is empty", "use query, key and value")


@dataclass(frozen=True)
class Sentence(Term):
    """Distance of the mean states of each text, as sentence encoders pool them: after the last layer and its norm.

    The mean is over all tokens of a text, special ones included; a text that was cut into several segments has one mean
    per segment.

    distance: cosine | mse.
    projection: see Hidden.
    """

    distance: Distance = "cosine"
    projection: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        one_of(self.distance, ("cosine", "mse"), "distance")


# Terms on inner states, which cached predictions lack; cache_states provides those of STATE_TERMS.
FEATURE_TERMS = ("hidden", "embeddings", "relations", "sentence")
STATE_TERMS = ("hidden", "relations", "sentence")
TERMS = ("kl", "mlm", *FEATURE_TERMS)


@dataclass(frozen=True)
class Loss:
    """The distillation loss, a weighted sum of terms; part of `config.distill`.

    clean: text is not masked, and only the terms on inner states are used.
    center: subtract the mean of the teacher's states from them first; needs a cache.
    masked_from: with clean, progress from which text is masked, and kl and mlm replace the terms on inner states; 1
        never masks it.
    kl, mlm, hidden, embeddings, relations, sentence: the terms; mlm is the hard masked-LM cross entropy.
    kd_positions: masked | all: where the KL term is taken.
    block_positions: positions whose logits are formed at a time; 0 chooses.
    """

    kl: KL = field(default_factory=KL)
    mlm: Term = field(default_factory=lambda: Term(1.0))
    hidden: Hidden = field(default_factory=Hidden)
    embeddings: Embeddings = field(default_factory=Embeddings)
    relations: Relations = field(default_factory=Relations)
    sentence: Sentence = field(default_factory=Sentence)
    clean: bool = False
    center: bool = False
    masked_from: float = 1.0
    kd_positions: str = "masked"
    block_positions: int = 0

    def __post_init__(self):
        check(bool(self.used), "", "every term has weight 0", f"give {', '.join(TERMS)} a weight")
        one_of(self.kd_positions, ("masked", "all"), "kd_positions")
        logits, both = [name for name in ("kl", "mlm") if name in self.used], self.masked_from < 1
        problem = f"no token is masked for {' and '.join(logits)}"
        remedy = "set their weights to 0, or set it to False, or set masked_from below 1"
        check(not (self.clean and logits) or both, "clean", problem, remedy)
        check(0 < self.masked_from <= 1, "masked_from", f"{self.masked_from} is outside (0, 1]", "1 never masks text")
        complete = not both or (self.clean and bool(logits) and bool(self.features))
        problem = f"{self.masked_from:g} switches from states to logits, and not all that this takes is set"
        check(complete, "masked_from", problem, "set clean, and give terms of both kinds a weight")
        centered = self.clean or not self.center
        check(centered, "center", "masked text has no cache of states", "set clean, or center to False")
        check(self.block_positions >= 0, "block_positions", f"{self.block_positions} is negative", "0 chooses")

    @property
    def used(self) -> dict[str, Term]:
        """The terms that are part of the loss, by name."""
        return {name: term for name in TERMS if (term := getattr(self, name)).used}

    @property
    def parts(self) -> tuple[tuple[float, Self], ...]:
        """(progress, the loss from there on): one pair, or one for unmasked text and then one for masked text."""
        if self.masked_from == 1:
            return ((0.0, self),)

        def without(names: Iterable[str], **changes: Any) -> Self:
            off = {name: replace(getattr(self, name), weight=0.0, final_weight=-1.0) for name in names}
            return replace(self, masked_from=1.0, **off, **changes)

        masked = without(FEATURE_TERMS, clean=False, center=False)
        return (0.0, without(("kl", "mlm"))), (self.masked_from, masked)

    @property
    def trains_head(self) -> bool:
        """Whether the student's masked-LM head is part of the loss."""
        return self.kl.used or self.mlm.used

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the used terms on inner states."""
        return tuple(name for name in FEATURE_TERMS if name in self.used)


@dataclass(frozen=True)
class Distill(Loss, Training):
    """Distillation of a student: `config.distill`.

    init: random | teacher: the student starts from layers of the (first) teacher; at another width, from its token
        table alone, reduced to principal components.
    init_layers: init=teacher: uniform | first | last | "0,3": a teacher layer for each of the student's; none takes the
        token table alone.
    table_from: embeddings | states, init=teacher from the token table alone: what the principal components are taken
        of, the teacher's token table or its mean state of each token read alone.
    table_scale: > 0, init=teacher from the token table alone: root mean square of its entries, relative to the standard
        deviation of a random table.
    teacher_steps: several teachers: () averages them; (0, n, ...) uses each from its step on.
    """

    init: str = "random"
    init_layers: str = "uniform"
    table_from: str = "embeddings"
    table_scale: float = 1.0
    teacher_steps: tuple[int, ...] = ()

    def __post_init__(self):
        Training.__post_init__(self)
        Loss.__post_init__(self)
        one_of(self.init, ("random", "teacher"), "init")
        one_of(self.table_from, ("embeddings", "states"), "table_from")
        check(
            self.table_scale > 0, "table_scale", f"{self.table_scale} is not above 0", "1.0 is as large as a random one"
        )
        reached = self.masked_from == 1 or 0 < round(self.masked_from * self.steps) < self.steps
        problem = f"{self.masked_from:g} of {self.steps} steps leaves no step for one kind of text"
        check(reached, "masked_from", problem, "move it towards the middle, or raise the steps")
        one = self.masked_from == 1 or not self.teacher_steps
        check(
            one, "teacher_steps", "the teacher changes where text is masked or not", "set it to (), or masked_from to 1"
        )


@dataclass(frozen=True)
class Finetune(Training):
    """Finetuning on labeled utterances: `config.finetune`.

    init_from: workdir of a distill or pretrain run; empty trains from scratch.
    epochs: > 0 replaces steps: passes over the train utterances.
    domain: ICNER: one domain's model; empty takes all domains together; "each" trains one after the other.
    max_train: labeled train utterances per locale, the same ids in each; 0 takes all.
    max_dev: dev utterances per locale for dev.json, the recipe search and early stopping, the same ids in each; 0 takes
        all.
    pooling: first | mean | max: what DC and the intent head read of an utterance: the state of its first token, or the
        mean or maximum over all of its tokens, special ones included.
    encoder_rate: factor on the encoder's learning rate, and so on its weight decay, in (0, 1]; the heads have 1. It
        applies from scratch too.
    patience: evaluations on dev without a better score after which training stops, keeping the best parameters; 0 never
        stops, and keeps the last. The learning rate is still scheduled over all steps, so a run that stops early does
        not reach its end. With patience, evaluate_every=0 means once per epoch.
    labels: workdir of an evaluate run of the partition "unlabeled", whose predictions are used as further labels; needs
        an empty finetune.domain.
    label_smoothing: in [0, 1).
    tag_weight: ICNER: weight of the tag loss; the intent loss has weight 1.
    dropout: in [0, 1), in the heads and the encoder.
    """

    batch_size: int = 32
    init_from: str = ""
    epochs: int = 0
    domain: str = ""
    max_train: int = 0
    labels: str = ""
    label_smoothing: float = 0.0
    tag_weight: float = 1.0
    dropout: float = 0.1
    max_dev: int = 0
    pooling: str = "first"
    encoder_rate: float = 1.0
    patience: int = 0

    @property
    def of_step(self) -> Training:
        step = super().of_step
        return Finetune(**vars(step), encoder_rate=self.encoder_rate) if self.encoder_rate != 1 else step

    @property
    def rates(self) -> dict[str, float]:
        return super().rates | ({} if self.encoder_rate == 1 else {"encoder": self.encoder_rate})

    def __post_init__(self):
        super().__post_init__()
        smoothing = self.label_smoothing
        check(0 <= smoothing < 1, "label_smoothing", f"{smoothing} is outside [0, 1)", "0.1 is usual")
        check(0 <= self.dropout < 1, "dropout", f"{self.dropout} is outside [0, 1)", "0.1 is usual")
        check(self.max_train >= 0, "max_train", f"{self.max_train} is negative", "0 takes all")
        check(self.epochs >= 0, "epochs", f"{self.epochs} is negative", "0 uses config.finetune.steps")
        check(self.max_dev >= 0, "max_dev", f"{self.max_dev} is negative", "0 takes all")
        check(self.patience >= 0, "patience", f"{self.patience} is negative", "0 never stops early")
        rate = self.encoder_rate
        check(0 < rate <= 1, "encoder_rate", f"{rate} is outside (0, 1]", "1.0 trains the encoder like the heads")
        one_of(self.pooling, get_args(Pooling), "pooling")
        whole = not (self.labels and self.domain)
        check(whole, "labels", "predicted labels do not include a domain", "leave finetune.domain empty")
