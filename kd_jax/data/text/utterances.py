"""Labeled utterances in the schema of MASSIVE (FitzGerald et al. 2022), their IOB2 tags, and their label maps."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kd_jax.data.text import files
from kd_jax.types import UserError

# Locales that MASSIVE tags character by character, since their words are not set apart by spaces.
CHARACTER_LOCALES = frozenset({"ja-JP", "zh-CN", "zh-TW"})
PARTITIONS = ("train", "dev", "test")
FIELDS = ("id", "locale", "partition", "scenario", "intent", "utt", "annot_utt")

MARK = re.compile(r"\[([^\[\]]*)\]")


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A slot on the words [start, end) of an utterance."""

    slot: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class Utterance:
    """One labeled utterance; `tags` are IOB2, one for each of `words` (characters in CHARACTER_LOCALES)."""

    id: str
    locale: str
    partition: str
    domain: str
    intent: str
    text: str
    words: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def spans(self) -> tuple[Span, ...]:
        """The slots, from left to right."""
        starts = [index for index, tag in enumerate(self.tags) if tag.startswith("B-")]
        return tuple(Span(self.tags[start][2:], start, _span_end(self.tags, start)) for start in starts)

    def annotated(self) -> str:
        """The text with its slots marked, e.g. `weck mich [date : diese woche] auf`."""
        word = r"\S" if self.locale in CHARACTER_LOCALES else r"\S+"
        places = [match.span() for match in re.finditer(word, self.text)]
        pieces, done = [], 0
        for span in self.spans:
            start, end = places[span.start][0], places[span.end - 1][1]
            pieces.append(f"{self.text[done:start]}[{span.slot} : {self.text[start:end]}]")
            done = end
        return "".join(pieces) + self.text[done:]


def _span_end(tags: Sequence[str], start: int) -> int:
    end = start + 1
    while end < len(tags) and tags[end] == f"I-{tags[start][2:]}":
        end += 1
    return end


def split_words(text: str, locale: str) -> list[str]:
    """What tags stand on: words between whitespace, or the characters that are not whitespace in CHARACTER_LOCALES."""
    words = text.split()
    return list("".join(words)) if locale in CHARACTER_LOCALES else words


def parse_annotated(annot_utt: str, utt: str, locale: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words and IOB2 tags of `... [slot : text] ...`; raises ValueError with the reason when the marks are wrong."""
    words: list[str] = []
    tags: list[str] = []
    plain = []
    done = 0
    for mark in MARK.finditer(annot_utt):
        before = annot_utt[done : mark.start()]
        slot, colon, inside = mark[1].partition(":")
        slot, inside = slot.strip(), inside.strip()
        if not colon:
            raise ValueError(f"the slot mark {mark[0]!r} has no colon")
        if not slot:
            raise ValueError(f"the slot mark {mark[0]!r} has an empty slot name")
        if " " in slot:
            raise ValueError(f"the slot name {slot!r} holds a space")
        marked = split_words(inside, locale)
        if not marked:
            raise ValueError(f"the slot mark {mark[0]!r} has no text")
        outside = split_words(before, locale)
        words += outside + marked
        tags += ["O"] * len(outside) + [sys.intern(f"B-{slot}")] + [sys.intern(f"I-{slot}")] * (len(marked) - 1)
        plain += [before, inside]
        done = mark.end()
    rest = annot_utt[done:]
    outside = split_words(rest, locale)
    words += outside
    tags += ["O"] * len(outside)
    plain.append(rest)
    _check_brackets(plain, annot_utt)
    expected = split_words(utt, locale)
    stripped = split_words("".join(plain), locale)
    if stripped != expected:
        raise ValueError(f"without its marks annot_utt reads {' '.join(''.join(plain).split())!r} and not utt {utt!r}")
    if words != expected:
        raise ValueError("a slot mark begins or ends inside a word")
    if not words:
        raise ValueError("the utterance is empty")
    return tuple(words), tuple(tags)


def _check_brackets(plain: Sequence[str], annot_utt: str) -> None:
    """What is left once the innermost marks are gone must hold no bracket; says whether the marks were nested."""
    if not any("[" in piece or "]" in piece for piece in plain):
        return
    depth = 0
    for character in annot_utt:
        depth += (character == "[") - (character == "]")
        if depth > 1:
            raise ValueError("slot marks are nested or one is not closed")
    raise ValueError("slot marks are unbalanced")


def check_record(record: Mapping[str, Any], locale: str, place: str, seen: set[str]) -> Utterance:
    """Checks one record of `locale`; `seen` holds the ids before it. Raises UserError that begins with `place`."""
    for field in FIELDS:
        value = record.get(field)
        if not isinstance(value, str) or not value.strip():
            if field not in record:
                problem = f"field {field!r} is missing"
            else:
                problem = f"field {field!r} is {value!r} and not a string with text in it"
            raise UserError(f"{place}: {problem}; write the fields {', '.join(FIELDS)} as strings")
    if record["locale"] != locale:
        raise UserError(
            f"{place}: locale is {record['locale']!r} in a file of {locale}; move the line or mend the field"
        )
    if record["partition"] not in PARTITIONS:
        raise UserError(f"{place}: unknown partition {record['partition']!r}; write train, dev or test")
    if record["id"] in seen:
        raise UserError(
            f"{place}: id {record['id']!r} stands a second time in {locale}; give each utterance its own id"
        )
    seen.add(record["id"])
    try:
        words, tags = parse_annotated(record["annot_utt"], record["utt"], locale)
    except ValueError as error:
        raise UserError(f"{place}: {error}; mend annot_utt or utt") from None
    return Utterance(
        id=record["id"],
        locale=locale,
        partition=record["partition"],
        domain=sys.intern(record["scenario"]),
        intent=sys.intern(record["intent"]),
        text=record["utt"],
        words=words,
        tags=tags,
    )


def _parse_lines(lines: Iterable[tuple[int, str]], name: str, locale: str, report: files.Report) -> list[Utterance]:
    utterances = []
    seen: set[str] = set()
    for number, line in lines:
        if line.strip():
            place = f"{name}:{number}"
            try:
                utterances.append(check_record(files.json_object(line, place), locale, place, seen))
            except UserError as error:
                report(error)
    check_train(utterances, name, locale, report)
    return utterances


def check_train(
    utterances: Sequence[Utterance], name: str, locale: str, report: files.Report = files.raise_error
) -> None:
    """A UserError when a locale has no utterance, or none to train on."""
    if not utterances:
        report(UserError(f"{name}: holds no utterance of {locale}; check that the file is whole"))
    elif not any(utterance.partition == "train" for utterance in utterances):
        report(
            UserError(f"{name}: the train partition of {locale} is empty; mark some utterances with partition train")
        )


def unknown_locale(locale: str, place: object, available: Iterable[str]) -> UserError:
    """What to tell the user about a locale that `place` does not have."""
    listed = ", ".join(sorted(available)) or "none"
    return UserError(f"config.nlu.locales: {place} has no locale {locale!r}; it has: {listed}")


def read_massive(
    folder: str | os.PathLike, locales: Sequence[str], report: files.Report = files.raise_error
) -> list[Utterance]:
    """Utterances of a folder of `<locale>.jsonl`, or of MASSIVE's own .tar.gz, in the order of `locales` and lines.

    UserErrors with file and line for a broken line, and for a locale that is not there, go to `report`.
    """
    folder = Path(folder)
    if folder.is_file():
        return _read_tarball(folder, locales, report)
    if not folder.is_dir():
        raise UserError(
            f"config.nlu.path: no folder or tarball {folder}; name MASSIVE's folder of <locale>.jsonl files"
        )
    utterances = []
    for locale in locales:
        file = folder / f"{locale}.jsonl"
        if not file.is_file():
            report(unknown_locale(locale, folder, (other.stem for other in folder.glob("*.jsonl"))))
            continue
        utterances += _parse_lines(files.numbered_lines(file, report), str(file), locale, report)
    return utterances


def _read_tarball(tarball: Path, locales: Sequence[str], report: files.Report) -> list[Utterance]:
    """Reads `<any>/data/<locale>.jsonl` from the archive in one pass, without unpacking it."""
    found: dict[str, list[Utterance]] = {}
    available = set()
    try:
        with tarfile.open(tarball, "r:*") as archive:
            for member in archive:
                match = re.search(r"(?:^|/)data/([^/.][^/]*)\.jsonl$", member.name)
                if match is None or not member.isfile():
                    continue
                locale = match[1]
                available.add(locale)
                if locale in locales:
                    if locale in found:
                        raise UserError(f"{tarball}: holds {locale}.jsonl twice; keep one release in the archive")
                    name = f"{tarball}/{member.name}"
                    lines = archive.extractfile(member)
                    assert lines is not None  # only of members that are not files
                    found[locale] = _parse_lines(files.decode_lines(lines, name, report), name, locale, report)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{tarball}: is not a whole tar archive ({error}); download it again") from None
    for locale in locales:
        if locale not in found:
            report(unknown_locale(locale, tarball, available))
    return [utterance for locale in locales if locale in found for utterance in found[locale]]


def write_massive(utterances: Iterable[Utterance], folder: str | os.PathLike) -> None:
    """Writes `<locale>.jsonl` files in MASSIVE's schema; each appears under its name only when it is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    by_locale: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        by_locale.setdefault(utterance.locale, []).append(utterance)
    for locale, members in by_locale.items():
        partial = folder / f".{locale}.jsonl.partial"
        try:
            with open(partial, "w", encoding="utf-8", newline="\n") as lines:
                for one in members:
                    values = (one.id, locale, one.partition, one.domain, one.intent, one.text, one.annotated())
                    lines.write(json.dumps(dict(zip(FIELDS, values, strict=True)), ensure_ascii=False) + "\n")
            os.replace(partial, folder / f"{locale}.jsonl")
        finally:
            partial.unlink(missing_ok=True)


def load_utterances(nlu: ConfigDict, report: files.Report = files.raise_error) -> list[Utterance]:
    """The labeled utterances that `config.nlu` names, `nlu.max_train` train utterances a locale at the most.

    Raises UserError when the config or a file as a whole is wrong; what is wrong with a record goes to `report`.
    """
    locales = tuple(nlu.locales)
    if not locales or len(set(locales)) < len(locales):
        raise UserError(f"config.nlu.locales: {locales} is empty or names a locale twice; name each locale once")
    if nlu.max_train < 0:
        raise UserError(f"config.nlu.max_train: {nlu.max_train} is negative; 0 keeps all")
    path = files.fill_path(nlu.path, key="config.nlu.path")
    match nlu.format:
        case "embedded":
            from kd_jax.data.embedded.utterances import embedded_utterances  # it builds on this module

            utterances = embedded_utterances(locales)
        case "massive":
            utterances = read_massive(path, locales, report)
        case "massive_parquet" | "huggingface":
            from kd_jax.data import utterance_tables  # it builds on this module

            if nlu.format == "huggingface":
                utterances = utterance_tables.read_hub(nlu.name, locales, report)
            else:
                utterances = utterance_tables.read_parquet(path, locales, report)
        case other:
            raise UserError(
                f"config.nlu.format: unknown format {other!r}; write embedded, massive, massive_parquet or huggingface"
            )
    return subset_train(utterances, nlu.max_train) if nlu.max_train else utterances


def subset_train(utterances: Iterable[Utterance], max_train: int) -> list[Utterance]:
    """All dev and test utterances, and in each locale the `max_train` train utterances whose ids hash lowest.

    So a parallel data set keeps the same ids in every locale, and a smaller subset lies inside a larger one.
    """

    def rank(utterance: Utterance) -> tuple[bytes, str]:
        return hashlib.sha256(utterance.id.encode()).digest(), utterance.id

    utterances = list(utterances)
    train: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        if utterance.partition == "train":
            train.setdefault(utterance.locale, []).append(utterance)
    kept = {
        (locale, utterance.id)
        for locale, members in train.items()
        for utterance in sorted(members, key=rank)[:max_train]
    }
    return [one for one in utterances if one.partition != "train" or (one.locale, one.id) in kept]


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
    def for_domain(cls, utterances: Iterable[Utterance], domain: str) -> "LabelMaps":
        """The maps of one domain's own train utterances; UserError when it has none."""
        utterances = list(utterances)
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
        return {field: list(names) for field, names in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Sequence[str]]) -> "LabelMaps":
        """The inverse of `to_json`."""
        return cls(**{field.name: tuple(values[field.name]) for field in dataclasses.fields(cls)})
