"""The report of a study: report.md, report.html and figures, and the summary for the terminal."""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from kd_jax.runtime.files import write_atomically
from kd_jax.runtime.paths import as_path, make_folder
from kd_jax.study.report import figures, tables
from kd_jax.study.report.choosing import choosing_section
from kd_jax.study.report.document import Block, Bullets, Document, Picture, Section, Text, markdown
from kd_jax.study.report.findings import (
    LOSS,
    NOT_RUN,
    DomainGain,
    correlation,
    correlation_text,
    divergence_key,
    domain_gains,
    findings,
    loss_text,
    scratch_text,
    similarity_points,
    unigram_text,
    verdict_text,
)
from kd_jax.study.report.html import page
from kd_jax.study.report.inputs import HEADLINE, TASK_NAMES, TEST, Numbers, Place, ReportInputs
from kd_jax.study.report.plotting import write_figure

__all__ = ["ReportInputs", "ReportPaths", "summary_text", "write_report"]

OWN_CHOICES = (
    "The sizes of teacher and students, the shares of task text, the amounts of text and the measure of similarity are "
    "this study's own "
    "choices; the paper's (Peris et al. 2022, arXiv 2210.04834) are not public, so its numbers are not to be compared "
    "with these."
)
RESULTS, CURVES, SIMILARITY = (
    "Results",
    "Error against the share of task text",
    "Similarity to generic text against the gain",
)
HELDOUT = "Held-out masked-LM loss"
FINDING_PLACES = (RESULTS, f"{CURVES}; {HELDOUT}", SIMILARITY, f"{RESULTS}; {HELDOUT}")

Draw = Callable[[str, Figure | None, str, str, str], Block]


class ReportPaths(NamedTuple):
    """Where the parts of a report lie."""

    markdown: pathlib.Path
    html: pathlib.Path
    figures: pathlib.Path


def write_report(folder: pathlib.Path, inputs: ReportInputs) -> ReportPaths:
    """Writes report.md, report.html and figures/*.svg, *.png under `folder`, each whole or not at all.

    Raises UserError where a file cannot be written. What a study did not run is said in a sentence, never an error.
    """
    folder = as_path(folder)
    paths = ReportPaths(folder / "report.md", folder / "report.html", folder / "figures")

    def draw(name: str, figure: Figure | None, caption: str, alternative: str, missing: str) -> Block:
        if figure is None:
            return Text(missing)
        write_figure(figure, paths.figures, name)
        return Picture(name, caption, alternative)

    make_folder(paths.figures)
    document = build(inputs, draw)
    write_atomically(paths.markdown, markdown(document))
    write_atomically(paths.html, page(document, paths.figures))
    return paths


def summary_text(inputs: ReportInputs) -> str:
    """The result table and the verdict as plain text of at most 110 columns, for the terminal."""
    numbers = inputs.numbers
    lines = [inputs.name]
    if numbers.students:
        for table in tables.terminal_tables(numbers):
            lines += ["", _wrapped(table.caption), tables.plain(table)]
    lines += ["", *(_wrapped(text.replace("**", "")) for text in _verdict_sentences(numbers))]
    lines += [_wrapped(f"Note: {note}") for note in inputs.notes]
    return "\n".join(lines)


def _wrapped(text: str, width: int = 110) -> str:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def _verdict_sentences(numbers: Numbers) -> list[str]:
    sentences = [verdict_text(numbers, task) for task in numbers.tasks()]
    if not sentences:
        sentences = ["**No verdict.** There are no downstream results."]
    return sentences + [text for text in (scratch_text(numbers), loss_text(numbers), unigram_text(numbers)) if text]


def build(inputs: ReportInputs, draw: Draw) -> Document:
    """The whole report; `draw` writes a figure and gives the block that shows it."""
    numbers = inputs.numbers
    gains = domain_gains(numbers)
    sections = [
        _verdict_section(numbers),
        _results_section(numbers),
        _heldout_section(numbers, draw),
        _curve_section(numbers, draw),
        _test_sets_section(numbers, draw),
        _locale_section(numbers, draw),
        _teacher_section(numbers, draw),
        _similarity_section(numbers, gains, draw),
        choosing_section(inputs.latency),
        _training_section(numbers, draw),
        _findings_section(numbers, gains),
        _method_section(numbers),
    ]
    return Document(f"{inputs.name}: on which text to distill", sections)


def _verdict_section(numbers: Numbers) -> Section:
    blocks: list[Block] = [Text(text) for text in _verdict_sentences(numbers)]
    if numbers.inputs.notes:
        blocks.append(Bullets([f"**Note:** {note}" for note in numbers.inputs.notes]))
    return Section("Verdict", [*blocks, Text(OWN_CHOICES)])


def _results_section(numbers: Numbers) -> Section:
    if not numbers.students or not numbers.tasks():
        return Section(RESULTS, [Text("No student was finetuned and tested, so there is no table.")])
    blocks: list[Block] = [tables.result_table(numbers)]
    for task in HEADLINE:
        if task not in numbers.tasks():
            blocks.append(Text(f"{TASK_NAMES[task]} was not part of this study."))
    if numbers.scratch is None or not any(student.kind == "mlm" for student in numbers.students):
        blocks.append(Text("A baseline is missing: from scratch, or MLM alone on the same text."))
    return Section(RESULTS, [*blocks, Text(_interval_text(numbers))])


def _interval_text(numbers: Numbers) -> str:
    text = (
        "Intervals come from a paired bootstrap over seeds and utterances (locales of one utterance together). They "
        "cover seeds and test "
        "utterances; they do not cover what all seeds share: the teacher, the texts, the finetuning recipe, the "
        "languages."
    )
    if not numbers.inputs.records:
        text = "No records of single utterances were given, so intervals cover seeds only."
    return text + (" With one seed they cover test utterances only." if len(numbers.seeds()) == 1 else "")


def _heldout_section(numbers: Numbers, draw: Draw) -> Section:
    figure = draw(
        "heldout_loss",
        figures.heldout_loss(numbers),
        "Held-out masked-LM loss (lower is better). Small points are seeds, large ones their means; the dashed line is "
        "a unigram's loss.",
        "Dot plot of held-out masked-LM loss by student and teacher, on task and on generic text",
        "No held-out masked-LM loss was measured.",
    )
    if isinstance(figure, Text):
        return Section(HELDOUT, [figure])
    text = (
        "What the students learned before any finetuning. It can be told at sizes at which the downstream tasks cannot "
        "be; a low loss on "
        "task text is what training on task text aims at, so it shows that distillation worked rather than that it "
        "helps."
    )
    return Section(HELDOUT, [Text(text), figure, tables.heldout_table(numbers)])


def _curve_section(numbers: Numbers, draw: Draw) -> Section:
    return Section(
        CURVES,
        [
            draw(
                "share_curves",
                figures.share_curves(numbers),
                "Error against the share of task text in the transfer set. The line joins the means over seeds of the "
                "students distilled "
                "from the generic teacher; students by MLM alone and from the adapted teacher stand beside their "
                "share. Axes start where "
                "the data do, not at zero.",
                "Line plots of each error rate against the share of task text",
                "No distilled student was tested, so there is no curve.",
            )
        ],
    )


def _test_sets_section(numbers: Numbers, draw: Draw) -> Section:
    title = "Unseen and tail utterances"
    names = {name for task in numbers.tasks() for name in numbers.test_sets(task)}
    blocks: list[Block] = []
    for name, meaning in (
        ("test_unseen", "utterances whose text is not in train"),
        ("tail", "utterances with at least one word that is not in train"),
    ):
        if name not in names:
            blocks.append(Text(f"There are no results on `{name}` ({meaning})."))
            continue
        blocks.append(Text(f"`{name}`: {meaning}{_same_as_test(numbers, name)}."))
        blocks.append(tables.result_table(numbers, name))
    if names - {TEST}:
        figure = draw(
            "test_sets",
            figures.by_test_set(numbers),
            "The headline error rates by test set. Small points are seeds, large ones their means.",
            "Dot plot of error rates by test set and student",
            "",
        )
        blocks.append(figure)
    return Section(title, blocks)


def _same_as_test(numbers: Numbers, name: str) -> str:
    """A remark where a test set holds every test utterance, so that its numbers repeat those of test."""
    for task in numbers.tasks():
        metric = "error_rate" if task == "dc" else "exact_match"
        for student in numbers.students[:1]:
            counts = [numbers.count(student, task, metric, Place(test_set)) for test_set in (name, TEST)]
            if counts[0] is None or counts[0] != counts[1]:
                return ""
    return "; here these are all test utterances, so the numbers are those of the first table"


def _locale_section(numbers: Numbers, draw: Draw) -> Section:
    title, tasks = "By locale", [task for task in numbers.tasks() if numbers.locales(task)]
    if not tasks:
        return Section(title, [Text("There are no results by locale.")])
    figure = draw(
        "locales",
        figures.by_locale(numbers),
        "The headline error rates by locale. Small points are seeds, large ones their means.",
        "Dot plot of error rates by locale and student",
        "None of the students that this figure compares was tested.",
    )
    return Section(title, [figure, *(tables.locale_table(numbers, task) for task in tasks)])


def _teacher_section(numbers: Numbers, draw: Draw) -> Section:
    title = "Noise of the teachers"
    figure = draw(
        "teacher_noise",
        figures.teacher_noise(numbers),
        "Held-out masked-LM loss and masked-token accuracy of each teacher by language. A teacher at or right of the "
        "unigram's mark knows no "
        "more about such text than how often each piece occurs.",
        "Dot plots of teacher loss and accuracy by language on task and generic text",
        "No teacher's held-out loss was measured.",
    )
    blocks: list[Block] = [figure]
    if isinstance(figure, Picture):
        blocks.append(tables.teacher_table(numbers))
    if len(numbers.teachers) == 1:
        blocks.append(Text(f"There is one teacher, the {numbers.label(numbers.teachers[0])}."))
    return Section(title, blocks)


def _similarity_section(numbers: Numbers, gains: Sequence[DomainGain], draw: Draw) -> Section:
    rows = list(gains)
    if not rows:
        return Section(SIMILARITY, [Text("No domain's text was compared with the generic text.")])
    tasks = numbers.tasks()
    lines = [f"{TASK_NAMES[task]}: {correlation_text(correlation(rows, task))}." for task in tasks]
    left_out = {task: len(rows) - len(similarity_points(rows, task)) for task in tasks}
    lines += [
        f"{TASK_NAMES[task]}: {count} of {len(rows)} domains have no gain (no result, or no error to reduce) and are "
        f"left out."
        for task, count in left_out.items()
        if count
    ]
    used = "at a matched number of tokens" if divergence_key(rows) == "jsd_matched" else "over all of the text"
    text = (
        f"For each domain, the Jensen-Shannon divergence of its train text from the generic train text ({used}) "
        f"against the relative error "
        "reduction by task text only against generic text only. ρ below zero: the more similar domains gain more; "
        "above: the less similar. "
        "The interval is a bootstrap over domains, rough below ten of them; a domain's gain is noisier the fewer "
        "utterances it has."
    )
    figure = draw(
        "similarity",
        figures.similarity_scatter(numbers, rows),
        "One point a domain. The intervals of the gains are in the table.",
        "Scatter plot of each domain's divergence from generic text against its gain from task text",
        "There are no gains by domain: that takes a generic-only and a task-only student, and records or several "
        "seeds.",
    )
    return Section(SIMILARITY, [Text(text), Bullets(lines), figure, tables.domain_table(rows, tasks)])


def _training_section(numbers: Numbers, draw: Draw) -> Section:
    figure = draw(
        "training",
        figures.training_curves(numbers),
        "Masked-LM loss on each run's own training text, so curves on different text are not to be compared with each "
        "other; a line a seed.",
        "Line plots of training loss against the step for teachers and students",
        "No training curves were recorded.",
    )
    return Section("Training curves", [figure])


def _findings_section(numbers: Numbers, gains: Sequence[DomainGain]) -> Section:
    found = findings(numbers, list(gains))
    names = {**TASK_NAMES, LOSS: "held-out task loss"}
    details = []
    for number, finding in enumerate(found, start=1):
        clauses = [f"{names[what]} **{answer.status}**: {answer.reason}" for what, answer in finding.answers.items()]
        details.append(f"**{number}.** " + ("; ".join(clauses) if clauses else NOT_RUN) + ".")
    warning = [Text(f"**To be read with this in mind:** {text}")] if (text := unigram_text(numbers)) else []
    blocks: list[Block] = [*warning, tables.findings_table(found, FINDING_PLACES), Bullets(details)]
    return Section("The paper's four findings", blocks)


def _method_section(numbers: Numbers) -> Section:
    inputs = numbers.inputs
    blocks: list[Block] = []
    if inputs.config:
        blocks.append(Bullets(_settings(inputs)))
    if inputs.recipes:
        if len({(row["learning_rate"], row["epochs"]) for row in inputs.recipes}) == 1:
            row = inputs.recipes[0]
            recipe = f"learning rate {row['learning_rate']:g}, {row['epochs']:g} epochs"
            blocks.append(Text(f"One finetuning recipe was given for all students ({recipe}); nothing was searched."))
        else:
            blocks.append(tables.recipe_table(numbers))
    if inputs.realized:
        blocks.append(tables.text_table(numbers))
    blocks.append(Bullets(_provenance_lines(inputs)))
    if inputs.provenance.get("seconds"):
        blocks.append(tables.time_table(inputs.provenance["seconds"]))
    return Section("How it was done", blocks)


def _settings(inputs: ReportInputs) -> list[str]:
    """What of the config a reader needs to judge the numbers."""
    config = inputs.config
    sizes = [
        f"{name}: {config[name]['num_layers']} layers × {config[name]['hidden_size']}"
        for name in ("teacher", "student")
        if name in config
    ]
    lines = [f"Encoders of our own choice: {', '.join(sizes)}."] if sizes else []
    imported = config["study"]["teacher_import"] if "study" in config else ""
    if imported:
        lines.append(f"The generic teacher was pretrained by others: `{imported}`.")
    teacher = "the masked-LM head of the imported teacher alone" if imported else "teacher"
    if imported and not config["study"]["train_head"]:
        config = {name: block for name, block in config.items() if name != "pretrain"}
    for name, what in (("pretrain", teacher), ("adapt", "adapted teacher, further"), ("distill", "each student")):
        if name in config:
            steps, batch = config[name]["steps"], config[name]["batch_size"]
            lines.append(
                f"`{name}` ({what}): {steps} steps of {batch} rows, learning rate {config[name]['learning_rate']:g}."
            )
    if "study" in config:
        seeds = ", ".join(str(seed) for seed in config["study"]["seeds"])
        lines.append(
            f"Seeds {seeds}: a seed varies the student's initialization, the order of the data in distillation and "
            f"finetuning, and dropout. "
            "Teachers, row stores, masks (`masking.seed`) and the chosen recipe are the same for all seeds."
        )
    return lines


def _provenance_lines(inputs: ReportInputs) -> list[str]:
    """Everything in provenance but the stages' seconds, one line each."""
    lines = []
    for name, value in inputs.provenance.items():
        if name == "seconds":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
        label = "config hash" if name == "config" else name.replace("_", " ")
        lines.append(f"{label}: `{'unknown' if value in (None, '') else value}`")
    return lines or ["The command, commit and versions were not recorded."]
