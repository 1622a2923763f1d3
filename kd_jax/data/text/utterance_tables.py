"""MASSIVE's schema from Parquet files and from the Hugging Face hub, where labels may be numbers with names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from kd_jax.data.text import files
from kd_jax.data.text.utterances import FIELDS, PARTITIONS, Utterance, check_record, check_train, unknown_locale
from kd_jax.types import UserError


def read_parquet(folder: str, locales: Sequence[str], report: files.Report = files.raise_error) -> list[Utterance]:
    """Utterances of Parquet files, all in `folder` with a locale column, or in one subfolder for each locale.

    Raises UserError for a file; what is wrong with a row (from 0) goes to `report`.
    """
    if not Path(folder).is_dir():
        raise UserError(f"config.nlu.path: no folder {folder}; name the folder of Parquet files")
    utterances = []
    for locale in locales:
        own = Path(folder, locale)
        members: list[Utterance] = []
        available = {file.name for file in Path(folder).iterdir() if file.is_dir()}
        seen: set[str] = set()
        # Files of all locales are read again for each locale: they are small, and one locale's rows are held at a time.
        for file in files.find_files(str(own if own.is_dir() else folder), (".parquet",), key="config.nlu.path"):
            records = _records(*_read_columns(file), str(file))
            members += _members(records, locale, str(file), seen, report)
            available |= {str(record["locale"]) for record in records}
        if not members:
            report(unknown_locale(locale, folder, available))
            continue
        check_train(members, folder, locale, report)
        utterances += members
    return utterances


def read_hub(name: str, locales: Sequence[str], report: files.Report = files.raise_error) -> list[Utterance]:
    """Utterances of a data set on the hub (or a local folder) that has one configuration for each locale.

    Raises UserError when it cannot be loaded; what is wrong with a row (from 0) of a split goes to `report`.
    """
    if not name:
        raise UserError("config.nlu.name: is empty; name the data set on the hub")
    utterances = []
    for locale in locales:
        members: list[Utterance] = []
        seen: set[str] = set()
        for split, table in files.load_hub(name, locale).items():
            table = table.select_columns([field for field in table.column_names if field in FIELDS])
            place = f"{name} ({locale}, {split})"
            members += _members(_records(table.to_dict(), table.features, place), locale, place, seen, report)
        check_train(members, name, locale, report)
        utterances += members
    return utterances


def _read_columns(file: Path) -> tuple[dict[str, list], Any]:
    import datasets  # about a second, for its reading of the label names in a Parquet file's metadata

    try:
        schema = pyarrow.parquet.read_schema(file)
        table = pyarrow.parquet.read_table(file, columns=[field for field in FIELDS if field in schema.names])
        return table.to_pydict(), datasets.Features.from_arrow_schema(table.schema)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({error}); download it again") from None


def _records(columns: Mapping[str, list], features: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The rows as records; numbers become the names that `features` gives them, and partitions 0, 1, 2 their own."""
    named = {}
    for field in FIELDS:
        if field not in columns:
            raise UserError(f"{name}: column {field!r} is missing; it has: {', '.join(columns)}")
        names = getattr(features[field], "names", None) or (PARTITIONS if field == "partition" else ())
        inside = range(len(names))
        named[field] = [names[value] if value in inside else value for value in columns[field]]
    # "validation" is the hub's own name for the split.
    named["partition"] = ["dev" if value == "validation" else value for value in named["partition"]]
    return [dict(zip(FIELDS, values, strict=True)) for values in zip(*named.values(), strict=True)]


def _members(
    records: Sequence[dict[str, Any]], locale: str, name: str, seen: set[str], report: files.Report
) -> list[Utterance]:
    members = []
    for row, record in enumerate(records):
        if record["locale"] == locale:
            try:
                members.append(check_record(record, locale, f"{name}: row {row}", seen))
            except UserError as error:
                report(error)
    return members
