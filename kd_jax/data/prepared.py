"""From text sources to a prepared folder: utterances, tokenizer and row stores, and reading it back.

utterances/<locale>.jsonl the labeled utterances, in MASSIVE's form tokenizer/ rows/<split>/<name>/ a store for each
source and language; "heldout" for generic text and for the dev partition manifest.json written last: what was built,
from which config
"""

import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_jax.data.decontamination import FilterCount, HeldOut, normalize
from kd_jax.data.files import fill_path
from kd_jax.data.rows import MANIFEST, RowStore, StoreWriter, disk_of, new_folder
from kd_jax.data.sources import read_texts
from kd_jax.data.tokenizer import Tokenizer, train_tokenizer
from kd_jax.data.utterances import Utterance, load_utterances, read_massive, write_massive
from kd_jax.types import UserError

# The parts of the config that decide what is built.
PARTS = ("nlu", "sources", "tokenizer", "rows")

# Name of the held-out stores made from the dev partition, one a locale.
DEV = "task"

_CHUNK_TEXTS = 2048

# Letters that decide whether a generic text is held out, and the characters at its head that nearly always hold them.
_LETTERS = 24
_HEAD = 40


class Prepared:
    """A finished prepared folder. Attributes: manifest (dict), config (the part it was built from), fingerprint (of
    all content).

    Raises UserError when `folder` is none.
    """

    def __init__(self, folder: str | os.PathLike):
        if not str(folder):
            raise UserError("config.prepared: is empty; set it to the folder that prepare wrote")
        self.folder = pathlib.Path(folder)
        manifest = _read_manifest(self.folder)
        if manifest is None:
            raise UserError(f"config.prepared: {self.folder} is no finished prepared folder; run prepare into it first")
        self.manifest: dict[str, Any] = manifest
        self.config = ConfigDict(manifest["config"])
        self.fingerprint: str = manifest["fingerprint"]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that its rows were made with."""
        tokenizer = Tokenizer.load(str(self.folder / "tokenizer"))
        if tokenizer.fingerprint != self.manifest["tokenizer_fingerprint"]:
            raise UserError(
                f"{self.folder / 'tokenizer'}: is not the tokenizer its rows were built with; run prepare again"
            )
        return tokenizer

    @functools.cached_property
    def utterances(self) -> list[Utterance]:
        """The labeled utterances of all partitions and locales."""
        return read_massive(self.folder / "utterances", self.config.nlu.locales)

    def stores(self, split: str) -> list[RowStore]:
        """The row stores of a split, "train" or "heldout", in the order of the config."""
        return [
            RowStore(self.folder / "rows" / split / store["name"], self.manifest["tokenizer_fingerprint"])
            for store in self.manifest["stores"]
            if store["split"] == split
        ]


def prepare(config: ConfigDict, folder: str | os.PathLike, progress: bool = False) -> None:
    """Builds a prepared folder from config.nlu, sources, tokenizer and rows.

    What a killed call finished is kept; a finished folder is left as it is, and refused if its config differs. Memory
    is bounded but for the utterances. Raises UserError for mistakes in the config or the data, and for a full disk.
    """
    folder = pathlib.Path(folder)
    values = {part: json.loads(json.dumps(config[part].to_dict())) for part in PARTS}
    finished = _read_manifest(folder)
    if finished is not None:
        different = _differences(finished["config"], values)
        if different:
            raise UserError(
                f"{folder}: was prepared with another config ({'; '.join(different)}); "
                "choose another folder or remove this one"
            )
        return
    _check(config)
    with disk_of(folder):
        utterances = load_utterances(config.nlu)
        with new_folder(folder / "utterances") as temporary:
            write_massive(utterances, temporary)
        builder = _Builder(config, values, folder, utterances, progress)
        manifests = builder.stores()
        builder.remove_strays(manifests)
        _write_manifest(folder, values, utterances, builder.tokenizer, manifests)


def _check(config: ConfigDict) -> None:
    """Refuses settings that cannot work before anything is read."""
    if not config.sources:
        raise UserError("config.sources: is empty; name at least one source of text")
    for name, source in config.sources.items():
        if source.kind not in ("generic", "task"):
            raise UserError(f"config.sources.{name}.kind: {source.kind!r} is unknown; use 'generic' or 'task'")
        if not source.languages:
            raise UserError(f"config.sources.{name}.languages: is empty; name at least one language")
        if source.kind == "generic" and name == DEV:
            raise UserError(
                f"config.sources.{name}: the name is taken by the dev partition's rows; give the source another"
            )
    stores = Counter(f"{name}-{language}" for name, source in config.sources.items() for language in source.languages)
    twice = [store for store, count in stores.items() if count > 1]
    if twice:
        raise UserError(f"config.sources: {', '.join(twice)} would be built twice; name each source and language once")
    rows = config.rows
    if not 0 < rows.heldout_share <= 0.5:
        raise UserError(f"config.rows.heldout_share: {rows.heldout_share} is outside (0, 0.5]; 0.02 is usual")
    if rows.length < 8:
        raise UserError(f"config.rows.length: {rows.length} tokens are too few for a text; use at least 8")
    if rows.open_rows < 1:
        raise UserError(f"config.rows.open_rows: {rows.open_rows} is below 1; 64 is usual")


class _Builder:
    """What building the stores of one prepared folder shares."""

    def __init__(
        self, config: ConfigDict, values: dict, folder: pathlib.Path, utterances: list[Utterance], progress: bool
    ):
        self.config, self.values, self.folder = config, values, folder
        self.utterances, self.progress = utterances, progress
        self.held_out = HeldOut(utterances)
        self.tokenizer = self._tokenizer()

    def stores(self) -> list[dict[str, Any]]:
        """The manifests of all stores, built or found finished."""
        manifests = []
        for name, source in self.config.sources.items():
            for language in source.languages:
                manifests += self._source_stores(name, source, language)
        for locale in self.config.nlu.locales:
            manifests += self._dev_store(locale)
        return manifests

    def _texts(self, name: str, language: str, count: FilterCount) -> Iterator[tuple[str, bool]]:
        """(text, whether it is held out) of one language of a source, without dev and test utterances.

        Generic texts are held out by their content, so equal texts are on the same side.
        """
        source = self.config.sources[name]
        texts = read_texts(source, language, self.utterances, key=f"config.sources.{name}")
        limit = self.config.rows.heldout_share * 2**64 if source.kind == "generic" else 0
        for text in self.held_out.filter(texts, count):
            yield text, limit > 0 and _content_hash(text) < limit

    def _tokenizer(self) -> Tokenizer:
        folder = self.folder / "tokenizer"
        settings = self.config.tokenizer
        # Training reads the texts that are not held out; loading reads none.
        texts_from = [self.values["nlu"], self.values["sources"], self.config.rows.heldout_share]
        built_from = _digest([self.values["tokenizer"], texts_from if settings.kind == "train" else None])
        marker = folder / "built_from.txt"
        if marker.is_file() and marker.read_text() == built_from:
            return Tokenizer.load(str(folder))
        if settings.kind == "load":
            tokenizer = Tokenizer.load(fill_path(settings.path, key="config.tokenizer.path"))
        elif settings.kind == "train":
            texts = self._bar(self._tokenizer_texts(), "tokenizer")
            tokenizer = train_tokenizer(texts, settings.model, settings.vocab_size)
        else:
            raise UserError(f"config.tokenizer.kind: {settings.kind!r} is unknown; use 'train' or 'load'")
        with new_folder(folder) as temporary:
            tokenizer.save(temporary)
            (temporary / marker.name).write_text(built_from)
        # What was saved is what every later command reads.
        return Tokenizer.load(str(folder))

    def _tokenizer_texts(self) -> Iterator[str]:
        for name, source in self.config.sources.items():
            for language in source.languages:
                train = (text for text, heldout in self._texts(name, language, FilterCount()) if not heldout)
                yield from itertools.islice(train, self.config.tokenizer.texts_per_store)

    def _source_stores(self, name: str, source: ConfigDict, language: str) -> list[dict[str, Any]]:
        """The train store of one language of a source and, for generic text, its held-out store, in one pass."""
        kept = {key: value for key, value in self.values["sources"][name].items() if key not in ("weight", "languages")}
        built_from = self._digest(kept, language)
        splits = ("train", "heldout") if source.kind == "generic" else ("train",)
        store_name = f"{name}-{language}"
        found = [self._finished(split, store_name, built_from) for split in splits]
        if all(found):
            return [manifest for manifest in found if manifest]
        count = FilterCount()
        with ExitStack() as stack:
            writers = [
                stack.enter_context(self._writer(stack, split, store_name, name, source.kind, language, built_from))
                for split in splits
            ]
            marked = self._bar(self._texts(name, language, count), store_name)
            for chunk in _encode_ahead(marked, self.tokenizer):
                for writer, heldout in zip(writers, (False, True)):
                    writer.add([ids for ids, is_heldout in chunk if is_heldout == heldout])
            # Which side a removed text would have been on is not counted; all are told of at the train store.
            removed = {"decontaminated": count.removed}
            return [writer.finish(removed if split == "train" else {}) for writer, split in zip(writers, splits)]

    def _dev_store(self, locale: str) -> list[dict[str, Any]]:
        """The held-out task store of one locale, or nothing where the dev partition is empty."""
        texts = [one.text for one in self.utterances if one.locale == locale and one.partition == "dev"]
        if not texts:
            return []
        name = f"{DEV}-{locale}"
        built_from = self._digest("dev", locale)
        found = self._finished("heldout", name, built_from)
        if found:
            return [found]
        with ExitStack() as stack:
            writer = stack.enter_context(self._writer(stack, "heldout", name, DEV, "task", locale, built_from))
            writer.add(self.tokenizer.encode(texts))
            return [writer.finish({})]

    def _digest(self, *parts: Any) -> str:
        return _digest([parts, self.values["nlu"], self.values["rows"], self.tokenizer.fingerprint])

    def _store_folder(self, split: str, name: str) -> pathlib.Path:
        return self.folder / "rows" / split / name

    def _finished(self, split: str, name: str, built_from: str) -> dict[str, Any] | None:
        manifest = _read_manifest(self._store_folder(split, name))
        return manifest if manifest is not None and manifest["built_from"] == built_from else None

    def _writer(self, stack, split, name, source, kind, language, built_from) -> StoreWriter:
        temporary = stack.enter_context(new_folder(self._store_folder(split, name)))
        return StoreWriter(
            temporary,
            name=name,
            source=source,
            kind=kind,
            language=language,
            split=split,
            length=self.config.rows.length,
            open_rows=self.config.rows.open_rows,
            tokenizer=self.tokenizer,
            built_from=built_from,
        )

    def _bar(self, texts: Iterable, name: str) -> Iterable:
        return tqdm(texts, desc=name, unit=" texts", disable=None if self.progress else True, leave=False)

    def remove_strays(self, manifests: Sequence[dict[str, Any]]) -> None:
        """Removes stores that an unfinished call with another config left."""
        wanted = {self._store_folder(manifest["split"], manifest["name"]) for manifest in manifests}
        for store in (self.folder / "rows").glob("*/*"):
            if store not in wanted:
                shutil.rmtree(store)


def _encode_ahead(marked: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[list[tuple[np.ndarray, bool]]]:
    """Chunks of (pieces, mark) of marked texts; a thread tokenizes the next chunk while this one is packed."""

    def encode(chunk: list[tuple[str, bool]]) -> list[tuple[np.ndarray, bool]]:
        return list(zip(tokenizer.encode([text for text, _ in chunk]), (mark for _, mark in chunk)))

    marked = iter(marked)
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = None
        while chunk := list(itertools.islice(marked, _CHUNK_TEXTS)):
            following = pool.submit(encode, chunk)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _content_hash(text: str) -> int:
    """A 64-bit hash of the first letters of the normalized text, which texts equal but for case and marks share.

    The letters are taken from the text's head where what follows cannot change them: normalizing all of it would take a
    sixth of the time of tokenizing it.
    """
    letters = normalize(text[:_HEAD]).replace(" ", "")
    if len(text) > _HEAD and all(unicodedata.combining(character) for character in letters[_LETTERS:]):
        letters = normalize(text).replace(" ", "")
    return int.from_bytes(hashlib.blake2b(letters[:_LETTERS].encode(), digest_size=8).digest(), "little")


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _differences(old: Any, new: Any, key: str = "config") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        absent = "(absent)"
        return [
            line
            for name in sorted(old.keys() | new.keys())
            for line in _differences(old.get(name, absent), new.get(name, absent), f"{key}.{name}")
        ]
    return [] if old == new else [f"{key}: {old!r} -> {new!r}"]


def _read_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{folder / MANIFEST}: broken JSON ({error}); remove the folder and run prepare again"
        ) from None


def _write_manifest(
    folder: pathlib.Path,
    values: dict,
    utterances: list[Utterance],
    tokenizer: Tokenizer,
    manifests: list[dict[str, Any]],
) -> None:
    partitions = Counter(f"{one.locale} {one.partition}" for one in utterances)
    content = hashlib.sha256()
    for locale in values["nlu"]["locales"]:
        content.update((folder / "utterances" / f"{locale}.jsonl").read_bytes())
    content.update(tokenizer.fingerprint.encode())
    removed: Counter = Counter()
    for manifest in manifests:
        content.update(f"{manifest['split']} {manifest['name']} {manifest['fingerprint']}".encode())
        removed.update(manifest["removed"])
    whole = {
        "config": values,
        "fingerprint": content.hexdigest(),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "utterances": dict(sorted(partitions.items())),
        "removed": dict(removed),
        "stores": manifests,
    }
    partial = folder / f"{MANIFEST}.partial"
    try:
        partial.write_text(json.dumps(whole, indent=1), encoding="utf-8")
        os.replace(partial, folder / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)
