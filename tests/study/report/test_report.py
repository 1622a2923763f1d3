"""The report as a whole: its sections, well-formed self-contained HTML, honest sentences where things are missing."""

import dataclasses
import html.parser
import re

import pytest

from kd_jax.study.report.document import Picture, Text, markdown
from kd_jax.study.report.html import inline
from kd_jax.study.report.report import ReportInputs, build, summary_text, write_report
from kd_jax.types import UserError
from tests.support.report_inputs import STUDENTS, synthetic_inputs

SECTIONS = [
    "Verdict",
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
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def document_text(inputs: ReportInputs) -> str:
    """The report's Markdown without drawing anything to disk."""
    return markdown(build(inputs, lambda name, figure, *rest: Picture(name, *rest[:2]) if figure else Text(rest[2])))


@pytest.fixture(scope="module")
def inputs() -> ReportInputs:
    return synthetic_inputs(size=60)


@pytest.fixture(scope="module")
def paths(inputs, tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("report"), inputs)


def test_every_section_stands_in_both_files_in_order(paths):
    text = paths.markdown.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == SECTIONS
    page = Page(paths.html.read_text(encoding="utf-8"))
    assert page.headings == SECTIONS


def test_html_is_one_file_with_its_figures_and_no_network(paths):
    text = paths.html.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.sources) == 7 and all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.anywhere)
    assert "http" not in re.sub(r'src="[^"]*"', "", text)


def test_markdown_names_figures_that_exist_and_its_tables_are_whole(paths):
    text = paths.markdown.read_text(encoding="utf-8")
    names = re.findall(r"\]\(figures/(\w+)\.svg\)", text)
    assert sorted(names) == sorted(path.stem for path in paths.figures.glob("*.png"))
    assert sorted(names) == sorted(path.stem for path in paths.figures.glob("*.svg"))
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        assert len({line.count(" |") for line in table.splitlines()}) == 1
    assert [path.name for path in paths.markdown.parent.iterdir() if path.name.startswith(".")] == []


def test_the_notes_and_our_own_choices_stand_in_the_verdict(inputs):
    verdict = document_text(inputs).split("## Results")[0]
    assert inputs.notes[0] in verdict
    assert "this study's own choices" in verdict


def test_summary_is_narrow_and_holds_the_verdict(inputs):
    text = summary_text(inputs)
    assert all(len(line) <= 110 for line in text.splitlines())
    assert "ICNER: task 100 % won" in " ".join(text.split())
    assert "**" not in text


def test_inline_text_is_escaped():
    assert inline("a < b & `c>d` **e**") == "a &lt; b &amp; <code>c&gt;d</code> <strong>e</strong>"
    assert inline("1\n2") == "1<small>2</small>"


def test_one_seed_is_said_and_names_no_winner():
    text = document_text(synthetic_inputs(seeds=(0,), size=60))
    assert "won**" not in text
    assert "fewer than 3 seeds decide nothing" in text
    assert "With one seed they cover test utterances only." in text


def test_one_seed_without_records_has_no_interval():
    text = document_text(synthetic_inputs(seeds=(0,), size=60, with_records=False))
    assert "DC: no winner can be named." in text
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


def test_missing_baselines_are_said():
    students = {key: value for key, value in STUDENTS.items() if key[0] == "distilled"}
    assert "A baseline is missing" in document_text(synthetic_inputs(students=students, size=60))


def test_a_study_without_any_result_is_still_a_report(tmp_path):
    inputs = ReportInputs(name="Nothing")
    page = Page(write_report(tmp_path, inputs).html.read_text(encoding="utf-8"))
    assert page.headings == SECTIONS
    assert "No verdict." in summary_text(inputs)


def test_undefined_metrics_are_no_crash():
    inputs = synthetic_inputs(size=60)
    results = [{**row, "value": None} for row in inputs.results]
    text = document_text(dataclasses.replace(inputs, results=results))
    assert "nothing to compare" in text


def test_a_single_recipe_is_said():
    inputs = synthetic_inputs(size=60, tasks=("dc",))
    recipes = [{**row, "dev_score": None} for row in inputs.recipes if row["chosen"]]
    assert "nothing was searched" in document_text(dataclasses.replace(inputs, recipes=recipes))


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "file", ReportInputs(name="x"))
