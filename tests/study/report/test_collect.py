"""What is read of the stages' directories."""

from kd_jax.study.report.collect import heldout_results, read_curve


def test_a_teacher_that_was_only_imported_has_no_curve(tmp_path):
    assert read_curve(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 7.5}\n')
    assert read_curve(tmp_path) == [{"step": 2, "loss": 7.5}]


def test_heldout_losses_are_pooled_by_their_counts():
    rows = [
        {"kind": "task", "language": language, "loss": loss, "accuracy": 0.5, "unigram_loss": 7.0, "count": count}
        for language, loss, count in (("de-DE", 2.0, 30), ("en-US", 4.0, 10))
    ]
    found = heldout_results(rows, {"student": "teacher", "seed": 0})
    losses = {(row["scope"], row["locale"]): (row["value"], row["count"]) for row in found if row["metric"] == "loss"}
    assert losses == {("all", "all"): (2.5, 40), ("locale", "de-DE"): (2.0, 30), ("locale", "en-US"): (4.0, 10)}
    assert {(row["test_set"], row["student"], row["task"]) for row in found} == {("heldout_task", "teacher", "mlm")}
