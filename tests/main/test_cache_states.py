"""The command that caches a teacher's states, and distilling from what it wrote: as with the teacher in the loop."""

import json

import jax
import numpy as np
import pytest

from kd_jax.data.prepared import Prepared
from kd_jax.data.teacher_states import StateBatches, StatesWriter
from kd_jax.jobs.cache import SUMMARY
from kd_jax.main import cache_states, cache_teacher, distill, prepare, pretrain
from kd_jax.runtime.files import read_json
from kd_jax.types import UserError
from tests.main.test_cache_teacher import STEPS, config_for, final_params, metrics_of

pytestmark = pytest.mark.slow

TRIM = {"trim": True, "min_count": 3, "dropped": "renormalize"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data, a teacher, and a cache of the states of all of its layers in float32."""
    folder = tmp_path_factory.mktemp("states")
    config = config_for(pretrain__steps=20, pretrain__learning_rate=1e-2, transfer__task_share=0.5)
    prepare.run(config, folder / "data")
    config.prepared = str(folder / "data")
    pretrain.run(config, folder / "teacher")
    cache_states.run(ready(folder, states__layers="0,-1"), folder / "cache")
    return folder


def ready(made, **changes):
    """A narrow student of clean text, by all terms that a cache serves."""
    place = {"prepared": str(made / "data"), "teacher_checkpoint": str(made / "teacher")}
    config = config_for(**place, states__dtype="float32", states__rows_per_part=30)
    config.student.update({"hidden_size": 16, "num_heads": 2})
    config.distill.update({"clean": True, "checkpoint_every": 1})
    config.distill.kl.weight = config.distill.mlm.weight = 0.0
    config.distill.hidden.update({"weight": 1.0, "layers": "0:0,1:-1"})
    config.distill.sentence.weight = 0.5
    for key, value in changes.items():
        target, *rest = key.split("__")
        config[target].update({rest[0]: value}) if rest else config.update({target: value})
    return config


def cached(made, cache=None, **changes):
    return ready(made, teacher_cache=str(cache or made / "cache"), **changes)


def assert_same(one, other, tolerance):
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("vocabulary", [{"trim": False}, TRIM], ids=["full", "trimmed"])
def test_students_from_the_cache_equal_those_of_the_teacher_in_the_loop(made, tmp_path, vocabulary):
    changes = {"vocabulary": {"min_count": 1, "dropped": "renormalize", **vocabulary}, "transfer__task_share": 0.3}
    config = ready(made, **changes)
    distill.run(config, tmp_path / "loop")
    distill.run(cached(made, **changes), tmp_path / "cached")
    one, other = final_params(config, tmp_path / "loop"), final_params(config, tmp_path / "cached")
    assert_same(one, other, 2e-5)
    for left, right in zip(metrics_of(tmp_path / "loop"), metrics_of(tmp_path / "cached"), strict=True):
        for name in ("loss", "hidden", "sentence"):
            if name in left:
                np.testing.assert_allclose(left[name], right[name], rtol=1e-5)
    assert {"hidden", "sentence"} <= metrics_of(tmp_path / "loop")[0].keys()
    assert read_json(tmp_path / "cached" / "heldout.json") == []


def test_float16_and_components_cost_what_they_say(made, tmp_path):
    summaries, losses = {}, {}
    for name, changes in {
        "float16": {"states__dtype": "float16"},
        "half": {"states__components": 16},
        "whole": {"states__components": 32},
    }.items():
        cache_states.run(ready(made, states__layers="0,-1", **changes), tmp_path / name)
        summaries[name] = read_json(tmp_path / name / SUMMARY)
        config = cached(made, tmp_path / name)
        distill.run(config, tmp_path / f"student-{name}")
        losses[name] = [row["loss"] for row in metrics_of(tmp_path / f"student-{name}") if "loss" in row]
    distill.run(cached(made), tmp_path / "student")
    exact = [row["loss"] for row in metrics_of(tmp_path / "student") if "loss" in row]
    full = read_json(made / "cache" / SUMMARY)
    assert full["explained"] == {} and full["tokens"] == summaries["float16"]["tokens"]
    # Two layers of 32 numbers per token, and 32 per text.
    headers = 200 * len(list((made / "cache" / "parts").glob("*.npy")))
    assert 0 < full["bytes"] - 4 * 32 * (2 * full["tokens"] + full["texts"]) < headers
    assert abs(full["bytes"] - 2 * summaries["float16"]["bytes"]) < headers
    np.testing.assert_allclose(losses["float16"], exact, rtol=1e-3)
    assert losses["float16"] != exact
    # All components are the same vectors, rotated; a projection that is drawn for them makes another student.
    assert all(share > 0.9999 for share in summaries["whole"]["explained"].values())
    assert all(0.3 < share < 0.9999 for share in summaries["half"]["explained"].values())
    assert read_json(tmp_path / "student-half" / "run.json")["projections"] == []


def test_a_killed_command_goes_on_and_machines_share_the_parts(made, tmp_path, monkeypatch, capsys):
    own, written = StatesWriter.write, []

    def broken(self, number, *rest):
        if len(written) == 2:
            raise ConnectionError("the disk is gone")
        written.append(number)
        own(self, number, *rest)

    config = ready(made, states__layers="0,-1")
    with monkeypatch.context() as patch:
        patch.setattr(StatesWriter, "write", broken)
        with pytest.raises(ConnectionError):
            cache_states.run(config, tmp_path / "cache")
    for part in (0, 1):
        cache_states.run(ready(made, states__layers="0,-1", cache_parts=2, cache_part=part), tmp_path / "cache")
        assert (tmp_path / "cache" / "DONE").is_file() == (part == 1)
    assert "parts are left to the other machines" in capsys.readouterr().out
    assert (tmp_path / "cache" / "manifest.json").read_text() == (made / "cache" / "manifest.json").read_text()


def test_components_are_those_of_the_machine_with_part_0(made, tmp_path):
    changes = {"states__components": 8, "cache_parts": 2}
    with pytest.raises(UserError, match=r"config\.cache_part: part 0 computes the components"):
        cache_states.run(ready(made, **changes, cache_part=1), tmp_path / "cache")
    for part in (0, 1):
        cache_states.run(ready(made, **changes, cache_part=part), tmp_path / "cache")
    cache_states.run(ready(made, states__components=8), tmp_path / "whole")
    assert (tmp_path / "cache" / "manifest.json").read_text() == (tmp_path / "whole" / "manifest.json").read_text()


def test_a_student_resumes_bit_for_bit(made, tmp_path, monkeypatch):
    distill.run(cached(made), tmp_path / "straight")
    own = StateBatches.batch

    def broken(self, step, *rest):
        if step == STEPS - 1:
            raise ConnectionError("the disk is gone")
        return own(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(StateBatches, "batch", broken)
        with pytest.raises(ConnectionError):
            distill.run(cached(made), tmp_path / "broken")
    assert (tmp_path / "broken" / "checkpoints" / str(STEPS - 1)).is_dir()
    distill.run(cached(made), tmp_path / "broken")
    config = cached(made)
    assert_same(final_params(config, tmp_path / "straight"), final_params(config, tmp_path / "broken"), 0)


def test_a_narrow_student_starts_from_the_teachers_table_and_keeps_it_frozen(made, tmp_path):
    changes = {"distill__init": "teacher", "distill__table_rate": 0.0, "vocabulary": TRIM}
    tables = []
    for name, config in {"loop": ready(made, **changes), "cached": cached(made, **changes)}.items():
        distill.run(config, tmp_path / name)
        tables.append(final_params(config, tmp_path / name)["encoder"]["embeddings"]["tokens"])
    np.testing.assert_array_equal(*tables)
    np.testing.assert_allclose(np.sqrt(np.mean(tables[0] ** 2)), config.student.initializer_range, rtol=1e-5)
    assert "token table" in read_json(tmp_path / "cached" / "run.json")["remarks"][0]
    distill.run(cached(made, **changes | {"distill__table_rate": 1.0}), tmp_path / "free")
    assert np.abs(final_params(config, tmp_path / "free")["encoder"]["embeddings"]["tokens"] - tables[0]).max() > 1e-4


def test_what_does_not_fit_is_refused_in_one_sentence_and_nothing_is_written(made, tmp_path):
    config = ready(made, pretrain__steps=3)
    pretrain.run(config, tmp_path / "teacher")
    masked = config_for(prepared=str(made / "data"), teacher_checkpoint=str(made / "teacher"))
    cache_teacher.run(masked, tmp_path / "predictions")
    cache_states.run(ready(made, states__layers="none", states__kinds=("task",)), tmp_path / "task")
    only_texts = {"distill__hidden": {"weight": 0.0}}
    for config, message in (
        (cached(made, teacher_checkpoint=str(tmp_path / "teacher")), "was made from another teacher"),
        (cached(made, tmp_path / "task"), r"hidden\.layers: it needs the teacher's layers \[0, 1\], and .* has \[\]"),
        (cached(made, tmp_path / "task", **only_texts), "has no states of generic-en"),
        (cached(made, tmp_path / "predictions"), r"was written by cache_teacher.*config\.distill\.clean to False"),
        (cached(made, distill__relations={"weight": 1.0}), r"config\.teacher_cache: it has no relations"),
        (cached(made, distill__clean=False), r"config\.teacher_cache: it has no hidden, sentence.*cache_states"),
        (cached(made, tmp_path / "nowhere"), "holds no finished cache"),
        (ready(made, distill__mlm={"weight": 1.0}), r"config\.distill\.clean: mlm are taken where tokens are masked"),
    ):
        with pytest.raises(UserError, match=message):
            distill.run(config, tmp_path / "student")
        assert not (tmp_path / "student").exists()
    masked.teacher_cache = str(made / "cache")
    with pytest.raises(UserError, match=r"was written by cache_states.*config\.distill\.clean to True"):
        distill.run(masked, tmp_path / "student")
    for changes, message in (
        ({"states__layers": "7"}, r"config\.states\.layers: the teacher has no layer 7"),
        ({"states__layers": "all"}, r"config\.states\.layers: 'all' is unknown"),
        ({"states__kinds": ("selected",)}, r"config\.states\.kinds: config\.prepared has no train rows of selected"),
        ({"states__components": 33}, r"config\.states\.components: 33 of states that are 32 wide"),
        ({"states__dtype": "int8"}, r"config\.states\.dtype"),
        ({"teacher_checkpoint": f"{made / 'teacher'},x"}, r"config\.teacher_checkpoint: a cache holds one teacher's"),
    ):
        with pytest.raises(UserError, match=message):
            cache_states.run(ready(made, **changes), tmp_path / "cache")
        assert not (tmp_path / "cache").exists()


def test_rows_that_changed_since_the_cache_was_written_are_refused(made, tmp_path):
    config = config_for(rows__length=24)
    config.tokenizer.update({"kind": "load", "path": str(made / "data" / "tokenizer")})
    prepare.run(config, tmp_path / "data")
    assert Prepared(tmp_path / "data").tokenizer.fingerprint == Prepared(made / "data").tokenizer.fingerprint
    with pytest.raises(UserError, match="was made from other rows of generic-"):
        distill.run(cached(made, prepared=str(tmp_path / "data")), tmp_path / "student")
    assert not (tmp_path / "student").exists()
    place = made / "cache" / "parts"
    note = json.loads(next(place.glob("*.json")).read_text())
    assert note["tokens"] > 0 and note["texts"] > 0
