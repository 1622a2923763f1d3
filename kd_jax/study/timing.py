"""How long the remaining stages will take: as long as finished ones of the same kind, else by their FLOPs.

The slowest stage of a kind also compiled, so it counts only while it is the only one. Kinds not seen yet are estimated
from their FLOPs at the lowest rate seen, since small jobs are the slowest per FLOP, plus the least time that a stage
has spent outside its steps.
"""

from collections.abc import Iterable, Mapping

from kd_jax.config.training import Finetune, Pretrain
from kd_jax.study.plan import Stage


class Timing:
    """The seconds of finished stages.

    flops: of all stages by folder, for kinds of which none has finished. together: stages that run at the same time.
    """

    def __init__(self, flops: Mapping[str, float] | None = None, together: int = 1):
        self.flops: Mapping[str, float] = flops or {}
        self._together = together
        self._steps: list[tuple[Stage, float]] = []  # seconds of the steps
        self._others: list[float] = []  # seconds of everything else
        self._seconds: dict[tuple, list[float]] = {}

    def note(self, stage: Stage, seconds: float, steps: float = 0.0) -> None:
        """Records that a stage took `seconds`, of which its training steps took `steps`."""
        if steps:
            self._steps.append((stage, steps))
            self._others.append(max(seconds - steps, 0.0))
        for kind in kinds(stage):
            self._seconds.setdefault(kind, []).append(seconds)

    def expected(self, stage: Stage) -> float | None:
        """Seconds of a stage, 0 where no FLOPs are counted; None while nothing is known."""
        known = self._known(stage)
        if known is not None:
            others = sorted(known)[:-1] or known
            return sum(others) / len(others)
        work = self.flops.get(stage.folder)
        rates = [flops / took for one, took in self._steps if (flops := self.flops.get(one.folder, 0.0))]
        if not work:
            return work
        return work / min(rates) + min(self._others) if rates else None

    def _known(self, stage: Stage) -> list[float] | None:
        return next((self._seconds[kind] for kind in kinds(stage) if kind in self._seconds), None)

    def left(self, stages: Iterable[Stage]) -> str:
        """How long these stages take together, in words."""
        stages = list(stages)
        expected = [self.expected(stage) for stage in stages]
        known = [one for one in expected if one is not None]
        if not expected:
            return "the report is left"
        if len(known) < len(expected) and not sum(known):
            return "time left not known yet"
        seconds = max(sum(known) / self._together, 1.0)
        return f"{'about' if len(known) == len(expected) else 'more than'} {duration(seconds)} left"


def kinds(stage: Stage) -> tuple[tuple, ...]:
    """Keys shared by stages that take equally long, the closest match first."""
    job = stage.job
    if stage.command == "baseline":
        return ((stage.command, stage.config["baseline"]["features"]),)
    if job is None:
        return ((stage.command,),)
    model = job.model if isinstance(job, Pretrain) else ""
    length = (job.epochs if isinstance(job, Finetune) else 0) or job.steps
    # A cache makes distillation faster, and an intermediate is another student than the one compared.
    more = (bool(stage.config["teacher_cache"]), str(stage.config["student"])) if stage.command == "distill" else ()
    return (stage.command, model, length, job.batch_size, *more), (stage.command, model)


def duration(seconds: float) -> str:
    """3700 as "1 h 2 min"."""
    seconds = max(round(seconds), 0)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"
