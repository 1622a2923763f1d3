"""The whole quickstart finds what the README says it finds."""

import pytest

from configs import quickstart
from kd_jax.main import study


@pytest.mark.long
@pytest.mark.slow
def test_the_student_on_task_text_beats_what_it_is_declared_against(tmp_path):
    config = quickstart.get_config()
    config.progress = config.tensorboard = False
    study.run(config, tmp_path)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("| ")]
    declared = {(row[0], row[2]): row[-1] for row in table if row[0] in ("DC, error", "ICNER, intent error")}
    others = ("distilled, generic only", "from scratch", "from the teacher, not distilled", "n-grams")
    for error in ("DC, error", "ICNER, intent error"):
        for other in others:
            assert declared[error, other] == "lower", (error, other, declared)
    assert "domains (DC): use task text and distill" in report
