import json
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from configs import massive_me5, massive_wikipedia
from kd_jax.config import base
from kd_jax.config.settings import read
from kd_jax.config.training import Pretrain
from kd_jax.data.rows import MANIFEST
from kd_jax.main import study
from kd_jax.models.encoder_config import encoder_config
from kd_jax.models.functional import Functional, flops_per_row, parameter_count
from kd_jax.steps.pretrain import make_pretrain_objective
from kd_jax.steps.train_step import make_train_step
from kd_jax.study import estimate
from kd_jax.study.plan import Student
from kd_jax.trainer.optimizer import make_optimizer, make_schedule
from kd_jax.trainer.state import new_state
from tests.support import pretrained

NOWHERE = pathlib.Path("/nowhere")
SIZES = estimate.Sizes(vocabulary=4000, train=800, test=100, tokens=16.0)


def estimated(config, sizes=SIZES) -> tuple[dict[str, estimate.Estimate], study.Study]:
    """The estimates of the teachers, caches and encoders by name, and the study."""
    opened = study.open_study(config, NOWHERE)
    stages = opened.planned()
    found = estimate.estimates(stages, opened.values, sizes)
    return {stage.name: found[stage.folder] for stage in stages[:-1]}, opened


def test_pretraining_is_counted_row_by_row():
    config = pretrained.get_config()
    found, _ = estimated(config)
    shape = encoder_config(config.teacher.to_dict(), 4000)
    one = found["pretrain-teacher"]
    assert one.tokens == 250 * 32 * 64
    assert one.flops == 250 * 32 * flops_per_row(shape, 64, 10, 4000, training=True, last_layer_at=10)
    parameters = 4 * parameter_count(Functional("mlm", shape).abstract())["total"]
    assert one.memory["parameters"] == one.memory["gradients"] == one.memory["moments"] / 2 == parameters
    # The loss forms 4194 positions at a time, more than the 32 rows x 10 masks that there are.
    assert one.memory["logits"] == 4 * 4000 * 2 * 32 * 10


def test_a_cached_teacher_costs_its_decoder_and_a_present_one_its_forward_pass():
    config = pretrained.get_config()
    cached, _ = estimated(config)
    config.study.cache = False
    present, _ = estimated(config)
    student, teacher = (encoder_config(config[name].to_dict(), 4000) for name in ("student", "teacher"))
    name, rows = "distilled-task-generic-seed0", 50 * 32
    trained = flops_per_row(student, 64, 10, 4000, training=True, last_layer_at=10)
    assert cached[name].flops == pytest.approx(rows * (trained + 2 * 10 * teacher.hidden_size * 4000))
    seen = flops_per_row(teacher, 64, 10, 4000, training=False, last_layer_at=10)
    assert present[name].flops == pytest.approx(rows * (trained + seen))
    whole = 4 * parameter_count(Functional("mlm", teacher).abstract())["total"]
    assert present[name].memory["teacher"] == whole > cached[name].memory["teacher"]
    assert cached["mlm-task-seed0"].flops == rows * trained
    assert "teacher" not in cached["mlm-task-seed0"].memory


def test_two_teachers_at_once_are_both_in_memory_and_one_after_the_other_is_not():
    config = pretrained.get_config()
    config.study.update({"cache": False, "average_sets": ("task",), "schedule_sets": ("task",)})
    found, _ = estimated(config)
    one, average, schedule = (
        found[f"distilled-task-{teacher}-seed0"] for teacher in ("generic", "average", "schedule")
    )
    assert average.memory["teacher"] == 2 * one.memory["teacher"]
    assert schedule.memory["teacher"] == one.memory["teacher"]
    assert average.flops > schedule.flops == one.flops


def test_a_chain_has_the_intermediate_as_student_and_then_as_teacher():
    config = pretrained.get_config()
    config.study.update({"cache": False, "chain_sets": ("task",)})
    found, _ = estimated(config)
    middle = (
        4 * parameter_count(Functional("mlm", encoder_config(config.intermediate.to_dict(), 4000)).abstract())["total"]
    )
    assert found["intermediate-task-seed0"].memory["parameters"] == middle
    assert found["distilled-task-chain-seed0"].memory["teacher"] == middle


def test_a_head_alone_costs_a_forward_pass_and_three_heads():
    config = pretrained.get_config()
    config.study.teacher_import = "folder"
    found, _ = estimated(config)
    shape = encoder_config(config.teacher.to_dict(), 4000)
    body = flops_per_row(shape, 64, 0, 0, training=False, last_layer_at=10)
    head = flops_per_row(shape, 64, 10, 4000, training=False, last_layer_at=10) - body
    assert found["train-teacher-head"].flops == pytest.approx(250 * 32 * (body + 3 * head))
    assert found["import-teacher"].flops == 0


def test_finetuning_counts_packed_rows_of_its_epochs():
    config = pretrained.get_config()
    config.finetune.max_train = 100
    found, opened = estimated(config)
    name = next(name for name in found if name.startswith("dc-scratch"))
    student = encoder_config(config.student.to_dict(), 4000)
    steps, rows = 4 * 400 // 32, 9  # four locales; 1.1 * 32 utterances of 16 tokens in rows of 64
    assert found[name].flops == steps * rows * flops_per_row(student, 64, 0, 0, training=True)
    stage = opened.planner.finetune(Student("scratch"), 0, "dc", opened.planner.recipes[0])
    assert stage.config["finetune"]["epochs"] == 4


@pytest.mark.long
@pytest.mark.parametrize("preset, gated", [("student_small", True), ("minilm_l12_h384", False)])
def test_memory_is_about_that_of_the_compiled_step(preset, gated):
    """Temporary memory of XLA on a CPU: gradients, activations and logits."""
    config = pretrained.get_config()
    config.teacher = base.encoder(preset, vocab_size=0, num_layers=4, scan="scan")
    assert config.teacher.gated == gated
    config.pretrain.batch_size = rows = 16
    found, _ = estimated(config)
    model = Functional("mlm", encoder_config(config.teacher.to_dict(), 4000))
    job = read(Pretrain, config.pretrain, "pretrain")
    optimizer = make_optimizer(job)
    objective = make_pretrain_objective(model)
    step = make_train_step(objective, optimizer, make_schedule(job), steps=10, accumulation=1)
    state = jax.eval_shape(lambda: new_state(model.init(jax.random.key(0)), optimizer))
    batch = {name: jax.ShapeDtypeStruct((rows, 64), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    for name in ("masked_positions", "masked_targets", "masked_weights"):
        batch[name] = jax.ShapeDtypeStruct((rows, 10), jnp.float32 if "weights" in name else jnp.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(state, {"seed": jnp.int32(0)}, batch).compile()
    measured = compiled.memory_analysis().temp_size_in_bytes
    memory = found["pretrain-teacher"].memory
    assert memory["gradients"] + memory["activations"] + memory["logits"] == pytest.approx(measured, rel=0.35)


def test_sizes_are_those_of_the_data_where_they_are_prepared(tmp_path):
    stores = [
        {"kind": "generic", "texts": 9, "tokens": 900},
        {"kind": "task", "texts": 10, "tokens": 150},
        {"kind": "task", "texts": 10, "tokens": 250},
    ]
    utterances = {"de-DE dev": 3, "de-DE test": 5, "de-DE train": 10, "en-US train": 10}
    opened = study.open_study(pretrained.get_config(), tmp_path)
    folder = opened.folder(opened.planner.prepare())
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps({"vocab_size": 77, "utterances": utterances, "stores": stores}))
    note = "Counted in the prepared text: 20 utterances to train on, 5 to test on."
    assert estimate.sizes_of(opened) == estimate.Sizes(77, 20, 5, 20.0, (note,))


def test_the_users_own_files_are_counted(tmp_path):
    config = massive_wikipedia.get_config()
    config.nlu.update({"path": str(tmp_path / "nlu"), "locales": ("en-US", "de-DE"), "max_train": 3})
    (tmp_path / "nlu").mkdir()
    for locale, train in (("en-US", 5), ("de-DE", 2)):
        partitions = ["train"] * train + ["test"] * 2
        rows = [
            {"id": str(number), "locale": locale, "partition": partition, "scenario": "x", "intent": "y"}
            | {"utt": "one two three four", "annot_utt": "one two three four"}
            for number, partition in enumerate(partitions)
        ]
        lines = [json.dumps(row) for row in rows] + ["{broken"]
        (tmp_path / "nlu" / f"{locale}.jsonl").write_text("\n".join(lines) + "\n")
    sizes = estimate.sizes_of(study.open_study(config, NOWHERE))
    assert (sizes.train, sizes.test, sizes.tokens) == (3 + 2, 4, 8.4)
    assert sizes.notes[0].startswith(
        f"Counted in {tmp_path / 'nlu'}: 5 utterances to train on, 4 to test on, of 4.0 words"
    )
    config.nlu.path = str(tmp_path / "elsewhere")
    sizes = estimate.sizes_of(study.open_study(config, NOWHERE))
    assert sizes.train == 2 * 3 and sizes.notes[0].startswith("Assumed, since config.nlu.path: no folder or tarball ")


def test_terms_on_inner_states_are_counted():
    def flops(**terms):
        config = pretrained.get_config()
        config.study.cache = False
        for name, values in terms.items():
            config.distill[name].update(values)
        return estimated(config)[0]["distilled-task-generic-seed0"].flops

    config = pretrained.get_config()
    student, teacher = (encoder_config(config[name].to_dict(), 4000) for name in ("student", "teacher"))
    ours, theirs, rows, length = student.hidden_size, teacher.hidden_size, 50 * 32, 64

    def both(at, logits, student_logits=10):
        return rows * (
            flops_per_row(student, length, student_logits, 4000, training=True, last_layer_at=at)
            + flops_per_row(teacher, length, logits, 4000, training=False, last_layer_at=at)
        )

    assert flops() == pytest.approx(both(10, 10))
    hidden = rows * 6 * length * ours * theirs
    assert flops(hidden={"weight": 1.0, "layers": "last"}) == pytest.approx(both(None, 10) + hidden)
    assert flops(hidden={"weight": 1.0, "layers": "0:0,1:2"}) == pytest.approx(both(None, 10) + 2 * hidden)
    assert flops(embeddings={"weight": 1.0}) == pytest.approx(both(None, 10) + hidden)
    sentence = rows * 6 * (length / SIZES.tokens) * ours * theirs
    assert flops(sentence={"weight": 1.0}) == pytest.approx(both(None, 10) + sentence)
    relations = rows * 3 * 2 * length**2 * (3 * ours + theirs)
    assert flops(relations={"weight": 1.0, "heads": 4}) == pytest.approx(both(None, 10) + relations)
    alone = {"kl": {"weight": 0.0}, "mlm": {"weight": 0.0}, "hidden": {"weight": 1.0, "layers": "last"}}
    assert flops(**alone) == pytest.approx(both(None, 0, 0) + hidden), "without logits there is no head"


def test_states_and_then_logits_cost_their_parts_of_the_steps():
    config = pretrained.get_config()
    config.distill.update({"clean": True, "masked_from": 0.75})
    config.distill.hidden.update({"weight": 1.0, "layers": "last"})
    found = estimated(config)[0]["distilled-task-generic-seed0"]
    student, teacher = (encoder_config(config[name].to_dict(), 4000) for name in ("student", "teacher"))
    states = flops_per_row(student, 64, 0, 0, training=True) + 6 * 64 * student.hidden_size * teacher.hidden_size
    logits = flops_per_row(student, 64, 10, 4000, training=True, last_layer_at=10) + 2 * 10 * teacher.hidden_size * 4000
    assert found.flops == pytest.approx(50 * 32 * (0.75 * states + 0.25 * logits))


def test_what_is_assumed_of_data_that_are_not_here_is_said():
    config = massive_wikipedia.get_config()
    sizes = estimate.sizes_of(study.open_study(config, NOWHERE))
    assert (sizes.vocabulary, sizes.train) == (64_000, 7 * 11_514)
    assert any("11,514" in line for line in sizes.notes)
    config = massive_me5.get_config()
    config.tokenizer.path = "somebody/some-model"
    sizes = estimate.sizes_of(study.open_study(config, NOWHERE))
    assert any("somebody/some-model was not found" in line for line in sizes.notes)


def test_the_vocabulary_of_the_embedded_model_is_read(monkeypatch):
    monkeypatch.setattr(estimate.Tokenizer, "load", lambda name: SimpleNamespace(vocab_size={"embedded": 77}[name]))
    config = massive_me5.get_config()
    config.tokenizer.path = "embedded"
    assert estimate.sizes_of(study.open_study(config, NOWHERE)).vocabulary == 77
