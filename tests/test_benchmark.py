"""The benchmark hands all variants the same texts and masks, takes turns, and reports nothing that does not agree."""

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import rc_context
from ml_collections import ConfigDict

from configs import benchmark as experiment
from kd_jax.benchmark import agreement, handover, layouts, memory, rounds, step_section, tables, worker, workers
from kd_jax.benchmark.flops import cached_flops, distill_flops
from kd_jax.data.masking import mask_rows, num_slots
from kd_jax.data.packing import Packer, positions
from kd_jax.main import benchmark
from kd_jax.models.encoder_config import encoder_config
from kd_jax.models.presets import PRESETS
from kd_jax.study.plotting import STYLE, panel_grid
from kd_jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
LENGTH, VOCAB, CLS, SEP, PAD, MASK = 24, 90, 1, 2, 3, 4


def packed_batch(seed: int, texts: int = 30):
    """A masked-LM batch of packed rows, as kd_jax.data makes them."""
    rng = np.random.default_rng(seed)
    packer = Packer(LENGTH, CLS, SEP, PAD, open_rows=8)
    pieces = [rng.integers(5, VOCAB, size) for size in rng.integers(1, LENGTH - 2, texts)]
    tokens, segment_ids = map(np.concatenate, zip(packer.add(pieces), packer.finish()))
    keys = rng.integers(0, 2**62, len(tokens)).astype(np.uint64)
    masking = ConfigDict({"rate": 0.3, "mask_share": 0.8, "random_share": 0.1})
    corrupted, places, targets, weights = mask_rows(
        tokens, segment_ids, keys=keys, slots=num_slots(LENGTH, 0.3), masking=masking, mask_id=MASK,
        special_ids=(CLS, SEP, PAD, MASK), random_ids=np.arange(5, VOCAB, dtype=np.int32),
    )  # fmt: skip
    return {
        "tokens": corrupted,
        "segment_ids": segment_ids,
        "positions": positions(segment_ids),
        "masked_positions": places,
        "masked_targets": targets,
        "masked_weights": weights,
    }


def texts_and_masks(batch) -> list[tuple]:
    """Each text of a batch as (its tokens, its masks as (position in the text, target)), found cell by cell."""
    found = []
    for row, segments in enumerate(batch["segment_ids"]):
        masks = {}
        for slot, weight in enumerate(batch["masked_weights"][row]):
            if weight:
                masks[int(batch["masked_positions"][row, slot])] = int(batch["masked_targets"][row, slot])
        for segment in range(1, segments.max(initial=0) + 1):
            columns = np.flatnonzero(segments == segment)
            tokens = tuple(int(batch["tokens"][row, column]) for column in columns)
            found.append((tokens, tuple((i, masks[c]) for i, c in enumerate(columns) if c in masks)))
    return found


def test_padded_rows_hold_the_packed_texts_and_masks():
    batch = packed_batch(0)
    expected = texts_and_masks(batch)
    assert len(expected) >= 30 and any(len(masks) > 1 for _, masks in expected)
    rows = layouts.one_text_a_row(batch, PAD)
    assert texts_and_masks(rows) == expected
    assert rows["tokens"].shape[0] == len(expected)
    assert rows["tokens"].shape[1] == max(len(tokens) for tokens, _ in expected)
    np.testing.assert_array_equal(rows["positions"], positions(rows["segment_ids"]))
    assert set(rows["tokens"][rows["segment_ids"] == 0]) <= {PAD}


def test_one_shape_for_all_batches_adds_only_padding():
    batches = [layouts.one_text_a_row(packed_batch(seed, 20 + 5 * seed), PAD) for seed in range(3)]
    filled = layouts.same_shape(batches, 8, PAD)
    assert len({batch["tokens"].shape for batch in filled}) == 1
    assert len({batch["masked_positions"].shape for batch in filled}) == 1
    assert all(size % 8 == 0 for size in filled[0]["tokens"].shape)
    assert [texts_and_masks(batch) for batch in filled] == [texts_and_masks(batch) for batch in batches]
    assert layouts.counts(filled) | {"rows": 0, "length": 0} == layouts.counts(batches) | {"rows": 0, "length": 0}
    assert all((batch["tokens"][batch["segment_ids"] == 0] == PAD).all() for batch in filled)
    assert layouts.same_shape(batches, 8, PAD, length=40)[0]["tokens"].shape[1] == 40


def test_labels_stand_at_the_masked_columns():
    batch = packed_batch(1)
    labeled = layouts.with_labels(batch)
    used = batch["masked_weights"] > 0
    rows, _ = np.nonzero(used)
    columns, targets = batch["masked_positions"][used], batch["masked_targets"][used]
    np.testing.assert_array_equal(labeled["labels"][rows, columns], targets)
    assert labeled["label_weights"].sum() == used.sum() == (labeled["labels"] != layouts.IGNORED).sum()
    np.testing.assert_array_equal(labeled["label_weights"][rows, columns], 1)


def test_labeled_utterances_keep_labels_and_tags():
    rng = np.random.default_rng(0)
    segment_ids = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]], np.int32)
    tags = rng.integers(1, 9, segment_ids.shape).astype(np.int32)
    batch = {
        "tokens": rng.integers(5, VOCAB, segment_ids.shape).astype(np.int32),
        "segment_ids": segment_ids,
        "positions": positions(segment_ids),
        "tag_labels": tags,
        "tag_weights": (segment_ids > 0).astype(np.float32),
        "first_positions": np.array([[0, 3, 0], [0, 0, 0]], np.int32),
        "utterance_weights": np.array([[1, 1, 0], [1, 0, 0]], np.float32),
        "utterance_labels": np.array([[4, 5, 0], [6, 0, 0]], np.int32),
    }
    rows = layouts.labeled_text_a_row(batch, PAD)
    assert rows["utterance_labels"].tolist() == [[4], [5], [6]] and rows["utterance_weights"].sum() == 3
    assert not rows["first_positions"].any()
    np.testing.assert_array_equal(rows["tag_labels"][1, :2], tags[0, 3:5])
    np.testing.assert_array_equal(rows["tokens"][1], [*batch["tokens"][0, 3:5], PAD, PAD])
    np.testing.assert_array_equal(rows["tag_weights"], rows["segment_ids"])


def test_what_is_handed_over_is_read_back(tmp_path):
    batches = [packed_batch(seed) for seed in range(11)]
    handover.write_batches(tmp_path / "a" / "batches.npz", batches)
    read = handover.read_batches(tmp_path / "a" / "batches.npz")
    assert len(read) == 11
    for mine, theirs in zip(read, batches):
        assert mine.keys() == theirs.keys()
        for name, values in theirs.items():
            np.testing.assert_array_equal(mine[name], values)
    handover.write_arrays(tmp_path / "tree.npz", {"a/b/c": np.ones(2), "a/d": np.zeros(1)})
    tree = handover.read_tree(tmp_path / "tree.npz")
    assert tree["a"]["b"]["c"].tolist() == [1, 1] and tree["a"]["d"].tolist() == [0]


GOOD = [{"kl": 2.0, "mlm": 4.0}, {"kl": 1.0, "mlm": 3.0}]


@pytest.mark.parametrize(
    "bad",
    [
        [{"kl": 2.0, "mlm": 4.0}, {"kl": 1.01, "mlm": 3.0}],
        [{"kl": 2.0, "mlm": 4.1}, {"kl": 1.0, "mlm": 3.0}],
        [{"kl": float("nan"), "mlm": 4.0}, {"kl": 1.0, "mlm": 3.0}],
        [{"loss": 6.0}, {"loss": 4.0}],
    ],
)
def test_different_losses_are_refused(bad):
    near = [{"kl": 2.0001, "mlm": 4.0}, {"kl": 1.0, "mlm": 3.0}]
    found = agreement.check_agreement({"a": GOOD, "b": near}, "a", 2, 1e-3)
    assert found["a"] == 0 and found["b"] == pytest.approx(5e-5)
    with pytest.raises(UserError, match="nothing is reported"):
        agreement.check_agreement({"a": GOOD, "b": bad}, "a", 2, 1e-3)


class Fake:
    """A worker without a process; every step takes `seconds`, the first three more."""

    def __init__(self, name: str, seconds: float, log: list[str], value: float = 1.0):
        self.name, self.seconds, self.log, self.value = name, seconds, log, value

    def ask(self, do: str, **request):
        if do == "run":
            self.log.append(self.name)
            compiles = 3.0 if request["first"] == 0 else 0.0
            values = [{"loss": self.value}] * request["steps"]
            return {"seconds": self.seconds * request["steps"] + compiles, "values": values}
        return {"prepare": {"flops": 1.0}, "forget_peak": {"works": True}, "memory": {"base": 10, "peak": 30}}[do]


def test_rounds_alternate_and_are_compared_pairwise():
    log, checked = [], []
    fakes = {"slow": Fake("slow", 0.4, log), "fast": Fake("fast", 0.1, log)}
    found = rounds.measure(fakes, {"slow": 2, "fast": 2}, 3, lambda one: checked.append(len(log)), lambda line: None)
    assert log == ["slow", "slow", "fast", "fast", "slow", "fast", "slow", "fast", "fast", "slow", "slow", "fast"]
    assert checked == [4]
    assert found["slow"].passes == [0.8] * 3
    assert found["slow"].compile_seconds == pytest.approx(3.0)
    assert rounds.ratio(found["slow"], found["fast"]) == pytest.approx({"median": 4.0, "min": 4.0, "max": 4.0})
    assert found["fast"].step_memory - found["fast"].base_memory == 20


def test_nothing_is_measured_when_the_first_pass_disagrees():
    log = []
    fakes = {"a": Fake("a", 0.1, log), "b": Fake("b", 0.1, log, value=1.5)}

    def check(found):
        agreement.check_agreement({name: one.first_values for name, one in found.items()}, "a", 1, 1e-3)

    with pytest.raises(UserError, match="losses of b differ"):
        rounds.measure(fakes, {"a": 1, "b": 1}, 3, check, lambda line: None)
    assert log == ["a", "b"]


class Counting:
    """A variant that counts its steps."""

    def prepare(self):
        return {"framework": "none", "flops": 1.0}

    def run(self, first, steps):
        if first < 0:
            raise RuntimeError("no such step")
        return [{"step": float(step)} for step in range(first, first + steps)]


def test_a_worker_answers_each_line_and_ends_at_a_failure():
    requests = [{"do": "prepare"}, {"do": "run", "first": 3, "steps": 2}, {"do": "memory"}]
    lines = "".join(json.dumps(request) + "\n" for request in [*requests, {"do": "run", "first": -1, "steps": 1}])
    answers = io.StringIO()
    assert worker.serve(Counting(), 7, io.StringIO(lines), answers) == 1
    prepared, ran, used, failed = map(json.loads, answers.getvalue().splitlines())
    assert prepared["flops"] == 1.0 and ran["values"] == [{"step": 3.0}, {"step": 4.0}] and ran["seconds"] > 0
    assert used["base"] == 7 and used["peak"] > 0
    assert "no such step" in failed["error"]


def test_a_worker_that_dies_is_one_sentence(tmp_path):
    dying = workers.Worker("mine", "packed_masked", {"threads": 0, "models": {}}, tmp_path)
    with workers.running({"mine": dying}), pytest.raises(UserError, match=r"worker of mine failed .*mine\.log"):
        dying.ask("prepare")


def test_every_variant_can_be_named_in_a_worker():
    for place in worker.VARIANTS.values():
        module, name = place.split(":")
        text = (ROOT / "kd_jax" / "benchmark" / f"{module}.py").read_text(encoding="utf-8")
        assert name in text
    assert set(step_section.LABELS) <= set(worker.VARIANTS)


def test_workers_have_the_devices_that_they_are_given(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_cpu_use_xnnpack=false")
    assert workers.environment(1)["XLA_FLAGS"] == "--xla_cpu_use_xnnpack=false"
    assert workers.environment(4)["XLA_FLAGS"].endswith("device_count=4")


def test_memory_sees_what_is_allocated_and_forgets_it():
    size = 2**27
    memory.reset_peak()
    before = memory.peak_bytes()
    block = np.ones(size, np.uint8)
    assert memory.peak_bytes() - before > 0.9 * block.nbytes
    del block
    if memory.reset_peak():
        assert memory.peak_bytes() < before + 0.5 * size


def test_flops_of_a_step():
    student = dataclasses.replace(encoder_config(PRESETS["tiny"], 100), num_layers=1)
    teacher = dataclasses.replace(student, hidden_size=64, num_layers=3)
    rows, length, logits = 5, 16, 3

    def forward(hidden, layers):
        matrices = hidden * 3 * hidden + hidden * hidden + hidden * 2 * 64 + 64 * hidden
        attention = 2 * length * hidden
        return 2 * (layers * length * (matrices + attention) + logits * (hidden * hidden + hidden * 100))

    assert distill_flops(student, teacher, rows, length, logits) == rows * (3 * forward(32, 1) + forward(64, 3))
    cached = rows * (3 * forward(32, 1) + 2 * logits * 64 * 100)
    assert cached_flops(student, teacher, rows, length, logits) == cached


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sections": ("steps",)}, r"benchmark.sections: 'steps' is unknown"),
        ({"rounds": 0}, r"benchmark.rounds: 0 is too few"),
        ({"check_steps": 9}, r"benchmark.check_steps: 9 exceeds"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, change, words):
    config = experiment.get_config("smoke")
    config.benchmark.update(change)
    with pytest.raises(UserError, match=words):
        benchmark.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def spread(value: float) -> dict[str, float]:
    return {"median": value, "min": 0.9 * value, "max": 1.2 * value}


def synthetic_results() -> dict[str, dict]:
    """A result of each section, as the sections return them."""
    about = {"commit": "abc", "machine": {"cpu": "a processor", "threads": 2}}
    names = list(step_section.LABELS)
    held = {"batches": 4, "rows": 64, "length": 64, "texts": 1600, "tokens": 16_000, "masked": 2000}

    def variant(rate):
        return {
            "framework": "jax", "rows": 64, "length": 64, "flops": 1e10, "tokens_per_second": spread(rate),
            "seconds_per_step": spread(4000 / rate), "compile_seconds": 3.0, "memory": 5 * 2**20 * rate / 100,
            "gemm_share": 0.5, "useful_share": 0.4, "difference": 1e-7, "utterances_per_second": spread(rate / 10),
        }  # fmt: skip

    step = {
        "about": about, "labels": step_section.LABELS, "gemm_peak": 3e11,
        "texts": {
            text: {
                "task_share": share, "held": held,
                "variants": {name: variant(100.0 * 3**number) for number, name in enumerate(names)},
                "ratios": {f"packed_masked/{names[0]}": spread(9.0), "packed_cached/packed_masked": spread(3.0)},
            }
            for text, share in (("utterances", 1.0), ("mixed", 0.7), ("generic", 0.0))
        },
    }  # fmt: skip
    job = {"held": held, "variants": {"packed": variant(300.0), "padded": variant(100.0)}}
    job["ratios"] = {"packed/padded": spread(3.0)}
    finetune = {"about": about, "labels": {"packed": "packed rows", "padded": "one a row"}, "jobs": {"finetune": job}}
    points = [
        {"value": 2**n, "seconds_per_step": spread(0.1 * 2**n), "flops": 1e9 * 2**n, "flops_per_second": 1e10,
         "memory": 2**26}
        for n in range(3)
    ]  # fmt: skip
    scaling = {"about": about, "axes": {"batch": {"counts": "rows a step", "points": points}}}
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
        "step": {round(100.0 * 3**number, 3) for number in range(len(step_section.LABELS))},
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


def run_smoke(workdir, *changes: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kd_jax.main.benchmark", "--config=configs/benchmark.py:smoke"]
    command += [f"--workdir={workdir}", *changes]
    environment = {name: value for name, value in os.environ.items() if name not in ("KD_JAX_DATA", "XLA_FLAGS")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_smoke_run_measures_and_reports_all_sections(tmp_path):
    result = run_smoke(tmp_path, "--config.benchmark.texts={'mixed': 0.7}")
    assert result.returncode == 0, result.stderr
    step = json.loads((tmp_path / "step.json").read_text())
    variants = step["texts"]["mixed"]["variants"]
    assert list(variants) == list(step_section.variants())
    assert all(one["difference"] < 1e-3 and one["tokens_per_second"]["min"] > 0 for one in variants.values())
    assert "4 against 3" in result.stdout
    for section in ("step", "finetune", "scaling"):
        assert (tmp_path / f"{section}.json").is_file() and (tmp_path / f"{section}.png").is_file()
    again = run_smoke(tmp_path, "--config.benchmark.texts={'mixed': 0.7}")
    assert again.returncode == 0 and again.stdout.count("is measured already") == 3


@pytest.mark.slow
def test_smoke_run_refuses_what_does_not_agree(tmp_path):
    changes = ("--config.benchmark.tolerance=0.0", "--config.benchmark.sections=('step',)")
    result = run_smoke(tmp_path, "--config.benchmark.texts={'mixed': 0.7}", *changes)
    assert result.returncode == 2
    assert "nothing is reported" in result.stderr and not (tmp_path / "step.json").exists()
