"""The report's tables. Cells are plain text, captions are Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kd_jax.evaluation.significance import SeedMean
from kd_jax.study.plan import Student
from kd_jax.study.report.contrasts import INTENT_ERROR, declared, reading
from kd_jax.study.report.findings import Answer, DomainGain
from kd_jax.study.report.numbers import HEADLINE, JUDGED_NAMES, TASK_NAMES, TEST, Measure, Numbers, Place, percent
from kd_jax.study.report.wording import (
    NONE,
    label,
    plural,
    relative,
    relative_text,
    signed,
    uninformative,
)
from kd_jax.text_tables import escaped, markdown_table

MOST_STORE_ROWS = 40
EXPLORATORY = "Exploratory: not adjusted for how many there are, so one interval in twenty excludes zero by chance."
# The first word of a stage's name -> what its time is spent on.
PHASES = {
    "prepare": "prepare text",
    "import": "import the teacher",
    "pretrain": "pretrain the teacher",
    "train": "train the imported teacher's head",
    "adapt": "adapt the teacher",
    "initialized": "initialize students from the teacher",
    "mlm": "students by MLM alone",
    "distilled": "distill students",
    "dc": "finetune DC, recipe search included",
    "icner": "finetune ICNER, recipe search included",
    "test": "evaluate",
    "label": "label train utterances with the finetuned teacher",
    "ngrams": "n-grams: fit and evaluate",
    "probe": "probe the frozen teacher and evaluate",
    "latency": "measure size and latency",
}


class Table(NamedTuple):
    """The first `left` columns are names, the others numbers; `strong` are the indices of highlighted rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    left: int = 1
    strong: Sequence[int] = ()

    def markdown(self) -> str:
        """The caption and the table; names in it may come from users, so all cells are escaped."""

        def cell(text: str) -> str:
            return "\n".join(map(escaped, text.split("\n")))

        rows = [[cell(text) for text in row] for row in self.rows]
        for index in self.strong:
            rows[index][0] = f"**{rows[index][0]}**"
        return f"{self.caption}\n\n{markdown_table([cell(text) for text in self.header], rows, self.left)}"


def fixed(value: float | None, digits: int) -> str:
    """The number with so many digits behind the point; an en dash for None."""
    return NONE if value is None else f"{value:.{digits}f}"


def spread(found: SeedMean | None, scale: float = 100.0, digits: int = 2) -> str:
    """Mean and standard deviation over seeds; the mean alone for one seed."""
    if found is None:
        return NONE
    mean = fixed(scale * found.mean, digits)
    return mean if found.deviation is None else f"{mean} ± {fixed(scale * found.deviation, digits)}"


def change(numbers: Numbers, student: Student, reference: Student | None, measure: Measure, place: Place) -> str:
    """Relative change of the error rate, with its interval if there is one."""
    if reference is None:
        return NONE
    if student == reference:
        return "reference"
    difference = numbers.difference(student, reference, measure, place)
    if difference is not None:
        return relative_text(difference)
    mean, base = (numbers.mean(who, measure.task, measure.error, place) for who in (student, reference))
    if mean is None or base is None or base.mean == 0:
        return NONE
    return f"{signed(100 * (mean.mean / base.mean - 1))} % (no interval)"


def result_table(numbers: Numbers, test_set: str = TEST) -> Table:
    """A row for each student: mean ± spread over seeds of each measure, and the change against generic-only."""
    measures, reference, place = numbers.measures(), numbers.with_share(0.0), Place(test_set)
    rows = []
    for student in numbers.students:
        means = [spread(numbers.mean(student, one.task, one.shown, place)) for one in measures]
        changes = [change(numbers, student, reference, one, place) for one in measures]
        rows.append([numbers.label(student), *map("\n".join, zip(means, changes))])
    against = (
        "second line: relative change of the error rate (1 − F1 for slots, 1 − exact match) against "
        f"{label(numbers, reference)}, with its 95 % interval"
        if reference
        else "there is no distilled student with generic text only to compare with"
    )
    counts = [utterances_of(numbers, task, test_set) for task in numbers.tasks() if numbers.students]
    sizes = ", ".join(f"{count} utterances for {TASK_NAMES[task]}" for task, count in zip(numbers.tasks(), counts))
    caption = (
        f"Test set `{test_set}` ({sizes}), in %: mean ± standard deviation over {seeds_text(numbers)}"
        f"{unseeded(numbers)}; {against}. {EXPLORATORY}"
    )
    strong = [index for index, student in enumerate(numbers.students) if student == reference]
    arrows = ["↓" if measure.shown == measure.error else "↑" for measure in measures]
    header = ["Student", *(f"{measure.title} {arrow}" for measure, arrow in zip(measures, arrows))]
    return Table(header, rows, caption, 1, strong)


def utterances_of(numbers: Numbers, task: str, test_set: str) -> int | None:
    """How many utterances of a task a test set has, counted in the first results that there are."""
    metric = "error_rate" if task == "dc" else "intent_error_rate"
    counts = (numbers.count(student, task, metric, Place(test_set)) for student in numbers.students)
    return next((count for count in counts if count is not None), None)


def seeds_text(numbers: Numbers) -> str:
    """The number of seeds behind a mean, for captions."""
    count = len(numbers.seeds())
    return f"{count} seeds" if count != 1 else "one seed (so no spread)"


def unseeded(numbers: Numbers) -> str:
    """A remark on the deterministic rows; empty if there are none."""
    names = [numbers.label(student) for student in numbers.students if numbers.seedless(student)]
    return f" (no seed, so no spread: {'; '.join(names)})" if names else ""


def declared_table(numbers: Numbers) -> Table:
    """A row for each declared comparison of each task that has results, those of intents alone last."""
    rows = []
    families = [declared(numbers, task) for task in numbers.tasks()]
    if INTENT_ERROR.task in numbers.tasks():
        families.append(declared(numbers, INTENT_ERROR.task, INTENT_ERROR))
    for found in families:
        together = sum(one.decision is not None for one in found.values())
        for one in found.values():
            if one.decision is None or one.student is None or one.reference is None:
                continue
            difference = one.decision.difference
            rows.append(
                [
                    f"{TASK_NAMES[one.measure.task]}, {one.measure.error_title.removeprefix('DC ').lower()}",
                    numbers.label(one.student),
                    numbers.label(one.reference),
                    fixed(100 * difference.rate_a, 2),
                    fixed(100 * difference.rate_b, 2),
                    relative_text(difference),
                    "< 0.001" if one.decision.adjusted < 0.001 else fixed(one.decision.adjusted, 3),
                    reading(one.decision, together),
                ]
            )
    header = ["Task", "Student", "Against", "Its error", "Error against", "Relative change", "p, adjusted", "Reading"]
    caption = (
        "Errors in %, relative change with its 95 % interval, and the p-value, adjusted (Holm) for the comparisons of "
        "the same error. Lower or higher: an adjusted p-value below 0.05, and at least three seeds."
    )
    return Table(header, rows, caption, 3)


def heldout_cells(numbers: Numbers, who: Student, kind: str, locale: str = "all") -> list[str]:
    """Masked-LM loss and accuracy on held-out text of one kind and language."""
    place = Place(f"heldout_{kind}", locale)
    loss, accuracy = (numbers.mean(who, "mlm", metric, place) for metric in ("loss", "accuracy"))
    return [spread(loss, 1.0), spread(accuracy, digits=1)]


def heldout_table(numbers: Numbers) -> Table:
    """Masked-LM loss and accuracy on held-out text of every model whose masked-LM head was trained, and the loss of a
    unigram of the same vocabulary.
    """
    kinds, rows = ("task", "generic"), []
    for who in [*numbers.teachers, *numbers.students]:
        cells: list[str] = []
        for kind in kinds:
            loss, accuracy = heldout_cells(numbers, who, kind)
            cells += [loss, fixed(numbers.unigram_loss(who, kind), 2), accuracy]
        if any(cell != NONE for cell in cells):
            rows.append([numbers.label(who), *cells])
    caption = (
        "Held-out masked-LM loss in nats per masked token (↓) and masked-token accuracy in % (↑): mean ± standard "
        f"deviation over {seeds_text(numbers)}. Unigram: the loss of token frequencies in each model's own vocabulary; "
        "losses can be compared only where it is the same. A model whose masked-LM head was never trained is left out."
    )
    header = ["Model"] + [f"{what}, {kind} text" for kind in kinds for what in ("Loss", "Unigram", "Accuracy")]
    return Table(header, rows, caption)


def locale_table(numbers: Numbers, task: str) -> Table:
    """A row for each locale: the compared students, and the change from generic-only to task-only."""
    measure, compared = HEADLINE[task], numbers.compared()
    rows = []
    for locale in numbers.locales(task):
        place = Place(locale=locale)
        cells = [spread(numbers.mean(student, task, measure.error, place)) for student in compared]
        difference = numbers.difference(numbers.with_share(1.0), numbers.with_share(0.0), measure, place)
        rows.append([locale, *cells, relative_text(difference)])
    header = ["Locale", *(numbers.label(student) for student in compared), "task 100 % against generic only"]
    caption = f"{measure.error_title} by locale, in %, and its relative change with a 95 % interval. {EXPLORATORY}"
    return Table(header, rows, caption)


def teacher_table(numbers: Numbers) -> Table:
    """Loss and accuracy of each teacher by kind of text and language, and the unigram's loss."""
    rows = [
        [kind, locale, fixed(numbers.unigram_loss(numbers.teachers[0], kind, locale), 2)]
        + [cell for teacher in numbers.teachers for cell in heldout_cells(numbers, teacher, kind, locale)]
        for kind in ("task", "generic")
        for locale in numbers.heldout_locales(kind)
    ]
    columns = [f"{numbers.label(teacher)}, {what}" for teacher in numbers.teachers for what in ("loss", "accuracy")]
    caption = "Loss in nats per masked token (↓) and accuracy of masked tokens in % (↑), on held-out text."
    return Table(["Text", "Language", "Unigram loss", *columns], rows, caption, 2)


def domain_table(gains: Sequence[DomainGain], tasks: Sequence[str]) -> Table:
    """A row for each domain: how far its text is from generic text, and its relative error reduction."""

    def gain(row: DomainGain, task: str) -> str:
        difference = row.gains[task]
        found = relative(difference)
        if difference is None or found is None:
            return NONE
        # A gain is a fall of the error, so the ends of the interval change places.
        value, high, low = (signed(-100 * one) for one in found)
        return uninformative(difference) or f"{value} % [{low}, {high}]"

    rows = [
        [
            row.domain,
            NONE if row.tokens is None else f"{row.tokens:,}",
            *(fixed(value, 3) for value in (row.jsd, row.jsd_matched, row.overlap)),
            *(gain(row, task) for task in tasks),
        ]
        for row in gains
    ]
    header = ["Domain", "Tokens", "JSD", "JSD, matched", "Overlap", *(f"{TASK_NAMES[task]} gain" for task in tasks)]
    caption = (
        "JSD: Jensen-Shannon divergence in bits of the domain's train text from the generic train text, once over all "
        "of both and once at one matched number of tokens. Overlap: share of the most frequent tokens in common. Gain: "
        "relative reduction of the DC error or the semantic error rate, task text only against generic text only, with "
        f"its 95 % interval. {EXPLORATORY}"
    )
    return Table(header, rows, caption)


def findings_table(findings: Mapping[str, Mapping[str, Answer]], sections: Sequence[str]) -> Table:
    """A row for each finding of the paper: seen, not seen or undecided here, and the sections that show it."""
    used = [what for what in JUDGED_NAMES if any(what in answers for answers in findings.values())]
    rows = [
        [
            f"{number}. {claim}",
            *(answers[what].status if what in answers else NONE for what in used),
            section,
        ]
        for number, ((claim, answers), section) in enumerate(zip(findings.items(), sections, strict=True), start=1)
    ]
    caption = (
        "Seen: a significant difference in the paper's direction, over at least three seeds (p < 0.05, Holm-adjusted: "
        "finding 1 among the declared comparisons, finding 2 over the transfer sets that task text only is compared "
        "with). Not seen: a significant difference in the other direction. Undecided: neither. Only finding 1 is a "
        "declared comparison; the others are exploratory."
    )
    header = ["Finding of the paper", *(JUDGED_NAMES[what] for what in used), "Shown in"]
    return Table(header, rows, caption, len(used) + 2)


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """The settings of a finetuning recipe."""
    rate, epochs, pooling = (recipe[key] for key in ("learning_rate", "epochs", "pooling"))
    factor = recipe.get("encoder_rate", 1)
    encoder = f" ({rate * factor:g} for the encoder)" if factor != 1 else ""
    return f"learning rate {rate:g}{encoder}, {epochs:g} epochs, pooling {pooling}"


def recipe_table(numbers: Numbers) -> Table:
    """A row for each finetuning recipe, or C of a baseline, that was tried on dev."""
    labels = {student.name: numbers.label(student) for student in numbers.students}
    trials: dict[tuple[str, str, str], int] = {}
    rows = []
    for row in numbers.inputs.recipes:
        part, name = str(row.get("part", "")), labels.get(row["student"]) or str(row["student"])
        trials[name, row["task"], part] = trials.get((name, row["task"], part), 0) + 1
        task = TASK_NAMES.get(row["task"], row["task"])
        rows.append(
            [
                name,
                f"{task}, {part}" if part == "slots" or part == "intent" else task,
                f"C = {row['c']:g}" if part else recipe_text(row),
                fixed(None if row["dev_score"] is None else 100 * row["dev_score"], 2),
                "chosen" if row["chosen"] else "",
            ]
        )
    by_count: dict[int, list[str]] = {}
    for (name, _, _), count in trials.items():
        by_count.setdefault(count, []).append(escaped(name))
    groups = {count: list(dict.fromkeys(by_count[count])) for count in sorted(by_count)}
    most = max(groups, key=lambda count: len(groups[count]), default=0)
    if len(groups.get(most, ())) > 2:  # names hold commas, so many of them are hard to tell apart
        groups[most] = ["every other row" if len(groups) > 1 else "every row"]
    counts = "; ".join(f"{count} for {' and '.join(names)}" for count, names in groups.items())
    caption = (
        "The same search for every student, on the dev partition with the first seed; n-grams and the probe choose the "
        f"C of their regression there. Trials of each row and task: {counts}."
    )
    return Table(["Student", "Task", "Tried", "Dev score, %", ""], rows, caption, 3)


def text_table(numbers: Numbers) -> Table:
    """The text that each transfer set showed its student, and how often it repeated; by store while that is short."""
    realized, shares = numbers.inputs.realized, numbers.inputs.task_shares
    by_store = sum(len(entry["stores"]) for entry in realized.values()) <= MOST_STORE_ROWS
    rows = []
    for name, entry in sorted(realized.items(), key=lambda item: (shares.get(item[0], 0.0), item[0])):
        for source, amount in entry["stores" if by_store else "kinds"].items():
            if amount["rows"]:
                share, epochs = percent(amount["tokens_share"]), fixed(amount["epochs"], 2)
                cut = percent(amount["cut_share"]) if "cut_share" in amount else NONE
                rows.append([name, source, f"{amount['tokens']:,}", share, epochs, f"{amount['unique_tokens']:,}", cut])
    source = "Store" if by_store else "Kind"
    header = ["Transfer set", source, "Tokens seen", "Share", "Epochs", "Unique tokens", "Cut"]
    caption = (
        "Text that each student was distilled on, in maskable tokens. Cut: the share of its texts that are longer than "
        "a row and were read in pieces."
    )
    return Table(header, rows, caption, 2)


def time_table(seconds: Mapping[str, float]) -> Table:
    """Wall time of the stages, grouped by what it was spent on; unknown times are left out."""
    phases: dict[str, list[float]] = {}
    for stage, value in seconds.items():
        first = stage.split("-")[0]
        phases.setdefault(PHASES.get(first, first), []).append(value)
    groups = {**phases, "all": list(seconds.values())}
    rows = []
    for phase, values in groups.items():
        known = [value for value in values if value is not None and math.isfinite(value)]
        rows.append([phase, str(len(values)), f"{sum(known):,.0f}" if known or phase == "all" else NONE])
    return Table(["Stages", "Number", "Seconds"], rows, "Wall time of all stages, in whichever start they ran.")


def latency_table(latency: Mapping[str, Any]) -> Table:
    """A row for each encoder size of the study: what it takes to store and to run."""
    models = latency["models"]
    counts = sorted({batch["utterances"] for one in models for batch in one["batches"]})
    times = [{batch["utterances"]: batch for batch in one["batches"]} for one in models]
    largest = counts[-1:]  # how many times as fast is said for the largest batch only

    def gain(index: int, count: int) -> str:
        if index == 0:
            return "reference"
        medians = [times[one][count]["p50_ms"] for one in (0, index) if count in times[one]]
        return f"{medians[0] / medians[1]:.1f}" if len(medians) == 2 else NONE

    def milliseconds(batch: Mapping[str, Any] | None) -> str:
        return NONE if batch is None else f"{batch['p50_ms']:.2f} ({batch['p95_ms']:.2f})"

    rows = [
        [
            one["name"],
            f"{one['layers']} × {one['hidden_size']}",
            f"{one['parameters']:,}",
            f"{one['without_embeddings']:,}",
            *(f"{one['bytes'][kind] / 1e6:,.2f}" for kind in ("float32", "int8")),
            *(milliseconds(times[index].get(count)) for count in counts),
            *(gain(index, count) for count in largest),
        ]
        for index, one in enumerate(models)
    ]
    header = [
        *("Encoder", "Layers × hidden", "Parameters", "without embeddings", "MB in float32", "MB in int8"),
        *(f"ms for {plural(count, 'utterance')}, p50 (p95)" for count in counts),
        *(f"{count} utterances, times as fast as the {models[0]['name']}" for count in largest),
    ]
    return Table(header, rows, "What each size in this study takes to store and to run.", 2)


def terminal_table(numbers: Numbers) -> Table:
    """The headline scores of both tasks, narrow enough for a terminal."""
    measures = [one for one in numbers.measures() if one.shown != "exact_match"]
    rows = []
    for student in numbers.students:
        means = [spread(numbers.mean(student, one.task, one.shown), digits=1) for one in measures]
        rows.append([numbers.label(student), *means])
    caption = f"Test set, in %, {seeds_text(numbers)}; errors and SemER: lower is better, F1: higher"
    return Table(["Student", *(one.title for one in measures)], rows, caption)
