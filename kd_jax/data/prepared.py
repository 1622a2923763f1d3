"""From text sources to a prepared folder: utterances, tokenizer and row stores, and reading it back.

A prepared folder holds

    utterances/<locale>.jsonl   the labeled utterances, in MASSIVE's form
    tokenizer/
    rows/train/<name>/          a store for each source and language, and for what config.select chose of generic text
    rows/heldout/<name>/        held-out generic text, and the dev partition
    manifest.json               written last: what was built, and from which config
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np

from kd_jax.config import differences, require
from kd_jax.config.data import CHARACTER_LOCALES, Prepare, Source, read_prepare
from kd_jax.data.rows import MANIFEST, STORE_FILES, RowStore, StoreWriter, new_folder, read_manifest
from kd_jax.data.text.files import fill_path, states_of
from kd_jax.data.text.selection import choose
from kd_jax.data.text.sources import load_utterances
from kd_jax.data.text.splits import Splits
from kd_jax.data.text.tokenizer import Tokenizer, train_tokenizer
from kd_jax.data.text.utterances import Utterance, read_massive, write_massive
from kd_jax.runtime.copies import Files, LocalCopy, copy_folder, describe, outgoing, put, verify
from kd_jax.runtime.files import full_disk_is_user_error, read_json, write_atomically, write_sealed
from kd_jax.runtime.paths import as_path, digest, is_remote, make_folder
from kd_jax.types import UserError

# The parts of the config that decide what is built; "select" only where it selects something.
PARTS = ("nlu", "sources", "tokenizer", "rows", "select")

# Name of the held-out stores made from the dev partition, one per locale.
DEV = "task"

_INPUTS = "inputs.txt"  # in an unfinished folder: a digest of the files that it is built from
_CHUNK_TEXTS = 2048
_REMEDY = "remove the folder and run prepare again"


class Prepared:
    """A finished prepared folder. Attributes: manifest (dict), fingerprint (of all content).

    A remote one is fetched to this host, once, in the background from now on. Raises UserError when `folder` is none.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        require(bool(str(folder)), "prepared", "it is empty", "set it to the folder that prepare wrote")
        self.folder = as_path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise UserError(
                f"config.prepared: {self.folder} is not a finished prepared folder; run prepare into it first"
            )
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self._files: Files = manifest.get("files", {})  # missing in old folders
        self._copy: LocalCopy | None = None
        if is_remote(self.folder):
            if "files" not in manifest:
                raise UserError(
                    f"{self.folder}: its manifest has no checksums, an older version wrote it; run prepare into "
                    "another folder"
                )
            self._copy = LocalCopy(self.folder, manifest)

    @cached_property
    def settings(self) -> Prepare:
        """What it was built from."""
        return read_prepare(self.manifest["config"])

    def _part(self, name: str) -> pathlib.Path:
        """A subfolder on this host, with all its files checked against the manifest."""
        if self._copy is not None:
            return self._copy.part(name)
        self._verify([file for file in self._files if file.startswith(f"{name}/")])
        return self.folder / name

    def _verify(self, names: Sequence[str]) -> None:
        verify(self.folder, {name: self._files[name] for name in names if name in self._files}, _REMEDY)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that its rows were made with."""
        tokenizer = _tokenizer(self._part("tokenizer"), self.fingerprint)
        if tokenizer.fingerprint != self.manifest["tokenizer_fingerprint"]:
            raise UserError(
                f"{self.folder / 'tokenizer'}: is not the tokenizer its rows were built with; run prepare again"
            )
        return tokenizer

    @cached_property
    def utterances(self) -> list[Utterance]:
        """The labeled utterances of all partitions and locales."""
        nlu = self.settings.nlu
        return _utterances(self._part("utterances"), nlu.locales, nlu.character_locales, self.fingerprint)

    def stores(self, split: str) -> list[RowStore]:
        """The row stores of a split, "train" or "heldout", in the order of the config."""
        names = [f"rows/{split}/{one['name']}" for one in self.manifest["stores"] if one["split"] == split]
        copy, tokenizer = self._copy, self.manifest["tokenizer_fingerprint"]
        if copy is None:
            self._verify([f"{name}/{file}" for name in names for file in STORE_FILES])
            return [RowStore(self.folder / name, tokenizer) for name in names]
        file_of = copy.file  # a type checker forgets in a lambda that `copy` is not None
        return [
            RowStore(copy.folder / name, tokenizer, lambda file, name=name: file_of(f"{name}/{file}"), later=True)
            for name in names
        ]


# A study's stages run in one process and read the same folder, and reading 250,000 tokens takes seconds.
@lru_cache(maxsize=2)
def _tokenizer(folder: pathlib.Path, fingerprint: str) -> Tokenizer:
    del fingerprint  # part of the cache's key: changed content at this path is read again
    return Tokenizer.load(folder)


@lru_cache(maxsize=2)
def _utterances(
    folder: pathlib.Path, locales: tuple[str, ...], characters: tuple[str, ...], fingerprint: str
) -> list[Utterance]:
    del fingerprint
    return read_massive(folder, locales, characters)


# Called with texts and what is done with them; gives the same texts. It may count them, and may stop by raising.
Watch = Callable[[Iterable[Any], str], Iterable[Any]]


def prepare(
    settings: Prepare,
    raw: Mapping[str, Any],
    workdir: str | os.PathLike[str],
    watch: Watch = lambda texts, doing: texts,
) -> None:
    """Builds a prepared folder; `raw` is the config as plain values, whose PARTS the manifest keeps.

    What a killed call finished is kept; a finished folder is left as it is, and refused if its config differs. Memory
    is bounded but for the utterances. A remote folder is built on this host, where it stays as the host's copy, and
    then uploaded. Raises UserError for mistakes in the config or the data, and for a full disk.
    """
    folder = as_path(workdir)
    parts = [part for part in PARTS if part != "select" or settings.select.share != 0]
    values: dict[str, Any] = json.loads(json.dumps({part: raw[part] for part in parts}))  # tuples become lists
    if settings.nlu.character_locales == CHARACTER_LOCALES:
        del values["nlu"]["character_locales"]  # so that folders of 0.2.0, which lack the key, keep their fingerprint
    if (finished := read_manifest(folder)) is not None:
        if different := differences(finished["config"], values, "config"):
            raise UserError(
                f"{folder}: was prepared with another config ({'; '.join(different)}); "
                "choose another folder or remove this one"
            )
        if not is_remote(folder) and (note := folder / _INPUTS).is_file():  # killed right after the manifest
            note.unlink()
        return
    check_settings(settings)
    if not is_remote(folder):
        _build(settings, values, folder, watch)
        return
    home = outgoing(folder)
    _build(settings, values, home, watch)
    manifest = read_json(home / MANIFEST)
    put(home, folder, manifest["files"])
    write_atomically(folder / MANIFEST, (home / MANIFEST).read_bytes())
    copy = copy_folder(manifest)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if copy.exists():
        shutil.rmtree(home)
    else:
        os.rename(home, copy)


def check_settings(settings: Prepare) -> None:
    """Refuses blocks of the config that do not go together, before anything is read. Raises UserError."""
    sources, select, tokenizer = settings.sources, settings.select, settings.tokenizer
    generic = {name: source for name, source in sources.items() if source.kind == "generic"}
    require(len(sources) > 0, "sources", "it is empty", "name at least one source of text")
    require(DEV not in generic, f"sources.{DEV}", "the name is taken by the dev partition's rows", "choose another")
    stores = Counter(f"{name}-{language}" for name, source in sources.items() for language in source.languages)
    stores.update({_selected_name(name, language) for name, source in generic.items() for language in source.languages})
    twice = ", ".join(store for store, count in stores.items() if count > 1)
    require(not twice, "sources", f"{twice} would be built twice", "name each source and language once")
    # Not checked by TokenizerSettings itself: folders that an older version prepared with "unigram" stay readable.
    known = tokenizer.kind == "load" or tokenizer.model == "bpe"
    remedy = "use 'bpe', or load a unigram (SentencePiece) tokenizer with config.tokenizer.kind=load"
    require(known, "tokenizer.model", f"{tokenizer.model!r} cannot be trained", remedy)
    if select.share == 0:
        return
    require(len(generic) > 0, "select.share", "there is no generic source to select from", "add one or set it to 0")
    spoken = {locale.split("-")[0] for locale in settings.nlu.locales}
    for name, source in generic.items():
        unspoken = ", ".join(language for language in source.languages if language.split("-")[0] not in spoken)
        problem = f"{name} has text in {unspoken}, which no locale of config.nlu speaks"
        compared = select.target != "language" or not unspoken
        require(compared, "select.target", problem, "use 'all' or leave the language out")


def _selected_name(source: str, language: str) -> str:
    return f"{source}.selected-{language}"


def _build(settings: Prepare, values: dict[str, Any], folder: pathlib.Path, watch: Watch) -> None:
    """Writes a prepared folder on a local disk, the manifest last."""
    with full_disk_is_user_error(folder):
        inputs = digest(_inputs(settings))
        utterances = load_utterances(settings.nlu)
        _begin(folder, inputs)
        with new_folder(folder / "utterances") as temporary:
            write_massive(utterances, temporary)
        builder = _Builder(settings, values, folder, utterances, watch)
        manifests = builder.stores()
        # An unfinished call with another config may have left other stores.
        wanted = {folder / "rows" / one["split"] / one["name"] for one in manifests}
        for store in set((folder / "rows").glob("*/*")) - wanted:
            shutil.rmtree(store)
        write_manifest(folder, values, utterances, builder.tokenizer, manifests)
        (folder / _INPUTS).unlink()


def _begin(folder: pathlib.Path, inputs: str) -> None:
    """Removes what an unfinished call built from files that have changed since, and records the files of this call."""
    note = folder / _INPUTS
    if not (note.is_file() and note.read_bytes() == inputs.encode()):
        for built in ("tokenizer", "rows"):
            shutil.rmtree(folder / built, ignore_errors=True)
        make_folder(folder)
        write_atomically(note, inputs)


def _inputs(settings: Prepare) -> list[Any]:
    """The size and time of every file that is read; none for data sets on the hub."""
    tokenizer = settings.tokenizer.path if settings.tokenizer.kind == "load" else ""
    paths = [settings.nlu.path, tokenizer]
    paths += [
        one.path.replace("{language}", language) for one in settings.sources.values() for language in one.languages
    ]
    return [states_of(os.path.expanduser(os.path.expandvars(path))) for path in paths if path]


class _Builder:
    """What building the stores of one prepared folder shares.

    Each store's manifest keeps a digest of all that its rows depend on ("built_from"). After a kill, a store whose
    digest is still the same is kept, and any other is built again.
    """

    def __init__(
        self, settings: Prepare, values: dict[str, Any], folder: pathlib.Path, utterances: list[Utterance], watch: Watch
    ):
        self.settings, self.values, self.folder = settings, values, folder
        self.utterances, self._watch = utterances, watch
        self.splits = Splits(settings, utterances)
        self.tokenizer = self._tokenizer()

    def stores(self) -> list[dict[str, Any]]:
        """The manifests of all stores, built or found finished."""
        manifests: list[dict[str, Any]] = []
        for name, source in self.settings.sources.items():
            for language in source.languages:
                manifests += self._source_stores(name, source, language)
                if source.kind == "generic" and self.settings.select.share > 0:
                    manifests += self._selected_store(name, language)
        for locale in self.settings.nlu.locales:
            if dev := [one.text for one in self.utterances if one.locale == locale and one.partition == "dev"]:
                identity = {"name": f"{DEV}-{locale}", "source": DEV, "kind": "task", "language": locale}
                manifests += self._built(identity, ("heldout",), ("dev", locale), partial(_none_held_out, dev))
        return manifests

    def _tokenizer(self) -> Tokenizer:
        folder, settings = self.folder / "tokenizer", self.settings.tokenizer
        # Training reads the texts that are not held out; loading reads none.
        texts_from = [self.values["nlu"], self.values["sources"], self.settings.rows.heldout_share]
        built_from = digest([self.values["tokenizer"], texts_from if settings.kind == "train" else None])
        marker = folder / "built_from.txt"
        if not (marker.is_file() and marker.read_bytes() == _stamp(folder, built_from)):
            if settings.kind == "load":
                tokenizer = Tokenizer.load(fill_path(settings.path, key="config.tokenizer.path"))
            else:
                stores = [(name, language) for name, one in self.settings.sources.items() for language in one.languages]
                each = (itertools.islice(self.splits.train(*store), settings.texts_per_store) for store in stores)
                texts = self._watch(itertools.chain.from_iterable(each), "tokenizer")
                tokenizer = train_tokenizer(texts, settings.vocab_size)
            with new_folder(folder) as temporary:
                tokenizer.save(temporary)
                (temporary / marker.name).write_bytes(_stamp(temporary, built_from))
        return Tokenizer.load(folder)  # also where it was just trained: what was saved is what later commands read

    def _source_stores(self, name: str, source: Source, language: str) -> list[dict[str, Any]]:
        """The train store of one language of a source and, for generic text, its held-out store, in one pass."""
        identity = {"name": f"{name}-{language}", "source": name, "kind": source.kind, "language": language}
        splits = ("train", "heldout") if source.kind == "generic" else ("train",)
        removed: Counter[str] = Counter(decontaminated=0)
        return self._built(
            identity,
            splits,
            (self._reading(name), language),
            lambda: self._watch(self.splits.marked(name, language, removed), identity["name"]),
            removed,
        )

    def _selected_store(self, name: str, language: str) -> list[dict[str, Any]]:
        """The train store of the generic texts of one language that `config.select` chooses."""
        select, store = self.settings.select, _selected_name(name, language)
        random = select.target == "random"
        target = () if random else self.splits.task(language if select.target == "language" else "")
        removed: Counter[str] = Counter()

        def read(doing: str) -> Iterable[str]:
            return self._watch(self.splits.train(name, language), f"{store}: {doing}")

        def texts() -> Iterator[tuple[str, bool]]:
            chosen = choose(lambda: read("weighing"), target, select)
            removed["not selected"] = chosen.texts - len(chosen.indices)
            yield from _none_held_out(chosen.of(read("packing")))

        identity = {"name": store, "source": name, "kind": "selected", "language": language}
        built_from = ("selected", self._reading(name), language, self.values["select"], digest(target))
        return self._built(identity, ("train",), built_from, texts, removed)

    def _reading(self, name: str) -> dict[str, Any]:
        """The keys of a source that decide which texts it gives."""
        return {key: value for key, value in self.values["sources"][name].items() if key not in ("weight", "languages")}

    def _built(
        self,
        identity: dict[str, str],
        splits: Sequence[str],
        built_from: tuple[Any, ...],
        texts: Callable[[], Iterable[tuple[str, bool]]],
        removed: Mapping[str, int] | None = None,
    ) -> list[dict[str, Any]]:
        """The manifests of a store in each of `splits`; where one is missing, they are written in one pass.

        texts: gives (text, whether it belongs to the second split). removed: counts, filled by then, of texts left
        out, which the first store's manifest keeps.
        """
        depends_on = digest([built_from, self.values["nlu"], self.values["rows"], self.tokenizer.fingerprint])
        folders = [self.folder / "rows" / split / identity["name"] for split in splits]
        found = [manifest for folder in folders if (manifest := read_manifest(folder)) is not None]
        if len(found) == len(splits) and all(one["built_from"] == depends_on for one in found):
            with contextlib.suppress(UserError):  # a damaged one is built again
                for folder, one in zip(folders, found):
                    verify(folder, one.get("files", {}), _REMEDY)
                return found
        rows = self.settings.rows
        with ExitStack() as stack:
            writers = [
                stack.enter_context(
                    StoreWriter(
                        stack.enter_context(new_folder(folder)),
                        **identity,
                        split=split,
                        length=rows.length,
                        open_rows=rows.open_rows,
                        tokenizer=self.tokenizer,
                        built_from=depends_on,
                    )
                )
                for folder, split in zip(folders, splits)
            ]
            for chunk in _encode_ahead(texts(), self.tokenizer):
                for writer, second in zip(writers, (False, True)):
                    writer.add([ids for ids, is_second in chunk if is_second == second])
            return [writer.finish(removed or {} if number == 0 else {}) for number, writer in enumerate(writers)]


def _stamp(folder: pathlib.Path, built_from: str) -> bytes:
    """The file that marks a tokenizer's folder as complete, with what it was built from."""
    files = sorted(file.name for file in folder.glob("*.json"))
    return digest([built_from, describe(folder, files)]).encode()


def _none_held_out(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    return ((text, False) for text in texts)


def _encode_ahead(marked: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[list[tuple[np.ndarray, bool]]]:
    """Chunks of (tokens, mark) of marked texts; a thread tokenizes the next chunk while this one is packed."""

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


def write_manifest(
    folder: pathlib.Path,
    values: dict[str, Any],
    utterances: Sequence[Utterance],
    tokenizer: Tokenizer,
    manifests: Sequence[dict[str, Any]],
) -> None:
    """Completes `folder`, which was built from `values` (config.<part> by part) and holds stores of these manifests."""
    utterance_files = [f"utterances/{locale}.jsonl" for locale in values["nlu"]["locales"]]
    content = hashlib.sha256()
    for file in utterance_files:
        content.update((folder / file).read_bytes())
    content.update(tokenizer.fingerprint.encode())
    removed: Counter[str] = Counter()
    for manifest in manifests:
        content.update(f"{manifest['split']} {manifest['name']} {manifest['fingerprint']}".encode())
        if manifest["kind"] != "selected":  # its texts were counted at the store that it is a part of
            removed.update(manifest["removed"])
    # In the order in which a training run asks for them: a remote folder is fetched in this order.
    files = [f"tokenizer/{file.name}" for file in sorted((folder / "tokenizer").iterdir())]
    known: dict[str, Any] = {}
    for manifest in sorted(manifests, key=lambda manifest: manifest["split"] != "train"):
        store = f"rows/{manifest['split']}/{manifest['name']}"
        files += [f"{store}/{file}" for file in STORE_FILES]
        known |= {f"{store}/{file}": noted for file, noted in manifest.get("files", {}).items()}
    files += utterance_files
    described = {**describe(folder, [name for name in files if name not in known]), **known}
    whole = {
        "config": values,
        "fingerprint": content.hexdigest(),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "utterances": dict(sorted(Counter(f"{one.locale} {one.partition}" for one in utterances).items())),
        "removed": dict(removed),
        "stores": manifests,
        "files": {name: described[name] for name in files},
    }
    write_sealed(folder / MANIFEST, whole)
