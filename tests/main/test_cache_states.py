"""The command that caches a teacher's states, and distilling from its cache: equal to the teacher in the loop."""

import shutil

import jax
import numpy as np
import pytest

from kd_jax.config.data import Vocabulary
from kd_jax.config.settings import read
from kd_jax.data.batches import PhasedBatches
from kd_jax.data.prepared import Prepared
from kd_jax.data.teacher_states import StateBatches, StatesWriter, TeacherStates
from kd_jax.data.vocabulary import kept_ids, seen_by_student, train_counts
from kd_jax.jobs import masked_lm
from kd_jax.jobs.cache import SUMMARY
from kd_jax.main import cache_states, cache_teacher, distill, prepare, pretrain
from kd_jax.models.initialization import principal_table
from kd_jax.runtime.files import read_json, write_json
from kd_jax.trainer.checkpoint import load_params
from kd_jax.types import UserError
from tests.main.test_cache_teacher import STEPS, config_for, final_params, metrics_of

pytestmark = pytest.mark.slow

TRIM = {"trim": True, "min_count": 3, "dropped": "renormalize"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data, a teacher, and a cache in float32: states of all of its layers, relations of the last."""
    folder = tmp_path_factory.mktemp("states")
    config = config_for(pretrain__steps=20, pretrain__learning_rate=1e-2, transfer__task_share=0.5)
    prepare.run(config, folder / "data")
    config.prepared = str(folder / "data")
    pretrain.run(config, folder / "teacher")
    cache_states.run(ready(folder, states__layers="0,-1", states__relations="last"), folder / "cache")
    return folder


def ready(made, **changes):
    """A narrow student on clean text, with all terms that a cache supports."""
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


@pytest.fixture(scope="module")
def straight(made):
    """The student trained from that cache without interruption."""
    distill.run(cached(made), made / "straight")
    return made / "straight"


def losses_of(workdir, name="loss"):
    return [row[name] for row in metrics_of(workdir) if name in row]


def test_students_from_the_cache_equal_those_of_the_teacher_in_the_loop(made, tmp_path):
    # Relation heads that differ from both models' attention heads, and not all of the parts.
    relations = {"weight": 1.0, "heads": 8, "parts": ("key", "value")}
    changes = {"vocabulary": TRIM, "transfer__task_share": 0.3, "distill__relations": relations}
    config = ready(made, **changes)
    distill.run(config, tmp_path / "loop")
    distill.run(cached(made, **changes), tmp_path / "cached")
    one, other = final_params(config, tmp_path / "loop"), final_params(config, tmp_path / "cached")
    for name in ("loss", "hidden", "sentence", "relations"):
        left, right = losses_of(tmp_path / "loop", name), losses_of(tmp_path / "cached", name)
        assert len(left) == STEPS
        np.testing.assert_allclose(left, right, rtol=1e-5)
    # Adam takes a full step even if a gradient is little more than rounding, here for one element in 9,168.
    assert_same(one, other, 1e-4)
    assert read_json(tmp_path / "cached" / "heldout.json") == []


@pytest.mark.long
def test_float16_and_components_cost_what_they_say(made, straight, tmp_path):
    summaries = {"whole": read_json(made / "cache" / SUMMARY)}
    for name, changes in {"float16": {"states__dtype": "float16"}, "half": {"states__components": 16}}.items():
        cache_states.run(ready(made, states__layers="0,-1", **changes), tmp_path / name)
        summaries[name] = read_json(tmp_path / name / SUMMARY)
        distill.run(cached(made, tmp_path / name), tmp_path / f"student-{name}")
    whole, float16, half = summaries.values()
    # Two layers of 32 numbers per token, and 32 per text; the first has queries, keys and values of a layer too.
    headers = 200 * len(list((made / "cache" / "parts").glob("*.npy")))
    for found, bytes_each, vectors in ((whole, 4 * 32, 5), (float16, 2 * 32, 2), (half, 4 * 16, 2)):
        assert 0 < found["bytes"] - bytes_each * (vectors * found["tokens"] + found["texts"]) < headers
    np.testing.assert_allclose(losses_of(tmp_path / "student-float16"), losses_of(straight), rtol=1e-3)
    assert losses_of(tmp_path / "student-float16") != losses_of(straight)
    assert whole["explained"] == {}
    assert half["explained"].keys() == {"layer 0", "layer 1", "texts"}
    assert all(0.3 < share < 0.9999 for share in half["explained"].values())
    # The student is as wide as the reduced states.
    assert read_json(tmp_path / "student-half" / "run.json")["projections"] == []


def test_a_killed_command_goes_on_and_machines_share_the_parts(made, tmp_path, monkeypatch, capsys):
    own, written = StatesWriter.write, []

    def broken(self, number, *rest):
        if len(written) == 2:
            raise ConnectionError("the disk is gone")
        written.append(number)
        own(self, number, *rest)

    what = {"states__layers": "0,-1", "states__relations": "last"}
    config = ready(made, **what)
    with monkeypatch.context() as patch:
        patch.setattr(StatesWriter, "write", broken)
        with pytest.raises(ConnectionError):
            cache_states.run(config, tmp_path / "cache")
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "parts").iterdir()}
    for part in (0, 1):
        cache_states.run(ready(made, **what, cache_parts=2, cache_part=part), tmp_path / "cache")
        assert (tmp_path / "cache" / "DONE").is_file() == (part == 1)
    assert "parts are left to the other machines" in capsys.readouterr().out
    assert len(kept) == 4 and all(file.stat().st_mtime_ns == time for file, time in kept.items()), "not written again"
    assert (tmp_path / "cache" / "manifest.json").read_text() == (made / "cache" / "manifest.json").read_text()


@pytest.mark.long
def test_components_come_from_the_machine_with_part_0(made, tmp_path):
    changes = {"states__components": 8, "cache_parts": 2}
    with pytest.raises(UserError, match=r"config\.cache_part: part 0 computes the components"):
        cache_states.run(ready(made, **changes, cache_part=1), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    for part in (0, 1):
        cache_states.run(ready(made, **changes, cache_part=part), tmp_path / "cache")
    cache_states.run(ready(made, states__components=8), tmp_path / "whole")
    assert (tmp_path / "cache" / "manifest.json").read_text() == (tmp_path / "whole" / "manifest.json").read_text()


def test_a_student_resumes_bit_for_bit(made, straight, tmp_path, monkeypatch):
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
    assert_same(final_params(config, straight), final_params(config, tmp_path / "broken"), 0)


@pytest.mark.parametrize("vectors", ["embeddings", "states"])
def test_a_narrow_student_starts_from_the_teachers_table_and_keeps_it_frozen(made, tmp_path, vectors):
    start = {"distill__init": "teacher", "distill__table_from": vectors, "distill__table_rate": 0.0}
    config = cached(made, **start, vocabulary=TRIM)
    distill.run(config, tmp_path / "student")
    table = final_params(config, tmp_path / "student")["encoder"]["embeddings"]["tokens"]
    full = Prepared(config.prepared)
    seen = seen_by_student(full, read(Vocabulary, config.vocabulary, "vocabulary"))
    theirs = jax.device_get(load_params(made / "teacher", teacher_shape(config, full)))
    whole = theirs["encoder"]["embeddings"]["tokens"][kept_ids(seen)]
    if vectors == "states":  # one token after the other, between the special ones
        model = masked_lm.encoder_model(config.teacher, full, "auto", "teacher")
        alone = [[full.tokenizer.cls_id, token, full.tokenizer.sep_id] for token in kept_ids(seen)]
        batch = {"tokens": np.array(alone), "segment_ids": np.ones((len(alone), 3), int)}
        batch["positions"] = np.tile(np.arange(3), (len(alone), 1))
        whole = np.asarray(model.hidden(theirs, batch)).mean(axis=1)
    expected, _ = principal_table(whole, train_counts(seen), 16, config.student.initializer_range)
    # States computed in other batches differ in the last bits.
    np.testing.assert_allclose(table, expected, atol=0 if vectors == "embeddings" else 1e-5)
    assert "token table" in read_json(tmp_path / "student" / "run.json")["remarks"][0]


def teacher_shape(config, prepared):
    return masked_lm.encoder_model(config.teacher, prepared, "auto", "teacher").abstract()


def test_what_does_not_fit_is_refused_in_one_sentence_and_nothing_is_written(made, tmp_path):
    shutil.copytree(made / "teacher", tmp_path / "teacher")
    done = read_json(tmp_path / "teacher" / "DONE")
    write_json(tmp_path / "teacher" / "DONE", {**done, "parameters_fingerprint": "another"})
    masked = config_for(prepared=str(made / "data"), teacher_checkpoint=str(made / "teacher"))
    (tmp_path / "predictions").mkdir()
    write_json(tmp_path / "predictions" / "manifest.json", {"identity": {}})  # as cache_teacher's, without its name
    cache_states.run(ready(made, states__layers="none", states__kinds=("task",)), tmp_path / "task")
    only_texts = {"distill__hidden": {"weight": 0.0}}
    for config, message in (
        (cached(made, teacher_checkpoint=str(tmp_path / "teacher")), "was made from another teacher"),
        (cached(made, tmp_path / "task"), r"hidden\.layers: it needs the teacher's layers \[0, 1\], and .* has \[\]"),
        (cached(made, tmp_path / "task", **only_texts), "has no states of generic-en"),
        (cached(made, tmp_path / "predictions"), r"was written by cache_teacher.*config\.distill\.clean to False"),
        (cached(made, distill__embeddings={"weight": 1.0}), r"config\.teacher_cache: it has no embeddings"),
        (
            cached(made, distill__relations={"weight": 1.0, "layers": "0:0"}),
            r"relations\.layers: it needs the teacher's layers \[0\], and .* has \[1\]; .*config\.states\.relations",
        ),
        (cached(made, distill__clean=False), r"config\.teacher_cache: it has no hidden, sentence.*cache_states"),
        (cached(made, tmp_path / "nowhere"), "holds no finished cache"),
        (ready(made, distill__center=True), r"config\.distill\.center: the mean is that of a cache of states"),
        (
            cached(made, distill__clean=False, distill__center=True),
            r"config\.distill\.center: masked text",
        ),
        (ready(made, distill__mlm={"weight": 1.0}), r"config\.distill\.clean: no token is masked for mlm"),
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
        ({"states__relations": "7"}, r"config\.states\.relations: the teacher has no layer 7"),
        ({"states__relations": "last", "states__components": 4}, r"config\.states\.components: relations need whole"),
        ({"states__components": 33}, r"config\.states\.components: 33 of states that are 32 wide"),
        ({"states__dtype": "int8"}, r"config\.states\.dtype"),
        ({"teacher_checkpoint": f"{made / 'teacher'},x"}, r"config\.teacher_checkpoint: a cache holds one teacher's"),
    ):
        with pytest.raises(UserError, match=message):
            cache_states.run(ready(made, **changes), tmp_path / "cache")
        assert not (tmp_path / "cache").exists()


@pytest.mark.long
def test_logits_follow_states_from_two_caches_as_in_the_loop_and_across_a_kill(made, tmp_path, monkeypatch):
    both = {"distill__masked_from": 0.5, "distill__kl": {"weight": 1.0}, "distill__mlm": {"weight": 1.0}}
    more = {"cache__dtype": "float32", "cache__task_shares": (0.5,), "cache__steps": STEPS}
    cache_teacher.run(ready(made, **both, **more), tmp_path / "logits")
    folders = f"{made / 'cache'},{tmp_path / 'logits'}"
    distill.run(ready(made, **both), tmp_path / "loop")
    distill.run(cached(made, folders, **both), tmp_path / "cached")
    config = ready(made, **both)
    one, other = final_params(config, tmp_path / "loop"), final_params(config, tmp_path / "cached")
    assert_same(one, other, 2e-5)
    terms = [
        {name for name in ("hidden", "sentence", "kl", "mlm") if name in row} for row in metrics_of(tmp_path / "loop")
    ]
    half = STEPS // 2
    assert terms[:half] == [{"hidden", "sentence"}] * half and terms[half:STEPS] == [{"kl", "mlm"}] * (STEPS - half)
    assert read_json(tmp_path / "cached" / "heldout.json") != []

    own = PhasedBatches.batch

    def broken(self, step, *rest):
        if step == half + 1:
            raise ConnectionError("the disk is gone")
        return own(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(PhasedBatches, "batch", broken)
        with pytest.raises(ConnectionError):
            distill.run(cached(made, folders, **both), tmp_path / "broken")
    distill.run(cached(made, folders, **both), tmp_path / "broken")
    assert_same(other, final_params(config, tmp_path / "broken"), 0)
    for config, message in (
        (cached(made, **both), r"config\.teacher_cache: 1 caches for 2 kinds of text"),
        (cached(made, folders), r"config\.teacher_cache: 2 caches for 1 kinds of text"),
        (cached(made, **{**both, "distill__clean": False}), r"config\.distill\.masked_from: .* set clean"),
        (ready(made, distill__masked_from=0.5), r"config\.distill\.masked_from: .*terms of both kinds"),
        (ready(made, **both, distill__teacher_steps=(0, 1)), r"config\.distill\.teacher_steps"),
    ):
        with pytest.raises(UserError, match=message):
            distill.run(config, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()


def test_rows_that_changed_since_the_cache_was_written_are_refused(made, tmp_path):
    config = config_for(rows__length=24)
    config.tokenizer.update({"kind": "load", "path": str(made / "data" / "tokenizer")})
    prepare.run(config, tmp_path / "data")
    assert Prepared(tmp_path / "data").tokenizer.fingerprint == Prepared(made / "data").tokenizer.fingerprint
    with pytest.raises(UserError, match="was made from other rows of generic-"):
        distill.run(cached(made, prepared=str(tmp_path / "data")), tmp_path / "student")
    assert not (tmp_path / "student").exists()


@pytest.mark.long
def test_a_teacher_with_another_tokenizer_gives_the_means_of_texts_and_nothing_else(made, tmp_path):
    config = config_for(pretrain__steps=1, tokenizer__vocab_size=300, rows__length=64)
    prepare.run(config, tmp_path / "theirs")
    config.prepared = str(tmp_path / "theirs")
    pretrain.run(config, tmp_path / "teacher")
    changes = {"teacher_checkpoint": str(tmp_path / "teacher"), "vocabulary": TRIM}
    with pytest.raises(UserError, match="another tokenizer"):
        cache_states.run(ready(made, **changes, states__layers="last"), tmp_path / "cache")
    cache_states.run(ready(made, **changes, states__layers="none"), tmp_path / "cache")

    ours, theirs = Prepared(made / "data"), Prepared(tmp_path / "theirs")
    store, cache = ours.stores("train")[0], TeacherStates(tmp_path / "cache")
    _, means = cache.read(store, np.array([3]), [], texts=True)
    tokens, segment_ids = store.rows(np.array([3]))
    model = masked_lm.encoder_model(config.teacher, theirs, "auto", "teacher")
    params = load_params(tmp_path / "teacher", model.abstract())
    for number in range(segment_ids.max()):
        (text,) = ours.tokenizer.decode([tokens[0][segment_ids[0] == number + 1]])
        (ids,) = theirs.tokenizer.encode([text])
        assert len(ids) <= 62
        alone = np.array([[theirs.tokenizer.cls_id, *ids, theirs.tokenizer.sep_id]], np.int32)
        batch = {"tokens": alone, "segment_ids": np.ones_like(alone), "positions": np.arange(alone.size)[None]}
        expected = np.asarray(model.hidden(params, batch))[0].mean(axis=0)
        np.testing.assert_allclose(means[0, number], expected, atol=1e-5)

    alone = {"distill__hidden": {"weight": 0.0}, "distill__center": True}
    distill.run(cached(made, tmp_path / "cache", **changes, **alone), tmp_path / "student")
    assert losses_of(tmp_path / "student")[-1] < losses_of(tmp_path / "student")[0]
    alone = {"distill__hidden": {"weight": 0.0}}
    for config in (
        cached(made, tmp_path / "cache", **changes),
        cached(made, tmp_path / "cache", **changes, **alone, distill__init="teacher"),
        ready(made, **changes, **alone),
    ):
        with pytest.raises(UserError, match="another tokenizer"):
            distill.run(config, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
