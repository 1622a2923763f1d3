"""Labeled utterances in the schema of MASSIVE (FitzGerald et al. 2022): IOB2 tags, files, label maps."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd_jax.config import require
from kd_jax.config.data import CHARACTER_LOCALES
from kd_jax.data.text import files
from kd_jax.runtime.files import write_json_lines
from kd_jax.types import UserError

PARTITIONS = ("train", "dev", "test")
FIELDS = ("id", "locale", "partition", "scenario", "intent", "utt", "annot_utt")

MARK = re.compile(r"\[([^\[\]]*)\]")
# Brackets of the text itself are written \[ and \] in annot_utt; these replace them while it is parsed.
_ESCAPED = {r"\[": "\ue05b", r"\]": "\ue05d"}

# Records as their file holds them, each with where it stands: "file:line" or "file: row 3".
Records = Iterable[tuple[str, Mapping[str, Any]]]


class Span(NamedTuple):
    """A slot on the words [start, end) of an utterance."""

    slot: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class Utterance:
    """One labeled utterance; `tags` are IOB2, one for each of `words`.

    characters: `words` are the characters that are not whitespace (config.nlu.character_locales). widened: a slot mark
    began or ended inside a word, and the slot was extended to the whole word.
    """

    id: str
    locale: str
    partition: str
    domain: str
    intent: str
    text: str
    words: tuple[str, ...]
    tags: tuple[str, ...]
    characters: bool = False
    widened: bool = dataclasses.field(default=False, compare=False)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The slots, from left to right."""
        found = []
        for start, tag in enumerate(self.tags):
            if tag.startswith("B-"):
                end = start + 1
                while end < len(self.tags) and self.tags[end] == f"I-{tag[2:]}":
                    end += 1
                found.append(Span(tag[2:], start, end))
        return tuple(found)

    def annotated(self) -> str:
        """The text with its slots marked, e.g. `weck mich [date : diese woche] auf`."""
        columns = _columns(self.text, self.characters)
        parts, done = [], 0
        for span in self.spans:
            start, end = columns[span.start][0], columns[span.end - 1][1]
            parts.append(f"{_escape(self.text[done:start])}[{span.slot} : {_escape(self.text[start:end])}]")
            done = end
        return "".join(parts) + _escape(self.text[done:])


def _escape(text: str) -> str:
    return text.replace("[", r"\[").replace("]", r"\]")


def split_words(text: str, characters: bool = False) -> list[str]:
    """The units that are tagged: words between whitespace, or the characters that are not whitespace."""
    words = text.split()
    return list("".join(words)) if characters else words


def _columns(text: str, characters: bool) -> list[tuple[int, int]]:
    """Where each of `split_words` begins and ends in the text."""
    return [match.span() for match in re.finditer(r"\S" if characters else r"\S+", text)]


class Tagged(NamedTuple):
    """A text with its slot marks parsed; widened as in `Utterance`."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    widened: bool


def parse_annotated(annot_utt: str, utt: str, characters: bool = False) -> Tagged:
    """Words and IOB2 tags of `... [slot : text] ...`, where \\[ and \\] are brackets of the text.

    A word that a slot covers in part has the slot. Raises ValueError with the reason when the marks are wrong.
    """
    for written, stand_in in _ESCAPED.items():
        annot_utt = annot_utt.replace(written, stand_in)
    plain = ""
    outside: list[bool] = []
    slots: list[tuple[str, int, int]] = []  # name, and the columns [start, end) of `plain`

    def add(text: str, slot: str = "") -> None:
        nonlocal plain
        outside.append("[" in text or "]" in text)  # a bracket outside the innermost marks
        for written, stand_in in _ESCAPED.items():
            text = text.replace(stand_in, written[1])
        if slot and not text:
            raise ValueError(f"the slot mark of {slot!r} has no text")
        if slot:
            slots.append((slot, len(plain), len(plain) + len(text)))
        plain += text

    done = 0
    for mark in MARK.finditer(annot_utt):
        add(annot_utt[done : mark.start()])
        slot, colon, inside = (part.strip() for part in mark[1].partition(":"))
        if not colon:
            raise ValueError(f"the slot mark {mark[0]!r} has no colon")
        if not slot:
            raise ValueError(f"the slot mark {mark[0]!r} has an empty slot name")
        if " " in slot:
            raise ValueError(f"the slot name {slot!r} holds a space")
        add(inside, slot)
        done = mark.end()
    add(annot_utt[done:])
    if any(outside):
        depths = [annot_utt[:end].count("[") - annot_utt[:end].count("]") for end in range(len(annot_utt) + 1)]
        problem = "nested or one is not closed" if max(depths) > 1 else "unbalanced"
        raise ValueError(f"slot marks are {problem} (a bracket of the text is written \\[ or \\])")
    words = split_words(utt, characters)
    if split_words(plain, characters) != words:
        raise ValueError(f"without its marks annot_utt reads {' '.join(plain.split())!r} and not utt {utt!r}")
    if not words:
        raise ValueError("the utterance is empty")
    tags, columns, widened = ["O"] * len(words), _columns(plain, characters), False
    for slot, start, end in slots:
        covered = [number for number, (first, last) in enumerate(columns) if first < end and last > start]
        widened |= columns[covered[0]][0] < start or columns[covered[-1]][1] > end
        for number in covered:
            if tags[number] != "O":
                raise ValueError(
                    f"{tags[number][2:]!r} and {slot!r} share the word {words[number]!r}; mark it once, or tag the "
                    "locale by character (config.nlu.character_locales)"
                )
            # Interned: a data set has millions of tags and a hundred different ones.
            tags[number] = sys.intern(f"{'BI'[number > covered[0]]}-{slot}")
    return Tagged(tuple(words), tuple(tags), widened)


def _check_record(record: Mapping[str, Any], locale: str, characters: bool, where: str, seen: set[str]) -> Utterance:
    """One record of `locale`; `seen` holds the ids before it. Raises UserError that begins with `where`."""
    if isinstance(number := record.get("id"), int) and not isinstance(number, bool):
        record = {**record, "id": str(number)}
    if record.get("partition") == "validation":  # the hub's own name for the split
        record = {**record, "partition": "dev"}
    for field in FIELDS:
        value = record.get(field)
        if not isinstance(value, str) or not value.strip():
            missing = field not in record
            problem = f"{field!r} is missing" if missing else f"{field!r} is {value!r} and not a string with text in it"
            raise UserError(f"{where}: field {problem}; write the fields {', '.join(FIELDS)} as strings")
    if record["locale"] != locale:
        raise UserError(
            f"{where}: locale is {record['locale']!r} in a file of {locale}; move the line or fix the field"
        )
    if record["partition"] not in PARTITIONS:
        raise UserError(f"{where}: unknown partition {record['partition']!r}; write train, dev or test")
    if record["id"] in seen:
        raise UserError(f"{where}: id {record['id']!r} occurs a second time in {locale}; give each utterance its own")
    seen.add(record["id"])
    try:
        tagged = parse_annotated(record["annot_utt"], record["utt"], characters)
    except ValueError as error:
        raise UserError(f"{where}: {error}; fix annot_utt or utt") from None
    domain, intent = sys.intern(record["scenario"]), sys.intern(record["intent"])
    where_and_what = (record["id"], locale, record["partition"], domain, intent, record["utt"])
    return Utterance(*where_and_what, tagged.words, tagged.tags, characters, tagged.widened)


def _utterances(records: Records, name: str, locale: str, characters: bool, report: files.Report) -> list[Utterance]:
    """The utterances of one locale; `report` gets what is wrong with a record, and a locale without train text."""
    utterances, seen = list[Utterance](), set[str]()
    for where, record in records:
        try:
            utterances.append(_check_record(record, locale, characters, where, seen))
        except UserError as error:
            report(error)
    if not utterances:
        report(UserError(f"{name}: holds no utterance of {locale}; check that the file is whole"))
    elif not any(utterance.partition == "train" for utterance in utterances):
        problem = f"the train partition of {locale} is empty"
        report(UserError(f"{name}: {problem}; mark some utterances with partition train"))
    return utterances


def _unknown_locale(locale: str, where: object, available: Iterable[str]) -> UserError:
    listed = ", ".join(sorted(available)) or "none"
    return UserError(f"config.nlu.locales: {where} has no locale {locale!r}; it has: {listed}")


def read_massive(
    folder: str | os.PathLike[str],
    locales: Sequence[str],
    characters: Collection[str] = CHARACTER_LOCALES,
    report: files.Report = files.raise_error,
) -> list[Utterance]:
    """Utterances of a folder of `<locale>.jsonl[.gz]`, or of MASSIVE's .tar.gz, in the order of `locales` and lines.

    characters: the locales that are tagged by character. Errors in a line or a locale go to `report` as UserError.
    """
    folder = Path(folder)
    if folder.is_file():
        return _read_tarball(folder, locales, characters, report)
    remedy = "name MASSIVE's folder of <locale>.jsonl files"
    require(folder.is_dir(), "nlu.path", f"no folder or tarball {folder}", remedy)
    utterances: list[Utterance] = []
    for locale in locales:
        file = next((one for one in (folder / f"{locale}.jsonl", folder / f"{locale}.jsonl.gz") if one.is_file()), None)
        if file is not None:
            records = files.json_records(files.numbered_lines(file, report), str(file), report)
            utterances += _utterances(records, str(file), locale, locale in characters, report)
        else:
            names = {other.name.partition(".jsonl")[0] for other in folder.glob("*.jsonl*")}
            report(_unknown_locale(locale, folder, names))
    return utterances


def _read_tarball(
    tarball: Path, locales: Sequence[str], characters: Collection[str], report: files.Report
) -> list[Utterance]:
    """Reads `<any>/data/<locale>.jsonl` from the archive in one pass, without unpacking it."""
    found, available = dict[str, list[Utterance]](), set[str]()
    try:
        with tarfile.open(tarball, "r:*") as archive:
            for member in archive:
                match = re.search(r"(?:^|/)data/([^/.][^/]*)\.jsonl$", member.name)
                lines = archive.extractfile(member) if match and member.isfile() else None
                if match is None or lines is None:
                    continue
                locale, name = match[1], f"{tarball}/{member.name}"
                available.add(locale)
                if locale in found:
                    raise UserError(f"{tarball}: holds {locale}.jsonl twice; keep one release in the archive")
                if locale in locales:
                    records = files.json_records(files.decode_lines(lines, name, report), name, report)
                    found[locale] = _utterances(records, name, locale, locale in characters, report)
            while archive.fileobj.read(2**20):  # the checksum comes last
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{tarball}: is not a whole tar archive ({error}); download it again") from None
    for locale in locales:
        if locale not in found:
            report(_unknown_locale(locale, tarball, available))
    return [utterance for locale in locales if locale in found for utterance in found[locale]]


def read_parquet(
    folder: str, locales: Sequence[str], characters: Collection[str], report: files.Report
) -> list[Utterance]:
    """Utterances of Parquet files, all in `folder` with a locale column, or in one subfolder for each locale."""
    import datasets  # knows the label names in a Parquet file's metadata; takes a second to import
    import pyarrow.parquet

    require(Path(folder).is_dir(), "nlu.path", f"no folder {folder}", "name the folder of Parquet files")
    utterances: list[Utterance] = []
    for locale in locales:
        own = Path(folder, locale)
        available = {file.name for file in Path(folder).iterdir() if file.is_dir()}
        members: list[tuple[str, Mapping[str, Any]]] = []
        # Files of all locales are read again for each locale: they are small, and one locale's rows are held at a time.
        for file in files.find_files(str(own if own.is_dir() else folder), (".parquet",), key="config.nlu.path"):
            try:
                names = pyarrow.parquet.read_schema(file).names
                table = pyarrow.parquet.read_table(file, columns=[field for field in FIELDS if field in names])
                columns, features = table.to_pydict(), datasets.Features.from_arrow_schema(table.schema)
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file}: cannot be read as Parquet ({error}); download it again") from None
            records = list(_table_records(columns, features, str(file)))
            members += [(where, record) for where, record in records if record["locale"] == locale]
            available |= {str(record["locale"]) for _, record in records}
        if members:
            utterances += _utterances(members, folder, locale, locale in characters, report)
        else:
            report(_unknown_locale(locale, folder, available))
    return utterances


def read_hub(name: str, locales: Sequence[str], characters: Collection[str], report: files.Report) -> list[Utterance]:
    """Utterances of a data set on the hub (or a local folder) that has one configuration for each locale."""
    require(bool(name), "nlu.name", "it is empty", "name the data set on the hub")
    utterances: list[Utterance] = []
    for locale in locales:
        members: list[tuple[str, Mapping[str, Any]]] = []
        for split, table in files.load_hub(name, locale).items():
            table = table.select_columns([field for field in table.column_names if field in FIELDS])
            records = _table_records(table.to_dict(), table.features, f"{name} ({locale}, {split})")
            members += [(where, record) for where, record in records if record["locale"] == locale]
        utterances += _utterances(members, name, locale, locale in characters, report)
    return utterances


def _table_records(
    columns: Mapping[str, list[Any]], features: Mapping[str, Any], name: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows as records; numbers become the names that `features` gives them, and partitions 0, 1, 2 their own."""
    named: list[list[Any]] = []
    for field in FIELDS:
        if field not in columns:
            raise UserError(f"{name}: column {field!r} is missing; it has: {', '.join(columns)}")
        names = getattr(features[field], "names", None) or (PARTITIONS if field == "partition" else ())
        named.append([names[value] if value in range(len(names)) else value for value in columns[field]])
    for row, values in enumerate(zip(*named, strict=True)):
        yield f"{name}: row {row}", dict(zip(FIELDS, values, strict=True))


def write_massive(utterances: Iterable[Utterance], folder: str | os.PathLike[str]) -> None:
    """Writes `<locale>.jsonl` files in MASSIVE's schema, each atomically."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    by_locale: dict[str, list[dict[str, Any]]] = {}
    for one in utterances:
        values = (one.id, one.locale, one.partition, one.domain, one.intent, one.text, one.annotated())
        by_locale.setdefault(one.locale, []).append(dict(zip(FIELDS, values, strict=True)))
    for locale, records in by_locale.items():
        write_json_lines(Path(folder, f"{locale}.jsonl"), records)


def subset_train(utterances: Sequence[Utterance], max_train: int) -> list[Utterance]:
    """All dev and test utterances, and `max_train` train utterances in each locale."""
    return subset(utterances, "train", max_train)


def subset(utterances: Sequence[Utterance], partition: str, most: int) -> list[Utterance]:
    """In each locale the `most` utterances of the partition whose ids hash lowest, and all of the other partitions.

    So a parallel data set keeps the same ids in every locale, and smaller subsets are nested in larger ones.
    """

    def rank(utterance: Utterance) -> tuple[bytes, str]:
        return hashlib.sha256(utterance.id.encode()).digest(), utterance.id

    found: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        if utterance.partition == partition:
            found.setdefault(utterance.locale, []).append(utterance)
    kept = {(locale, one.id) for locale, members in found.items() for one in sorted(members, key=rank)[:most]}
    return [one for one in utterances if one.partition != partition or (one.locale, one.id) in kept]


# Of unrelated utterances with the same id, fewer than 90 % agree in intent by chance, unless one intent makes up 95 %
# of the data. Translations whose labels were corrected in one locale differ in fewer than 10 %, and none in MASSIVE.
MOST_DIFFERING = 0.1


class SharedIds(NamedTuple):
    """The number of ids shared by locales, and of those among them whose intents differ between locales."""

    shared: int
    differing: int

    @property
    def parallel(self) -> bool:
        """Whether utterances of one id can be translations of each other."""
        return self.differing <= MOST_DIFFERING * self.shared


def shared_ids(labeled: Iterable[tuple[Hashable, str, str]]) -> SharedIds:
    """Counts the ids that locales share; labeled: (id, locale, intent) of each utterance."""
    intents: dict[Hashable, dict[str, set[str]]] = {}
    for name, locale, intent in labeled:
        intents.setdefault(name, {}).setdefault(locale, set()).add(intent)
    shared = [list(found.values()) for found in intents.values() if len(found) > 1]
    return SharedIds(len(shared), sum(any(one != found[0] for one in found) for found in shared))


def domains_of_intents(utterances: Iterable[Utterance]) -> dict[str, tuple[str, ...]]:
    """The domains that each intent has among the utterances."""
    found: dict[str, set[str]] = {}
    for one in utterances:
        found.setdefault(one.intent, set()).add(one.domain)
    return {intent: tuple(sorted(domains)) for intent, domains in sorted(found.items())}


@dataclasses.dataclass(frozen=True)
class LabelMaps:
    """Names of the classes in the order of their ids, from the train partition alone; tags[0] is "O".

    A name that train does not have gets -1, which losses leave out and scores count as an error.
    """

    domains: tuple[str, ...]
    intents: tuple[str, ...]
    tags: tuple[str, ...]

    @classmethod
    def from_train(cls, utterances: Iterable[Utterance]) -> "LabelMaps":
        """Sorted names of the train utterances among `utterances`; tags are B-slot, I-slot for each sorted slot."""
        train = [utterance for utterance in utterances if utterance.partition == "train"]
        slots = {tag[2:] for utterance in train for tag in utterance.tags if tag != "O"}
        return cls(
            domains=tuple(sorted({utterance.domain for utterance in train})),
            intents=tuple(sorted({utterance.intent for utterance in train})),
            tags=("O", *(f"{prefix}-{slot}" for slot in sorted(slots) for prefix in "BI")),
        )

    @classmethod
    def for_domain(cls, utterances: Sequence[Utterance], domain: str) -> "LabelMaps":
        """The maps of one domain's own train utterances; UserError when it has none."""
        maps = cls.from_train(utterance for utterance in utterances if utterance.domain == domain)
        if not maps.domains:
            known = ", ".join(cls.from_train(utterances).domains)
            raise UserError(f"domain {domain!r} has no train utterance; use one of: {known}")
        return maps

    @functools.cached_property
    def _ids(self) -> dict[str, dict[str, int]]:
        fields = dataclasses.asdict(self)
        return {field: {name: number for number, name in enumerate(names)} for field, names in fields.items()}

    def domain_id(self, name: str) -> int:
        """Id of a domain, or -1."""
        return self._ids["domains"].get(name, -1)

    def intent_id(self, name: str) -> int:
        """Id of an intent, or -1."""
        return self._ids["intents"].get(name, -1)

    def tag_id(self, name: str) -> int:
        """Id of an IOB2 tag, or -1."""
        return self._ids["tags"].get(name, -1)

    def to_json(self) -> dict[str, list[str]]:
        """The names as a value that `json.dump` takes."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Sequence[str]]) -> "LabelMaps":
        """The inverse of `to_json`."""
        return cls(*(tuple(values[field.name]) for field in dataclasses.fields(cls)))
