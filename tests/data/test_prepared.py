import errno
import json
import os

import numpy as np
import pytest
from ml_collections import ConfigDict

from kd_jax.config import to_dict
from kd_jax.config.base import source
from kd_jax.config.data import CHARACTER_LOCALES, Nlu, Rows, Select, TokenizerSettings, read_prepare
from kd_jax.config.settings import block
from kd_jax.data import prepared as prepared_module
from kd_jax.data import rows as rows_module
from kd_jax.data.prepared import Prepared
from kd_jax.data.text import splits as splits_module
from kd_jax.data.text.splits import normalize
from kd_jax.data.text.tokenizer import Tokenizer, train_tokenizer
from kd_jax.types import UserError

WORDS = [
    "wake", "me", "up", "at", "nine", "play", "some", "jazz", "what", "is", "the", "weather", "today", "turn", "off",
]  # fmt: skip


def sentence(random, longest):
    return " ".join(random.choice(WORDS, random.integers(2, longest)))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A MASSIVE folder of one locale and a file of generic text that holds two of its test utterances."""
    folder = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(0)
    spoken = list(dict.fromkeys(sentence(random, 8) for _ in range(400)))[:300]
    records = [
        {
            "id": str(number), "locale": "en-US", "partition": ("train", "train", "dev", "test")[number % 4],
            "scenario": "alarm", "intent": "alarm_set", "utt": text, "annot_utt": text,
        }
        for number, text in enumerate(spoken)
    ]  # fmt: skip
    (folder / "nlu").mkdir()
    (folder / "nlu" / "en-US.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    test = [record["utt"] for record in records if record["partition"] == "test"]
    generic = [sentence(random, 60).capitalize() + "." for _ in range(2000)]
    generic[100:102] = [test[0].upper() + "!", test[1]]
    (folder / "en.txt").write_text("\n".join(generic) + "\n")
    return folder, generic, records


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    """A folder with a tokenizer trained on the generic text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts[1], 60).save(folder)
    return folder


@pytest.fixture
def config(texts, tokenizer):
    result = ConfigDict()
    result.nlu = block(Nlu, format="massive", path=str(texts[0] / "nlu"))
    result.sources = {
        "web": source("generic", "text", ("en",), path=str(texts[0] / "{language}.txt")),
        "nlu": source("task", "utterances", ("en-US",)),
    }
    path = str(tokenizer)
    result.tokenizer = block(TokenizerSettings, kind="load", path=path, vocab_size=60, texts_per_store=500)
    result.rows = block(Rows, length=32, heldout_share=0.1, open_rows=16)
    result.select = block(Select, buckets=1000)
    return result


def prepare(config, folder):
    prepared_module.prepare(read_prepare(config), to_dict(config), folder)


def decoded(store, tokenizer):
    """The texts of a store's segments, without spaces and marks."""
    names = tokenizer.tokens()
    tokens, segment_ids = store.rows(np.arange(store.num_rows))
    for row, ids in zip(tokens, segment_ids):
        for number in range(1, ids.max() + 1):
            pieces = row[ids == number]
            assert pieces[0] == tokenizer.cls_id and pieces[-1] == tokenizer.sep_id
            yield "".join(names[piece] for piece in pieces[1:-1]).replace("▁", "")


def test_every_text_is_in_exactly_one_split(config, texts, tmp_path):
    prepare(config, tmp_path / "p")
    prepared = Prepared(tmp_path / "p")
    _, generic, records = texts
    train, heldout = prepared.stores("train"), prepared.stores("heldout")
    assert [store.name for store in train] == ["nlu-en-US", "web-en"]  # a config's keys are sorted
    assert [(store.name, store.kind, store.language) for store in heldout] == [
        ("web-en", "generic", "en"), ("task-en-US", "task", "en-US"),
    ]  # fmt: skip
    excluded = {record["utt"] for record in records if record["partition"] != "train"}
    kept = [text for text in generic if text.lower().strip(".!") not in excluded]
    assert train[1].texts + heldout[0].texts == len(kept) <= len(generic) - 2
    assert train[0].texts == sum(record["partition"] == "train" for record in records)
    assert heldout[0].texts / len(generic) == pytest.approx(0.1, abs=0.03)
    assert prepared.manifest["removed"]["decontaminated"] == len(generic) - len(kept)
    # Long texts are cut, but all characters are there, in some order of the segments.
    found = "".join("".join(decoded(store, prepared.tokenizer)) for store in (train[1], heldout[0]))
    assert sorted(found.lower()) == sorted("".join(kept).replace(" ", "").lower())
    dev = [record["utt"] for record in records if record["partition"] == "dev"]
    assert heldout[1].texts == len(dev)
    found = {normalize(text) for text in decoded(heldout[1], prepared.tokenizer)}
    assert found == {text.replace(" ", "") for text in dev}


def test_equal_texts_are_on_the_same_side(config, texts, tmp_path):
    path = tmp_path / "twice.txt"
    path.write_text("\n".join(texts[1] + [text.upper() for text in texts[1]]))
    config.sources.web.path = str(path)
    prepare(config, tmp_path / "p")
    prepared = Prepared(tmp_path / "p")
    config.sources.web.path = str(texts[0] / "en.txt")
    prepare(config, tmp_path / "once")
    once = Prepared(tmp_path / "once")
    for split in ("train", "heldout"):
        double, single = (next(s for s in one.stores(split) if s.name == "web-en") for one in (prepared, once))
        assert double.texts == 2 * single.texts


def test_reading_back(config, texts, tmp_path):
    prepare(config, tmp_path / "p")
    prepared = Prepared(str(tmp_path / "p"))
    assert [one.text for one in prepared.utterances] == [record["utt"] for record in texts[2]]
    assert prepared.settings.rows.length == 32 and prepared.settings.sources["web"].weight == 1.0
    assert prepared.manifest["utterances"]["en-US train"] == sum(r["partition"] == "train" for r in texts[2])
    assert prepared.tokenizer.fingerprint == prepared.stores("train")[0].tokenizer_fingerprint
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["manifest.json", "rows", "tokenizer", "utterances"]


def test_is_deterministic(config, tmp_path):
    for name in ("a", "b"):
        prepare(config, tmp_path / name)
    assert Prepared(tmp_path / "a").fingerprint == Prepared(tmp_path / "b").fingerprint
    config.rows.heldout_share = 0.2
    prepare(config, tmp_path / "c")
    assert Prepared(tmp_path / "c").fingerprint != Prepared(tmp_path / "a").fingerprint


def test_a_finished_folder_is_left_alone_and_another_config_refused(config, tmp_path, monkeypatch):
    prepare(config, tmp_path / "p")
    monkeypatch.setattr(prepared_module, "load_utterances", lambda nlu: pytest.fail("read again"))
    prepare(config, tmp_path / "p")
    # The manifest is one that 0.2.0 could have written; it contains the key only if it is not the default.
    assert "character_locales" not in Prepared(tmp_path / "p").manifest["config"]["nlu"]
    config.nlu.character_locales = ("th-TH",)
    with pytest.raises(UserError, match=r"config\.nlu\.character_locales: \(absent\) -> \['th-TH'\]"):
        prepare(config, tmp_path / "p")
    config.nlu.character_locales = CHARACTER_LOCALES
    config.rows.length = 64
    config.sources.web.max_texts = 5
    with pytest.raises(UserError, match=r"config\.rows\.length: 32 -> 64; config\.sources\.web\.max_texts: 0 -> 5"):
        prepare(config, tmp_path / "p")


class Killed(BaseException):
    pass


def killed(*arguments):
    raise Killed


def languages_read(monkeypatch):
    """A list that grows with the language of every source that is read."""
    read, read_texts = [], splits_module.read_texts

    def recording(source, language, *rest, **named):
        read.append(language)
        return read_texts(source, language, *rest, **named)

    monkeypatch.setattr(splits_module, "read_texts", recording)
    return read


def killed_at(store, config, folder, monkeypatch):
    """Prepares `folder`, killed when this store is finished."""
    finish = rows_module.StoreWriter.finish

    def finish_or_die(self, removed):
        if self._identity["name"] == store:
            raise Killed
        return finish(self, removed)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(rows_module.StoreWriter, "finish", finish_or_die)
        prepare(config, folder)


def test_a_call_killed_right_after_the_manifest_leaves_no_note_of_its_inputs(config, tmp_path, monkeypatch):
    note, manifest = tmp_path / "p" / "inputs.txt", tmp_path / "p" / "manifest.json"

    def killed(path, missing_ok=False):
        if path == note:
            raise Killed
        os.unlink(path)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(type(note), "unlink", killed)
        prepare(config, tmp_path / "p")
    assert note.exists() and manifest.exists()
    prepare(config, tmp_path / "p")
    assert not note.exists() and manifest.exists()


def test_a_killed_call_goes_on_where_it_was(config, tmp_path, monkeypatch):
    prepare(config, tmp_path / "whole")
    read = languages_read(monkeypatch)
    killed_at("web-en", config, tmp_path / "p", monkeypatch)
    assert read == ["en-US", "en"]
    with pytest.raises(UserError, match="not a finished prepared folder"):
        Prepared(tmp_path / "p")
    # A kill that runs no handlers leaves its temporary folder behind.
    leftover = tmp_path / "p" / "rows" / "train" / "web-en.partial"
    leftover.mkdir()
    read.clear()
    prepare(config, tmp_path / "p")
    assert read == ["en"] and not leftover.exists()
    assert Prepared(tmp_path / "p").fingerprint == Prepared(tmp_path / "whole").fingerprint


def test_stores_of_an_unfinished_other_config_are_replaced(config, tmp_path, monkeypatch):
    config.sources.old = config.sources.web.copy_and_resolve_references()
    config.rows.length = 64
    monkeypatch.setattr(prepared_module, "write_manifest", killed)
    with pytest.raises(Killed):
        prepare(config, tmp_path / "p")
    monkeypatch.undo()
    del config.sources["old"]
    config.rows.length = 32
    prepare(config, tmp_path / "p")
    assert {store.length for store in Prepared(tmp_path / "p").stores("train")} == {32}
    assert sorted(p.name for p in (tmp_path / "p" / "rows" / "train").iterdir()) == ["nlu-en-US", "web-en"]


def selecting(config, folder, name, monkeypatch):
    """Prepares `folder`/`name` with a selection; the selected store, and the texts that were chosen from and chosen."""
    seen = {}
    choose = prepared_module.choose

    def recording(read, target, select):
        seen.update(read=list(read()), target=list(target), chosen=choose(read, target, select))
        return seen["chosen"]

    monkeypatch.setattr(prepared_module, "choose", recording)
    prepare(config, folder / name)
    monkeypatch.setattr(prepared_module, "choose", choose)
    [store] = [store for store in Prepared(folder / name).stores("train") if store.kind == "selected"]
    return store, seen


def test_selected_text_is_a_store_of_its_own(config, texts, tmp_path, monkeypatch):
    prepare(config, tmp_path / "without")
    config.select.share = 0.05
    store, seen = selecting(config, tmp_path, "with", monkeypatch)
    without, prepared = Prepared(tmp_path / "without"), Prepared(tmp_path / "with")
    [generic] = [one for one in prepared.stores("train") if one.kind == "generic"]
    heldout = prepared.stores("heldout")[0]
    assert (store.name, store.source, store.language) == ("web.selected-en", "web", "en")
    # Chosen from the texts of the train store alone, for likeness to train utterances alone.
    assert len(seen["read"]) == generic.texts and generic.texts + heldout.texts < len(texts[1])
    assert set(seen["target"]) == {record["utt"] for record in texts[2] if record["partition"] == "train"}
    excluded = {record["utt"] for record in texts[2] if record["partition"] != "train"}
    assert not excluded & {normalize(text) for text in seen["read"]}
    chosen = [text.replace(" ", "") for text in seen["chosen"].of(seen["read"])]
    assert store.texts == len(chosen) == round(0.05 * generic.texts)
    assert sorted("".join(decoded(store, prepared.tokenizer))) == sorted("".join(chosen))
    # Everything else is as without it, and what was left out is not counted twice.
    others = [one for one in prepared.manifest["stores"] if one["kind"] != "selected"]
    assert others == without.manifest["stores"]
    assert prepared.manifest["removed"] == without.manifest["removed"]
    assert store.manifest["removed"] == {"not selected": generic.texts - store.texts, "empty": 0}
    assert prepared.settings.select.share == 0.05 and "select" not in without.manifest["config"]


def test_selection_settings_decide_its_store_and_the_folder(config, texts, tmp_path, monkeypatch):
    with config.unlocked():
        config.select.share = 0.05
        first, _ = selecting(config, tmp_path, "first", monkeypatch)
        built = {first.manifest["built_from"]}
        for number, (key, value) in enumerate((("seed", 1), ("ngrams", 1), ("smoothing", 1.0), ("buckets", 500))):
            changed = config.copy_and_resolve_references()
            changed.select[key] = value
            store, _ = selecting(changed, tmp_path, str(number), monkeypatch)
            built.add(store.manifest["built_from"])
            with pytest.raises(UserError, match=rf"config\.select\.{key}: "):
                prepare(changed, tmp_path / "first")
        assert len(built) == 5
        # Where nothing is selected, the other settings decide nothing; a selection is not slipped into a folder.
        config.select.share = 0.0
        for config.select.seed in (0, 5):
            prepare(config, tmp_path / "none")
        config.select.share = 0.05
        with pytest.raises(UserError, match=r"config\.select: \(absent\)"):
            prepare(config, tmp_path / "none")


def test_task_text_that_changes_before_a_resume_is_selected_for_anew(config, texts, tmp_path, monkeypatch):
    (nlu := tmp_path / "nlu").mkdir()
    lines = (texts[0] / "nlu" / "en-US.jsonl").read_text().splitlines()
    config.nlu.path, config.select.share = str(nlu), 0.05
    digests = set()
    for kept in (lines, lines[:100], lines[:100]):
        (nlu / "en-US.jsonl").write_text("\n".join(kept))
        monkeypatch.setattr(prepared_module, "write_manifest", killed)
        with pytest.raises(Killed):
            prepare(config, tmp_path / "p")
        monkeypatch.undo()
        manifest = json.loads((tmp_path / "p" / "rows" / "train" / "web.selected-en" / "manifest.json").read_text())
        digests.add(manifest["built_from"])
    assert len(digests) == 2


def test_a_call_killed_while_selecting_goes_on_where_it_was(config, tmp_path, monkeypatch):
    config.select.share = 0.05
    prepare(config, tmp_path / "whole")
    read = languages_read(monkeypatch)
    to_count_weigh_and_pack = ["en"] * 3
    killed_at("web.selected-en", config, tmp_path / "p", monkeypatch)
    assert read == ["en-US", "en", *to_count_weigh_and_pack]
    read.clear()
    killed_at("task-en-US", config, tmp_path / "p", monkeypatch)
    assert read == to_count_weigh_and_pack
    read.clear()
    prepare(config, tmp_path / "p")
    assert read == []
    assert Prepared(tmp_path / "p").fingerprint == Prepared(tmp_path / "whole").fingerprint


def test_a_loaded_tokenizer_is_the_one_of_its_folder(config, tokenizer, tmp_path):
    prepare(config, tmp_path / "p")
    assert Prepared(tmp_path / "p").tokenizer.fingerprint == Tokenizer.load(str(tokenizer)).fingerprint
    assert Prepared(tmp_path / "p").manifest["tokenizer_fingerprint"] == Tokenizer.load(str(tokenizer)).fingerprint


def test_a_trained_tokenizer_reads_no_text_that_is_held_out(config, tmp_path, monkeypatch):
    given = []

    def recording(texts, vocab_size):
        given.extend(texts)
        return train_tokenizer(given, vocab_size)

    monkeypatch.setattr(prepared_module, "train_tokenizer", recording)
    config.tokenizer.kind, config.tokenizer.texts_per_store = "train", 700
    prepare(config, tmp_path / "p")
    prepared = Prepared(tmp_path / "p")
    task, generic = (next(s for s in prepared.stores("train") if s.kind == kind) for kind in ("task", "generic"))
    assert len(given) == task.texts + 700 < task.texts + generic.texts
    heldout = "".join(decoded(prepared.stores("heldout")[0], prepared.tokenizer))
    long_ones = [text.replace(" ", "") for text in given if 60 < len(text) < 100]
    assert len(long_ones) > 20 and not any(text in heldout for text in long_ones)
    assert prepared.tokenizer.vocab_size <= 60


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rows.heldout_share", 0.9, r"config\.rows\.heldout_share: 0\.9"),
        ("rows.length", 2, r"config\.rows\.length"),
        ("sources.web.kind", "news", r"config\.sources\.web\.kind"),
        ("sources.web.languages", (), r"config\.sources\.web\.languages"),
        ("sources.web.languages", ("en", "en"), "web-en would be built twice"),
        ("sources.web.spoken_share", 1.5, r"config\.sources\.web\.spoken_share"),
        ("sources.web.path", "/nowhere/{language}.txt", r"config\.sources\.web.*nowhere/en\.txt"),
        (
            "sources.web.max_texts",
            1,
            r"config\.sources\.web: no text of en was held out; raise config\.rows\.heldout_share",
        ),
        ("tokenizer.kind", "guess", r"config\.tokenizer\.kind"),
        ("tokenizer", {"kind": "train", "model": "unigram"}, r"config\.tokenizer\.model: 'unigram' .*kind=load"),
        ("sources", {}, r"config\.sources: it is empty"),
        ("select.share", 2.0, r"config\.select\.share: 2\.0"),
    ],
)
def test_mistakes_are_named(config, tmp_path, key, value, message):
    with config.ignore_type():
        if isinstance(value, dict):
            config[key] = ConfigDict(value)
        else:
            config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        prepare(config, tmp_path / "p")
    assert not (tmp_path / "p" / "manifest.json").exists()


def test_a_full_disk_is_named_and_leaves_nothing_half_written(config, tmp_path, monkeypatch):
    append = rows_module._ArrayFile.append

    def full(self, rows):
        append(self, rows)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rows_module._ArrayFile, "append", full)
    with pytest.raises(UserError, match="the disk is full"):
        prepare(config, tmp_path / "p")
    assert not list((tmp_path / "p" / "rows").glob("*/*"))


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.prepared: it is empty"):
        Prepared("")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="broken JSON"):
        Prepared(tmp_path)


def test_massive_and_generic_text(config, data_dir, tmp_path):
    config.nlu.path, config.nlu.locales, config.nlu.max_train = str(data_dir / "nlu" / "massive"), ("de-DE",), 300
    config.sources.web.path, config.sources.web.languages = str(data_dir / "generic" / "{language}.txt.gz"), ("de",)
    config.sources.web.max_texts, config.sources.nlu.languages = 2000, ("de-DE",)
    config.tokenizer.kind, config.tokenizer.vocab_size, config.rows.length = "train", 1000, 128
    prepare(config, tmp_path / "p")
    prepared = Prepared(tmp_path / "p")
    assert len(prepared.utterances) == 300 + 2033 + 2974
    stores = prepared.manifest["stores"]
    assert all(store["packing_efficiency"] > 0.93 for store in stores if store["rows"] > 50), stores


@pytest.mark.parametrize("damaged", ["rows/train/web-en/tokens.npy", "rows/heldout/web-en/piece_counts.npy"])
def test_a_flipped_bit_in_the_rows_is_refused_by_name(config, tmp_path, damaged):
    prepare(config, tmp_path / "p")
    data = bytearray((tmp_path / "p" / damaged).read_bytes())
    data[-5] ^= 1
    (tmp_path / "p" / damaged).write_bytes(data)
    with pytest.raises(
        UserError, match=rf"{damaged}: was changed or damaged .*; remove the folder and run prepare again"
    ):
        _ = [Prepared(tmp_path / "p").stores(split) for split in ("train", "heldout")]


def test_what_was_built_from_other_texts_is_not_kept(config, texts, tmp_path, monkeypatch):
    path = tmp_path / "en.txt"
    path.write_text("\n".join(texts[1][:1000]) + "\n")
    config.sources.web.path = str(path)
    config.tokenizer.kind = "train"
    with monkeypatch.context() as patch, pytest.raises(UserError, match="stop"):
        patch.setattr(prepared_module, "write_manifest", lambda *_: (_ for _ in ()).throw(UserError("stop")))
        prepare(config, tmp_path / "p")
    path.write_text("\n".join(texts[1]) + "\n")
    prepare(config, tmp_path / "p")
    prepare(config, tmp_path / "once")
    one, other = (Prepared(tmp_path / name).manifest for name in ("p", "once"))
    assert one == other and one["fingerprint"]
    assert sorted(file.name for file in (tmp_path / "p").iterdir()) == [
        "manifest.json",
        "rows",
        "tokenizer",
        "utterances",
    ]


def test_a_store_that_was_damaged_before_a_restart_is_built_again(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="stop"):
        patch.setattr(prepared_module, "write_manifest", lambda *_: (_ for _ in ()).throw(UserError("stop")))
        prepare(config, tmp_path / "p")
    for name in ("rows/train/web-en/segments.npy", "tokenizer/tokenizer.json"):
        data = bytearray((tmp_path / "p" / name).read_bytes())
        data[-60] ^= 2
        (tmp_path / "p" / name).write_bytes(data)
    prepare(config, tmp_path / "p")
    prepare(config, tmp_path / "once")
    assert Prepared(tmp_path / "p").manifest == Prepared(tmp_path / "once").manifest
