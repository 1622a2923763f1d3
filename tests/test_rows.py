import errno
import json
import types

import numpy as np
import pytest

from kd_jax.data import rows as rows_module
from kd_jax.data.rows import RowStore, maskable, pack_stream, positions, write_store
from kd_jax.types import UserError

CLS, SEP, PAD = 1, 2, 0
TOKENIZER = types.SimpleNamespace(
    vocab_size=50000, cls_id=CLS, sep_id=SEP, pad_id=PAD, special_ids=(0, 1, 2, 3, 4), fingerprint="tok-a"
)
STORE = {
    "name": "wiki-de", "source": "wiki", "kind": "generic", "language": "de", "split": "train", "length": 16,
    "open_rows": 4, "tokenizer": TOKENIZER, "removed": {}, "built_from": "abc",
}  # fmt: skip


def random_texts(count, longest, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(5, 50000, random.integers(0, longest)).astype(np.int32) for _ in range(count)]


def segments_of(tokens, segment_ids):
    """Every segment's tokens, read one by one."""
    found = []
    for row, ids in zip(tokens, segment_ids):
        for number in range(1, ids.max() + 1):
            columns = np.flatnonzero(ids == number)
            np.testing.assert_array_equal(columns, np.arange(columns[0], columns[0] + len(columns)))
            found.append(tuple(row[columns].tolist()))
    return found


def pack(texts, length, open_rows=8, chunk=10):
    chunks = [texts[i : i + chunk] for i in range(0, len(texts), chunk)]
    blocks = list(pack_stream(chunks, length, CLS, SEP, PAD, open_rows))
    return np.concatenate([b[0] for b in blocks]), np.concatenate([b[1] for b in blocks])


def test_hand_worked_rows():
    texts = [np.array([7, 8, 9]), np.array([], np.int32), np.array([10]), np.array([11, 12])]
    tokens, segment_ids = pack(texts, length=8)
    np.testing.assert_array_equal(tokens, [[1, 7, 8, 9, 2, 1, 10, 2], [1, 11, 12, 2, 0, 0, 0, 0]])
    np.testing.assert_array_equal(segment_ids, [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0, 0]])


def test_runs():
    np.testing.assert_array_equal(rows_module.runs(np.array([5, 0, 9]), np.array([3, 0, 2])), [5, 6, 7, 9, 10])


@pytest.mark.parametrize("open_rows", [1, 3, 64])
def test_no_text_is_lost_and_long_ones_are_split(open_rows):
    length, texts = 24, random_texts(500, 60)
    expected = []
    for text in texts:
        for start in range(0, len(text), length - 2):
            expected.append((CLS, *text[start : start + length - 2].tolist(), SEP))
    tokens, segment_ids = pack(texts, length, open_rows)
    assert sorted(segments_of(tokens, segment_ids)) == sorted(expected)
    assert np.all(tokens[segment_ids == 0] == PAD)


def test_rows_do_not_depend_on_the_chunks():
    texts = random_texts(300, 30)
    once = pack(texts, 20, chunk=300)
    for chunk in (1, 7, 64):
        again = pack(texts, 20, chunk=chunk)
        np.testing.assert_array_equal(once[0], again[0])
        np.testing.assert_array_equal(once[1], again[1])


def test_rows_are_full():
    texts = random_texts(3000, 40)
    _, segment_ids = pack(texts, 64, open_rows=64, chunk=256)
    assert np.mean(segment_ids > 0) > 0.97


def test_full_rows_close_early_so_memory_stays_bounded():
    fit = rows_module.BestFit(10, open_rows=2, max_segments=10)
    rows, columns, numbers, closed = fit.place([6, 7, 5, 4])
    # Rows 0, 1 and 2 open with room 4, 3 and 5; three are one too many, so the fullest (1) closes; 4 fits row 0 best.
    assert (rows, columns, numbers) == ([0, 1, 2, 0], [0, 0, 0, 6], [1, 1, 1, 2])
    assert closed == [1, 0] and fit.open() == [2]


def test_a_row_takes_no_more_than_max_segments():
    fit = rows_module.BestFit(30, open_rows=9, max_segments=2)
    rows, _, numbers, closed = fit.place([3, 3, 3])
    assert (rows, numbers, closed) == ([0, 0, 1], [1, 2, 1], [0])


def test_positions_restart_in_each_segment():
    segment_ids = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2], [0] * 8])
    expected = [[0, 1, 2, 0, 1, 0, 0, 0], [0, 0, 1, 2, 3, 4, 5, 6], [0] * 8]
    np.testing.assert_array_equal(positions(segment_ids), expected)


def test_maskable_leaves_out_special_tokens_and_padding():
    tokens, segment_ids = np.array([[1, 9, 3, 2, 9]]), np.array([[1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(maskable(tokens, segment_ids, (0, 1, 2, 3)), [[False, True, False, False, False]])


def test_store_holds_what_was_packed(tmp_path):
    texts = random_texts(400, 40)
    chunks = [texts[i : i + 64] for i in range(0, 400, 64)]
    manifest = write_store(tmp_path / "wiki-de", chunks, **(STORE | {"removed": {"decontaminated": 3}}))
    store = RowStore(tmp_path / "wiki-de", "tok-a")
    tokens, segment_ids = pack(texts, 16, open_rows=4, chunk=64)
    assert store.num_rows == len(tokens) == manifest["rows"]
    order = np.random.default_rng(1).permutation(store.num_rows)
    read = store.rows(order)
    np.testing.assert_array_equal(read[0], tokens[order])
    np.testing.assert_array_equal(read[1], segment_ids[order])
    assert read[0].dtype == read[1].dtype == np.int32
    pieces = np.concatenate(texts)
    assert store.maskable == len(pieces) and manifest["unique_pieces"] == len(np.unique(pieces))
    np.testing.assert_array_equal(store.token_counts(50000), np.bincount(pieces, minlength=50000))
    assert store.tokens == np.count_nonzero(segment_ids)
    assert manifest["packing_efficiency"] == pytest.approx(np.mean(segment_ids > 0))
    empty = sum(len(text) == 0 for text in texts)
    assert store.texts == 400 - empty and manifest["removed"] == {"decontaminated": 3, "empty": empty}
    assert np.load(tmp_path / "wiki-de" / "tokens.npy", mmap_mode="r").dtype == np.uint16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wiki-de"]


def test_large_vocabularies_and_long_rows_need_wider_types(tmp_path):
    tokenizer = types.SimpleNamespace(**(vars(TOKENIZER) | {"vocab_size": 250000}))
    texts = [np.array([249999])] * 1000
    write_store(tmp_path / "s", [texts], **(STORE | {"tokenizer": tokenizer, "length": 2048}))
    tokens, segment_ids = RowStore(tmp_path / "s").rows(np.array([0]))
    assert tokens[0, 1] == 249999 and segment_ids.max() == 2048 // 3


def test_fingerprint_follows_the_content(tmp_path):
    texts = random_texts(50, 20)
    changed = [*texts[:-1], texts[-1] + 1]
    digests = [
        write_store(tmp_path / str(i), [t], **STORE)["fingerprint"] for i, t in enumerate([texts, texts, changed])
    ]
    assert digests[0] == digests[1] != digests[2]


def test_another_tokenizer_is_refused(tmp_path):
    write_store(tmp_path / "s", [random_texts(9, 20)], **STORE)
    with pytest.raises(UserError, match="tokenizer tok-a, not tok-b"):
        RowStore(tmp_path / "s", "tok-b")


@pytest.mark.parametrize("damage", ["truncate", "longer", "header", "empty", "missing", "manifest"])
def test_damaged_files_are_refused(tmp_path, damage):
    write_store(tmp_path / "s", [random_texts(50, 20)], **STORE)
    path = tmp_path / "s" / ("manifest.json" if damage == "manifest" else "tokens.npy")
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        changes = {
            "truncate": data[:-5],
            "longer": data + b"x",
            "header": b"?" * len(data),
            "empty": b"",
            "manifest": data[:30],
        }
        path.write_bytes(changes[damage])
    with pytest.raises(UserError, match=path.name):
        RowStore(tmp_path / "s")


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match="no finished row store"):
        RowStore(tmp_path)


def test_leftovers_of_a_killed_run_are_replaced(tmp_path):
    leftover = tmp_path / "s.partial"
    leftover.mkdir()
    (leftover / "old").write_text("half")
    write_store(tmp_path / "s", [random_texts(50, 20)], **STORE)
    assert not leftover.exists() and not (tmp_path / "s" / "old").exists()


def test_no_text_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"config\.sources\.wiki: no train text is left for de \(4 decontaminated\)"):
        write_store(tmp_path / "s", [[np.zeros(0, np.int32)]], **(STORE | {"removed": {"decontaminated": 4}}))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rows_module._ArrayFile, "append", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_store(tmp_path / "s", [random_texts(50, 20)], **STORE)
    assert not list(tmp_path.iterdir())


def test_manifest_is_plain_json(tmp_path):
    manifest = write_store(tmp_path / "s", [random_texts(50, 20)], **STORE)
    assert json.loads((tmp_path / "s" / "manifest.json").read_text()) == manifest
