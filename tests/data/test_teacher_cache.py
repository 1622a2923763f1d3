"""Cached predictions: the same batches as masking gives, whole or refused, however the writing was cut up."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from kd_jax.data.batches import MaskedRows
from kd_jax.data.parts import BEGUN
from kd_jax.data.teacher_cache import CachedBatches, CacheWriter, Layout, TeacherCache, visited
from kd_jax.runtime import copies
from kd_jax.runtime.paths import as_path
from kd_jax.types import UserError
from tests.data.test_batches import MASKING, TOKENIZER, make, stores  # noqa: F401  a fixture
from tests.support import fake_store

STEPS, WIDTH = 5, 3
IDENTITY = {"teacher": "abc", "masking": asdict(MASKING), "rows": {"web-en": "x"}}


def features(batch) -> np.ndarray:
    """Stands for the teacher: a value that tells each position's text, place and mask apart."""
    targets = batch["masked_targets"][:, :, None] + batch["masked_positions"][:, :, None] / 100
    return (targets * np.arange(1, WIDTH + 1)).astype(np.float32)


def layout(stores) -> Layout:  # noqa: F811
    slots = MaskedRows(stores, MASKING, TOKENIZER).slots
    return Layout(stores[0].length, slots, TOKENIZER.vocab_size, {"features": ("float32", (WIDTH,))})


def writer_of(folder, stores, rows=STEPS * 24, rows_per_part=16, identity=IDENTITY):  # noqa: F811
    visits = visited(make(stores).transfer_set, rows, MASKING.epochs)
    return CacheWriter(folder, stores, visits, layout(stores), identity, rows_per_part)


def write(writer, numbers):
    masked = MaskedRows(writer.stores, MASKING, TOKENIZER)
    for number in numbers:
        store, rows, epochs = writer.rows_of(number)
        batch = masked(np.full(len(rows), store), rows, epochs)
        writer.write(number, writer.layout.pack(batch, {"features": features(batch)}), {"positions": 1.0})


@pytest.fixture
def finished(stores, tmp_path):  # noqa: F811
    writer = writer_of(tmp_path, stores)
    write(writer, writer.missing(0, 1))
    assert writer.finish() is not None
    return tmp_path


def test_batches_are_those_that_masking_gives_with_the_values_beside_them(stores, finished):  # noqa: F811
    fresh = make(stores)
    cached = CachedBatches(TeacherCache(finished), fresh.transfer_set, MASKING, 24, STEPS)
    for step in range(STEPS):
        for process in range(2):
            expected, found = fresh.batch(step, process, 2), cached.batch(step, process, 2)
            assert set(found) == {*expected, "teacher_features"}
            for name, values in expected.items():
                np.testing.assert_array_equal(found[name], values, err_msg=name)
                assert found[name].dtype == values.dtype, name
            used = expected["masked_weights"] > 0
            np.testing.assert_array_equal(found["teacher_features"][used], features(expected)[used])


def test_every_visited_row_and_masking_epoch_is_written_once(stores):  # noqa: F811
    transfer_set = make(stores).transfer_set
    source, epoch, row = transfer_set.locate(np.arange(500))
    wanted = set(zip(source.tolist(), (epoch % MASKING.epochs).tolist(), row.tolist()))
    seen = visited(transfer_set, 500, MASKING.epochs)
    found = {(number, e, r) for number, one in enumerate(seen) for e, r in np.argwhere(one).tolist()}
    assert found == wanted
    assert len(wanted) < 500  # task rows come again with the same masks


def test_parts_may_be_written_by_several_machines_and_a_killed_one_goes_on(stores, tmp_path):  # noqa: F811
    one, other = writer_of(tmp_path, stores), writer_of(tmp_path, stores)
    assert len(one) > 3
    mine = one.missing(0, 2)
    write(one, mine[:1])
    assert one.finish() is None
    with pytest.raises(UserError, match=r"config\.teacher_cache: .* holds no finished cache"):
        TeacherCache(tmp_path)
    (tmp_path / "parts" / ".web-en-00002.npy.99.partial").write_bytes(b"half")
    assert one.missing(0, 2) == mine[1:]
    write(other, other.missing(1, 2))
    again = writer_of(tmp_path, stores)
    write(again, again.missing(0, 2))
    assert again.finish()["fingerprint"] == again.finish()["fingerprint"]
    assert TeacherCache(tmp_path).identity == json.loads(json.dumps(IDENTITY))


def test_the_cut_into_parts_changes_no_batch(stores, finished, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("whole")
    writer = writer_of(folder, stores, rows_per_part=10**6)
    write(writer, writer.missing(0, 1))
    writer.finish()
    transfer_set = make(stores).transfer_set
    small, large = (
        CachedBatches(TeacherCache(place), transfer_set, MASKING, 24, STEPS) for place in (finished, folder)
    )
    for name, values in small.batch(3).items():
        np.testing.assert_array_equal(values, large.batch(3)[name])


def test_a_changed_part_is_named_with_its_remedy(stores, finished):  # noqa: F811
    place = sorted((finished / "parts").glob("*.npy"))[0]
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    cached = CachedBatches(TeacherCache(finished), make(stores).transfer_set, MASKING, 24, STEPS)
    with pytest.raises(UserError, match=rf"{place.name}: .*checksum differs; remove it"):
        for step in range(STEPS):
            cached.batch(step)


def test_what_differs_is_named(finished):
    cache = TeacherCache(finished)
    cache.check(IDENTITY)
    with pytest.raises(UserError, match=r"another teacher .*abc.*xyz"):
        cache.check({**IDENTITY, "teacher": "xyz"})
    with pytest.raises(UserError, match="another masking"):
        cache.check({**IDENTITY, "masking": {**asdict(MASKING), "seed": 1}})
    with pytest.raises(UserError, match="another rows"):
        cache.check({**IDENTITY, "rows": {"web-en": "y"}})


def test_rows_that_the_cache_lacks_are_counted_before_the_first_step(stores, finished):  # noqa: F811
    with pytest.raises(UserError, match=r"lacks \d+ of the \d+ rows of web-en .*config\.cache\.seeds"):
        CachedBatches(TeacherCache(finished), make(stores, seed=1).transfer_set, MASKING, 24, STEPS)
    with pytest.raises(UserError, match="lacks"):
        CachedBatches(TeacherCache(finished), make(stores).transfer_set, MASKING, 24, 4 * STEPS)


def test_a_folder_begun_with_another_config_is_refused(stores, finished):  # noqa: F811
    with pytest.raises(UserError, match="begun with another teacher, data or config"):
        writer_of(finished, stores, identity={**IDENTITY, "teacher": "xyz"})
    with pytest.raises(UserError, match="begun with another"):
        writer_of(finished, stores, rows=24)
    assert (finished / BEGUN).is_file()


def test_a_cache_on_a_store_is_written_in_parts_and_read_from_a_copy(stores, finished, tmp_path, monkeypatch):  # noqa: F811
    fake_store.install(tmp_path / "store")
    monkeypatch.setattr(copies, "_chosen_root", str(tmp_path / "local"))
    remote = as_path("gs://bucket/cache")
    one, other = writer_of(remote, stores), writer_of(remote, stores)  # two machines
    write(one, one.missing(0, 2))
    assert one.finish() is None
    write(other, other.missing(1, 2))
    assert other.finish()["fingerprint"] == TeacherCache(finished).fingerprint
    with pytest.raises(UserError, match=r"^gs://bucket/cache: holds a cache begun with another"):
        writer_of(remote, stores, rows=24)
    transfer_set = make(stores).transfer_set
    near, far = (CachedBatches(TeacherCache(cache), transfer_set, MASKING, 24, STEPS) for cache in (finished, remote))
    for step in range(STEPS):
        for name, values in far.batch(step).items():
            np.testing.assert_array_equal(values, near.batch(step)[name])


def test_a_damaged_part_on_a_store_is_named(stores, finished, tmp_path, monkeypatch):  # noqa: F811
    fake_store.install(tmp_path / "store")
    monkeypatch.setattr(copies, "_chosen_root", str(tmp_path / "local"))
    bucket = tmp_path / "store/buckets/bucket"
    shutil.copytree(finished, bucket, ignore=shutil.ignore_patterns("store"))  # as a user copies a finished cache
    part = sorted((bucket / "parts").glob("*.npy"))[0]
    part.write_bytes(part.read_bytes()[:-1])
    cached = CachedBatches(TeacherCache("s3://bucket"), make(stores).transfer_set, MASKING, 24, STEPS)
    with pytest.raises(UserError, match=rf"^s3://bucket/parts/{part.name}: is damaged"):
        for step in range(STEPS):
            cached.batch(step)


def test_records_are_as_small_as_their_types_allow():
    small = Layout(64, 10, 4000, {"features": ("float16", (256,))}).record
    assert small.itemsize == 64 * 2 + 10 + 10 * 2 + 2 + 10 * 256 * 2
    wide = Layout(300, 45, 250_002, {"ids": ("int32", (8,)), "log_p": ("float16", (8,))}).record
    assert wide.itemsize == 300 * 4 + 45 * 2 + 45 * 4 + 2 + 45 * 8 * 6
