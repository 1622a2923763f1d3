"""What to do for each task, in words that need no statistics; it follows from the declared comparisons alone."""

from typing import NamedTuple

from kd_jax.evaluation.significance import HIGHER, LOWER, MINIMUM_SEEDS, Decision
from kd_jax.study.plan import INITIALIZED
from kd_jax.study.report.contrasts import (
    GENERIC,
    INTENT_ERROR,
    MANY_SEEDS,
    MLM,
    NGRAMS,
    Contrast,
    against_ngrams,
    declared,
    helps,
    more_seeds,
    text_of,
)
from kd_jax.study.report.findings import unigram_students
from kd_jax.study.report.numbers import Numbers
from kd_jax.study.report.wording import label, leaves_out_zero, relative, sentence, uninformative

# The tasks and their errors in plain words, for readers of this paragraph alone.
WHAT = {"dc": "domains (DC)", "icner": "intents and slots (ICNER)"}
WRONG = {
    "error_rate": "wrong domains",
    "semer": "wrong intents and slots",
    "intent_error_rate": "wrong intents",
}
WITHOUT = {  # distillation
    MLM: "the same training without the teacher",
    INITIALIZED: "the same start from the teacher without distillation",
}
TITLES = {  # (which text wins, whether distillation helps)
    (LOWER, LOWER): "use {ours} and distill",
    (LOWER, HIGHER): "use {ours}, and do not distill",
    (LOWER, None): "use {ours}; whether to distill is open",
    (HIGHER, LOWER): "use {theirs} and distill",
    (HIGHER, HIGHER): "use {theirs}; distilling on {ours} hurts",
    (HIGHER, None): "use {theirs}; whether to distill is open",
    (None, LOWER): "distill; which text is better is open",
    (None, HIGHER): "do not distill on {ours}; which text is better is open",
    (None, None): "nothing is decided yet",
}
LONGER = 4  # times the steps of distillation that are proposed where students are too weak


class Recommendation(NamedTuple):
    """What to do, why, how strong the evidence is, and what would strengthen it; Markdown sentences without periods."""

    title: str
    reason: str
    evidence: str
    next_step: str


def recommendation(numbers: Numbers, task: str) -> Recommendation:
    """Which text, and whether to distill; n-grams where no student makes fewer errors than they do."""
    found = declared(numbers, task)
    texts, distilling = found[GENERIC], [found[name] for name in WITHOUT]
    rivals = against_ngrams(numbers, found)
    best = min(rivals, key=lambda one: rivals[one].difference.rate_a, default=None)
    beaten = found[NGRAMS].status == HIGHER
    if best is not None and (beaten or rivals[best].difference.difference >= 0):
        one = rivals[best].difference
        reason = (
            f"Counts of words and letters (n-grams), without a neural network, have {_rate(one.rate_b)} "
            f"{WRONG[found[NGRAMS].measure.error]}; the best student, {label(numbers, best)}, has {_rate(one.rate_a)}"
        )
        behind = [found[NGRAMS]]
        intents = declared(numbers, task, INTENT_ERROR)[NGRAMS] if task == INTENT_ERROR.task else None
        if intents and intents.student and intents.decision and intents.status == LOWER:
            reason += f". On intents alone the student on {text_of(numbers, intents.student)} is better than they are: "
            reason += _compared(intents.decision)
            behind.append(intents)
        evidence = _evidence(behind)
        more = _longer(numbers) if beaten or unigram_students(numbers) else _seeds(numbers)
        return Recommendation(f"{WHAT[task]}: keep the n-grams", reason, evidence, more)
    ours, theirs = (text_of(numbers, one) if one else "" for one in (texts.student, texts.reference))
    answers = [texts.status, helps(found)]
    which, whether = (answer if answer in (LOWER, HIGHER) else None for answer in answers)
    title = TITLES[which, whether].format(ours=ours, theirs=theirs)
    reasons, behind = [_texts(texts, ours, theirs), *_distilling(found)], [texts, *distilling]
    counted = found[NGRAMS].decision
    if counted and counted.status == LOWER:
        reasons.append(f"Against counts of words and letters (n-grams), without a neural network: {_compared(counted)}")
        behind.append(found[NGRAMS])
    elif best is not None:
        one = rivals[best].difference
        reasons.append(f"No student is shown to beat counts of words and letters (n-grams, {_rate(one.rate_b)})")
        behind.append(found[NGRAMS])
        title = f"keep the n-grams until a student is shown to beat them; for students, {title}"
    more = _longer(numbers) if unigram_students(numbers) else _seeds(numbers)
    if texts.decision is None and texts.student and texts.reference in (None, texts.student):
        other = "task text alone (share 1)" if texts.reference else "generic text alone (share 0)"
        more = f"give `config.study.transfer_sets` a set of {other} to compare with"
    return Recommendation(f"{WHAT[task]}: {title}", ". ".join(dict.fromkeys(reasons)), _evidence(behind), more)


def _rate(value: float) -> str:
    return f"{100 * value:.1f} %"


def _texts(contrast: Contrast, ours: str, theirs: str) -> str:
    """The errors on both texts, and how they differ."""
    if contrast.decision is None:
        return sentence(contrast.missing)
    one = contrast.decision.difference
    rates = f"A student distilled on {ours} has {_rate(one.rate_a)} {WRONG[contrast.measure.error]}, one on {theirs}"
    return f"{rates} {_rate(one.rate_b)}: {_compared(contrast.decision)}"


def _distilling(found: dict[str, Contrast]) -> list[str]:
    """How the distilled student compares with the controls without distillation."""
    known = [(WITHOUT[name], found[name].decision) for name in WITHOUT]
    said: dict[str, list[str]] = {}
    for what, decision in known:
        if decision:
            said.setdefault(_compared(decision), []).append(what)
    clauses = [f"against {' and '.join(names)}: {text}" for text, names in said.items()]
    return [sentence("; ".join(clauses))] if clauses else [sentence(found[MLM].missing)]


def _compared(decision: Decision) -> str:
    """ "17 % fewer errors (between 5 and 29 %)", or that the difference is not known."""
    one = decision.difference
    change = relative(one)
    if decision.status not in (LOWER, HIGHER):
        if leaves_out_zero(one):
            side = "fewer" if one.difference < 0 else "more"
            few = 0 < one.seeds < MINIMUM_SEEDS
            return f"{side} errors on these utterances, but {_few(one.seeds) if few else 'chance is not ruled out'}"
        return uninformative(one) or "a difference that chance can explain"
    if change is None:
        return "fewer errors" if one.difference < 0 else "more errors"
    value, low, high = (abs(100 * end) for end in change)
    ends = f" (between {min(low, high):.2g} and {max(low, high):.2g} %)" if leaves_out_zero(one) else ""
    return f"{value:.2g} % {'fewer' if change[0] < 0 else 'more'} errors{ends}"


def _few(seeds: int) -> str:
    return f"{'one seed' if seeds == 1 else 'two seeds'} cannot decide"


def _evidence(contrasts: list[Contrast]) -> str:
    """How many of the comparisons behind a recommendation are decided, over how many seeds (repeated trainings)."""
    decisions = [one.decision for one in contrasts if one.decision]
    if not decisions:
        return "none; nothing could be compared"
    count, total = sum(one.status in (LOWER, HIGHER) for one in decisions), len(decisions)
    seeds = min((one.difference.seeds for one in decisions if one.difference.seeds), default=0)
    times = {1: "once", 2: "twice"}.get(seeds, f"{seeds} times")
    trained = f"; every student was trained {times}" if seeds else ""
    if count == total:
        word = "strong" if seeds >= MANY_SEEDS else "good"
        which = "both" if total == 2 else f"all {total}"
        every = "the comparison behind this is" if total == 1 else f"{which} comparisons behind this are"
        return f"{word}; {every} decided{trained}"
    which = f"{count} of the {total} comparisons behind this" if count else "nothing behind this"
    return f"{'partial' if count else 'weak'}; {which} {'are' if count > 1 else 'is'} decided{trained}"


def _seeds(numbers: Numbers) -> str:
    return f"add seeds: {more_seeds(numbers)}"


def _longer(numbers: Numbers) -> str:
    """More steps of distillation, where students are too weak for more seeds to help."""
    if "distill" not in numbers.inputs.config:
        return "distill longer: `config.distill.steps`"
    return f"distill longer: `--config.distill.steps={LONGER * numbers.inputs.config['distill']['steps']}`"
