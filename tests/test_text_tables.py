"""Tables as text: aligned, narrow, and what Markdown would read into a name is escaped."""

import pytest
from markdown_it import MarkdownIt

from kd_jax.text_tables import aligned_table, escaped, markdown_table

NAMES = (
    "a_b",
    "test_unseen",
    "_a_",
    "*a*",
    "`a`",
    "<b>",
    "[a](b)",
    "![a](b)",
    "a & b",
    "&amp;",
    "a\\*b",
    "~a~",
    "−1 [−2, 3]",
)


@pytest.mark.parametrize("name", NAMES)
def test_escaped_names_are_shown_as_they_are(name):
    (inline,) = MarkdownIt("commonmark", {"html": True}).enable("strikethrough").parseInline(escaped(name))
    assert [(token.type, token.content) for token in inline.children] == [("text", name)]


def test_escaping_leaves_usual_names_readable():
    assert escaped("test_unseen, de-DE [−1.0, +2.0]") == "test_unseen, de-DE [−1.0, +2.0]"
    assert escaped("two\nlines") == "two lines"


def test_markdown_table():
    assert markdown_table(["name", "a"], [["x|y", "1\n2"]]) == "| name | a |\n| :-- | --: |\n| x\\|y | 1<br>2 |"
    assert markdown_table(["name", "a"], [], left=2).endswith("| :-- | :-- |")


def test_aligned_tables_put_names_left_and_numbers_right():
    table = aligned_table(["name", "a", "b"], [["x", "10", ""], ["longer", "5", "1.5"]])
    assert table == "name     a    b\nx       10\nlonger   5  1.5"
    assert aligned_table(["name", "a"], [["x", "y"]], left=2, rule=True) == "name  a\n-------\nx     y"


def test_a_width_cuts_the_first_column():
    text = aligned_table(["Student", "a"], [["x" * 200, "1"]], width=110)
    assert all(len(line) <= 110 for line in text.splitlines()) and "…  1" in text
