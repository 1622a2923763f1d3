"""Results as a table of a card; how they are found and refused is tested with the card (test_export.py)."""

from kd_jax.jobs import model_card


def row(test_set, metric, value):
    return {"test_set": test_set, "metric": metric, "value": value, "scope": "all"}


def test_whole_partition_stands_first_and_gaps_stay_empty():
    rows = [row("tail", "slot_f1", 0.5), row("test", "slot_f1", 0.75), row("test", "semer", 0.25)]
    assert model_card.results_table(rows).splitlines() == [
        "| | test | tail |",
        "|---|---|---|",
        "| slot f1 | 0.7500 | 0.5000 |",
        "| semer | 0.2500 |  |",
    ]


def test_nothing_beside_a_run_gives_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    assert model_card.scored_by(tmp_path / "run", "") is None
