"""Streams the texts of one language of one source, whatever its format, in bounded memory."""

import hashlib
import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from ml_collections import ConfigDict

from kd_jax.data.text import files
from kd_jax.data.text.files import fill_path
from kd_jax.data.text.utterances import Utterance
from kd_jax.types import UserError

__all__ = ["fill_path", "read_texts", "to_spoken"]

BATCH = 1024  # texts read at once from columnar formats

APOSTROPHES = "'\u2019"


class _Spoken(dict):
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


def read_texts(
    source: ConfigDict,
    language: str,
    utterances: Sequence[Utterance],
    *,
    key: str = "config.sources",
    report: files.Report = files.raise_error,
) -> Iterator[str]:
    """Texts of `language` (e.g. "de" or "de-DE") as the source's keys say, stripped, blank ones left out.

    `utterances` are those of config.nlu, for format "utterances"; `key` is the source's place in the config.
    Raises UserError at once for a wrong key, and while reading for a broken file or an empty source; what is wrong with
    a record (with file and line) goes to `report`.
    """
    readers = {
        "text": _read_text,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "huggingface": _read_huggingface,
        "tfds": _read_tfds,
    }
    if not 0 <= source.spoken_share <= 1:
        raise UserError(f"{key}.spoken_share: {source.spoken_share} is outside 0 to 1; give a share")
    if source.max_texts < 0:
        raise UserError(f"{key}.max_texts: {source.max_texts} is negative; 0 reads all")
    match source.format:
        case "utterances":
            texts = (one.text for one in utterances if one.partition == "train" and _speaks(one.locale, language))
        case "embedded":
            from kd_jax.data.embedded.utterances import (
                embedded_texts,  # it brings packages that other formats do without
            )

            texts = embedded_texts(language)
        case name if name in readers:
            path = fill_path(source.path, language, key=f"{key}.path")
            texts = readers[name](source, path, language, key, report)
        case other:
            known = ", ".join(["embedded", *readers, "utterances"])
            raise UserError(f"{key}.format: unknown format {other!r}; write one of: {known}")
    return _finish(texts, source, language, key)


def _finish(texts: Iterable[str | None], source: ConfigDict, language: str, key: str) -> Iterator[str]:
    kept = (stripped for text in texts if text is not None and (stripped := text.strip()))
    if source.spoken_share > 0:
        kept = _speak(kept, source.spoken_share)
    number = 0
    for number, text in enumerate(itertools.islice(kept, source.max_texts or None), 1):  # noqa: B007
        yield text
    if not number and source.format == "utterances":
        raise UserError(
            f"{key}.languages: there is no train utterance of {language!r}; take it out, or see to config.nlu.locales"
        )
    if not number:
        raise UserError(
            f"{key}: format {source.format!r} gives no text for language {language!r}; check path and field"
        )


def _speaks(locale: str, language: str) -> bool:
    return language in (locale, locale.split("-")[0])


def _speak(texts: Iterable[str], share: float) -> Iterator[str]:
    """A text's own hash decides whether it is brought to spoken form, so a text has one form wherever it stands."""
    limit = round(share * 2**64)
    for text in texts:
        digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"spoken form").digest()
        spoken = to_spoken(text) if int.from_bytes(digest, "little") < limit else text
        if spoken:
            yield spoken


def _read_text(source: ConfigDict, path: str, language: str, key: str, report: files.Report) -> Iterator[str]:
    for file in files.find_files(path, (".txt", ".txt.gz"), key=f"{key}.path"):
        for _, line in files.numbered_lines(file, report):
            yield line


def _read_jsonl(source: ConfigDict, path: str, language: str, key: str, report: files.Report) -> Iterator[str | None]:
    field = source.field  # a config's look-up is too slow for every text
    for file in files.find_files(path, (".jsonl", ".jsonl.gz"), key=f"{key}.path"):
        for number, line in files.numbered_lines(file, report):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            try:
                text = _field_of(files.json_object(line, place), line, place, field, key)
            except UserError as error:
                report(error)
            else:
                yield _text_or_none(text, place, field, key, report)


def _field_of(record: dict[str, Any], line: str, place: str, field: str, key: str) -> Any:
    if field not in record:
        listed = ", ".join(record) or "none"
        raise UserError(f"{place}: no field {field!r}; it has: {listed}; set {key}.field to one of them")
    text = record[field]
    if "\\u" in line and isinstance(text, str) and not _encodes(text):
        raise UserError(f"{place}: field {field!r} holds half a surrogate pair; mend or leave out the line")
    return text


def _encodes(text: str) -> bool:
    """JSON can spell half of a surrogate pair, which is no character and breaks tokenizers."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_or_none(value: Any, place: str, field: str, key: str, report: files.Report) -> str | None:
    if value is None or isinstance(value, str):
        return value
    problem = f"{place}: field {field!r} holds a {type(value).__name__} and not text"
    report(UserError(f"{problem}; set {key}.field to a text field"))
    return None


def _read_parquet(source: ConfigDict, path: str, language: str, key: str, report: files.Report) -> Iterator[str | None]:
    field = source.field
    for file in files.find_files(path, (".parquet",), key=f"{key}.path"):
        row = 0
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                _check_column(field, table.schema_arrow.names, str(file), key)
                for batch in table.iter_batches(batch_size=BATCH, columns=[field]):
                    for value in batch.column(0).to_pylist():
                        yield _text_or_none(value, f"{file}: row {row}", field, key, report)
                        row += 1
        except UnicodeDecodeError:
            raise UserError(
                f"{file}: row {row} or later holds bytes that are not UTF-8; write the file again"
            ) from None
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: cannot be read as Parquet ({error}); copy or download it again") from None


def _check_column(field: str, columns: Sequence[str], place: str, key: str) -> None:
    if field not in columns:
        raise UserError(f"{place}: no column {field!r}; it has: {', '.join(columns)}; set {key}.field to one of them")


def _read_huggingface(
    source: ConfigDict, path: str, language: str, key: str, report: files.Report
) -> Iterator[str | None]:
    """A data set of the hub; or, with a path, a folder that `save_to_disk` wrote or a folder of data files."""
    import datasets  # about a second, which other formats need not pay

    field = source.field
    name, subset = source.name.replace("{language}", language), source.subset.replace("{language}", language)
    if not (path or name):
        raise UserError(f"{key}.name: is empty, and so is path; name a data set on the hub or set path to a folder")
    if path and not Path(path).is_dir():
        raise UserError(f"{key}.path: no folder {path}; check the path, or leave it empty to read name from the hub")
    place = path or name
    if path and any(Path(path, file).is_file() for file in ("state.json", "dataset_dict.json")):
        try:
            table = datasets.load_from_disk(path)
        except Exception as error:
            raise files.hub_error(path, None, error) from error
        if isinstance(table, datasets.DatasetDict):
            if source.split not in table:
                raise UserError(
                    f"{key}.split: {path} has no split {source.split!r}; it has: {', '.join(map(str, table))}"
                )
            table = table[source.split]
    else:
        # Files on the disk are always streamed, since anything else would copy them into a cache first.
        streaming = bool(path) or source.streaming
        table = files.load_hub(place, subset or None, split=source.split, streaming=streaming)
    if table.column_names is not None:
        _check_column(field, table.column_names, place, key)
        table = table.select_columns([field])
    row = 0
    try:
        for batch in table.iter(batch_size=BATCH):
            _check_column(field, list(batch), place, key)
            for value in batch[field]:
                yield _text_or_none(value, f"{place}: row {row}", field, key, report)
                row += 1
    except UserError:
        raise
    except Exception as error:  # streaming reads the network here
        raise files.hub_error(place, subset or None, error) from error


def _read_tfds(source: ConfigDict, path: str, language: str, key: str, report: files.Report) -> Iterator[str | None]:
    """A data set that was prepared as array_record in the folder `path` (or TFDS's own), read without TensorFlow."""
    import tensorflow_datasets as tfds  # half a second, which other formats need not pay

    field = source.field
    parts = (source.name.replace("{language}", language), source.subset.replace("{language}", language))
    name = "/".join(part for part in parts if part)
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
    _check_column(field, list(builder.info.features), name, key)
    for start in range(0, len(table), BATCH):
        rows = range(start, min(start + BATCH, len(table)))
        for row, record in zip(rows, table.__getitems__(rows), strict=True):
            value = record[field]
            try:
                text = value.decode() if isinstance(value, bytes) else value
            except UnicodeDecodeError:
                raise UserError(
                    f"{name}: row {row} holds bytes that are not UTF-8; prepare the data set again"
                ) from None
            yield _text_or_none(text, f"{name}: row {row}", field, key, report)
