"""Every format gives the same texts, in order, without holding them all; wrong input is named."""

import gzip
import json
import re
import sys
import types

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_jax.config.base import source
from kd_jax.config.data import Source
from kd_jax.config.settings import read as read_settings
from kd_jax.data.text.sources import read_texts, to_spoken
from kd_jax.data.text.utterances import Utterance
from kd_jax.types import UserError

TEXTS = ["Wake me up!", "पाँच बजे जगाओ।", "L'heure, s'il vous plaît…", "Über 20 € — 'sicher'?"]
KEY = "config.sources.web"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Even what is only streamed leaves lock files in the cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(format, path="", language="de", utterances=(), **changes):
    block = source("generic", format, (language,), path=str(path), **changes)
    return list(read_texts(read_settings(Source, block, "sources.web"), language, utterances, key=KEY))


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        (TEXTS[0], "wake me up"),
        (TEXTS[1], "पाँच बजे जगाओ"),
        (TEXTS[2], "l'heure s'il vous plaît"),
        (TEXTS[3], "über 20 sicher"),
        ("Rock 'n' roll, don’t—stop ''", "rock n roll don’t stop"),
        ("E-Mail an max_muster@web.de", "e mail an max muster web de"),
        ("STRASSE und Straße", "strasse und straße"),
        ("क्\u200dष", "क्\u200dष"),
        ("...", ""),
    ],
)
def test_to_spoken(text, spoken):
    assert to_spoken(text) == spoken


def test_text_files_folders_and_globs(tmp_path):
    (tmp_path / "de").mkdir()
    (tmp_path / "de" / "a.txt").write_text("\n".join([TEXTS[0], "", "  " + TEXTS[1] + " "]) + "\n", encoding="utf-8")
    (tmp_path / "de" / "b.txt.gz").write_bytes(gzip.compress("\n".join(["   ", *TEXTS[2:]]).encode()))
    for path in ("{language}", "{language}/*.txt*", "{language}/[ab].*"):
        assert read("text", tmp_path / path) == TEXTS
    assert read("text", tmp_path / "{language}" / "a.txt") == TEXTS[:2]
    assert read("text", tmp_path / "{language}", max_texts=3) == TEXTS[:3]


def test_a_variable_in_the_path(tmp_path, monkeypatch):
    (tmp_path / "fr.txt").write_text("oui\n")
    monkeypatch.setenv("KD_JAX_TEXTS", str(tmp_path))
    assert read("text", "${KD_JAX_TEXTS}/{language}.txt", "fr") == ["oui"]
    monkeypatch.delenv("KD_JAX_TEXTS")
    block = Source("generic", "text", ("fr",), path="${KD_JAX_TEXTS}/{language}.txt")
    # At the call and not at the first text, so that a wrong config is known before work begins.
    with pytest.raises(UserError, match=r"config.sources.web.path: environment variable KD_JAX_TEXTS is not set"):
        read_texts(block, "fr", (), key=KEY)


def test_jsonl(tmp_path):
    records = [{"body": text, "n": 1} for text in TEXTS]
    lines = [json.dumps(one) for one in [*records[:2], {"body": None}, {"body": " "}, *records[2:]]]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:3], "", *lines[3:]]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((lines[0] + "\n").encode()))
    assert read("jsonl", tmp_path, field="body") == [*TEXTS, TEXTS[0]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', r"a.jsonl:2: broken JSON"),
        (b'"a"', r"a.jsonl:2: holds a JSON str"),
        (b'{"body": "a", "n": 1}', r"a.jsonl:2: no field 'text'; it has: body, n; set config.sources.web.field"),
        (b'{"text": ["a"]}', r"a.jsonl:2: field 'text' holds a list and not text"),
        (b'{"text": "\xfc"}', r"a.jsonl:2: byte 0xfc at column 11 is not UTF-8"),
        (b'{"text": "half \\ud83d"}', r"a.jsonl:2: field 'text': character 6 is half a surrogate pair"),
    ],
)
def test_a_broken_jsonl_line_is_named(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "whole \\ud83d\\ude00"}\n' + line + b"\n")
    block = Source("generic", "jsonl", ("de",), path=str(tmp_path))
    texts = read_texts(block, "de", (), key=KEY)
    assert next(texts) == "whole 😀"
    with pytest.raises(UserError, match=reason):
        next(texts)


def test_parquet(tmp_path):
    values = [*TEXTS[:2], None, "", *TEXTS[2:]]
    for name, kind in (("a", pa.string()), ("b", pa.large_string()), ("c", pa.dictionary(pa.int32(), pa.string()))):
        column = pa.array(values, pa.string()).cast(kind)
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"id": range(6), "text": column}), tmp_path / name / "0.parquet", row_group_size=2)
        assert read("parquet", tmp_path / name) == TEXTS
    assert read("parquet", tmp_path / "*" / "*.parquet", max_texts=6) == TEXTS + TEXTS[:2]
    with pytest.raises(UserError, match=r"0.parquet: no column 'body'; it has: id, text; set config.sources.web.field"):
        read("parquet", tmp_path / "a", field="body")
    with pytest.raises(UserError, match=r"0.parquet: row 0: field 'id' holds a int and not text"):
        read("parquet", tmp_path / "a", field="id")
    (tmp_path / "d").mkdir()
    latin = pa.array([b"gut", b"\xfcber"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": latin, "n": [None, 1]}), tmp_path / "d" / "0.parquet")
    with pytest.raises(UserError, match=r"d/0.parquet: row 0 or later holds bytes that are not UTF-8"):
        read("parquet", tmp_path / "d")
    with pytest.raises(UserError, match=r"d/0.parquet: row 1: field 'n' holds a int"):
        read("parquet", tmp_path / "d", field="n")
    (tmp_path / "a" / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"0.parquet: cannot be read as Parquet"):
        read("parquet", tmp_path / "a")


def test_parquet_is_streamed(tmp_path):
    file = tmp_path / "big.parquet"
    pq.write_table(pa.table({"text": [f"text {number} " + "x" * 2000 for number in range(20000)]}), file)
    before = pa.total_allocated_bytes()
    texts = read_texts(Source("generic", "parquet", ("de",), path=str(file)), "de", ())
    peak = max(pa.total_allocated_bytes() for _ in texts) - before
    assert peak < 20e6  # of 40 MB


@pytest.mark.parametrize("saved", ["dataset", "dictionary", "parquet"])
def test_huggingface_folder(tmp_path, saved):
    table = datasets.Dataset.from_dict({"body": [*TEXTS, None], "n": list(range(5))})
    folder = tmp_path / "de"
    if saved == "dataset":
        table.save_to_disk(folder)
    elif saved == "dictionary":
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(folder)
    else:
        for split in ("train", "test"):
            table.select(range(5 if split == "train" else 1)).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    path = tmp_path / "{language}"
    assert read("huggingface", path, field="body") == TEXTS
    if saved != "dataset":
        assert read("huggingface", path, field="body", split="test") == TEXTS[:1]
        with pytest.raises(UserError, match=r"dev"):
            read("huggingface", path, field="body", split="dev")
    with pytest.raises(UserError, match=r"no column 'text'; it has: body, n"):
        read("huggingface", path)


def test_huggingface_name_subset_and_split_reach_the_library(monkeypatch):
    calls = []

    def load_dataset(name, subset, **options):
        calls.append((name, subset, options))
        table = datasets.Dataset.from_dict({"text": TEXTS})
        return table.to_iterable_dataset() if options["streaming"] else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("huggingface", name="org/wiki", subset="2023.{language}", split="test", streaming=True) == TEXTS
    assert read("huggingface", name="org/{language}") == TEXTS
    assert calls == [
        ("org/wiki", "2023.de", {"split": "test", "streaming": True}),
        ("org/de", None, {"split": "train", "streaming": False}),
    ]


def test_huggingface_network_lost_on_the_way(monkeypatch):
    def rows():
        for number in range(3000):
            if number == 2500:
                raise ConnectionError("the line went dead")
            yield {"text": "x"}

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(UserError, match=r"data set org/wiki cannot be read: .*the line went dead; check .* network"):
        read("huggingface", name="org/wiki", streaming=True)


def test_huggingface_needs_a_place(tmp_path):
    with pytest.raises(UserError, match=r"config.sources.web.name: is empty"):
        read("huggingface")
    with pytest.raises(UserError, match=r"config.sources.web.path: no folder"):
        read("huggingface", tmp_path / "none")
    with pytest.raises(UserError, match=r"data set nobody/nothing cannot be read"):
        read("huggingface", name="nobody/nothing", streaming=True)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    import tensorflow_datasets as tfds

    class KdJaxLines(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("wiki.fr", "wiki.de")]  # noqa: RUF012

        def _info(self):
            features = {"text": tfds.features.Text(), "n": tfds.features.Scalar(dtype=np.int64)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            good = [f"{number} {TEXTS[number % 4]}" for number in range(3000)]
            return {"train": self._generate_examples(good), "latin": self._generate_examples([b"\xfcber"])}

        def _generate_examples(self, texts):
            for number, text in enumerate(texts):
                yield number, {"text": text, "n": number}

    folder = tmp_path_factory.mktemp("tfds")
    KdJaxLines(config="wiki.de", data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_without_tensorflow(tfds_folder):
    texts = read("tfds", tfds_folder, name="kd_jax_lines/wiki.{language}")
    # TFDS shuffles by key when it writes.
    assert sorted(texts) == sorted(f"{number} {TEXTS[number % 4]}" for number in range(3000))
    assert read("tfds", tfds_folder, name="kd_jax_lines", subset="wiki.{language}", max_texts=7) == texts[:7]
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match=r"no column 'body'; it has: .*text"):
        read("tfds", tfds_folder, name="kd_jax_lines/wiki.de", field="body")
    with pytest.raises(UserError, match=r"row 0 holds bytes that are not UTF-8"):
        read("tfds", tfds_folder, name="kd_jax_lines/wiki.de", split="latin")
    with pytest.raises(UserError, match=r"field 'n' holds a int and not text"):
        read("tfds", tfds_folder, name="kd_jax_lines/wiki.de", field="n")
    for changes in ({"name": "kd_jax_nothing"}, {"name": "kd_jax_lines/wiki.de", "split": "dev"}):
        with pytest.raises(UserError, match=r"TFDS cannot open kd_jax_.*tfds build"):
            read("tfds", tfds_folder, **changes)
    with pytest.raises(UserError, match=r"config.sources.web.name: is empty"):
        read("tfds", tfds_folder)


def test_utterances_give_their_train_partition():
    def one(text, partition, locale):
        return Utterance("0", locale, partition, "a", "b", text, (text,), ("O",))

    members = [
        one("eins", "train", "de-DE"),
        one("zwei", "test", "de-DE"),
        one("drei", "dev", "de-DE"),
        one("servus", "train", "de-AT"),
        one("one", "train", "en-US"),
    ]
    assert read("utterances", language="de", utterances=members) == ["eins", "servus"]
    assert read("utterances", language="de-DE", utterances=members) == ["eins"]
    with pytest.raises(UserError, match=r"there is no train utterance of 'fr'"):
        read("utterances", language="fr", utterances=members)


def test_embedded_is_asked_for_the_language(monkeypatch):
    module = types.ModuleType("kd_jax.data.embedded.utterances")
    vars(module)["embedded_texts"] = lambda language: iter([f"text in {language}"])
    monkeypatch.setitem(sys.modules, "kd_jax.data.embedded.utterances", module)
    assert read("embedded", language="hi") == ["text in hi"]


def test_spoken_share(tmp_path):
    texts = [f"Text Nr. {number}!" for number in range(4000)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    spoken = {share: read("text", tmp_path / "a.txt", spoken_share=share) for share in (0.0, 0.3, 0.7, 1.0)}
    assert spoken[0.0] == texts
    assert spoken[1.0] == [f"text nr {number}" for number in range(4000)]
    chosen = {share: {number for number, text in enumerate(spoken[share]) if text != texts[number]} for share in spoken}
    for share, numbers in chosen.items():
        assert abs(len(numbers) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-9
        assert all(spoken[share][number] == spoken[1.0][number] for number in numbers)
    # The text alone decides: other texts around it and another order change nothing, a larger share adds to a smaller.
    assert chosen[0.3] < chosen[0.7]
    (tmp_path / "b.txt").write_text("\n".join(texts[:10:-1]))
    assert read("text", tmp_path / "b.txt", spoken_share=0.7) == spoken[0.7][:10:-1]


def test_wrong_keys_and_empty_sources(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"config.sources.web: format 'text' gives no text for language 'de'"):
        read("text", tmp_path / "empty.txt")
    (tmp_path / "dots.txt").write_text("...\n")
    with pytest.raises(UserError, match=r"gives no text"):
        read("text", tmp_path / "dots.txt", spoken_share=1.0)
    with pytest.raises(UserError, match=r"config.sources.web.path: no file"):
        read("text", tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"config.sources.web.path: is empty"):
        read("text")
    known = "embedded, text, jsonl, parquet, huggingface, tfds, utterances"
    with pytest.raises(UserError, match=rf"config.sources.web.format: 'csv' is unknown; use {known}"):
        read("csv", tmp_path)
    with pytest.raises(UserError, match=r"config.sources.web.spoken_share: 1.5"):
        read("text", tmp_path, spoken_share=1.5)
    with pytest.raises(UserError, match=r"config.sources.web.max_texts: -1"):
        read("text", tmp_path, max_texts=-1)
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"line\n" * 1000)[:-10])
    with pytest.raises(UserError, match=r"cut.txt.gz: is not a whole gzip file"):
        read("text", tmp_path / "cut.txt.gz")


def test_only_what_is_asked_for_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\xff\n")
    assert read("text", tmp_path / "a.txt", max_texts=2) == ["one", "two"]


def test_real_generic_text(data_dir):
    texts = read("text", data_dir / "generic" / "{language}.txt.gz", "hi")
    assert len(texts) == 33476  # the number of lines in the data's own README
    spoken = read("text", data_dir / "generic" / "{language}.txt.gz", "hi", max_texts=500, spoken_share=1.0)
    marks = re.compile(r"[\u093e-\u094d]")
    assert [marks.findall(one) for one in spoken] == [marks.findall(one) for one in texts[:500]]
