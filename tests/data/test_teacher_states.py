"""Cached states: every row has its own vectors with its clean tokens, however the parts were written, or is refused."""

import copy

import numpy as np
import pytest

from kd_jax.data.batches import CleanBatches
from kd_jax.data.packing import positions
from kd_jax.data.teacher_cache import TeacherCache
from kd_jax.data.teacher_states import StateBatches, StatesWriter, TeacherStates, counts_of
from kd_jax.runtime import copies
from kd_jax.runtime.paths import as_path
from kd_jax.types import UserError
from tests.data.test_batches import TOKENIZER, make, stores  # noqa: F401  a fixture
from tests.support import fake_store

STEPS, WIDTH, LAYERS = 4, 3, (1, 4)
FIELDS = {"first": 1, "second": 4}


def states_of(store, rows, texts):
    """Stand-in for the teacher: vectors that encode each token's text, position and layer, and the texts' means."""
    tokens, segment_ids = store.rows(rows)
    values = (tokens + positions(segment_ids) / 100)[:, :, None] * np.arange(1, WIDTH + 1)
    inside = (segment_ids[:, None, :] == np.arange(1, texts + 1)[None, :, None]).astype(float)
    means = np.einsum("rsl,rlw->rsw", inside, values) / np.maximum(inside.sum(axis=2), 1)[:, :, None]
    real = (segment_ids > 0)[:, :, None]
    return [(np.where(real, values * 10**layer, 7)).astype(np.float32) for layer in LAYERS], means.astype(np.float32)


def writer_of(folder, stores, rows_per_part=7, **identity):  # noqa: F811
    return StatesWriter(folder, stores, LAYERS, WIDTH, "float32", {"teacher": "abc", **identity}, rows_per_part)


def write(writer, numbers):
    for number in numbers:
        store, rows = writer.rows_of(number)
        layers, texts = states_of(writer.stores[store], rows, writer.texts)
        writer.write(number, writer.pack(store, rows, layers, texts), {"rows": len(rows)})


@pytest.fixture
def finished(stores, tmp_path):  # noqa: F811
    writer = writer_of(tmp_path / "cache", stores)
    write(writer, writer.missing(0, 1))
    assert writer.finish() is not None
    return tmp_path / "cache"


def batches_of(folder, stores, **transfer):  # noqa: F811
    transfer_set = make(stores, **transfer).transfer_set
    return StateBatches(TeacherStates(folder), transfer_set, TOKENIZER, FIELDS, "means", 24)


def test_batches_are_clean_rows_with_each_tokens_states_and_each_texts_mean(stores, finished):  # noqa: F811
    found = batches_of(finished, stores)
    transfer_set = found.transfer_set
    clean = CleanBatches(transfer_set, TOKENIZER, 24)
    assert clean.fingerprint != found.fingerprint != make(stores).fingerprint
    texts = found.cache.texts
    for step in range(STEPS):
        source, _, row = transfer_set.locate(np.arange(step * 24, step * 24 + 24))
        whole = found.batch(step)
        parts = [found.batch(step, process, 2) for process in range(2)]
        for name, values in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
        expected = clean.batch(step)
        assert whole.keys() == {*expected, "first", "second", "means"}
        for name, values in expected.items():
            np.testing.assert_array_equal(whole[name], values, err_msg=name)
        for place, (number, one) in enumerate(zip(source, row)):
            tokens, segment_ids = stores[number].rows(np.array([one]))
            np.testing.assert_array_equal(whole["tokens"][place], tokens[0])
            (first, second), means = states_of(stores[number], np.array([one]), texts)
            real = (segment_ids[0] > 0)[:, None]
            np.testing.assert_array_equal(whole["first"][place], np.where(real, first[0], 0))
            np.testing.assert_array_equal(whole["second"][place], np.where(real, second[0], 0))
            np.testing.assert_array_equal(whole["means"][place], means[0])


def test_only_what_is_asked_for_is_read(stores, finished):  # noqa: F811
    transfer_set = make(stores).transfer_set
    cache = TeacherStates(finished)
    assert StateBatches(cache, transfer_set, TOKENIZER, {}, "means", 24).batch(0).keys() >= {"tokens", "means"}
    only = StateBatches(cache, transfer_set, TOKENIZER, {"x": 4}, "", 24).batch(0)
    assert only.keys() == {"tokens", "segment_ids", "positions", "x"}
    np.testing.assert_array_equal(only["x"], batches_of(finished, stores).batch(0)["second"])


def test_parts_may_be_written_by_several_machines_and_their_size_changes_no_batch(stores, finished, tmp_path):  # noqa: F811
    one, other = (writer_of(tmp_path / "again", stores, rows_per_part=11) for _ in range(2))
    write(one, one.missing(0, 2))
    assert one.finish() is None
    write(other, other.missing(1, 2))
    assert other.finish() is not None
    for step in range(STEPS):
        left, right = (batches_of(folder, stores).batch(step) for folder in (finished, tmp_path / "again"))
        for name, values in left.items():
            np.testing.assert_array_equal(values, right[name])


def test_padding_takes_no_space(stores, finished):  # noqa: F811
    counts = np.concatenate([counts_of(store) for store in stores]).astype(int)
    assert counts[:, 0].sum() == sum(store.manifest["tokens"] for store in stores)
    records = sum(part["records"] for part in TeacherStates(finished).manifest["parts"])
    assert records == len(LAYERS) * counts[:, 0].sum() + counts[:, 1].sum()


def test_centers_are_the_means_of_what_the_parts_hold(stores, finished):  # noqa: F811
    cache = TeacherStates(finished)

    def means(rows_of):
        everyone = [[], [], []]
        for store in stores:
            rows = rows_of(store)
            layers, texts = states_of(store, rows, cache.texts)
            counts = counts_of(store)[rows].astype(int)
            for into, values, count in zip(everyone, [*layers, texts], [*[counts[:, 0]] * 2, counts[:, 1]]):
                into += [values[row, : count[row]] for row in range(len(rows))]
        return [np.concatenate(one).astype(np.float64).mean(axis=0) for one in everyone]

    of_layers, of_texts = cache.centers(most=10**6)
    first, second, texts = means(lambda store: np.arange(store.num_rows))
    for found, expected in ((of_layers[1], first), (of_layers[4], second), (of_texts, texts)):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Of one part, the first one of the first store.
    of_layers, _ = cache.centers(most=1)
    first, *_ = means(lambda store: np.arange(7 if store is stores[0] else 0))
    np.testing.assert_allclose(of_layers[1], first, rtol=1e-6)


def test_a_sample_is_spread_over_all_stores(stores, tmp_path):  # noqa: F811
    writer = writer_of(tmp_path / "cache", stores)
    everything = sum(store.num_rows for store in stores)
    for most in (5, 10**6):
        sample = writer.sample(most)
        assert sum(len(rows) for _, rows in sample) == min(most, everything)
        assert all(rows.max() < stores[number].num_rows and rows.min() >= 0 for number, rows in sample)
    assert [number for number, _ in sample] == list(range(len(stores)))


def test_what_differs_is_named(stores, finished):  # noqa: F811
    with pytest.raises(UserError, match=r"was made from another teacher .*abc.*xyz"):
        TeacherStates(finished).check({"teacher": "xyz"})
    with pytest.raises(UserError, match=r"was written by cache_states, and cache_teacher is needed here"):
        TeacherCache(finished)
    with pytest.raises(UserError, match="begun with another teacher, data or config"):
        writer_of(finished, stores, teacher="xyz")


def test_a_store_that_is_read_must_be_there_unchanged(stores, tmp_path):  # noqa: F811
    writer = writer_of(tmp_path / "task", stores[1:])
    write(writer, writer.missing(0, 1))
    writer.finish()
    with pytest.raises(UserError, match=r"config\.teacher_cache: .* has no states of web-en"):
        batches_of(tmp_path / "task", stores)
    older = copy.copy(stores[0])
    older.fingerprint = "older"
    changed = writer_of(tmp_path / "other", [older, *stores[1:]])
    write(changed, changed.missing(0, 1))
    changed.finish()
    with pytest.raises(UserError, match=r"was made from other rows of web-en; run cache_states again"):
        batches_of(tmp_path / "other", stores)


def test_a_changed_part_is_named_with_its_remedy(stores, finished):  # noqa: F811
    place = sorted((finished / "parts").glob("*.npy"))[0]
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    batches = batches_of(finished, stores)
    with pytest.raises(UserError, match=rf"{place.name}: .*checksum differs; remove it .* run cache_states again"):
        for step in range(STEPS * 4):
            batches.batch(step)


def test_a_cache_on_a_store_is_read_from_a_copy(stores, finished, tmp_path, monkeypatch):  # noqa: F811
    fake_store.install(tmp_path / "store")
    monkeypatch.setattr(copies, "_chosen_root", str(tmp_path / "local"))
    remote = as_path("gs://bucket/cache")
    writer = writer_of(remote, stores)
    write(writer, writer.missing(0, 1))
    assert writer.finish()["fingerprint"] == TeacherStates(finished).fingerprint
    near, far = batches_of(finished, stores), batches_of(remote, stores)
    for name, values in far.batch(1).items():
        np.testing.assert_array_equal(values, near.batch(1)[name])
