"""Utterances: marks to IOB2 tags and back, what a broken file is told, label maps, and the real data's counts."""

import gzip
import io
import json
import tarfile
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_jax.config.data import Nlu
from kd_jax.config.settings import block, read
from kd_jax.data.text.sources import load_utterances
from kd_jax.data.text.utterances import (
    LabelMaps,
    Span,
    Utterance,
    parse_annotated,
    read_massive,
    shared_ids,
    write_massive,
)
from kd_jax.types import UserError


def record(**changes):
    values = {
        "id": "1",
        "locale": "de-DE",
        "partition": "train",
        "scenario": "alarm",
        "intent": "alarm_set",
        "utt": "weck mich diese woche auf",
        "annot_utt": "weck mich [date : diese woche] auf",
    }
    values.update(changes)
    return {name: value for name, value in values.items() if value is not ...}


def write_lines(folder, locale, records):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in records]
    (folder / f"{locale}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


def utterance(text, tags, locale="en-US", **changes):
    characters = changes.setdefault("characters", locale == "zh-CN")
    words = tuple(text.replace(" ", "")) if characters else tuple(text.split())
    values = {"id": "0", "partition": "train", "domain": "alarm", "intent": "alarm_set", **changes}
    return Utterance(locale=locale, text=text, words=words, tags=tuple(tags.split()), **values)


@pytest.mark.parametrize(
    ("annotated", "text", "locale", "words", "tags"),
    [
        ("weck mich [date : diese woche] auf", "weck mich diese woche auf", "de-DE", 5, "O O B-date I-date O"),
        ("[a : x] [a : y z]", "x y z", "en-US", 3, "B-a B-a I-a"),
        ("[time:5:30] wecken", "5:30 wecken", "de-DE", 2, "B-time O"),
        ("wake  me [ day : to  day ]  up", "wake me to day up", "en-US", 5, "O O B-day I-day O"),
        ("[date : 周五] [time : 九点]叫 我", "周五九点叫我", "zh-CN", 6, "B-date I-date B-time I-time O O"),
        ("आज [time : पाँच बजे] उठाओ", "आज पाँच बजे उठाओ", "hi-IN", 4, "O B-time I-time O"),
        ("nothing here", "nothing here", "en-US", 2, "O O"),
        (r"play [song : x \[live\]] \[now\]", "play x [live] [now]", "en-US", 4, "O B-song I-song O"),
    ],
)
def test_marks_become_tags(annotated, text, locale, words, tags):
    got_words, got_tags, widened = parse_annotated(annotated, text, locale == "zh-CN")
    assert not widened
    assert len(got_words) == words and "".join(got_words) == "".join(text.split())
    assert " ".join(got_tags) == tags


@pytest.mark.parametrize(
    ("annotated", "text", "reason"),
    [
        ("wake [time : five", "wake five", "unbalanced"),
        ("wake time : five]", "wake time : five", "unbalanced"),
        ("wake [time : [hour : five] sharp]", "wake five sharp", "nested"),
        ("wake [time : five [day : today]", "wake five today", "nested or one is not closed"),
        ("wake [ : five]", "wake five", "empty slot name"),
        ("wake [two words : five]", "wake five", "holds a space"),
        ("wake [five]", "wake five", "no colon"),
        ("wake [time : ] up", "wake up", "no text"),
        ("wake [time : six]", "wake five", "'wake six' and not utt 'wake five'"),
        ("wake[time : five]", "wake five", "'wakefive' and not utt"),
        ("[hour : 5][half : pm]", "5pm", "'hour' and 'half' share the word '5pm'"),
        ("[song : x],[song : y] now", "x,y now", "'song' and 'song' share the word 'x,y'"),
    ],
)
def test_wrong_marks_are_named(annotated, text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_annotated(annotated, text)


@pytest.mark.parametrize(
    ("annotated", "text", "tags", "back"),
    [
        ("[time : 5]pm", "5pm", "B-time", "[time : 5pm]"),
        (
            "play [s : let it be], please",
            "play let it be, please",
            "O B-s I-s I-s O",
            "play [s : let it be,] please",
        ),
        ("(weck mich) um [time : 7]!", "(weck mich) um 7!", "O O O B-time", "(weck mich) um [time : 7!]"),
        ("vor[day : mit tag]s", "vormit tags", "B-day I-day", "[day : vormit tags]"),
        ("play [a : x], [b : y].", "play x, y.", "O B-a B-b", "play [a : x,] [b : y.]"),
    ],
)
def test_a_slot_that_ends_inside_a_word_is_extended_to_it(tmp_path, annotated, text, tags, back):
    write_lines(tmp_path / "given", "de-DE", [record(utt=text, annot_utt=annotated)])
    (one,) = read_massive(tmp_path / "given", ["de-DE"])
    assert one.widened and one.words == tuple(text.split())
    assert " ".join(one.tags) == tags
    assert one.annotated() == back
    write_massive([one], tmp_path / "written")
    (again,) = read_massive(tmp_path / "written", ["de-DE"])
    assert again == one and not again.widened


def test_any_locale_can_be_tagged_by_character(tmp_path):
    thai = {"utt": "ปลุกฉันเจ็ดโมง เช้า", "annot_utt": "ปลุกฉัน[time : เจ็ดโมง เช้า]", "locale": "th-TH"}
    attached = {"id": "2", "locale": "th-TH", "utt": "เปิดx,y", "annot_utt": "เปิด[a : x],[b : y]"}
    write_lines(tmp_path / "given", "th-TH", [record(**thai), record(**attached)])
    with pytest.raises(UserError, match=r"th-TH.jsonl:2: 'a' and 'b' share the word 'เปิดx,y'.*nlu.character_locales"):
        read_massive(tmp_path / "given", ["th-TH"])
    settings = nlu(format="massive", path=str(tmp_path / "given"), locales=("th-TH",), character_locales=("th-TH",))
    one, two = load_utterances(settings)
    assert one.characters and one.words == tuple(thai["utt"].replace(" ", "")) and not one.widened
    assert one.spans == (Span("time", 7, 18),) and two.spans == (Span("a", 4, 5), Span("b", 6, 7))
    assert [it.annotated() for it in (one, two)] == [thai["annot_utt"], attached["annot_utt"]]
    write_massive([one, two], tmp_path / "written")
    assert read_massive(tmp_path / "written", ["th-TH"], ["th-TH"]) == [one, two]
    with pytest.raises(UserError, match=r"config.nlu.character_locales: the embedded data are tagged by word, also en"):
        nlu(character_locales=("en-US",))


def test_spans_and_annotated():
    one = utterance("wake  me at five am or ten", "O O O B-time I-time O B-time")
    assert one.spans == (Span("time", 3, 5), Span("time", 6, 7))
    assert one.annotated() == "wake  me at [time : five am] or [time : ten]"
    adjacent = utterance("a b c", "B-x B-x I-y")  # I-y does not continue x
    assert adjacent.spans == (Span("x", 0, 1), Span("x", 1, 2))
    chinese = utterance("周五 叫我", "B-date I-date O O", locale="zh-CN")
    assert chinese.annotated() == "[date : 周五] 叫我"
    assert parse_annotated(chinese.annotated(), chinese.text, True) == (chinese.words, chinese.tags, False)


def test_write_then_read_gives_the_same(tmp_path):
    first = utterance("wake me at five", "O O O B-time", id="a")
    second = utterance("周五叫我", "B-date I-date O O", locale="zh-CN", id="a")
    third = utterance("stop", "O", id="b", partition="dev", domain="music", intent="music_stop")
    write_massive([first, second, third], tmp_path / "new")
    assert read_massive(tmp_path / "new", ["zh-CN", "en-US"]) == [second, first, third]
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["en-US.jsonl", "zh-CN.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    good = utterance("stop", "O")
    write_massive([good], tmp_path)
    before = (tmp_path / "en-US.jsonl").read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_massive([good, utterance("\ud800", "O")], tmp_path)
    assert (tmp_path / "en-US.jsonl").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["en-US.jsonl"]


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (b'{"id": "2", ', r"de-DE.jsonl:2: broken JSON"),
        (b"[1]", r"de-DE.jsonl:2: holds a JSON list"),
        (b'{"utt": "play \\ud83d now"}', r"de-DE.jsonl:2: field 'utt': character 6 is half a surrogate pair"),
        (b'{"id": "\xff"}', r"de-DE.jsonl:2: byte 0xff at column 9 is not UTF-8"),
        (record(id="2", intent=...), r"de-DE.jsonl:2: field 'intent' is missing"),
        (record(id=2.5), r"de-DE.jsonl:2: field 'id' is 2.5 and not a string"),
        (record(id=1), r"de-DE.jsonl:2: id '1' occurs a second time"),
        (record(id="2", scenario=" "), r"de-DE.jsonl:2: field 'scenario' is ' '"),
        (record(id="2", annot_utt="weck mich [date : diese woche auf"), r"de-DE.jsonl:2: slot marks are unbalanced"),
        (record(id="2", partition="eval"), r"de-DE.jsonl:2: unknown partition 'eval'"),
        (record(id="2", locale="de-AT"), r"de-DE.jsonl:2: locale is 'de-AT' in a file of de-DE"),
        (record(), r"de-DE.jsonl:2: id '1' occurs a second time"),
    ],
)
def test_a_broken_line_is_named(tmp_path, second, reason):
    write_lines(tmp_path, "de-DE", [record(), second, record(id="3")])
    with pytest.raises(UserError, match=reason):
        read_massive(tmp_path, ["de-DE"])


def test_a_broken_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config.nlu.path: no folder"):
        read_massive(tmp_path / "none", ["de-DE"])
    write_lines(tmp_path, "de-DE", [])
    write_lines(tmp_path, "fr-FR", [record(locale="fr-FR", partition="dev")])
    with pytest.raises(UserError, match=r"no locale 'xx-XX'; it has: de-DE, fr-FR"):
        read_massive(tmp_path, ["xx-XX"])
    with pytest.raises(UserError, match=r"de-DE.jsonl: holds no utterance"):
        read_massive(tmp_path, ["de-DE"])
    with pytest.raises(UserError, match=r"train partition of fr-FR is empty"):
        read_massive(tmp_path, ["fr-FR"])


def test_numbers_as_ids_validation_as_dev_and_gzip_are_read(tmp_path):
    write_lines(tmp_path, "de-DE", [record(), record(id=2, partition="validation")])
    plain = read_massive(tmp_path, ["de-DE"])
    assert [(one.id, one.partition) for one in plain] == [("1", "train"), ("2", "dev")]
    file = tmp_path / "de-DE.jsonl"
    (tmp_path / "de-DE.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    assert read_massive(tmp_path, ["de-DE"]) == plain
    with pytest.raises(UserError, match=r"no locale 'xx-XX'; it has: de-DE$"):
        read_massive(tmp_path, ["xx-XX"])


def test_brackets_of_a_text_survive_writing_and_reading(tmp_path):
    one = utterance("play x [live] [now]", "O B-song I-song O", id="a")
    write_massive([one], tmp_path)
    assert read_massive(tmp_path, ["en-US"]) == [one]


def test_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path):
    (tmp_path / "de-DE.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(record()).encode() + b"\r\n\r\n")
    assert [one.tags for one in read_massive(tmp_path, ["de-DE"])] == [("O", "O", "B-date", "I-date", "O")]


def tarball(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, records in members.items():
            content = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_the_official_tarball(tmp_path):
    path = tmp_path / "massive.tar.gz"
    german, french = [record(), record(id="2")], [record(locale="fr-FR")]
    tarball(
        path,
        {"1.1/data/fr-FR.jsonl": french, "1.1/data/._de-DE.jsonl": [{}], "1.1/data/de-DE.jsonl": german, "1.1/x": []},
    )
    assert [(one.locale, one.id) for one in read_massive(path, ["de-DE", "fr-FR"])] == [
        ("de-DE", "1"),
        ("de-DE", "2"),
        ("fr-FR", "1"),
    ]
    with pytest.raises(UserError, match=r"no locale 'hi-IN'; it has: de-DE, fr-FR"):
        read_massive(path, ["hi-IN"])
    tarball(path, {"1.0/data/de-DE.jsonl": [record(), record(intent=...)]})
    with pytest.raises(UserError, match=r"massive.tar.gz/1.0/data/de-DE.jsonl:2: field 'intent' is missing"):
        read_massive(path, ["de-DE"])
    tarball(path, {"1.0/data/de-DE.jsonl": german, "1.1/data/de-DE.jsonl": german})
    with pytest.raises(UserError, match=r"holds de-DE.jsonl twice"):
        read_massive(path, ["de-DE"])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"is not a whole tar archive"):
        read_massive(path, ["fr-FR"])


def nlu(**changes):
    return read(Nlu, block(Nlu, **changes), "nlu")


def test_max_train_keeps_the_same_ids_in_every_locale(tmp_path):
    ids = [str(number) for number in range(50)]
    for locale, order in (("de-DE", ids), ("fr-FR", ids[::-1])):
        records = [record(locale=locale, id=one) for one in order]
        write_lines(tmp_path, locale, [*records, record(locale=locale, id="d", partition="dev")])

    def kept(count):
        loaded = load_utterances(nlu(format="massive", path=str(tmp_path), locales=("de-DE", "fr-FR"), max_train=count))
        assert [one.id for one in loaded if one.partition == "dev"] == ["d", "d"]
        return [
            {one.id for one in loaded if (one.locale, one.partition) == (locale, "train")}
            for locale in ("de-DE", "fr-FR")
        ]

    german, french = kept(20)
    assert german == french and len(german) == 20 and german != set(ids[:20])
    assert kept(7)[0] < german
    assert len(kept(0)[0]) == len(kept(99)[0]) == 50


def test_load_refuses_a_wrong_config(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"config.nlu.format: 'csv' is unknown"):
        load_utterances(nlu(format="csv"))
    with pytest.raises(UserError, match=r"config.nlu.locales"):
        load_utterances(nlu(locales=("de-DE", "de-DE")))
    with pytest.raises(UserError, match=r"config.nlu.max_train: -1"):
        load_utterances(nlu(max_train=-1))
    monkeypatch.delenv("KD_JAX_NOWHERE", raising=False)
    with pytest.raises(UserError, match=r"config.nlu.path: environment variable KD_JAX_NOWHERE is not set"):
        load_utterances(nlu(format="massive", path="${KD_JAX_NOWHERE}/massive"))
    monkeypatch.setenv("KD_JAX_NOWHERE", str(tmp_path))
    write_lines(tmp_path / "massive", "en-US", [record(locale="en-US")])
    assert len(load_utterances(nlu(format="massive", path="${KD_JAX_NOWHERE}/massive"))) == 1


def test_label_maps_know_train_only():
    utterances = [
        utterance("b a", "B-time B-date", intent="set", domain="alarm"),
        utterance("c", "O", intent="play", domain="music"),
        utterance("d", "B-song", intent="stop", domain="radio", partition="dev"),
    ]
    maps = LabelMaps.from_train(utterances)
    assert maps == LabelMaps(("alarm", "music"), ("play", "set"), ("O", "B-date", "I-date", "B-time", "I-time"))
    assert [maps.domain_id("music"), maps.intent_id("set"), maps.tag_id("B-time"), maps.tag_id("O")] == [1, 1, 3, 0]
    assert [maps.domain_id("radio"), maps.intent_id("stop"), maps.tag_id("B-song")] == [-1, -1, -1]
    assert LabelMaps.from_json(json.loads(json.dumps(maps.to_json()))) == maps
    assert LabelMaps.for_domain(utterances, "music") == LabelMaps(("music",), ("play",), ("O",))
    with pytest.raises(UserError, match=r"'radio' has no train utterance; use one of: alarm, music"):
        LabelMaps.for_domain(utterances, "radio")


def test_real_locale_agrees_with_its_published_counts(data_dir):
    folder = data_dir / "nlu" / "massive"
    utterances = read_massive(folder, ["de-DE"])
    # The row of de-DE in the data's own README.
    assert Counter(one.partition for one in utterances) == {"train": 11514, "dev": 2033, "test": 2974}
    assert sum(len(one.spans) for one in utterances) == 16215
    assert sum(not one.spans for one in utterances) == 5415
    maps = LabelMaps.from_train(utterances)
    assert (len(maps.domains), len(maps.intents), len(maps.tags)) == (18, 60, 1 + 2 * 55)
    train = {one.text for one in utterances if one.partition == "train"}
    overlap = json.loads((folder / "overlap_with_train.json").read_text())["de-DE"]
    for partition in ("dev", "test"):
        repeated = {one.id for one in utterances if one.partition == partition and one.text in train}
        assert repeated == set(overlap[partition])
    with open(folder / "de-DE.jsonl", encoding="utf-8") as lines:
        for line, one in zip(lines, utterances, strict=True):
            assert one.annotated() == json.loads(line)["annot_utt"]


def test_all_real_locales_parse_and_are_parallel(data_dir):
    locales = ["en-US", "es-ES", "fr-FR", "hi-IN", "it-IT", "pt-PT"]
    utterances = read_massive(data_dir / "nlu" / "massive", locales)
    spans = Counter()
    for one in utterances:
        spans[one.locale] += len(one.spans)
    assert [spans[locale] for locale in locales] == [16171, 15916, 15802, 16153, 16154, 16083]
    labels = {(one.id, one.partition, one.domain, one.intent) for one in utterances}
    assert len(labels) == len(utterances) / len(locales) == 16521


# From Parquet and from `datasets`: the same utterances as from JSONL, with label numbers decoded.
DOMAINS, INTENTS = ["alarm", "music"], ["music_play", "alarm_set"]
ROWS = {
    "de-DE": [
        ("0", "train", "alarm", "alarm_set", "weck mich um [time : fünf uhr]"),
        ("1", "dev", "music", "music_play", "spiel [artist : abba]"),
        ("2", "test", "music", "music_play", "lauter"),
    ],
    "hi-IN": [("0", "train", "alarm", "alarm_set", "मुझे [time : पाँच बजे] जगाओ")],
}


def table(locale, numbers=False):
    ids, partitions, domains, intents, annotated = map(list, zip(*ROWS[locale], strict=True))
    texts = [one.replace("[time : ", "").replace("[artist : ", "").replace("]", "") for one in annotated]
    columns = {"id": ids, "locale": [locale] * len(ids), "partition": partitions, "scenario": domains}
    columns |= {"intent": intents, "utt": texts, "annot_utt": annotated, "worker_id": ["7"] * len(ids)}
    if numbers:
        columns["partition"] = [["train", "dev", "test"].index(one) for one in partitions]
        columns["scenario"] = [DOMAINS.index(one) for one in domains]
        columns["intent"] = [INTENTS.index(one) for one in intents]
    return columns


def labeled(locale):
    """As the hub's own copies are written: label numbers, with the names in the schema's metadata."""
    columns = table(locale, numbers=True)
    features = {name: datasets.Value("string") for name in columns}
    features |= {"partition": datasets.Value("int64"), "scenario": datasets.ClassLabel(names=DOMAINS)}
    features["intent"] = datasets.ClassLabel(names=INTENTS)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def load(format="massive_parquet", locales=("de-DE", "hi-IN"), **changes):
    return load_utterances(nlu(format=format, locales=locales, **changes))


def check(utterances):
    got = [(one.locale, one.id, one.partition, one.domain, one.intent, one.annotated()) for one in utterances]
    assert got == [(locale, *row) for locale, rows in ROWS.items() for row in rows]


def test_parquet_in_one_folder_or_one_for_each_locale(tmp_path):
    columns = {name: values + table("hi-IN")[name] for name, values in table("de-DE").items()}
    (tmp_path / "one").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "one" / "all.parquet")
    check(load(path=str(tmp_path / "one")))
    for locale in ROWS:
        (tmp_path / "many" / locale / "train").mkdir(parents=True)
        pq.write_table(pa.table(table(locale)), tmp_path / "many" / locale / "train" / "0000.parquet")
    check(load(path=str(tmp_path / "many")))
    columns["partition"] = ["validation" if one == "dev" else one for one in columns["partition"]]
    pq.write_table(pa.table(columns), tmp_path / "one" / "all.parquet")
    check(load(path=str(tmp_path / "one")))
    with pytest.raises(UserError, match=r"no locale 'fr-FR'; it has: de-DE, hi-IN"):
        load(path=str(tmp_path / "one"), locales=("fr-FR",))


def test_label_numbers_get_their_names(tmp_path):
    for locale in ROWS:
        (tmp_path / locale).mkdir()
        labeled(locale).to_parquet(tmp_path / locale / "train.parquet")
    assert pq.read_schema(tmp_path / "de-DE" / "train.parquet").field("scenario").type == pa.int64()
    check(load(path=str(tmp_path)))


def test_datasets_reads_a_configuration_for_each_locale(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = ["---", "configs:"]
    for locale in ROWS:
        (tmp_path / "set" / locale).mkdir(parents=True)
        data = labeled(locale)
        splits = ["train", "validation", "test"][: len(data)]
        lines += [f"- config_name: {locale}", "  data_files:"]
        for row, split in enumerate(splits):
            data.select([row]).to_parquet(tmp_path / "set" / locale / f"{split}.parquet")
            lines += [f"  - split: {split}", f"    path: {locale}/{split}.parquet"]
    (tmp_path / "set" / "README.md").write_text("\n".join([*lines, "---", ""]))
    check(load("huggingface", name=str(tmp_path / "set")))
    with pytest.raises(UserError, match=r"\(fr-FR\) cannot be read"):
        load("huggingface", name=str(tmp_path / "set"), locales=("fr-FR",))
    with pytest.raises(UserError, match=r"config.nlu.name: it is empty"):
        load("huggingface")


def test_the_hubs_export_to_parquet_has_a_folder_for_each_locale(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for locale in ROWS:
        data = labeled(locale)
        for row, split in enumerate(["train", "validation", "test"][: len(data)]):
            folder = tmp_path / "set" / locale / split
            folder.mkdir(parents=True)
            data.select([row]).to_parquet(folder / "0000.parquet")
    asked, load_dataset = [], datasets.load_dataset

    def recorded(path, name=None, **options):
        asked.append((path, name, options["revision"], options["data_dir"]))
        return load_dataset(path, name, **options)

    monkeypatch.setattr(datasets, "load_dataset", recorded)
    check(load("huggingface", name=f"{tmp_path / 'set'}@refs/convert/parquet"))
    assert asked == [(str(tmp_path / "set"), None, "refs/convert/parquet", locale) for locale in ROWS]
    with pytest.raises(UserError, match=r"set@refs/convert/parquet \(fr-FR\) cannot be read"):
        load("huggingface", name=f"{tmp_path / 'set'}@refs/convert/parquet", locales=("fr-FR",))


def test_broken_tables_are_named(tmp_path):
    file = tmp_path / "all.parquet"

    def refuse(columns, reason):
        pq.write_table(pa.table(columns), file)
        with pytest.raises(UserError, match=reason):
            load(path=str(tmp_path), locales=("de-DE",))

    columns = table("de-DE")
    refuse({**columns, "annot_utt": ["weck", *columns["annot_utt"][1:]]}, r"all.parquet: row 0: without its marks")
    refuse({**columns, "partition": [0, 1, 3]}, r"all.parquet: row 2: field 'partition' is 3 and not a string")
    refuse({**columns, "intent": [0, 1, 0]}, r"all.parquet: row 0: field 'intent' is 0 and not a string")
    refuse({**columns, "partition": ["dev"] * 3}, r"train partition of de-DE is empty")
    del columns["intent"]
    refuse(columns, r"all.parquet: column 'intent' is missing; it has: id, locale")
    file.write_bytes(b"PAR1 no table")
    with pytest.raises(UserError, match=r"all.parquet: cannot be read as Parquet"):
        load(path=str(tmp_path), locales=("de-DE",))
    with pytest.raises(UserError, match=r"config.nlu.path: no folder"):
        load(path=str(tmp_path / "none"))


def test_shared_ids_tell_translations_from_equal_numbers():
    def labeled(differing, locales=("de-DE", "en-US", "fr-FR")):
        return [
            (str(number), locale, locale if number < differing else "set") for number in range(50) for locale in locales
        ]

    assert shared_ids(labeled(0)) == (50, 0) and shared_ids(labeled(0)).parallel
    assert shared_ids(labeled(5)).parallel  # labels that were corrected in one locale
    assert shared_ids(labeled(6)) == (50, 6) and not shared_ids(labeled(6)).parallel
    assert shared_ids(labeled(6, ("de-DE",))) == (0, 0) and shared_ids([]).parallel
    # An id that a locale has twice with two intents counts like an id shared by two locales.
    twice = [("1", locale, intent) for locale in ("de-DE", "en-US") for intent in ("set", "stop")]
    assert shared_ids(twice) == (1, 0) and shared_ids(twice[:-1]) == (1, 1)
