"""From text sources to a prepared folder: utterances, tokenizer and row stores, and reading it back.

A prepared folder holds

    utterances/<locale>.jsonl   the labeled utterances, in MASSIVE's form
    tokenizer/
    rows/train/<name>/          a store for each source and language, and for what config.select chose of generic text
    rows/heldout/<name>/        held-out generic text, and the dev partition
    manifest.json               written last: what was built, from which config
"""

import functools
import itertools
import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kd_jax.data.manifest import differences, read_manifest, write_manifest
from kd_jax.data.rows import MANIFEST, RowStore, StoreWriter, new_folder
from kd_jax.data.text.decontamination import FilterCount
from kd_jax.data.text.files import fill_path
from kd_jax.data.text.selection import check_selection, choose
from kd_jax.data.text.splits import Splits
from kd_jax.data.text.tokenizer import Tokenizer, train_tokenizer
from kd_jax.data.text.utterances import Utterance, load_utterances, read_massive, write_massive
from kd_jax.runtime.copies import LocalCopy, copy_folder, outgoing, put
from kd_jax.runtime.files import full_disk_is_user_error, read_json, write_atomically
from kd_jax.runtime.paths import as_path, digest, is_remote
from kd_jax.types import UserError

# The parts of the config that decide what is built; "select" only where it selects something.
PARTS = ("nlu", "sources", "tokenizer", "rows", "select")

# Name of the held-out stores made from the dev partition, one a locale.
DEV = "task"

_CHUNK_TEXTS = 2048


class Prepared:
    """A finished prepared folder. Attributes: manifest (dict), config (the part it was built from), fingerprint (of
    all content).

    A remote one is fetched to this host, once, from now on in the background. Raises UserError when `folder` is none.
    """

    def __init__(self, folder: str | os.PathLike):
        if not str(folder):
            raise UserError("config.prepared: is empty; set it to the folder that prepare wrote")
        self.folder = as_path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise UserError(f"config.prepared: {self.folder} is no finished prepared folder; run prepare into it first")
        self.manifest: dict[str, Any] = manifest
        self.config = ConfigDict(manifest["config"])
        self.fingerprint: str = manifest["fingerprint"]
        self._copy = remote_copy(self.folder, manifest) if is_remote(self.folder) else None

    def _part(self, name: str) -> pathlib.Path:
        """A subfolder on this host, whole."""
        return self.folder / name if self._copy is None else self._copy.part(name)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that its rows were made with."""
        tokenizer = Tokenizer.load(str(self._part("tokenizer")))
        if tokenizer.fingerprint != self.manifest["tokenizer_fingerprint"]:
            raise UserError(
                f"{self.folder / 'tokenizer'}: is not the tokenizer its rows were built with; run prepare again"
            )
        return tokenizer

    @functools.cached_property
    def utterances(self) -> list[Utterance]:
        """The labeled utterances of all partitions and locales."""
        return read_massive(self._part("utterances"), self.config.nlu.locales)

    def stores(self, split: str) -> list[RowStore]:
        """The row stores of a split, "train" or "heldout", in the order of the config."""
        return [self._store(f"rows/{split}/{one['name']}") for one in self.manifest["stores"] if one["split"] == split]

    def _store(self, name: str) -> RowStore:
        copy, tokenizer = self._copy, self.manifest["tokenizer_fingerprint"]
        if copy is None:
            return RowStore(self.folder / name, tokenizer)
        return RowStore(copy.folder / name, tokenizer, find=lambda file: copy.file(f"{name}/{file}"))


def remote_copy(folder: pathlib.Path, manifest: dict[str, Any]) -> LocalCopy:
    """This host's copy of a remote prepared folder. Raises UserError for one that was written without checksums."""
    if "files" not in manifest:
        raise UserError(
            f"{folder}: its manifest has no checksums, an older version wrote it; run prepare into another folder"
        )
    return LocalCopy(folder, manifest)


# Called with texts and what is done with them, it gives the texts back; it may count them, and may stop by raising.
Watch = Callable[[Iterable, str], Iterable]


def prepare(config: ConfigDict, folder: str | os.PathLike, watch: Watch = lambda texts, doing: texts) -> None:
    """Builds a prepared folder from config.nlu, sources, tokenizer, rows and select.

    What a killed call finished is kept; a finished folder is left as it is, and refused if its config differs. Memory
    is bounded but for the utterances. A remote folder is built on this host, where what was built is kept as its copy,
    and then put. Raises UserError for mistakes in the config or the data, and for a full disk.
    """
    folder = as_path(folder)
    parts = [part for part in PARTS if part != "select" or config.select.share != 0]
    values = {part: json.loads(json.dumps(config[part].to_dict())) for part in parts}
    finished = read_manifest(folder)
    if finished is not None:
        different = differences(finished["config"], values)
        if different:
            raise UserError(
                f"{folder}: was prepared with another config ({'; '.join(different)}); "
                "choose another folder or remove this one"
            )
        return
    check_settings(config)
    if not is_remote(folder):
        _build(config, values, folder, watch)
        return
    home = outgoing(folder)
    _build(config, values, home, watch)
    manifest = read_json(home / MANIFEST)
    put(home, folder, manifest["files"])
    write_atomically(folder / MANIFEST, (home / MANIFEST).read_bytes())
    copy = copy_folder(manifest)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if copy.exists():
        shutil.rmtree(home)
    else:
        os.rename(home, copy)


def _build(config: ConfigDict, values: dict[str, Any], folder: pathlib.Path, watch: Watch) -> None:
    """Writes a prepared folder on a local disk, the manifest last."""
    with full_disk_is_user_error(folder):
        utterances = load_utterances(config.nlu)
        with new_folder(folder / "utterances") as temporary:
            write_massive(utterances, temporary)
        builder = _Builder(config, values, folder, utterances, watch)
        manifests = builder.stores()
        builder.remove_strays(manifests)
        write_manifest(folder, values, utterances, builder.tokenizer, manifests)


def check_settings(config: ConfigDict) -> None:
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
    check_selection(config)
    pairs = [(name, source.kind, language) for name, source in config.sources.items() for language in source.languages]
    stores = Counter(f"{name}-{language}" for name, _, language in pairs)
    stores.update({_selected_name(name, language) for name, kind, language in pairs if kind == "generic"})
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


def _selected_name(source: str, language: str) -> str:
    return f"{source}.selected-{language}"


class _Builder:
    """What building the stores of one prepared folder shares."""

    def __init__(
        self, config: ConfigDict, values: dict, folder: pathlib.Path, utterances: list[Utterance], watch: Watch
    ):
        self.config, self.values, self.folder = config, values, folder
        self.utterances, self._watch = utterances, watch
        self.splits = Splits(config, utterances)
        self.tokenizer = self._tokenizer()

    def stores(self) -> list[dict[str, Any]]:
        """The manifests of all stores, built or found finished."""
        manifests = []
        for name, source in self.config.sources.items():
            for language in source.languages:
                manifests += self._source_stores(name, source, language)
                if source.kind == "generic" and self.config.select.share > 0:
                    manifests.append(self._selected_store(name, language))
        for locale in self.config.nlu.locales:
            manifests += self._dev_store(locale)
        return manifests

    def _tokenizer(self) -> Tokenizer:
        folder = self.folder / "tokenizer"
        settings = self.config.tokenizer
        # Training reads the texts that are not held out; loading reads none.
        texts_from = [self.values["nlu"], self.values["sources"], self.config.rows.heldout_share]
        built_from = digest([self.values["tokenizer"], texts_from if settings.kind == "train" else None])
        marker = folder / "built_from.txt"
        if marker.is_file() and marker.read_text() == built_from:
            return Tokenizer.load(str(folder))
        if settings.kind == "load":
            tokenizer = Tokenizer.load(fill_path(settings.path, key="config.tokenizer.path"))
        elif settings.kind == "train":
            stores = [(name, language) for name, one in self.config.sources.items() for language in one.languages]
            texts = (itertools.islice(self.splits.train(*store), settings.texts_per_store) for store in stores)
            texts = self._watch(itertools.chain.from_iterable(texts), "tokenizer")
            tokenizer = train_tokenizer(texts, settings.model, settings.vocab_size)
        else:
            raise UserError(f"config.tokenizer.kind: {settings.kind!r} is unknown; use 'train' or 'load'")
        with new_folder(folder) as temporary:
            tokenizer.save(temporary)
            (temporary / marker.name).write_text(built_from)
        # What was saved is what every later command reads.
        return Tokenizer.load(str(folder))

    def _source_stores(self, name: str, source: ConfigDict, language: str) -> list[dict[str, Any]]:
        """The train store of one language of a source and, for generic text, its held-out store, in one pass."""
        built_from = self._digest(self._reading(name), language)
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
            marked = self._watch(self.splits.marked(name, language, count), store_name)
            for chunk in _encode_ahead(marked, self.tokenizer):
                for writer, heldout in zip(writers, (False, True)):
                    writer.add([ids for ids, is_heldout in chunk if is_heldout == heldout])
            # Which side a removed text would have been on is not counted; all are told of at the train store.
            removed = {"decontaminated": count.removed}
            return [writer.finish(removed if split == "train" else {}) for writer, split in zip(writers, splits)]

    def _selected_store(self, name: str, language: str) -> dict[str, Any]:
        """The train store of the generic texts of one language that are like the task's train utterances."""
        select, store_name = self.config.select, _selected_name(name, language)
        target = self.splits.task(language if select.target == "language" else "")
        built_from = self._digest("selected", self._reading(name), language, self.values["select"], digest(target))
        found = self._finished("train", store_name, built_from)
        if found:
            return found

        def read(doing: str) -> Iterable[str]:
            return self._watch(self.splits.train(name, language), f"{store_name}: {doing}")

        chosen = choose(lambda: read("weighing"), target, select)
        with ExitStack() as stack:
            writer = stack.enter_context(
                self._writer(stack, "train", store_name, name, "selected", language, built_from)
            )
            marked = ((text, False) for text in chosen.of(read("packing")))
            for chunk in _encode_ahead(marked, self.tokenizer):
                writer.add([ids for ids, _ in chunk])
            return writer.finish({"not selected": chosen.texts - len(chosen.places)})

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

    def _reading(self, name: str) -> dict[str, Any]:
        """The keys of a source that decide which texts it gives."""
        return {key: value for key, value in self.values["sources"][name].items() if key not in ("weight", "languages")}

    def _digest(self, *parts: Any) -> str:
        return digest([parts, self.values["nlu"], self.values["rows"], self.tokenizer.fingerprint])

    def _store_folder(self, split: str, name: str) -> pathlib.Path:
        return self.folder / "rows" / split / name

    def _finished(self, split: str, name: str, built_from: str) -> dict[str, Any] | None:
        manifest = read_manifest(self._store_folder(split, name))
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
