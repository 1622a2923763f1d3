"""The report's tables, and the plain-text one for the terminal."""

import math
from collections.abc import Mapping, Sequence

from kd_jax.evaluation.significance import Interval
from kd_jax.study.plan import Student
from kd_jax.study.report.document import Table
from kd_jax.study.report.findings import LOSS, DomainGain, Finding, relative, relative_text, signed
from kd_jax.study.report.inputs import HEADLINE, TASK_NAMES, TEST, Measure, Numbers, Place, percent

NONE = "–"
MOST_STORE_ROWS = 40
# The first word of a stage's name -> what its time is spent on.
PHASES = {
    "prepare": "prepare text",
    "import": "import the teacher",
    "pretrain": "pretrain the teacher",
    "train": "train the imported teacher's head",
    "adapt": "adapt the teacher",
    "mlm": "students by MLM alone",
    "distilled": "distill students",
    "dc": "finetune DC, recipe search included",
    "icner": "finetune ICNER, recipe search included",
    "test": "evaluate",
    "latency": "measure size and latency",
}


def spread(interval: Interval | None, scale: float = 100.0, digits: int = 2) -> str:
    """Mean and standard deviation over seeds; without the latter for one seed."""
    if interval is None:
        return NONE
    mean = f"{scale * interval.mean:.{digits}f}"
    return mean if interval.deviation is None else f"{mean} ± {scale * interval.deviation:.{digits}f}"


def change(numbers: Numbers, student: Student, reference: Student | None, measure: Measure, place: Place) -> str:
    """Relative change of the error rate, with its interval where there is one."""
    if reference is None:
        return NONE
    if student == reference:
        return "reference"
    difference = numbers.difference(student, reference, measure, place)
    if difference is not None:
        return relative_text(difference)
    mean = numbers.mean(student, measure.task, measure.error, place)
    base = numbers.mean(reference, measure.task, measure.error, place)
    if mean is None or base is None or base.mean == 0:
        return NONE
    return f"{signed(100 * (mean.mean / base.mean - 1))} % (no interval)"


def result_table(numbers: Numbers, test_set: str = TEST) -> Table:
    """A row for each student: mean ± spread over seeds of each measure, and the change against generic-only."""
    measures, reference, place = numbers.measures(), numbers.with_share(0.0), Place(test_set)
    rows = [
        [numbers.label(student)]
        + [
            f"{spread(numbers.mean(student, measure.task, measure.shown, place))}\n"
            f"{change(numbers, student, reference, measure, place)}"
            for measure in measures
        ]
        for student in numbers.students
    ]
    against = (
        f"second line: relative change of the error rate (1 − F1 for slots, 1 − exact match) against "
        f"{numbers.label(reference)}, "
        "with its 95 % interval"
        if reference
        else "there is no distilled student with generic text only, so nothing to state changes against"
    )
    sizes = [
        f"{numbers.count(student, task, 'error_rate' if task == 'dc' else 'exact_match', place)} utterances for "
        f"{TASK_NAMES[task]}"
        for task in numbers.tasks()
        for student in numbers.students[:1]
    ]
    caption = (
        f"Test set `{test_set}` ({', '.join(sizes)}), in %: mean ± standard deviation over {seeds_text(numbers)}; "
        f"{against}."
    )
    strong = [index for index, student in enumerate(numbers.students) if student == reference]
    return Table(["Student", *(f"{measure.title} {arrow(measure)}" for measure in measures)], rows, caption, 1, strong)


def arrow(measure: Measure) -> str:
    """Which way is better."""
    return "↓" if measure.shown == measure.error else "↑"


def seeds_text(numbers: Numbers) -> str:
    """How many seeds a mean is over, for captions."""
    count = len(numbers.seeds())
    return f"{count} seeds" if count != 1 else "one seed (so no spread)"


def heldout_table(numbers: Numbers) -> Table:
    """Masked-LM loss and accuracy of students and teachers on held-out text, beside a unigram's loss."""
    rows = []
    for who in [*numbers.teachers, *numbers.students]:
        cells = []
        for kind in ("task", "generic"):
            place = Place(f"heldout_{kind}")
            cells.append(spread(numbers.mean(who, "mlm", "loss", place), 1.0))
            cells.append(spread(numbers.mean(who, "mlm", "accuracy", place), digits=1))
        if any(cell != NONE for cell in cells):
            rows.append([numbers.label(who), *cells])
    unigram = []
    for kind in ("task", "generic"):
        value = unigram_loss(numbers, kind)
        unigram += [NONE if value is None else f"{value:.2f}", NONE]
    rows.append(["a unigram", *unigram])
    caption = (
        f"Held-out masked-LM loss in nats a masked token (↓) and masked-token accuracy in % (↑): mean ± standard "
        f"deviation over "
        f"{seeds_text(numbers)}. A from-scratch student has learned no masked LM."
    )
    header = ["Model", "Loss, task text", "Accuracy, task text", "Loss, generic text", "Accuracy, generic text"]
    return Table(header, rows, caption)


def unigram_loss(numbers: Numbers, kind: str, locale: str = "all") -> float | None:
    """Held-out loss in nats of a unigram on "task" or "generic" text; the same for every model."""
    for who in [*numbers.teachers, *numbers.students]:
        mean = numbers.mean(who, "mlm", "unigram_loss", Place(f"heldout_{kind}", locale))
        if mean is not None:
            return mean.mean
    return None


def locale_table(numbers: Numbers, task: str) -> Table:
    """A row for each locale: the task-only and the generic-only student, and the change between them."""
    measure, compared = HEADLINE[task], compared_students(numbers)
    pair = numbers.with_share(1.0), numbers.with_share(0.0)
    rows = []
    for locale in numbers.locales(task):
        place = Place(locale=locale)
        cells = [spread(numbers.mean(student, task, measure.error, place)) for student in compared]
        difference = relative_text(numbers.difference(*pair, measure, place))
        rows.append([locale, *cells, difference])
    header = ["Locale", *(numbers.label(student) for student in compared), "task 100 % against generic only"]
    caption = f"{measure.error_title} by locale, in %, and its relative change with a 95 % interval."
    return Table(header, rows, caption)


def compared_students(numbers: Numbers) -> list[Student]:
    """The few students that a breakdown shows: from scratch, generic only, task only, and with the adapted teacher."""
    wanted = [numbers.scratch, numbers.with_share(0.0), numbers.with_share(1.0), *numbers.distilled("adapted")[-1:]]
    return [student for student in wanted if student]


def heldout_locales(numbers: Numbers, kind: str) -> list[str]:
    """ "all", then the languages of one kind of held-out text."""
    rows = (row for row in numbers.inputs.results if row["task"] == "mlm" and row["student"] == "teacher")
    found = {row["locale"] for row in rows if row["test_set"] == f"heldout_{kind}"}
    return [name for name in ["all", *sorted(found - {"all"})] if name in found]


def teacher_table(numbers: Numbers) -> Table:
    """Loss and accuracy of each teacher by kind of text and language, beside the unigram's loss."""
    rows = []
    for kind in ("task", "generic"):
        for locale in heldout_locales(numbers, kind):
            place = Place(f"heldout_{kind}", locale)
            value = unigram_loss(numbers, kind, locale)
            cells = [NONE if value is None else f"{value:.2f}"]
            for teacher in numbers.teachers:
                cells.append(spread(numbers.mean(teacher, "mlm", "loss", place), 1.0))
                cells.append(spread(numbers.mean(teacher, "mlm", "accuracy", place), digits=1))
            rows.append([kind, locale, *cells])
    names = [numbers.label(teacher) for teacher in numbers.teachers]
    header = [
        "Text",
        "Language",
        "Unigram loss",
        *(f"{name}, {what}" for name in names for what in ("loss", "accuracy")),
    ]
    return Table(
        header, rows, "Loss in nats a masked token (↓), accuracy of masked tokens in % (↑), on held-out text.", 2
    )


def domain_table(rows: Sequence[DomainGain], tasks: Sequence[str]) -> Table:
    """A row for each domain: how far its text is from generic text, and its relative error reduction."""

    def number(value: float | None, digits: int = 3) -> str:
        return NONE if value is None else f"{value:.{digits}f}"

    def gain(row: DomainGain, task: str) -> str:
        change = relative(row.gains[task])
        if change is None:
            return NONE
        # A gain is a fall of the error, so the ends of the interval change places.
        return f"{signed(-100 * change.value)} % [{signed(-100 * change.high)}, {signed(-100 * change.low)}]"

    body = [
        [
            row.domain,
            NONE if row.tokens is None else f"{row.tokens:,}",
            *(number(value) for value in (row.jsd, row.jsd_matched, row.overlap)),
            *(gain(row, task) for task in tasks),
        ]
        for row in rows
    ]
    header = ["Domain", "Tokens", "JSD", "JSD, matched", "Overlap", *(f"{TASK_NAMES[task]} gain" for task in tasks)]
    caption = (
        "JSD: Jensen-Shannon divergence in bits of the domain's train text from the generic train text, over all of "
        "both and at one "
        "matched number of tokens; overlap: share of the most frequent pieces in common. Gain: relative reduction of "
        "the DC error or "
        "the semantic error rate by task text only against generic text only, with its 95 % interval."
    )
    return Table(header, body, caption)


def findings_table(findings: Sequence[Finding], places: Sequence[str]) -> Table:
    """A row for each finding of the paper: seen, not seen or undecided here, and the section that shows it."""
    columns = {**TASK_NAMES, LOSS: "held-out task loss"}
    used = [name for name in columns if any(name in finding.answers for finding in findings)]
    rows = [
        [
            f"{number}. {finding.claim}",
            *(finding.answers[name].status if name in finding.answers else NONE for name in used),
            place,
        ]
        for number, (finding, place) in enumerate(zip(findings, places), start=1)
    ]
    caption = (
        "Seen: told apart from no difference, in the paper's direction, over at least three seeds (p < 0.05, "
        "Holm-adjusted where "
        "several students are compared); not seen: told apart in the other direction; undecided: neither."
    )
    return Table(["Finding of the paper", *(columns[name] for name in used), "Shown in"], rows, caption, len(used) + 2)


def recipe_table(numbers: Numbers) -> Table:
    """A row for each finetuning recipe that was tried on dev."""
    labels = {student.name: numbers.label(student) for student in numbers.students}
    rows = [
        [
            labels[row["student"]] if row["student"] in labels else row["student"],
            TASK_NAMES[row["task"]] if row["task"] in TASK_NAMES else row["task"],
            f"{row['learning_rate']:g}",
            f"{row['epochs']:g}",
            NONE if row["dev_score"] is None else f"{100 * row['dev_score']:.2f}",
            "chosen" if row["chosen"] else "",
        ]
        for row in numbers.inputs.recipes
    ]
    header = ["Student", "Task", "Learning rate", "Epochs", "Dev score, %", ""]
    return Table(
        header, rows, "The same search for every kind of student, on the dev partition with the first seed.", 2
    )


def text_table(numbers: Numbers) -> Table:
    """How much text of each kind each transfer set saw, and how often it repeated; by store where that is short."""
    realized = numbers.inputs.realized
    stores = sum(len(entry["stores"]) for entry in realized.values())
    level = "stores" if stores <= MOST_STORE_ROWS else "kinds"
    rows = []
    for name, entry in sorted(realized.items(), key=lambda item: (_share_of(numbers, item[0]), item[0])):
        for source, amount in entry[level].items():
            if amount["rows"]:
                numbers_of = (f"{amount['tokens']:,}", percent(amount["tokens_share"]), f"{amount['epochs']:.2f}")
                rows.append([name, source, *numbers_of, f"{amount['unique_tokens']:,}"])
    header = [
        "Transfer set",
        "Store" if level == "stores" else "Kind",
        "Tokens seen",
        "Share",
        "Epochs",
        "Unique tokens",
    ]
    return Table(header, rows, "Text that each student was distilled on, in maskable tokens.", 2)


def _share_of(numbers: Numbers, transfer_set: str) -> float:
    shares = numbers.inputs.task_shares
    return shares.get(transfer_set, 0.0)


def time_table(seconds: Mapping[str, float]) -> Table:
    """Wall time of the stages, by what it was spent on."""
    phases: dict[str, list[float]] = {}
    for stage, value in seconds.items():
        first = stage.split("-")[0]
        phases.setdefault(PHASES.get(first, first), []).append(value)
    rows = []
    for phase, values in phases.items():
        known = [value for value in values if value is not None and math.isfinite(value)]
        rows.append([phase, str(len(values)), f"{sum(known):,.0f}" if known else NONE])
    total = sum(value for value in seconds.values() if value is not None and math.isfinite(value))
    rows.append(["all", str(len(seconds)), f"{total:,.0f}"])
    return Table(["Stages", "Number", "Seconds"], rows, "Wall time of all stages, from whichever start ran them.")


def plain(table: Table, width: int = 110) -> str:
    """A table as aligned text; the first column is cut so that a line has at most `width` characters."""
    cells = [list(table.header), *(list(row) for row in table.rows)]
    sizes = [max(len(row[column]) for row in cells) for column in range(len(table.header))]
    sizes[0] = min(sizes[0], max(8, width - sum(sizes[1:]) - 2 * (len(sizes) - 1)))

    def line(row: Sequence[str]) -> str:
        first = row[0] if len(row[0]) <= sizes[0] else row[0][: sizes[0] - 1] + "…"
        return "  ".join(
            [first.ljust(sizes[0]), *(cell.rjust(size) for cell, size in zip(row[1:], sizes[1:]))]
        ).rstrip()

    return "\n".join([line(cells[0]), "-" * (sum(sizes) + 2 * (len(sizes) - 1)), *(line(row) for row in cells[1:])])


def terminal_tables(numbers: Numbers) -> list[Table]:
    """Scores, and relative changes against generic-only, each narrow enough for a terminal."""
    measures, reference, place = numbers.measures(), numbers.with_share(0.0), Place(TEST)
    scores, changes = [], []
    for student in numbers.students:
        loss = numbers.mean(student, "mlm", "loss", Place("heldout_task"))
        means = [numbers.mean(student, measure.task, measure.shown, place) for measure in measures]
        scores.append([short_label(numbers, student), *(spread(mean) for mean in means), spread(loss, 1.0)])
        changes.append(
            [short_label(numbers, student), *(marked(numbers, student, reference, measure) for measure in measures)]
        )
    names = [measure.title for measure in measures]
    tables = [
        Table(["Student", *names, "Task loss"], scores, f"Mean ± standard deviation over {seeds_text(numbers)}, in %")
    ]
    if reference and len(numbers.students) > 1 and measures:
        errors = [measure.title if measure.shown == measure.error else f"{measure.title} error" for measure in measures]
        caption = "Relative change of error rates against generic only, in %; * the 95 % interval leaves out zero"
        tables.append(Table(["Student", *errors], changes, caption))
    return tables


def short_label(numbers: Numbers, student: Student) -> str:
    """The label, short enough for a terminal."""
    return numbers.label(student).removesuffix(" teacher")


def marked(numbers: Numbers, student: Student, reference: Student | None, measure: Measure) -> str:
    """The relative change in %, with a star where its interval leaves out zero."""
    if student == reference:
        return "0  "
    found = relative(numbers.difference(student, reference, measure))
    if found is None:
        text = change(numbers, student, reference, measure, Place(TEST)).removesuffix(" % (no interval)")
        return f"{text}  "
    apart = found.low > 0 or found.high < 0
    return f"{signed(100 * found.value)}{' *' if apart else '  '}"
