"""The report as a whole: its sections, well-formed self-contained HTML, honest sentences where things are missing."""

import copy
import dataclasses
import html.parser
import pathlib
import re

import pytest

from kd_jax.study.report.figures import FIGURES
from kd_jax.study.report.numbers import ReportInputs
from kd_jax.study.report.report import compose, html_renderer, latency_section, plain, summary_text, write_report
from kd_jax.types import UserError
from tests.support.report_inputs import LATENCY, STUDENTS, synthetic_inputs

SECTIONS = [
    "What to do",
    "Verdict",
    "Declared comparisons",
    "Results",
    "Held-out masked-LM loss",
    "Error against the share of task text",
    "Unseen and tail utterances",
    "By locale",
    "Noise of the teachers",
    "Similarity to generic text against the gain",
    "Size and latency",
    "Training curves",
    "The paper's four findings",
    "How it was done",
]
VOID = {"meta", "img", "br"}


class Page(html.parser.HTMLParser):
    """Fails on elements that are not closed in order; keeps headings, links' targets and sources."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.headings, self.sources, self.ids, self.links, self.anywhere = [], [], [], [], [], []
        self.text = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        self.sources += [attributes["src"]] if "src" in attributes else []
        self.anywhere.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def document_text(inputs: ReportInputs) -> str:
    """The report's Markdown, with the figures that there would be."""
    sections = compose(inputs, [name for name, one in FIGURES.items() if one.draw(inputs.numbers)])
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())


@pytest.fixture(scope="module")
def inputs() -> ReportInputs:
    return synthetic_inputs(size=60)


@pytest.fixture(scope="module")
def folder(inputs, tmp_path_factory) -> pathlib.Path:
    written = tmp_path_factory.mktemp("report")
    write_report(written, inputs)
    return written


def test_every_section_stands_in_both_files_in_order(folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == SECTIONS
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.headings == SECTIONS


def test_html_is_one_file_with_its_figures_and_no_network(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.sources) == len(FIGURES) - 1 and all(  # no text was limited
        source.startswith("data:image/svg+xml;base64,") for source in page.sources
    )
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.anywhere)
    assert "http" not in re.sub(r'src="[^"]*"', "", text)


def test_markdown_names_figures_that_exist_and_its_tables_are_whole(folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    names = re.findall(r"\]\(figures/(\w+)\.svg\)", text)
    assert sorted(names) == sorted(path.stem for path in (folder / "figures").glob("*.png"))
    assert sorted(names) == sorted(path.stem for path in (folder / "figures").glob("*.svg"))
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        assert len({line.count(" |") for line in table.splitlines()}) == 1
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_notes_are_at_the_top_and_our_own_choices_in_the_verdict(inputs):
    top, verdict = document_text(inputs).split("## Declared")[0].split("## Verdict")
    assert inputs.notes[0] in top and "figures/answer.svg" in top
    assert "this study's own choices" in verdict


def test_the_summary_fits_one_screen_and_begins_with_what_to_do(inputs):
    text = summary_text(inputs)
    lines = text.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100
    assert lines[:2] == ["Synthetic study", ""]
    assert lines[2].startswith("Domains (DC): ")
    assert "Intents and slots (ICNER): use task text and distill." in " ".join(text.split("Student ")[0].split())
    assert "For stronger evidence, add seeds: --config.study.seeds='(0,1,2,3,4)'." in text
    assert "**" not in text and "`" not in text
    (header,) = [line for line in lines if line.startswith("Student ")]
    assert header.split()[1:] == ["DC", "error", "Intent", "error", "Slot", "F1", "SemER"]
    assert len(lines) - lines.index(header) - 2 == len(inputs.numbers.students)


def test_names_of_users_are_shown_as_they_are(tmp_path):
    """Whatever a domain, a locale or the study is called, it stays text in both files."""
    name = "<script>*a*|`b`_c_ [d](e) & \\f"
    inputs = synthetic_inputs(size=60, tasks=("dc",))
    similarity = [{**inputs.similarity[0], "domain": name}, *inputs.similarity[1:]]
    notes = [f"Mind {name}"]
    provenance = {**inputs.provenance, "command_line": f"run ``{name}``"}
    inputs = dataclasses.replace(
        inputs, name=name, similarity=similarity, notes=notes, selected=(), provenance=provenance
    )
    write_report(tmp_path, inputs)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = "".join(page.text)
    assert "script" not in page.anywhere and "e" not in page.links
    assert text.count(name) == 5  # title, heading, note, domain and command
    assert f"Note: Mind {name}" in " ".join(summary_text(inputs).split("\n"))


def test_only_line_breaks_pass_as_html():
    rendered = html_renderer(pathlib.Path()).render("a<br>b <b>c</b> 5 % [1, 2]\n\n<div>d</div>\n")
    assert rendered == ("<p>a<br>b &lt;b&gt;c&lt;/b&gt; 5\u00a0% [1,\u00a02]</p>\n<p>&lt;div&gt;d&lt;/div&gt;</p>\n")
    assert plain("**a** `b` c\\_") == "a b c_"


def test_one_seed_is_said_and_names_no_winner():
    text = document_text(synthetic_inputs(seeds=(0,), size=60))
    assert " wins " not in text and "no winner" not in text
    assert "lower on these utterances; one seed cannot decide" in text
    assert "With one seed they cover test utterances only." in text


def test_one_seed_without_records_has_no_interval():
    text = document_text(synthetic_inputs(seeds=(0,), size=60, with_records=False))
    assert "with one seed and no records of single utterances, a difference has no interval" in text
    assert "intervals cover seeds only" in text
    assert "(no interval)" in text


def test_no_icner_is_said():
    text = document_text(synthetic_inputs(tasks=("dc",), size=60))
    assert "ICNER was not part of this study." in text
    assert "SemER" not in text


def test_no_adapted_teacher_is_said():
    students = {key: value for key, value in STUDENTS.items() if key[2] != "adapted"}
    inputs = synthetic_inputs(students=students, size=60)
    results = [row for row in inputs.results if row["teacher"] != "adapted"]
    text = document_text(dataclasses.replace(inputs, results=results))
    assert "no student was distilled from an adapted teacher" in text
    assert "There is one teacher, the generic teacher." in text


def test_the_settings_are_those_of_what_ran():
    inputs = synthetic_inputs(size=60)
    text = document_text(inputs)
    assert "`adapt` (adapted teacher, further): 100 steps of 32 rows" in text
    assert "Loss of distillation: kl × 1, mlm × 1, on masked text; students start from random parameters." in text
    assert "Labels: 1,151 train utterances of each locale." in text
    config = {**inputs.config, "study": {**inputs.config["study"], "adapted_sets": ()}}
    off = {**inputs.config["distill"]["kl"], "weight": 0.0}
    states = {"clean": True, "center": True, "init": "teacher", "kl": off, "mlm": off}
    states["hidden"] = {**inputs.config["distill"]["hidden"], "weight": 1.0, "final_weight": 0.5}
    config |= {"distill": {**inputs.config["distill"], **states}, "finetune": {"max_train": 0}}
    config["study"]["teacher_import"] = "embedded"
    text = document_text(dataclasses.replace(inputs, config=config))
    assert "The generic teacher was pretrained by others: `multilingual-e5-small, 4 bits`." in text
    assert "`adapt`" not in text and "Labels: all train utterances." in text
    assert "Loss of distillation: hidden × 1 to 0.5, on unmasked text, the states centered; students start from" in text


def test_few_domains_have_no_rank_correlation():
    inputs = synthetic_inputs(size=60)
    few = inputs.similarity[:4]
    text = document_text(dataclasses.replace(inputs, similarity=few))
    assert "4 domains cannot tell whether gain goes with similarity" in text and "ρ +" not in text and "ρ −" not in text


def test_missing_baselines_are_said():
    students = {key: value for key, value in STUDENTS.items() if key[0] == "distilled"}
    assert "A baseline is missing" in document_text(synthetic_inputs(students=students, size=60))


def test_a_study_without_any_result_is_still_a_report(tmp_path):
    inputs = ReportInputs(name="Nothing")
    write_report(tmp_path, inputs)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.headings == SECTIONS
    assert "No verdict: there are no results on a task." in summary_text(inputs)


def test_undefined_metrics_are_no_crash():
    inputs = synthetic_inputs(size=60)
    results = [{**row, "value": None} for row in inputs.results]
    text = document_text(dataclasses.replace(inputs, results=results))
    assert "DC: no verdict on the transfer sets.** Distilled, task 100 % has no error." in text


def test_a_single_recipe_is_said():
    inputs = synthetic_inputs(size=60, tasks=("dc",))
    recipes = [{**row, "dev_score": None} for row in inputs.recipes if row["chosen"]]
    assert "nothing was searched" in document_text(dataclasses.replace(inputs, recipes=recipes))


def test_how_latency_was_measured_is_said():
    text = latency_section(LATENCY)
    for words in (
        "ICNER heads",
        "float32",
        "rows of 64 tokens (1 utterance in 1, 64 utterances in 11 rows)",
        "200 calls",
    ):
        assert words in text, words
    assert "Too large" not in text


def test_what_was_not_timed_is_said():
    values = copy.deepcopy(LATENCY)
    values["models"][0]["batches"] = []
    text = latency_section(values)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[2][-3:] == ["–", "–", "reference"] and rows[3][-1] == "–"
    assert "Too large for one device, so not timed: teacher." in text
    assert "64 utterances in 11 rows" in text


def test_without_a_measurement_of_latency_it_says_so():
    for nothing in (None, {**LATENCY, "models": []}):
        assert latency_section(nothing).startswith("Size and latency were not measured")


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "file", ReportInputs(name="x"))
