"""The report of a study: report.md, report.html, figures, and the summary for the terminal.

The report is composed once, as Markdown. The HTML page is rendered from it, with the figures embedded, so it needs no
network.
"""

import base64
import html
import pathlib
import re
import string
import textwrap
from collections.abc import Collection, Mapping
from importlib import resources
from typing import Any

from markdown_it import MarkdownIt

from kd_jax.config.settings import read
from kd_jax.config.training import Distill
from kd_jax.data.embedded.teacher import model_title
from kd_jax.runtime.files import write_atomically
from kd_jax.runtime.paths import as_path, make_folder
from kd_jax.study.report import tables
from kd_jax.study.report.contrasts import declared_student, left_out, trend_text, verdict_text
from kd_jax.study.report.figures import FIGURES
from kd_jax.study.report.findings import (
    FEWEST_DOMAINS,
    NOT_RUN,
    DomainGain,
    correlation,
    correlation_text,
    divergence_key,
    domain_gains,
    findings,
    loss_text,
    similarity_points,
    unigram_text,
)
from kd_jax.study.report.numbers import HEADLINE, JUDGED_NAMES, TASK_NAMES, TEST, Numbers, ReportInputs
from kd_jax.study.report.plotting import write_figure
from kd_jax.study.report.recommendation import recommendation
from kd_jax.study.report.wording import label, plural, sentence
from kd_jax.text_tables import aligned_table, escaped

WIDTH = 100  # characters in a line of the summary
DECLARED = "Declared comparisons"
RESULTS = "Results"
HELDOUT = "Held-out masked-LM loss"
CURVES = "Error against the share of task text"
SIMILARITY = "Similarity to generic text against the gain"
FINDING_SECTIONS = (DECLARED, f"{CURVES}; {HELDOUT}", SIMILARITY, f"{RESULTS}; {HELDOUT}")
NOTHING = "No verdict: there are no results on a task."
OWN_CHOICES = (
    "The sizes of teacher and students, the shares of task text, the amounts of text and the measure of similarity are "
    "this study's own choices. The paper's (Peris et al. 2022, arXiv 2210.04834) are not public, so do not compare its "
    "numbers with these."
)


def write_report(folder: pathlib.Path, inputs: ReportInputs) -> None:
    """Writes report.md, report.html and figures/*.svg, *.png under `folder`, each file atomically.

    Raises UserError if a file cannot be written. A part that the study did not run gives a sentence, never an error.
    """
    folder = as_path(folder)
    make_folder(folder / "figures")
    drawn = {name: one.draw(inputs.numbers) for name, one in FIGURES.items()}
    for name, figure in drawn.items():
        if figure is not None:
            write_figure(figure, folder / "figures", name)
    title = f"{inputs.name}: on which text to distill"
    sections = compose(inputs, [name for name, figure in drawn.items() if figure is not None])
    write_atomically(folder / "report.md", markdown(title, sections))
    write_atomically(folder / "report.html", page(title, sections, folder))


def summary_text(inputs: ReportInputs) -> str:
    """What to do and one table of results as plain text of at most 100 columns, for the terminal."""

    def wrapped(text: str) -> str:
        return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)

    numbers = inputs.numbers
    found = [recommendation(numbers, task) for task in numbers.tasks()]
    said = [f"{sentence(one.title)}. Evidence: {one.evidence}." for one in found] or [NOTHING]
    said += [f"For stronger evidence, {step}." for step in dict.fromkeys(one.next_step for one in found)]
    lines = [inputs.name, "", *(wrapped(plain(text)) for text in said)]
    lines += [wrapped(f"Note: {note}") for note in inputs.notes]
    if numbers.students:
        table = tables.terminal_table(numbers)
        lines += ["", wrapped(table.caption), aligned_table(table.header, table.rows, rule=True, width=WIDTH)]
    return "\n".join(lines)


def compose(inputs: ReportInputs, drawn: Collection[str]) -> dict[str, str]:
    """The sections of the report: title -> Markdown. `drawn` are the names of the figures that have been drawn."""
    numbers, gains = inputs.numbers, domain_gains(inputs.numbers)
    shown = {
        name: f"![{one.alternative}](figures/{name}.svg)\n\n*{one.caption}*" if name in drawn else one.missing
        for name, one in FIGURES.items()
    }
    return {
        "What to do": _joined(_what_to_do_section(numbers), shown["answer"]),
        "Verdict": _joined(*_verdict_sentences(numbers), OWN_CHOICES),
        DECLARED: _declared_section(numbers),
        RESULTS: _results_section(numbers),
        HELDOUT: _heldout_section(numbers, shown["heldout_loss"]),
        CURVES: _joined(shown["share_curves"], shown["amount_curves"]),
        "Unseen and tail utterances": _test_sets_section(numbers, shown["test_sets"]),
        "By locale": _locale_section(numbers, shown["locales"]),
        "Noise of the teachers": _teacher_section(numbers, shown["teacher_noise"]),
        SIMILARITY: _similarity_section(numbers, gains, shown["similarity"]),
        "Size and latency": latency_section(inputs.latency),
        "Training curves": shown["training"],
        "The paper's four findings": _findings_section(numbers, gains),
        "How it was done": _method_section(numbers),
    }


def markdown(title: str, sections: Mapping[str, str]) -> str:
    """The report in GitHub's Markdown."""
    return "\n\n".join([f"# {escaped(title)}", *(f"## {name}\n\n{text}" for name, text in sections.items())]) + "\n"


def page(title: str, sections: Mapping[str, str], folder: pathlib.Path) -> str:
    """The report as one HTML page; the figures are read from `folder`/figures."""
    renderer = html_renderer(folder)
    anchors = {name: re.sub(r"\W", "-", name.lower()) for name in sections}
    top, *others = (
        f'<section id="{anchors[name]}">\n<h2>{html.escape(name)}</h2>\n{renderer.render(text)}</section>'
        for name, text in sections.items()
    )
    contents = "".join(
        f'<li><a href="#{anchor}">{html.escape(name)}</a></li>' for name, anchor in list(anchors.items())[1:]
    )
    template = string.Template(resources.files("kd_jax.study.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), top=top, contents=contents, sections="\n".join(others))


def html_renderer(folder: pathlib.Path) -> MarkdownIt:
    """Markdown to HTML, with tables; images are embedded from `folder`, and <br> is the only HTML that passes."""

    def text(self, tokens, index, options, env) -> str:
        """Keeps numbers with their percent sign and intervals in one line."""
        shown = html.escape(tokens[index].content, quote=False).replace(" %", "\u00a0%")
        return re.sub(r"\[[^\]]*\]", lambda interval: interval.group().replace(" ", "\u00a0"), shown)

    def image(self, tokens, index, options, env) -> str:
        data = base64.b64encode((folder / tokens[index].attrs["src"]).read_bytes()).decode()
        return f'<img alt="{html.escape(tokens[index].content)}" src="data:image/svg+xml;base64,{data}">'

    def html_inline(self, tokens, index, options, env) -> str:
        # Names are escaped when the Markdown is composed; this holds even if one was forgotten.
        content = tokens[index].content
        return content if content == "<br>" else html.escape(content)

    renderer = MarkdownIt("commonmark", {"html": True, "xhtmlOut": False}).enable("table").disable("html_block")
    for rule in (text, image, html_inline):
        renderer.add_render_rule(rule.__name__, rule)
    renderer.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
    renderer.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return renderer


def plain(text: str) -> str:
    """A paragraph of Markdown as it is read."""
    (inline,) = MarkdownIt("commonmark").parseInline(text)
    return "".join(token.content for token in inline.children or ())


def _bullets(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _joined(*blocks: str) -> str:
    return "\n\n".join(block for block in blocks if block)


def _verdict_sentences(numbers: Numbers) -> list[str]:
    sentences = [verdict_text(numbers, task) for task in numbers.tasks()]
    if not sentences:
        sentences = [f"**{NOTHING}**"]
    return sentences + [text for text in (loss_text(numbers), unigram_text(numbers)) if text]


def _what_to_do_section(numbers: Numbers) -> str:
    blocks = []
    for task in numbers.tasks():
        one = recommendation(numbers, task)
        details = [f"{one.reason}.", f"Evidence: {one.evidence}.", f"For stronger evidence, {one.next_step}."]
        blocks.append(f"**{sentence(one.title)}.**\n\n{_bullets(details)}")
    notes = [f"**Note:** {escaped(note)}" for note in numbers.inputs.notes]
    return _joined(*(blocks or [f"**{NOTHING}**"]), *notes)


def _declared_section(numbers: Numbers) -> str:
    student, tasks = declared_student(numbers), numbers.tasks()
    if student is None or not tasks:
        return "No distilled student was tested, so there is nothing to compare."
    meaning = (
        "These comparisons were fixed before any result was known, and they alone decide the verdict. The student that "
        f"represents distillation is that of the generic teacher on the most task text ({label(numbers, student)}). "
        "Distillation helps only if this student beats the one trained by masked LM alone and, where students start "
        "from the teacher, the one that was not distilled."
    )
    if unseeded := [numbers.label(one) for one in numbers.students if numbers.seedless(one)]:
        meaning += f" Rows without a seed ({'; '.join(unseeded)}) are deterministic and count for every seed."
    table = tables.declared_table(numbers)
    trends = [text for task in tasks if (text := trend_text(numbers, task))]
    trend = "Separately, and not adjusted with them, the trend along the share of task text:" if trends else ""
    return _joined(
        meaning,
        table.markdown() if table.rows else "",
        _bullets([sentence for task in tasks for sentence in left_out(numbers, task)]),
        trend,
        _bullets(trends),
        "Everything else in this report is exploratory: it suggests what to study next, and decides nothing.",
    )


def _results_section(numbers: Numbers) -> str:
    if not numbers.students or not numbers.tasks():
        return "No student was finetuned and tested, so there is no table."
    missing = [f"{TASK_NAMES[task]} was not part of this study." for task in HEADLINE if task not in numbers.tasks()]
    if numbers.scratch is None or not any(student.kind == "mlm" for student in numbers.students):
        missing.append("A baseline is missing: from scratch, or MLM alone on the same text.")
    intervals = (
        "Intervals cover seeds and test utterances. They do not cover what all seeds share: the teacher, the texts, "
        f"the finetuning recipe, the languages. {_clusters(numbers)}"
    )
    if not numbers.inputs.records:
        intervals = "No records of single utterances were given, so intervals cover seeds only."
    if len(numbers.seeds()) == 1:
        intervals += " With one seed they cover test utterances only."
    return _joined(tables.result_table(numbers).markdown(), *missing, intervals)


def _clusters(numbers: Numbers) -> str:
    """Which utterances the intervals treat as translations of each other."""
    ids = numbers.shared_ids
    if ids.shared and not ids.parallel:
        return (
            f"{ids.differing:,} of {ids.shared:,} test ids that locales share have different intents, so utterances of "
            "one id are not translations of each other, and each counts on its own."
        )
    return "All locales of one utterance count together, since translations are not independent." if ids.shared else ""


def _heldout_section(numbers: Numbers, figure: str) -> str:
    if figure == FIGURES["heldout_loss"].missing:
        return figure
    meaning = (
        "This is what the students learned before any finetuning. It differs between students at sizes at which the "
        "downstream tasks do not yet. Training on task text aims at a low loss on task text, so a low loss shows that "
        "distillation worked, not that it helps."
    )
    return _joined(meaning, figure, tables.heldout_table(numbers).markdown())


def _test_sets_section(numbers: Numbers, figure: str) -> str:
    names = {name for task in numbers.tasks() for name in numbers.test_sets(task)}
    meanings = {
        "test_unseen": "utterances whose text, case, punctuation and spaces aside, is not among the labeled ones of "
        "their locale",
        "tail": "utterances with at least one word that no labeled utterance of their locale has",
    }
    blocks = []
    for name, meaning in meanings.items():
        if name in names:
            blocks.append(f"`{name}`: {meaning}{_same_as_test(numbers, name)}.")
            blocks.append(tables.result_table(numbers, name).markdown())
        else:
            blocks.append(f"There are no results on `{name}` ({meaning}).")
    return _joined(*blocks, figure if names - {TEST} else "")


def _same_as_test(numbers: Numbers, name: str) -> str:
    """A remark if a test set holds every test utterance, so that its numbers repeat those of test."""
    for task in numbers.tasks():
        if numbers.students:
            count = tables.utterances_of(numbers, task, name)
            if count is None or count != tables.utterances_of(numbers, task, TEST):
                return ""
    return "; here these are all test utterances, so the numbers are those of the first table"


def _locale_section(numbers: Numbers, figure: str) -> str:
    tasks = [task for task in numbers.tasks() if numbers.locales(task)]
    if not tasks:
        return "There are no results by locale."
    return _joined(figure, *(tables.locale_table(numbers, task).markdown() for task in tasks))


def _teacher_section(numbers: Numbers, figure: str) -> str:
    table = tables.teacher_table(numbers)
    one = f"There is one teacher, the {label(numbers, numbers.teachers[0])}." if len(numbers.teachers) == 1 else ""
    return _joined(figure, table.markdown() if table.rows else "", one)


def _similarity_section(numbers: Numbers, gains: list[DomainGain], figure: str) -> str:
    if not gains:
        return "No domain's text was compared with the generic text."
    tasks = numbers.tasks()
    lines = [f"{TASK_NAMES[task]}: {correlation_text(correlation(gains, task))}." for task in tasks]
    if len(gains) < FEWEST_DOMAINS:
        lines = [f"{plural(len(gains), 'domain')} cannot tell whether gain goes with similarity; it takes five."]
    for task in tasks:
        if left_out := len(gains) - len(similarity_points(gains, task)):
            lines.append(
                f"{TASK_NAMES[task]}: {left_out} of {plural(len(gains), 'domain')} left out because they have no gain "
                "(no result, or no error to reduce)."
            )
    sizes = "at a matched number of tokens" if divergence_key(gains) == "jsd_matched" else "over all of the text"
    return _joined(
        f"For each domain: the Jensen-Shannon divergence of its train text from the generic train text ({sizes}) "
        "against the relative error reduction, task text only against generic text only. ρ below zero: the more "
        "similar domains gain more; above zero: the less similar. The interval is a bootstrap over domains, rough with "
        "fewer than ten of them; the fewer utterances a domain has, the noisier its gain.",
        _bullets(lines),
        figure,
        tables.domain_table(gains, tasks).markdown(),
    )


def latency_section(latency: Mapping[str, Any] | None) -> str:
    """The section that helps to choose a student's size; `latency` is latency.json."""
    if not latency or not latency["models"]:
        return "Size and latency were not measured (config.study.latency)."
    timed = [one["batches"] for one in latency["models"] if one["batches"]]
    rows = ", ".join(
        f"{plural(batch['utterances'], 'utterance')} in {batch['rows']}" for batch in (timed[0] if timed else ())
    )
    calls = min((batch["calls"] for batches in timed for batch in batches), default=0)
    heads = {"dc": "DC head", "icner": "ICNER heads"}[latency["task"]]
    text = (
        f"Each encoder with the {heads}, in {latency['dtype']} on one device ({escaped(latency['device'])}; the "
        f"machine has {latency['cores']} cores). Times are of one call as `predict` makes it, from rows of "
        f"{latency['length']} tokens ({rows} rows) to classes, without reading and tokenizing: p50 and p95 over "
        f"{calls} calls or more, alternating between the encoders. Parameters include the token embeddings; bytes in "
        "int8 are of the matrices in int8 with their scales."
    )
    if left_out := [escaped(one["name"]) for one in latency["models"] if not one["batches"]]:
        text += f" Too large for one device, so not timed: {', '.join(left_out)}."
    return _joined(tables.latency_table(latency).markdown(), text)


def _findings_section(numbers: Numbers, gains: list[DomainGain]) -> str:
    found = findings(numbers, gains)
    details = []
    for number, answers in enumerate(found.values(), start=1):
        clauses = [f"{JUDGED_NAMES[what]} **{answer.status}**: {answer.reason}" for what, answer in answers.items()]
        details.append(f"**{number}.** {'; '.join(clauses) or NOT_RUN}.")
    warning = f"**Read with this in mind:** {text}" if (text := unigram_text(numbers)) else ""
    return _joined(warning, tables.findings_table(found, FINDING_SECTIONS).markdown(), _bullets(details))


def _method_section(numbers: Numbers) -> str:
    inputs = numbers.inputs
    blocks = [_bullets(_settings(inputs.config))]
    if inputs.recipes:
        searched = [row for row in inputs.recipes if "c" not in row and row["student"] != "finetuned"]
        if len({tables.recipe_text(row) for row in searched}) == 1:
            recipe = tables.recipe_text(searched[0])
            blocks.append(f"One finetuning recipe was given for all students ({recipe}); nothing was searched.")
        if len(inputs.recipes) > len(searched) or len(searched) > 1:
            blocks.append(tables.recipe_table(numbers).markdown())
    if inputs.realized:
        blocks.append(tables.text_table(numbers).markdown())
    blocks.append(_bullets([escaped(remark) for remark in inputs.remarks]))
    blocks.append(_bullets(_provenance_lines(inputs.provenance)))
    if inputs.provenance.get("seconds"):
        blocks.append(tables.time_table(inputs.provenance["seconds"]).markdown())
    return _joined(*blocks)


def _settings(config: Mapping[str, Any]) -> list[str]:
    """The part of the config that a reader needs to judge the numbers."""
    sizes = [
        f"{name}: {config[name]['num_layers']} layers × {config[name]['hidden_size']}"
        for name in ("teacher", "student")
        if name in config
    ]
    lines = [f"Encoders of our own choice: {', '.join(sizes)}."] if sizes else []
    trained = {"pretrain": "teacher", "adapt": "adapted teacher, further", "distill": "each student"}
    if "study" in config and (imported := config["study"]["teacher_import"]):
        lines.append(f"The generic teacher was pretrained by others: {_code(model_title(imported))}.")
        trained["pretrain"] = "the masked-LM head of the imported teacher alone"
        if not config["study"]["train_head"]:
            del trained["pretrain"]
    if "study" in config and not any(config["study"][f"{name}_sets"] for name in ("adapted", "schedule", "average")):
        del trained["adapt"]
    for name, what in trained.items():
        if name in config:
            steps, batch = config[name]["steps"], config[name]["batch_size"]
            rate = config[name]["learning_rate"]
            lines.append(f"`{name}` ({what}): {steps} steps of {batch} rows, learning rate {rate:g}.")
    if "distill" in config:
        lines.append(f"Loss of distillation: {_terms(read(Distill, config['distill'], 'distill'))}.")
    if "finetune" in config:
        few = config["finetune"]["max_train"]
        lines.append(f"Labels: {f'{few:,} train utterances of each locale' if few else 'all train utterances'}.")
    if "study" in config:
        lines.append(
            f"Seeds {', '.join(map(str, config['study']['seeds']))}: a seed varies the student's initialization, the "
            "order of the data in distillation and finetuning, and dropout. Teachers, row stores, masks "
            "(`masking.seed`) and the chosen recipe are the same for all seeds."
        )
    return lines


def _terms(distill: Distill) -> str:
    """The loss in words: its terms with their weights, the text, and where the student starts."""
    weights = ", ".join(
        f"{name} × {term.weight:g}" + (f" to {term.last:g}" if term.last != term.weight else "")
        for name, term in distill.used.items()
    )
    text = "unmasked text" if distill.clean else "masked text"
    if distill.masked_from < 1:
        text = f"unmasked text (states), and from {distill.masked_from:.0%} of the steps on masked text (logits)"
    centered = ", the states centered" if distill.center else ""
    start = "the teacher" if distill.init == "teacher" else "random parameters"
    return f"{weights}, on {text}{centered}; students start from {start}"


def _provenance_lines(provenance: Mapping[str, Any]) -> list[str]:
    """Everything in provenance but the stages' seconds, one line each."""
    lines = []
    for name, value in provenance.items():
        if name != "seconds":
            if isinstance(value, dict):
                value = ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
            title = "config hash" if name == "config" else escaped(name.replace("_", " "))
            lines.append(f"{title}: {_code('unknown' if value in (None, '') else str(value))}")
    return lines or ["The command, commit and versions were not recorded."]


def _code(text: str) -> str:
    """Text as inline code, between more backticks than it holds in a row."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{' '.join(text.split())}{space}{ticks}"
