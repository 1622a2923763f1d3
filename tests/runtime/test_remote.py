"""Every command with everything on a store: prepared rows, teacher, cache, checkpoints, metrics and results."""

import contextlib
import random

import numpy as np
import pytest

from kd_jax.config import to_dict
from kd_jax.config.data import read_prepare
from kd_jax.data import prepared as data
from kd_jax.data.batches import MaskedBatches
from kd_jax.main import cache_teacher, distill, evaluate, finetune_dc, prepare, pretrain, study
from kd_jax.main.command import on_storage
from kd_jax.runtime import copies
from kd_jax.runtime.files import read_json, read_json_lines, write_atomically
from kd_jax.runtime.paths import as_path, names_in
from kd_jax.trainer.checkpoint import Checkpoints
from kd_jax.trainer.metrics import TIME
from kd_jax.trainer.state import params_fingerprint
from kd_jax.types import UserError
from tests.support import fake_store, toy_training
from tests.support.finished_runs import small_config


@pytest.fixture
def store(tmp_path, monkeypatch):
    """What was read from the store, on which every bucket is a folder of tmp_path/buckets."""
    monkeypatch.setattr(copies, "_chosen_root", str(tmp_path / "local"))
    read = fake_store.install(tmp_path)
    with fake_store.serving(tmp_path):
        yield read


def small(prepared: str):
    config = small_config()
    for job in (config.pretrain, config.distill, config.finetune):
        job.update({"steps": 4, "checkpoint_every": 2, "batch_size": 8, "evaluate_rows": 8})
    config.prepared = prepared
    return config


def rows_without_times(metrics):
    return [
        {name: value for name, value in row.items() if not name.startswith(TIME)}
        for row in read_json_lines(metrics, growing=True)
    ]


@contextlib.contextmanager
def stopping_at(step, monkeypatch):
    """Batches end with an error at a step, as when a process dies."""
    batch = MaskedBatches.batch

    def stops(self, number, *place):
        if number == step:
            raise RuntimeError("the machine is gone")
        return batch(self, number, *place)

    with monkeypatch.context() as patch:
        patch.setattr(MaskedBatches, "batch", stops)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            yield


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_from_text_to_results_with_everything_on_a_store(tmp_path, store, monkeypatch, scheme):
    base = f"{scheme}://bucket/study"
    config = small(f"{base}/prepared")
    prepare.run(config, as_path(config.prepared))
    prepare.run(config, as_path(config.prepared))  # finished: left as it is
    assert (as_path(config.prepared) / "DONE").is_file()

    # A run that dies after its checkpoint goes on from it, from another host, as one that never stopped.
    config.tensorboard = True
    with stopping_at(3, monkeypatch):
        pretrain.run(config, as_path(f"{base}/teacher"))
    checkpoints = names_in(as_path(f"{base}/teacher/checkpoints"))
    assert "2" in checkpoints and "4" not in checkpoints
    monkeypatch.setattr(copies, "_chosen_root", str(tmp_path / "another-host"))
    store.clear()
    pretrain.run(config, as_path(f"{base}/teacher"))
    fetched = [name for name in store if name.startswith("bucket/study/prepared/rows")]
    assert fetched and len(fetched) == len(set(fetched))
    local = small(str(tmp_path / "prepared"))
    prepare.run(local, tmp_path / "prepared")
    pretrain.run(local, tmp_path / "teacher")
    there, here = as_path(f"{base}/teacher"), tmp_path / "teacher"
    assert rows_without_times(there / "metrics.jsonl") == rows_without_times(here / "metrics.jsonl")
    assert read_json(there / "heldout.json") == read_json(here / "heldout.json")
    fingerprints = {read_json(run / "DONE")["parameters_fingerprint"] for run in (there, here)}
    assert len(fingerprints) == 1
    assert names_in(there / "tensorboard")
    assert names_in(tmp_path / "another-host/copies")

    # The same through a cache, and finetuned and scored.
    config.tensorboard = False
    config.teacher_checkpoint = f"{base}/teacher"
    cache_teacher.run(config, as_path(f"{base}/cache"))
    config.teacher_cache = f"{base}/cache"
    distill.run(config, as_path(f"{base}/student"))
    config.finetune.init_from = f"{base}/student"
    finetune_dc.run(config, as_path(f"{base}/dc"))
    config.evaluate.checkpoint = f"{base}/dc"
    evaluate.run(config, as_path(f"{base}/scores"))
    local.teacher_checkpoint = str(here)
    cache_teacher.run(local, tmp_path / "cache")
    local.teacher_cache = str(tmp_path / "cache")
    distill.run(local, tmp_path / "student")
    students = as_path(f"{base}/student"), tmp_path / "student"
    assert len({read_json(run / "DONE")["parameters_fingerprint"] for run in students}) == 1
    scores = {row["metric"]: row["value"] for row in read_json_lines(as_path(f"{base}/scores/results.jsonl"))}
    assert np.isfinite(scores["accuracy"])
    written = {file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("*") if file.is_file()}
    assert written <= {"buckets", "local", "another-host", "prepared", "teacher", "cache", "student"}


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_the_rows_that_a_checkpoint_counts_are_on_the_store_before_it(store, scheme):
    workdir = as_path(f"{scheme}://bucket/toy")
    found = []

    class Looking(Checkpoints):
        def save(self, step, state, meta):
            found.append((meta["rows"], len(read_json_lines(workdir / "metrics.jsonl", growing=True))))
            super().save(step, state, meta)

    with Looking(workdir / "others", keep=2) as checkpoints:
        toy_training.train(workdir, checkpoints=checkpoints, tensorboard=True)
    assert len(found) == 3 and all(counted == there for counted, there in found)
    assert found[-1][0] == 3 and len(names_in(workdir / "tensorboard")) == 1


@pytest.mark.long
def test_checkpoints_on_a_store_that_refuses_one_request_in_four(tmp_path, monkeypatch):
    """Tensorstore, which writes their arrays, retries; the run and its resume are the same as on a disk."""
    monkeypatch.setattr(copies, "_chosen_root", str(tmp_path / "local"))
    fake_store.install(tmp_path)
    chance, refused = random.Random(0), []

    def refuses():
        refused.append(chance.random() < 0.25)
        return refused[-1]

    def job(steps):
        return toy_training.toy_job(steps=steps, checkpoint_every=3, schedule="constant", warmup_steps=0)

    for until in (6, 9):
        with fake_store.serving(tmp_path, refuses):
            state = toy_training.train(as_path("gs://bucket/toy"), job(until))
    straight = toy_training.train(tmp_path / "toy", job(9))
    assert params_fingerprint(state["params"]) == params_fingerprint(straight["params"])
    assert any(refused)
    assert names_in(as_path("gs://bucket/toy/checkpoints")) == ["6", "9"]


@pytest.mark.long
def test_a_study_with_its_workdir_on_a_store(tmp_path, store):
    config = small("")
    config.storage.local = str(tmp_path / "local")
    config.study.transfer_sets = {"mix50": 0.5}
    config.study.update({"adapted_sets": (), "mlm_sets": ("mix50",), "tasks": ("dc",)})
    workdir = "s3://bucket/study"
    on_storage(study.run)(config, workdir)
    files = ["models.json", "report.html", "report.md", "results.jsonl"]
    assert names_in(as_path(workdir)) == sorted(["figures", "stages", *files])
    stages = as_path(workdir) / "stages"
    assert all((stages / name / "DONE").is_file() for name in names_in(stages))
    kinds = {row["student"] for row in read_json_lines(as_path(workdir) / "results.jsonl")}
    assert {"teacher", "scratch", "mlm", "distilled"} <= kinds
    assert {file.name for file in tmp_path.iterdir()} <= {"buckets", "uploads", "local"}


@pytest.mark.slow
def test_what_is_damaged_on_the_store_is_named_and_not_used(tmp_path, store):
    base = "s3://bucket/damaged"
    config = small(f"{base}/prepared")
    prepare.run(config, as_path(config.prepared))
    prepared = tmp_path / "buckets/bucket/damaged/prepared"
    file = sorted((prepared / "rows/train").rglob("tokens.npy"))[0]
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    write_atomically(file, bytes(data))
    copies.keep_copies_in(str(tmp_path / "fresh"))
    name = f"{base}/prepared/{file.relative_to(prepared).as_posix()}"
    with pytest.raises(UserError, match=rf"^{name}: is damaged"):
        pretrain.run(config, as_path(f"{base}/teacher"))
    assert not (as_path(f"{base}/teacher") / "DONE").exists()


def test_a_prepare_that_is_killed_while_it_puts_is_made_good_by_the_next(tmp_path, store, monkeypatch):
    config = small("gs://bucket/prepared")
    put = data.put

    def killed(folder, remote, names):
        put(folder, remote, list(names)[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(read_prepare(config), to_dict(config), config.prepared)
    assert names_in(as_path(config.prepared))
    with pytest.raises(UserError, match="is not a finished prepared folder"):
        data.Prepared(config.prepared)
    monkeypatch.setattr(data, "put", put)
    data.prepare(read_prepare(config), to_dict(config), config.prepared)
    store.clear()
    prepared = data.Prepared(config.prepared)
    data.prepare(read_prepare(config), to_dict(config), tmp_path / "prepared")
    assert prepared.fingerprint == data.Prepared(tmp_path / "prepared").fingerprint
    rows = prepared.stores("train")[0].rows(np.arange(2))
    np.testing.assert_array_equal(rows, data.Prepared(tmp_path / "prepared").stores("train")[0].rows(np.arange(2)))
    assert store == ["bucket/prepared/manifest.json"]  # what was built here is not fetched
    config.rows.length = 40
    with pytest.raises(UserError, match=r"^gs://bucket/prepared: was prepared with another config .*rows\.length"):
        data.prepare(read_prepare(config), to_dict(config), config.prepared)


def test_rows_are_waited_for_when_they_are_read_and_not_before(tmp_path, store, monkeypatch):
    config = small("gs://bucket/prepared")
    data.prepare(read_prepare(config), to_dict(config), config.prepared)
    monkeypatch.setattr(copies, "_chosen_root", str(tmp_path / "another-host"))
    monkeypatch.setattr(copies.LocalCopy, "_fetch_waiting", lambda self: None)
    store.clear()
    one = data.Prepared(config.prepared).stores("train")[0]
    assert one.num_rows > 0 and not [name for name in store if name.endswith("tokens.npy")]
    one.rows(np.arange(1))
    assert [name for name in store if name.endswith(f"{one.name}/tokens.npy")]


def test_a_prepared_folder_without_checksums_and_one_that_is_not_there(tmp_path, store):
    with pytest.raises(UserError, match=r"^config\.prepared: gs://bucket/none is not a finished prepared folder"):
        data.Prepared("gs://bucket/none")
    write_atomically(as_path("gs://bucket/old/manifest.json"), b'{"config": {}, "fingerprint": "a"}')
    with pytest.raises(UserError, match=r"^gs://bucket/old: its manifest has no checksums"):
        data.Prepared("gs://bucket/old")
