import errno
import types

import numpy as np
import pytest

from kd_jax.data import rows as rows_module
from kd_jax.data.packing import pack_stream
from kd_jax.data.rows import RowStore, StoreWriter, new_folder
from kd_jax.runtime.files import read_json
from kd_jax.types import UserError

TOKENIZER = types.SimpleNamespace(
    vocab_size=50000, cls_id=1, sep_id=2, pad_id=0, special_ids=(0, 1, 2, 3, 4), fingerprint="tok-a"
)
STORE = {
    "name": "wiki-de", "source": "wiki", "kind": "generic", "language": "de", "split": "train", "length": 16,
    "open_rows": 4, "tokenizer": TOKENIZER, "built_from": "abc",
}  # fmt: skip


def random_texts(count, longest, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(5, 50000, random.integers(0, longest)).astype(np.int32) for _ in range(count)]


def write_store(folder, chunks, removed=(), **changes):
    with new_folder(folder) as temporary, StoreWriter(temporary, **(STORE | changes)) as writer:
        for chunk in chunks:
            writer.add(chunk)
        return writer.finish(dict(removed))


def test_store_holds_what_was_packed(tmp_path):
    texts = random_texts(400, 40)
    chunks = [texts[i : i + 64] for i in range(0, 400, 64)]
    manifest = write_store(tmp_path / "wiki-de", chunks, removed={"decontaminated": 3})
    store = RowStore(tmp_path / "wiki-de", "tok-a")
    blocks = list(pack_stream(chunks, 16, 1, 2, 0, open_rows=4))
    tokens, segment_ids = (np.concatenate(parts) for parts in zip(*blocks))
    assert store.num_rows == len(tokens) == manifest["rows"]
    order = np.random.default_rng(1).permutation(store.num_rows)
    read = store.rows(order)
    np.testing.assert_array_equal(read[0], tokens[order])
    np.testing.assert_array_equal(read[1], segment_ids[order])
    assert read[0].dtype == read[1].dtype == np.int32
    pieces = np.concatenate(texts)
    assert store.maskable == len(pieces) and manifest["unique_pieces"] == len(np.unique(pieces))
    np.testing.assert_array_equal(store.token_counts(50000), np.bincount(pieces, minlength=50000))
    assert manifest["tokens"] == np.count_nonzero(segment_ids)
    assert manifest["packing_efficiency"] == pytest.approx(np.mean(segment_ids > 0))
    empty = sum(len(text) == 0 for text in texts)
    assert store.cut == sum(len(text) > store.length - 2 for text in texts) > 0
    assert store.texts == 400 - empty and manifest["removed"] == {"decontaminated": 3, "empty": empty}
    assert np.load(tmp_path / "wiki-de" / "tokens.npy", mmap_mode="r").dtype == np.uint16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wiki-de"]


def test_large_vocabularies_and_long_rows_need_wider_types(tmp_path):
    tokenizer = types.SimpleNamespace(**(vars(TOKENIZER) | {"vocab_size": 250000}))
    texts = [np.array([249999])] * 1000
    write_store(tmp_path / "s", [texts], tokenizer=tokenizer, length=2048)
    tokens, segment_ids = RowStore(tmp_path / "s").rows(np.array([0]))
    assert tokens[0, 1] == 249999 and segment_ids.max() == 2048 // 3


def test_fingerprint_follows_the_content(tmp_path):
    texts = random_texts(50, 20)
    changed = [*texts[:-1], texts[-1] + 1]
    digests = [write_store(tmp_path / str(i), [t])["fingerprint"] for i, t in enumerate([texts, texts, changed])]
    assert digests[0] == digests[1] != digests[2]


def test_another_tokenizer_is_refused(tmp_path):
    write_store(tmp_path / "s", [random_texts(9, 20)])
    with pytest.raises(UserError, match="tokenizer tok-a, not tok-b"):
        RowStore(tmp_path / "s", "tok-b")


@pytest.mark.parametrize("damage", ["truncate", "longer", "header", "empty", "missing", "manifest"])
def test_damaged_files_are_refused(tmp_path, damage):
    write_store(tmp_path / "s", [random_texts(50, 20)])
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
    write_store(tmp_path / "s", [random_texts(50, 20)])
    assert not leftover.exists() and not (tmp_path / "s" / "old").exists()


def test_no_text_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(
        UserError,
        match=r"sources\.wiki: no text of de is left to train on \(left out: 4 decontaminated, 1 empty\); give",
    ):
        write_store(tmp_path / "s", [[np.zeros(0, np.int32)]], removed={"decontaminated": 4})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rows_module._ArrayFile, "append", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_store(tmp_path / "s", [random_texts(50, 20)])
    assert not list(tmp_path.iterdir())


def test_manifest_is_plain_json(tmp_path):
    manifest = write_store(tmp_path / "s", [random_texts(50, 20)])
    assert read_json(tmp_path / "s" / "manifest.json") == manifest
