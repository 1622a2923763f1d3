"""MASSIVE's schema from Parquet and from `datasets`: the same utterances as from JSONL, with label numbers decoded."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_jax.config.base import get_config
from kd_jax.data.text.utterances import load_utterances
from kd_jax.types import UserError

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
    block = get_config().nlu
    block.update(format=format, locales=locales, **changes)
    return load_utterances(block)


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
    with pytest.raises(UserError, match=r"config.nlu.name: is empty"):
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
