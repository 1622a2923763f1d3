"""Reads what the config names, whatever its format: the labeled utterances, and streams of texts in bounded memory."""

import hashlib
import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kd_jax.config.data import Nlu, Source
from kd_jax.data.text import files
from kd_jax.data.text.utterances import Utterance, read_hub, read_massive, read_parquet, subset_train
from kd_jax.types import UserError

BATCH = 1024  # texts read at once from columnar formats

APOSTROPHES = "'\u2019"


class _Spoken(dict[int, int]):
    """Translation table, filled on demand: punctuation and symbols become spaces; combining marks and the rest stay."""

    def __missing__(self, code: int) -> int:
        character = chr(code)
        silent = unicodedata.category(character)[0] in "PS" and character not in APOSTROPHES
        self[code] = ord(" ") if silent else code
        return self[code]


_SPOKEN = _Spoken()


def to_spoken(text: str) -> str:
    """The text as a speech recognizer would write it: lower case, no punctuation but apostrophes inside words."""
    words = text.lower().translate(_SPOKEN).split()
    if any(apostrophe in text for apostrophe in APOSTROPHES):
        words = [stripped for word in words if (stripped := word.strip(APOSTROPHES))]
    return " ".join(words)


def load_utterances(nlu: Nlu, report: files.Report = files.raise_error) -> list[Utterance]:
    """The labeled utterances that `config.nlu` names, at most `nlu.max_train` train utterances per locale.

    Raises UserError when the config or a file as a whole is wrong; what is wrong with a record goes to `report`.
    """
    path = files.fill_path(nlu.path, key="config.nlu.path")
    match nlu.format:
        case "embedded":
            from kd_jax.data.embedded.utterances import (
                embedded_utterances,  # imports packages that only this format needs
            )

            utterances = embedded_utterances(nlu.locales)
        case "massive":
            utterances = read_massive(path, nlu.locales, nlu.character_locales, report)
        case "massive_parquet":
            utterances = read_parquet(path, nlu.locales, nlu.character_locales, report)
        case _:  # Nlu knows no other format than "huggingface"
            utterances = read_hub(nlu.name, nlu.locales, nlu.character_locales, report)
    return subset_train(utterances, nlu.max_train) if nlu.max_train else utterances


def read_texts(
    source: Source,
    language: str,
    utterances: Sequence[Utterance],
    *,
    key: str = "config.sources",
    report: files.Report = files.raise_error,
) -> Iterator[str]:
    """Texts of `language` (e.g. "de" or "de-DE") as the source's keys say, stripped, blank ones left out.

    `utterances` are those of config.nlu, for format "utterances"; `key` names the source's block of the config. Raises
    UserError at once for a wrong key, and while reading for a broken file or an empty source; what is wrong with a
    record (with file and line) goes to `report`.
    """
    path = files.fill_path(source.path, language, key=f"{key}.path")
    match source.format:
        case "utterances":
            train = (one for one in utterances if one.partition == "train")
            texts = (one.text for one in train if language in (one.locale, one.locale.split("-")[0]))
        case "embedded":
            from kd_jax.data.embedded.utterances import embedded_texts  # imports packages that only this format needs

            texts = embedded_texts(language)
        case "text":
            texts = _lines(path, key, report)
        case columns:
            # Formats with named fields, whose values may be anything.
            readers = {"jsonl": _jsonl, "parquet": _parquet, "huggingface": _huggingface, "tfds": _tfds}
            texts = _only_text(readers[columns](source, path, language, key, report), source.field, key, report)
    return _finish(texts, source, language, key)


def _finish(texts: Iterable[str], source: Source, language: str, key: str) -> Iterator[str]:
    kept = (stripped for text in texts if (stripped := text.strip()))
    if source.spoken_share > 0:
        kept = _speak(kept, source.spoken_share)
    number = 0
    for number, text in enumerate(itertools.islice(kept, source.max_texts or None), 1):  # noqa: B007
        yield text
    if not number and source.format == "utterances":
        problem = f"there is no train utterance of {language!r}"
        raise UserError(f"{key}.languages: {problem}; remove it, or add its locale to config.nlu")
    if not number:
        problem = f"format {source.format!r} gives no text for language {language!r}"
        raise UserError(f"{key}: {problem}; check path and field")


def _speak(texts: Iterable[str], share: float) -> Iterator[str]:
    """Brings a share of the texts to spoken form; a text's own hash decides, so equal texts get the same form."""
    limit = round(share * 2**64)
    for text in texts:
        digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"spoken form").digest()
        spoken = to_spoken(text) if int.from_bytes(digest, "little") < limit else text
        if spoken:
            yield spoken


def _only_text(values: Iterable[tuple[str, Any]], field: str, key: str, report: files.Report) -> Iterator[str]:
    """The values that are text, of (where, value); missing ones are left out and any other goes to `report`."""
    for where, value in values:
        if isinstance(value, str):
            yield value
        elif value is not None:
            problem = f"{where}: field {field!r} holds a {type(value).__name__} and not text"
            report(UserError(f"{problem}; set {key}.field to a text field"))


def _check_column(field: str, columns: Iterable[str], where: str, key: str, what: str = "column") -> None:
    if field not in columns:
        listed = ", ".join(columns) or "none"
        raise UserError(f"{where}: no {what} {field!r}; it has: {listed}; set {key}.field to one of them")


def _lines(path: str, key: str, report: files.Report) -> Iterator[str]:
    for file in files.find_files(path, (".txt", ".txt.gz"), key=f"{key}.path"):
        for _, line in files.numbered_lines(file, report):
            yield line


def _jsonl(source: Source, path: str, language: str, key: str, report: files.Report) -> Iterator[tuple[str, Any]]:
    field = source.field
    for file in files.find_files(path, (".jsonl", ".jsonl.gz"), key=f"{key}.path"):
        for where, record in files.json_records(files.numbered_lines(file, report), str(file), report):
            try:
                _check_column(field, record, where, key, "field")
            except UserError as error:
                report(error)
            else:
                yield where, record[field]


def _parquet(source: Source, path: str, language: str, key: str, report: files.Report) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet  # here and below: a library that only one format needs

    field = source.field
    for file in files.find_files(path, (".parquet",), key=f"{key}.path"):
        row = 0
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                _check_column(field, table.schema_arrow.names, str(file), key)
                for batch in table.iter_batches(batch_size=BATCH, columns=[field]):
                    for value in batch.column(0).to_pylist():
                        yield f"{file}: row {row}", value
                        row += 1
        except UnicodeDecodeError:
            problem = f"row {row} or later holds bytes that are not UTF-8"
            raise UserError(f"{file}: {problem}; write the file again") from None
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: cannot be read as Parquet ({error}); copy or download it again") from None


def _huggingface(source: Source, path: str, language: str, key: str, report: files.Report) -> Iterator[tuple[str, Any]]:
    """A data set of the hub; or, with a path, a folder that `save_to_disk` wrote or a folder of data files."""
    import datasets

    name, subset = source.name.replace("{language}", language), source.subset.replace("{language}", language)
    if not (path or name):
        raise UserError(f"{key}.name: is empty, and so is path; name a data set on the hub or set path to a folder")
    if path and not Path(path).is_dir():
        raise UserError(f"{key}.path: no folder {path}; check the path, or leave it empty to read name from the hub")
    where = path or name
    if path and any(Path(path, file).is_file() for file in ("state.json", "dataset_dict.json")):
        try:
            table = datasets.load_from_disk(path)
        except Exception as error:
            raise files.hub_error(path, None, error) from error
        if isinstance(table, datasets.DatasetDict):
            if source.split not in table:
                splits = ", ".join(map(str, table))
                raise UserError(f"{key}.split: {path} has no split {source.split!r}; it has: {splits}")
            table = table[source.split]
    else:
        # Files on the disk are always streamed, since anything else would copy them into a cache first.
        streaming = bool(path) or source.streaming
        table = files.load_hub(where, subset or None, split=source.split, streaming=streaming)
    if table.column_names is not None:
        _check_column(source.field, table.column_names, where, key)
        table = table.select_columns([source.field])
    row = 0
    try:
        for batch in table.iter(batch_size=BATCH):
            _check_column(source.field, batch, where, key)
            for value in batch[source.field]:
                yield f"{where}: row {row}", value
                row += 1
    except UserError:
        raise
    except Exception as error:  # streaming reads the network here
        raise files.hub_error(where, subset or None, error) from error


def _tfds(source: Source, path: str, language: str, key: str, report: files.Report) -> Iterator[tuple[str, Any]]:
    """A data set that was prepared as array_record in the folder `path` (or TFDS's own), read without TensorFlow."""
    import tensorflow_datasets as tfds

    name = "/".join(part.replace("{language}", language) for part in (source.name, source.subset) if part)
    if not name:
        raise UserError(f"{key}.name: is empty; name the data set in TFDS")
    try:
        builder: Any = tfds.builder(name, data_dir=path or None)
        table = builder.as_data_source(split=source.split)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{key}.name: TFDS cannot open {name} in {path or 'its own folder'} ({type(error).__name__}: {reason}); "
            f"check the name and split, or prepare it with: tfds build {name} --file_format=array_record"
        ) from error
    _check_column(source.field, builder.info.features, name, key)
    for start in range(0, len(table), BATCH):
        rows = range(start, min(start + BATCH, len(table)))
        for row, record in zip(rows, table.__getitems__(rows), strict=True):
            value = record[source.field]
            try:
                yield f"{name}: row {row}", value.decode() if isinstance(value, bytes) else value
            except UnicodeDecodeError:
                problem = f"row {row} holds bytes that are not UTF-8"
                raise UserError(f"{name}: {problem}; prepare the data set again") from None
