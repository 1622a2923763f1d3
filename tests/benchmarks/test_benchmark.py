"""The benchmark takes turns, and reports nothing that does not agree."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as benchmark
from benchmarks import machine, rounds, sections, worker
from configs import benchmark as experiment
from kd_jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
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
    found = rounds.check_agreement({"a": GOOD, "b": near}, "a", 2, 1e-3)
    assert found["a"] == 0 and found["b"] == pytest.approx(5e-5)
    with pytest.raises(UserError, match="nothing is reported"):
        rounds.check_agreement({"a": GOOD, "b": bad}, "a", 2, 1e-3)


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


def test_rounds_alternate_and_are_compared_pairwise(monkeypatch):
    log, checked = [], []
    fakes: dict[str, Any] = {"slow": Fake("slow", 0.4, log), "fast": Fake("fast", 0.1, log)}
    monkeypatch.setattr(rounds, "busy_cores", lambda seconds: 0.25 * len(log))
    whole = rounds.measure(fakes, {"slow": 2, "fast": 2}, 3, lambda one: checked.append(len(log)), lambda line: None)
    found = whole.workers
    assert whole.others_busy == [1.5, 2.0, 2.5]
    assert log == ["slow", "slow", "fast", "fast", "slow", "fast", "slow", "fast", "fast", "slow", "slow", "fast"]
    assert checked == [4]
    assert found["slow"].passes == [0.8] * 3
    assert found["slow"].compile_seconds == pytest.approx(3.0)
    assert rounds.ratio(found["slow"], found["fast"]) == pytest.approx({"median": 4.0, "min": 4.0, "max": 4.0})
    assert found["fast"].step_memory - found["fast"].base_memory == 20


def test_nothing_is_measured_when_the_first_pass_disagrees():
    log = []
    fakes: dict[str, Any] = {"a": Fake("a", 0.1, log), "b": Fake("b", 0.1, log, value=1.5)}

    def check(found):
        rounds.check_agreement({name: one.first_values for name, one in found.items()}, "a", 1, 1e-3)

    with pytest.raises(UserError, match="losses of b differ"):
        rounds.measure(fakes, {"a": 1, "b": 1}, 3, check, lambda line: None)
    assert log == ["a", "b"]


def counting(spec):
    """A variant that counts its steps."""

    def run(first, steps):
        if first < 0:
            raise RuntimeError("no such step")
        return [{"step": float(step)} for step in range(first, first + steps)]

    return {"framework": "none", "flops": spec["flops"]}, run


def test_a_worker_answers_each_line_and_ends_at_a_failure():
    requests = [{"do": "prepare"}, {"do": "run", "first": 3, "steps": 2}, {"do": "memory"}]
    lines = "".join(json.dumps(request) + "\n" for request in [*requests, {"do": "run", "first": -1, "steps": 1}])
    answers = io.StringIO()
    assert worker.serve(counting, {"flops": 1.0}, 7, io.StringIO(lines), answers) == 1
    prepared, ran, used, failed = map(json.loads, answers.getvalue().splitlines())
    assert prepared["flops"] == 1.0 and ran["values"] == [{"step": 3.0}, {"step": 4.0}] and ran["seconds"] > 0
    assert used["base"] == 7 and used["peak"] > 0
    assert "no such step" in failed["error"]


def test_a_worker_that_dies_is_one_sentence(tmp_path):
    dying = worker.Worker("mine", "packed_masked", {"threads": 0, "models": {}}, tmp_path)
    with worker.running({"mine": dying}), pytest.raises(UserError, match=r"worker of mine failed .*mine\.log"):
        dying.ask("prepare")


def test_every_variant_can_be_named_in_a_worker():
    for place in worker.VARIANTS.values():
        module, name = place.split(":")
        text = (ROOT / "benchmarks" / f"{module}.py").read_text(encoding="utf-8")
        assert re.search(rf"^(def {name}\(|{name} = )", text, re.M)
    assert set(sections.LABELS) <= set(worker.VARIANTS)


def test_workers_have_the_devices_that_they_are_given(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_cpu_use_xnnpack=false")
    assert worker.environment(1, "cpu")["XLA_FLAGS"] == "--xla_cpu_use_xnnpack=false"
    assert worker.environment(4, "cpu")["XLA_FLAGS"].endswith("device_count=4")


def test_memory_sees_what_is_allocated_and_forgets_it():
    size = 2**27
    machine.reset_peak()
    before = machine.peak_bytes()
    block = np.ones(size, np.uint8)
    assert machine.peak_bytes() - before > 0.9 * block.nbytes
    del block
    if machine.reset_peak():
        assert machine.peak_bytes() < before + 0.5 * size


def test_a_busy_machine_is_noticed():
    if machine.busy_cores(0.01) is None:
        pytest.skip("this system does not tell how busy it is")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            assert machine.busy_cores(0.5) > 0.3
        finally:
            other.kill()


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


def run_smoke(workdir, *changes: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks", "--config=configs/benchmark.py:smoke"]
    command += [f"--workdir={workdir}", *changes]
    environment = {name: value for name, value in os.environ.items() if name not in ("KD_JAX_DATA", "XLA_FLAGS")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.long
def test_smoke_run_measures_and_reports_all_sections(tmp_path):
    result = run_smoke(tmp_path, "--config.benchmark.texts={'mixed': 0.7}")
    assert result.returncode == 0, result.stderr
    step = json.loads((tmp_path / "step.json").read_text())
    variants = step["texts"]["mixed"]["variants"]
    assert list(variants) == list(sections.variants())
    assert all(one["difference"] < 1e-3 and one["tokens_per_second"]["min"] > 0 for one in variants.values())
    assert "4 against 3" in result.stdout
    for section in ("step", "finetune", "scaling"):
        assert (tmp_path / f"{section}.json").is_file() and (tmp_path / f"{section}.png").is_file()
    again = run_smoke(tmp_path, "--config.benchmark.texts={'mixed': 0.7}")
    assert again.returncode == 0 and again.stdout.count("is measured already") == 3


@pytest.mark.long
def test_smoke_run_refuses_what_does_not_agree(tmp_path):
    changes = ("--config.benchmark.tolerance=0.0", "--config.benchmark.sections=('step',)")
    result = run_smoke(tmp_path, "--config.benchmark.texts={'mixed': 0.7}", *changes)
    assert result.returncode == 2
    assert "nothing is reported" in result.stderr and not (tmp_path / "step.json").exists()
