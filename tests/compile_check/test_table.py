"""The table of docs/scaling.md, of results whose numbers are round."""

import json

from kd_jax.compile_check.table import HEAD, table


def measurement(rows: int, fits: bool, step: float):
    roof = {"step": step, "bound": "memory", "compute": step / 2}
    sent = [
        {"kind": "all-gather", "sent": 2e9},
        {"kind": "all-gather", "sent": 1e9},
        {"kind": "all-reduce", "sent": 1e6},
    ]
    return {"rows": rows, "fits": fits, "total": 3 * 2**30, "roofline": roof, "collectives": sent}


def test_a_row_has_the_largest_batch_that_fits(tmp_path):
    values = {
        "measurements": [measurement(16, True, 1.0), measurement(64, True, 0.5), measurement(128, False, 1.0)],
        "mesh": {"data": 2, "fsdp": 4, "tensor": 1},
        "devices": 8,
        "length": 100,
        "usable": 4 * 2**30,
        "too_many": 128,
    }
    for name, changes in {"one": {}, "none": {"measurements": [measurement(128, False, 1.0)]}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "compile_check.json").write_text(json.dumps(values | changes))
    head, rule, one, none = table([tmp_path / "one", tmp_path / "none"]).split("\n")
    assert f"{head}\n{rule}" == HEAD
    # 64 rows of 100 tokens in half a second; 1e11 tokens / 12,800 a second * 8 devices / 3,600.
    assert one == (
        "| one | 2 × 4 × 1 | 64, not 128 | 3.0 of 4.0 | all-gather 3.0 | memory (50% of peak) | 12,800 | 17,361 |"
    )
    assert none == "| none | 2 × 4 × 1 | none of those tried | | | | | |"
