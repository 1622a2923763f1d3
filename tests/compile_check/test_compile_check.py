"""compile_check on CPU devices, on every command; and on a TPU slice where libtpu is installed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from kd_jax.compile_check import topology
from kd_jax.config import base
from kd_jax.main import compile_check
from kd_jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
VOCABULARY = 64


def config_of(command: str, **changes):
    config = base.get_config()
    config.teacher = base.encoder("tiny", vocab_size=VOCABULARY)
    config.student = base.encoder("tiny", vocab_size=VOCABULARY, num_layers=1)
    config.rows.length = 16
    config.compile_check.update({"command": command, "rows": 8, "tries": 0})
    config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
    config.cache.format = "hidden"
    config.cache.update(changes)
    return config


def one(values):
    (measurement,) = values["measurements"]
    return measurement


def test_a_distillation_step_is_compiled_and_read():
    lines, values = compile_check.check(config_of("distill"), "cpu:8")
    measurement = one(values)
    assert measurement["fits"] and values["largest"] == 8 and values["devices"] == 8
    assert measurement["total"] == sum(measurement[kind] for kind in ("arguments", "outputs", "temporaries", "code"))
    kinds = {one["kind"] for one in measurement["collectives"]}
    assert "all-gather" in kinds  # of the teacher, which lies along fsdp
    assert measurement["roofline"]["flops"] > 0 and measurement["roofline"]["bound"] in ("compute", "memory", "network")
    text = "\n".join(lines)
    for part in ("memory per device, GiB", "it fits", "collectives", "100 billion tokens", "largest batch"):
        assert part in text


@pytest.mark.long
@pytest.mark.parametrize("command", ["pretrain", "cached"])
def test_the_other_commands_are_compiled_too(command):
    alone = one(compile_check.check(config_of(command), "cpu:8")[1])
    beside = one(compile_check.check(config_of("distill"), "cpu:8")[1])
    assert alone["fits"] and alone["roofline"]["flops"] > 0
    if command == "pretrain":  # one forward pass fewer than with a teacher, but two layers instead of one
        assert alone["roofline"]["flops"] != beside["roofline"]["flops"]
    if command == "cached":  # no more of the teacher than its decoder
        assert alone["arguments"] < beside["arguments"]
        assert alone["roofline"]["flops"] < beside["roofline"]["flops"]


@pytest.mark.long
def test_a_student_of_cached_states_needs_neither_teacher_nor_logits():
    def compiled(command):
        config = config_of(command)
        config.distill.update({"clean": True, "kl": {"weight": 0.0}, "mlm": {"weight": 0.0}})
        config.distill.update({"hidden": {"weight": 1.0}, "sentence": {"weight": 1.0}})
        return one(compile_check.check(config, "cpu:8")[1])

    alone, beside = compiled("cached"), compiled("distill")
    assert alone["fits"]
    assert alone["roofline"]["flops"] < beside["roofline"]["flops"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "is not known"),
        ("v9x:4x4", "is not known"),
        ("cpu:64", "CPU devices"),
        ("h100:0x8", "is not known"),
    ],
)
def test_a_topology_that_cannot_be_had_is_one_sentence(name, message):
    with pytest.raises(UserError, match=message):
        compile_check.check(config_of("distill"), name)


@pytest.mark.parametrize(("name", "module"), [("v5e:4x4", "libtpu"), ("h100:8", "cuda13")])
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(name, module, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(UserError, match=r"install it with pip install 'jax\[") as raised:
        topology.find_topology(name)
    assert module[-6:] in str(raised.value)


def test_rows_that_the_mesh_does_not_divide_and_an_unknown_vocabulary_are_refused():
    config = config_of("distill")
    config.compile_check.rows = 6
    with pytest.raises(UserError, match=r"config\.compile_check\.rows: 6 rows are not a multiple"):
        compile_check.check(config, "cpu:8")
    config = config_of("distill")
    config.teacher.vocab_size = 0
    with pytest.raises(UserError, match=r"config\.teacher\.vocab_size: "):
        compile_check.check(config, "cpu:8")
    config.compile_check.command = "finetune"
    with pytest.raises(UserError, match=r"config\.compile_check\.command: 'finetune' is unknown"):
        compile_check.check(config, "cpu:8")


TINY = ["--config.rows.length=128", "--config.teacher.vocab_size=64", "--config.student.vocab_size=64"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "module", "kernels"),
    [
        ("v5e:2x2", "libtpu", {"splash_mha_fwd_segmented_residuals", "splash_mha_dkv_segmented_no_residuals"}),
        ("h100:4", "jax_plugins.xla_cuda13", {"attention_forward", "attention_backward"}),
    ],
)
def test_a_program_with_fused_attention_is_compiled_ahead_of_time(name, module, kernels, tmp_path):
    if not topology._installed(module):
        extra = "tpu" if name.startswith("v") else "cuda13"
        pytest.skip(f"{module} is not installed, so nothing compiles for {name}; pip install 'jax[{extra}]' brings it")
    words = ["--config=tests/support/pretrained.py:smoke", f"--topology={name}", f"--workdir={tmp_path}", *TINY]
    words += ["--config.compile_check.tries=0", "--config.attention=fused"]
    # XLA finds no tiling for a product as small as this one's.
    environment = {**os.environ, "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"}
    command = [sys.executable, "-m", "kd_jax.main.compile_check", *words]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    values = json.loads((tmp_path / compile_check.RESULT).read_text(encoding="utf-8"))
    measurement = one(values)
    assert values["devices"] == 4 and measurement["fits"]
    assert kernels <= set(measurement["kernels"])
