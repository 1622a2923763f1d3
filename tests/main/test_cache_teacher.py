"""The command that caches a teacher, and distilling from what it wrote: the same as with the teacher in the loop."""

import json

import jax
import numpy as np
import pytest

from kd_jax.config.data import Vocabulary
from kd_jax.config.settings import read
from kd_jax.data.batches import MaskedBatches
from kd_jax.data.prepared import Prepared
from kd_jax.data.vocabulary import seen_by_student
from kd_jax.jobs import masked_lm, trained
from kd_jax.jobs.cache import SUMMARY
from kd_jax.main import cache_teacher, distill, prepare, pretrain, study
from kd_jax.trainer.checkpoint import load_params
from kd_jax.types import UserError
from tests.support import pretrained

pytestmark = pytest.mark.slow

STEPS = 4


def config_for(**changes):
    config = pretrained.get_config("smoke")
    config.progress = config.tensorboard = False
    config.distill.update({"steps": STEPS, "batch_size": 16, "learning_rate": 1e-2, "log_every": 1})
    config.cache.update({"dtype": "float32", "rows_per_part": 20})
    with config.unlocked():
        for key, value in changes.items():
            target, *rest = key.split("__")
            if rest:
                config[target].update({rest[0]: value})
            else:
                config[target] = value
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder with data, teacher and full); the teacher is trained for a few steps, so that it is not flat."""
    folder = tmp_path_factory.mktemp("cache")
    config = config_for(pretrain__steps=20, pretrain__learning_rate=1e-2, transfer__task_share=0.5)
    prepare.run(config, folder / "data")
    config.prepared = str(folder / "data")
    pretrain.run(config, folder / "teacher")
    return folder


def ready(made, **changes):
    return config_for(**{"prepared": str(made / "data"), "teacher_checkpoint": str(made / "teacher"), **changes})


def final_params(config, workdir):
    prepared = Prepared(config.prepared)
    model = masked_lm.encoder_model(config.student, trained.run_prepared(workdir, prepared, "x"), "auto", "student")
    return jax.device_get(load_params(workdir, model.abstract()))


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("form", "trim"),
    [
        pytest.param({"cache__format": "hidden"}, False, marks=pytest.mark.long),
        pytest.param({"cache__format": "top_k", "cache__k": 600}, False, marks=pytest.mark.long),
        ({"cache__format": "hidden"}, True),
        pytest.param({"cache__format": "top_k", "cache__k": 600}, True, marks=pytest.mark.long),
    ],
)
def test_students_from_the_cache_equal_those_of_the_teacher_in_the_loop(made, tmp_path, form, trim):
    changes = {"vocabulary": {"trim": trim, "min_count": 2, "dropped": "unknown"}, "transfer__task_share": 0.3}
    config = ready(made, **changes)
    if trim and form["cache__format"] == "top_k":
        seen = seen_by_student(Prepared(config.prepared), read(Vocabulary, config.vocabulary, "vocabulary"))
        form = {**form, "cache__k": seen.tokenizer.vocab_size}
    distill.run(config, tmp_path / "loop")
    config = ready(made, **changes, **form)
    cache_teacher.run(config, tmp_path / "cache")
    config.teacher_cache = str(tmp_path / "cache")
    distill.run(config, tmp_path / "cached")
    one, other = final_params(config, tmp_path / "loop"), final_params(config, tmp_path / "cached")
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    for left, right in zip(metrics_of(tmp_path / "loop"), metrics_of(tmp_path / "cached"), strict=True):
        for name in ("loss", "kl", "mlm"):
            if name in left:
                np.testing.assert_allclose(left[name], right[name], rtol=1e-4)


@pytest.mark.long
def test_a_cache_serves_every_share_and_seed_it_was_written_for_and_no_other(made, tmp_path):
    config = ready(made, cache__task_shares=(0.0, 1.0), cache__seeds=(0, 1), cache__format="sampled", cache__samples=8)
    cache_teacher.run(config, tmp_path / "cache")
    summary = json.loads((tmp_path / "cache" / SUMMARY).read_text())
    assert 0 < summary["mass_kept"] < 1
    assert summary["bytes_per_position"] > 8 * 6
    assert {(one["task_share"], one["seed"]) for one in summary["runs"]} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(one["masks_repeat"] >= 1 for one in summary["runs"])
    config.teacher_cache = str(tmp_path / "cache")
    config.seed, config.transfer.task_share = 1, 1.0
    distill.run(config, tmp_path / "student")
    assert (tmp_path / "student" / "DONE").is_file()
    config.seed = 2
    with pytest.raises(UserError, match=r"lacks \d+ of the \d+ rows"):
        distill.run(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_cache_of_other_masks_or_another_teacher_is_refused(made, tmp_path):
    config = ready(made)
    cache_teacher.run(config, tmp_path / "cache")
    config.teacher_cache = str(tmp_path / "cache")
    config.masking.seed = 5
    with pytest.raises(UserError, match="was made from another masking"):
        distill.run(config, tmp_path / "student")
    config.masking.seed = 0
    longer = ready(made, pretrain__steps=3)
    pretrain.run(longer, tmp_path / "teacher")
    config.teacher_checkpoint = str(tmp_path / "teacher")
    with pytest.raises(UserError, match="was made from another teacher"):
        distill.run(config, tmp_path / "student")


@pytest.mark.long
def test_machines_share_the_parts_and_the_last_one_finishes(made, tmp_path, capsys):
    for part in (0, 1):
        config = ready(made, cache_parts=2, cache_part=part)
        cache_teacher.run(config, tmp_path / "cache")
        assert (tmp_path / "cache" / "DONE").is_file() == (part == 1)
    assert "parts are left to the other machines" in capsys.readouterr().out
    whole = tmp_path / "whole"
    cache_teacher.run(ready(made), whole)
    assert (whole / "manifest.json").read_text() == (tmp_path / "cache" / "manifest.json").read_text()


def test_a_command_killed_before_the_decoder_or_the_manifest_goes_on_and_a_changed_decoder_is_refused(made, tmp_path):
    config, folder = ready(made), tmp_path / "cache"
    cache_teacher.run(config, folder)
    whole = (folder / "manifest.json").read_text()
    table = folder / "decoder_table.npy"
    for name in ("manifest.json", "DONE", "decoder_table.npy"):
        (folder / name).unlink()
    cache_teacher.run(config, folder)
    assert (folder / "manifest.json").read_text() == whole
    content = bytearray(table.read_bytes())
    content[-1] ^= 1
    table.write_bytes(content)
    config.teacher_cache = str(folder)
    with pytest.raises(UserError, match=r"decoder_table\.npy: is missing or was changed"):
        distill.run(config, tmp_path / "student")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill.hidden": {"weight": 1.0, "layers": "0:9"}}, r"config\.distill\.hidden\.layers"),
        ({"distill.relations": {"weight": 1.0, "heads": 5}}, r"config\.distill\.relations\.heads"),
        ({"distill.embeddings": {"weight": 1.0, "projection": "always"}}, "no projection is needed"),
        ({"distill": {"init": "teacher"}, "student": {"intermediate_size": 16}}, r"config\.student\.intermediate_size"),
        ({"cache": {"format": "top_k"}, "distill.kl": {"final_temperature": 4.0}}, r"config\.cache\.format"),
    ],
)
def test_a_study_refuses_before_it_trains_a_teacher(tmp_path, changes, message):
    config = config_for()
    for block, values in changes.items():
        target = config
        for name in block.split("."):
            target = target[name]
        target.update(values)
    with pytest.raises(UserError, match=message):
        study.run(config, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_impossible_settings_name_their_key(made, tmp_path):
    for changes, message in (
        ({"cache__k": 10**6, "cache__format": "top_k"}, r"config\.cache\.k: 1000000 of \d+ tokens"),
        ({"cache__format": "topk"}, r"config\.cache\.format"),
        ({"cache_part": 2, "cache_parts": 2}, r"config\.cache_part"),
    ):
        with pytest.raises(UserError, match=message):
            cache_teacher.run(ready(made, **changes), tmp_path / "cache")
    config = ready(made, cache__format="top_k", cache__k=4)
    config.distill.kl.final_temperature = 4.0
    with pytest.raises(UserError, match=r"config\.cache\.format: for a temperature that moves"):
        cache_teacher.run(config, tmp_path / "cache")


@pytest.mark.long
def test_a_temperature_schedule_is_refused_with_a_top_k_cache_and_served_by_hidden(made, tmp_path):
    for form in ("top_k", "hidden"):
        config = ready(made, cache__format=form, cache__k=4)
        cache_teacher.run(config, tmp_path / form)
        config.teacher_cache = str(tmp_path / form)
        config.distill.kl.final_temperature = 4.0
        if form == "top_k":
            with pytest.raises(UserError, match=r"final_temperature: a top_k cache is for one temperature"):
                distill.run(config, tmp_path / "student")
            config.distill.kl.update({"temperature": 3.0, "final_temperature": 0.0})
            with pytest.raises(UserError, match=r"written at temperature 2\.0, not 3\.0"):
                distill.run(config, tmp_path / "student")
        else:
            distill.run(config, tmp_path / "student")
            moved = [row["kl"] for row in metrics_of(tmp_path / "student") if "kl" in row]
            config.distill.kl.final_temperature = 0.0
            distill.run(config, tmp_path / "constant")
            constant = [row["kl"] for row in metrics_of(tmp_path / "constant") if "kl" in row]
            assert moved[0] == constant[0] and all(a != b for a, b in zip(moved[1:], constant[1:], strict=True))


def test_hidden_states_and_relations_refuse_a_cache(made, tmp_path):
    for name in ("hidden", "relations"):
        config = ready(made, teacher_cache=str(tmp_path))
        config.distill[name].weight = 1.0
        with pytest.raises(UserError, match=rf"config\.teacher_cache: it has no {name}"):
            distill.run(config, tmp_path / "student")


@pytest.mark.long
def test_every_term_and_an_initialized_student_train_together(made, tmp_path):
    config = ready(made)
    for name in ("hidden", "embeddings", "relations"):
        config.distill[name].weight = 1.0
    config.distill.init = "teacher"
    config.student = config.student.copy_and_resolve_references()
    distill.run(config, tmp_path / "student")
    row = metrics_of(tmp_path / "student")[0]
    assert {"kl", "mlm", "hidden", "embeddings", "relations"} <= set(row)
    # A student that starts as its whole teacher differs from it in nothing.
    assert abs(row["kl"]) < 1e-4 and row["hidden"] < 1e-5 and row["relations"] < 1e-5
    run = json.loads((tmp_path / "student" / "run.json").read_text())
    assert run["terms"]["relations"] == [1.0, 1.0]


@pytest.mark.long
def test_projections_are_learned_and_left_behind(made, tmp_path):
    config = ready(made)
    config.student.update({"hidden_size": 16, "num_heads": 2})
    config.distill.hidden.update({"weight": 1.0, "layers": "0:-1,-1:0"})
    distill.run(config, tmp_path / "student")
    run = json.loads((tmp_path / "student" / "run.json").read_text())
    assert run["projections"] == [["hidden_0", 16, 32], ["hidden_1", 16, 32]]
    params = final_params(config, tmp_path / "student")
    assert set(params) == {"encoder", "mlm_head"}


@pytest.mark.long
def test_a_schedule_of_teachers_resumes_in_its_second_phase_and_an_average_differs(made, tmp_path, monkeypatch):
    other = ready(made, pretrain__steps=3)
    pretrain.run(other, tmp_path / "other")
    both = f"{made / 'teacher'},{tmp_path / 'other'}"
    config = ready(made)
    config.teacher_checkpoint = both
    config.distill.teacher_steps = (0, 2)
    distill.run(config, tmp_path / "schedule")
    alone = ready(made)
    distill.run(alone, tmp_path / "alone")
    kl = [[row["kl"] for row in metrics_of(tmp_path / name) if "kl" in row] for name in ("schedule", "alone")]
    assert kl[0][:2] == kl[1][:2]
    assert kl[0][2] != kl[1][2]

    own = MaskedBatches.batch

    def broken(self, step, *rest):
        if step == STEPS - 1:
            raise ConnectionError("the disk is gone")
        return own(self, step, *rest)

    config.distill.checkpoint_every = 1
    with monkeypatch.context() as patch:
        patch.setattr(MaskedBatches, "batch", broken)
        with pytest.raises(ConnectionError):
            distill.run(config, tmp_path / "broken")
    assert (tmp_path / "broken" / "checkpoints" / str(STEPS - 1)).is_dir()
    distill.run(config, tmp_path / "broken")
    one, other = final_params(config, tmp_path / "schedule"), final_params(config, tmp_path / "broken")
    jax.tree.map(np.testing.assert_array_equal, one, other)
    config.distill.teacher_steps = ()
    distill.run(config, tmp_path / "average")
    (first, *_), (one, *_) = (
        [row["kl"] for row in metrics_of(tmp_path / name) if "kl" in row] for name in ("average", "alone")
    )
    assert first != one
    config.distill.teacher_steps = (0,)
    with pytest.raises(UserError, match=r"config\.distill\.teacher_steps: 1 steps for 2 teachers"):
        distill.run(config, tmp_path / "x")


@pytest.mark.long
def test_a_chain_distills_from_a_distilled_student(made, tmp_path):
    config = ready(made)
    distill.run(config, tmp_path / "intermediate")
    config.teacher_checkpoint = str(tmp_path / "intermediate")
    config.student.num_layers = 1
    distill.run(config, tmp_path / "student")
    config.teacher_checkpoint = str(made / "teacher")
    distill.run(config, tmp_path / "without")
    (row, *_), (other, *_) = (metrics_of(tmp_path / name) for name in ("student", "without"))
    assert row["mlm"] == other["mlm"] and row["kl"] != other["kl"]  # the same student, another teacher


def test_a_teacher_with_another_tokenizer_is_refused_with_the_first_piece_that_differs(made, tmp_path):
    config = config_for(tokenizer__vocab_size=500)
    prepare.run(config, tmp_path / "data")
    config.prepared = str(tmp_path / "data")
    pretrain.run(config, tmp_path / "teacher")
    mine = ready(made, teacher_checkpoint=str(tmp_path / "teacher"))
    with pytest.raises(UserError, match=r"another tokenizer .*: id \d+ stands for .* and .*\(500 and 600 tokens\)"):
        distill.run(mine, tmp_path / "student")
