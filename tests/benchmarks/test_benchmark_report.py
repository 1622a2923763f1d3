"""Figures and tables of the benchmark show what was measured."""

import io

import pytest
from matplotlib import rc_context

from benchmarks import __main__ as benchmark
from benchmarks import sections, tables
from kd_jax.study.report.plotting import STYLE, panel_grid


def spread(value: float) -> dict[str, float]:
    return {"median": value, "min": 0.9 * value, "max": 1.2 * value}


def synthetic_results() -> dict[str, dict]:
    """A result of each section, as the sections return them."""
    about = {"commit": "abc", "machine": {"cpu": "a processor", "threads": 2}}
    names = list(sections.LABELS)
    held = {"batches": 4, "rows": 64, "length": 64, "texts": 1600, "tokens": 16_000, "masked": 2000}

    def variant(rate):
        return {
            "framework": "jax", "rows": 64, "length": 64, "flops": 1e10, "tokens_per_second": spread(rate),
            "seconds_per_step": spread(4000 / rate), "compile_seconds": 3.0, "memory": 5 * 2**20 * rate / 100,
            "gemm_share": 0.5, "useful_share": 0.4, "difference": 1e-7, "utterances_per_second": spread(rate / 10),
        }  # fmt: skip

    step = {
        "about": about, "labels": sections.LABELS, "gemm_peak": 3e11,
        "texts": {
            text: {
                "task_share": share, "held": held, "others_busy": [0.0, 0.1],
                "variants": {name: variant(100.0 * 3**number) for number, name in enumerate(names)},
                "ratios": {f"packed_masked/{names[0]}": spread(9.0), "packed_cached/packed_masked": spread(3.0)},
            }
            for text, share in (("utterances", 1.0), ("mixed", 0.7), ("generic", 0.0))
        },
    }  # fmt: skip
    job = {"held": held, "others_busy": [], "variants": {"packed": variant(300.0), "padded": variant(100.0)}}
    job["ratios"] = {"packed/padded": spread(3.0)}
    finetune = {"about": about, "labels": {"packed": "packed rows", "padded": "one a row"}, "jobs": {"finetune": job}}
    points = [
        {"value": 2**n, "seconds_per_step": spread(0.1 * 2**n), "flops": 1e9 * 2**n, "flops_per_second": 1e10,
         "memory": 2**26}
        for n in range(3)
    ]  # fmt: skip
    scaling = {
        "about": about,
        "axes": {"batch": {"counts": "rows a step", "others_busy": [0.1, 1.3], "points": points}},
    }
    return {"step": step, "finetune": finetune, "scaling": scaling}


@pytest.mark.parametrize("section", ["step", "finetune", "scaling"])
def test_figures_show_every_median(section):
    result = synthetic_results()[section]
    _, draw, panels, height = benchmark.SECTIONS[section]
    with rc_context(STYLE):
        drawn, axes = panel_grid(*panels, height)
        draw(axes, result)
        drawn.savefig(image := io.BytesIO(), format="png")
    assert image.getvalue().startswith(b"\x89PNG")
    points = {round(float(x), 3) for line in axes[0, 0].get_lines() for x in line.get_xdata()}
    wanted = {
        "step": {round(100.0 * 3**number, 3) for number in range(len(sections.LABELS))},
        "finetune": {30.0, 10.0},
        "scaling": {1.0, 2.0, 4.0},
    }
    assert wanted[section] <= points


def test_tables_have_a_row_for_each_variant_and_ratio():
    results = synthetic_results()
    text = tables.tables(results["step"])
    assert text.count("| 3 kd_jax: packed, masked |") == 3
    assert "| 4 against 3 | 3 (2.7–3.6) | 3 (2.7–3.6) | 3 (2.7–3.6) |" in text
    assert "GEMM peak: 300 GFLOP/s" in text and "a processor" in text
    assert "| one a row | 64 × 64 | 10 (9–12) | 3 (2.7–3.6) |" in tables.tables(results["finetune"])
    assert "| 4 | 400 (360–480) | 2.00 | 2.00 | 10 | 64 |" in tables.tables(results["scaling"])
    assert "kept up to 1.3 cores busy" in tables.tables(results["scaling"]) and "busy" not in text
