"""The section on size and latency says what latency.json holds, and what it lacks."""

import copy

from kd_jax.study.report.choosing import choosing_section, latency_table
from kd_jax.study.report.document import Text
from tests.support.report_inputs import LATENCY


def test_a_row_for_each_encoder():
    table = latency_table(LATENCY)
    assert table.header[0] == "Encoder" and table.header[-1] == "64 utterances, times as fast as the teacher"
    teacher, student = table.rows
    assert teacher == [
        "teacher",
        "3 × 192",
        "1,768,000",
        "1,000,000",
        "7.07",
        "1.77",
        "6.00 (7.00)",
        "24.00 (25.00)",
        "reference",
    ]
    assert student[-3:] == ["2.00 (3.00)", "8.00 (9.00)", "3.0"]


def test_how_it_was_measured_is_said():
    (_, how) = choosing_section(LATENCY).blocks
    assert isinstance(how, Text)
    for words in (
        "ICNER heads",
        "float32",
        "rows of 64 tokens (1 utterance in 1, 64 utterances in 11 rows)",
        "200 calls",
    ):
        assert words in how.text, words
    assert "Too large" not in how.text


def test_what_was_not_timed_is_said():
    values = copy.deepcopy(LATENCY)
    values["models"][0]["batches"] = []
    table, how = choosing_section(values).blocks
    assert table.rows[0][-3:] == ["–", "–", "reference"] and table.rows[1][-1] == "–"
    assert "Too large for one device, so not timed: teacher." in how.text
    assert "64 utterances in 11 rows" in how.text


def test_without_a_measurement_it_says_so():
    for nothing in (None, {**LATENCY, "models": []}):
        (block,) = choosing_section(nothing).blocks
        assert block.text.startswith("Size and latency were not measured")
