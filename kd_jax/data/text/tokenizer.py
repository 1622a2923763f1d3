"""One interface to all tokenizers: trained here, or read from a folder, a file or the hub."""

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from kd_jax.config import require
from kd_jax.data.embedded.teacher import EMBEDDED_MODEL, embedded_model
from kd_jax.runtime.files import read_json_object, write_atomically
from kd_jax.types import UserError

# Ids 0 to 4 of a tokenizer trained here: the first four as XLM-R has them. XLM-R's <mask> comes last in the vocabulary;
# ours has the same id whatever the size.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

_USUAL_NAMES = {
    "cls": ("<s>", "[CLS]"),
    "sep": ("</s>", "[SEP]"),
    "pad": ("<pad>", "[PAD]"),
    "mask": ("<mask>", "[MASK]"),
    "unk": ("<unk>", "[UNK]"),
}
# The keys of a tokenizer_config.json that affect how a WordPiece tokenizer reads a text.
_WORDPIECE = ("do_lower_case", "strip_accents", "tokenize_chinese_chars", *(f"{role}_token" for role in _USUAL_NAMES))
_CHUNK = 4096  # texts that are encoded at a time
_COVERAGE = 0.9998  # of the characters of the training texts; the rest becomes <unk>
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class Tokenizer:
    """Text to tokens. `cls_id`, `sep_id`, `pad_id`, `mask_id`, `unk_id` are ints (unk_id None where there is none),
    `special_ids` is the sorted tuple of them, `vocab_size` the number of ids.

    `names` are those of the special tokens, by role ("cls", ...), where they were declared; otherwise the usual names
    are looked for. Raises UserError, which begins with `where`, if one other than <unk> is missing.
    """

    def __init__(self, backend: tokenizers.Tokenizer, where: str, names: Mapping[str, str] | None = None):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # a text that says "<mask>" is encoded like any other
        self.backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._names: dict[str, str] = {}
        for role, usual in _USUAL_NAMES.items():
            # Declared ones first: in some vocabularies <s> is the HTML tag.
            wanted = [names[role]] if names and role in names else usual
            found = [name for name in wanted if name in vocabulary]
            if found:
                self._names[role] = found[0]
            elif role != "unk":
                raise UserError(
                    f"{where}: the tokenizer has no {role} token ({' or '.join(wanted)}); "
                    "use one that was made for a masked language model"
                )
        ids = {role: vocabulary[name] for role, name in self._names.items()}
        self.cls_id, self.sep_id, self.pad_id, self.mask_id = (ids[role] for role in ("cls", "sep", "pad", "mask"))
        self.unk_id = ids.get("unk")
        self.special_ids = tuple(sorted(set(ids.values())))

    @classmethod
    def load(cls, name: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a tokenizer.json, a vocab.txt (WordPiece), a folder with one of them or with a SentencePiece model, a
        tokenizer on the hub, or that of the embedded model."""
        if name == EMBEDDED_MODEL:
            name = embedded_model("tokenizer.path")
        path, names = Path(name).expanduser(), {}
        if path.is_dir():
            names = _declared_names(path)
            found = [path / file for file in ("tokenizer.json", "vocab.txt") if (path / file).is_file()]
            if not found and any(path.glob("*.model")):
                return cls(*_from_transformers(path, "needs the packages sentencepiece and protobuf, or is damaged"))
            if not found:
                raise UserError(f"{path}: holds neither tokenizer.json nor vocab.txt; name a tokenizer's folder")
            path = found[0]
        if path.is_file():
            return cls(*_read_wordpiece(path)) if path.suffix == ".txt" else cls(_read_json(path), str(path), names)
        if not HUB_NAME.fullmatch(str(name)):
            raise UserError(f"{name}: there is no such file or folder; name a tokenizer's folder, or one on the hub")
        problem = "there is no such folder here, and the hub gave no tokenizer of that name"
        return cls(*_from_transformers(name, problem))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` loads as well."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        named = {f"{role}_token": name for role, name in self._names.items()}
        write_atomically(folder / "tokenizer_config.json", json.dumps(config | named, indent=2))
        write_atomically(folder / "tokenizer.json", self.backend.to_str())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides which ids a text gets."""
        content = json.loads(self.backend.to_str())
        parts = {key: content[key] for key in ("normalizer", "pre_tokenizer", "model")}
        parts["added_tokens"] = [[token["id"], token["content"]] for token in content["added_tokens"]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def tokens(self) -> list[str]:
        """The token of each id; "" for an id that stands for none."""
        found = [""] * self.vocab_size
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            found[i] = token
        return found

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32, without special tokens and never cut."""
        encoded: list[np.ndarray] = []
        for start in range(0, len(texts), _CHUNK):
            batch = self.backend.encode_batch_fast(list(texts[start : start + _CHUNK]), add_special_tokens=False)
            encoded += [self._ids(encoding.ids) for encoding in batch]
        return encoded

    def decode(self, texts: Sequence[np.ndarray]) -> list[str]:
        """The text of each array of ids, without special tokens, as far as the tokens spell it."""
        return self.backend.decode_batch([ids.tolist() for ids in texts], skip_special_tokens=True)

    def encode_words(
        self, texts: Sequence[Sequence[str]], joined: bool | Sequence[bool] = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, word index) of texts given as words, int32 each: the ids of the words joined by a space, or by nothing
        where `joined` (characters), and the word that each token belongs to.

        Word indices never decrease. A word that normalizes to nothing has no token; a token of several joined
        characters belongs to the first.
        """
        # Encoded as a whole text and not word by word, so that the ids are those of pretraining.
        flags = [joined] * len(texts) if isinstance(joined, bool) else joined
        encoded: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, len(texts), _CHUNK):
            chunk = list(zip(texts[start : start + _CHUNK], flags[start : start + _CHUNK], strict=True))
            whole = [("" if flag else " ").join(words) for words, flag in chunk]
            batch = self.backend.encode_batch(whole, add_special_tokens=False)
            for encoding, (words, flag) in zip(batch, chunk):
                encoded.append((self._ids(encoding.ids), _word_index(encoding.offsets, words, 0 if flag else 1)))
        return encoded

    def _ids(self, ids: list[int]) -> np.ndarray:
        """As int32; a token that spells a special one becomes unknown: a text must not hold a mask."""
        array = np.array(ids, np.int32)
        if self.unk_id is not None and not self._specials.isdisjoint(ids):
            array[np.isin(array, self.special_ids)] = self.unk_id
        return array

    @functools.cached_property
    def _specials(self) -> frozenset[int]:
        return frozenset(self.special_ids) - {self.unk_id}


def _word_index(offsets: list[tuple[int, int]], words: Sequence[str], gap: int) -> np.ndarray:
    """The word of each token by its first character; the space before a word counts as the word's."""
    if not offsets:
        return np.zeros(0, np.int32)
    starts = np.array(offsets)[:, 0]
    ends = np.cumsum([len(word) + gap for word in words]) - gap
    return np.minimum(np.searchsorted(ends, starts, side="right"), len(words) - 1).astype(np.int32)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a BPE tokenizer of at most `vocab_size` tokens, special ones included; the same texts give the same one.

    Raises UserError for a vocabulary too small for the characters, and when there is no text.
    """
    one_space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    normalizer = normalizers.Sequence([normalizers.NFKC(), one_space, normalizers.Strip()])
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text).split())
    require(len(counts) > 0, "tokenizer", "there is no text to train a tokenizer on", "check config.sources")
    words = {f"▁{word}": count for word, count in counts.items()}
    alphabet = _characters(words)
    least = f"{len(SPECIAL_TOKENS)} special tokens and {len(alphabet)} characters of the training texts"
    fits = len(SPECIAL_TOKENS) + len(alphabet) <= vocab_size
    require(fits, "tokenizer.vocab_size", f"{vocab_size} is less than the {least}", "raise it")
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    # Sorted, so that the order of the texts cannot matter, and each word as often as it was counted. Words with a rare
    # character are left out: the trainer takes every character it meets into the vocabulary.
    known = sorted((word, count) for word, count in words.items() if alphabet.issuperset(word))
    backend.train_from_iterator((" ".join([word] * count) for word, count in known), trainer)
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    cls, _, sep, _, _ = SPECIAL_TOKENS
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} {sep} $B {sep}", special_tokens=[(cls, 0), (sep, 2)]
    )
    return Tokenizer(backend, "config.tokenizer")


def _characters(words: Mapping[str, int]) -> set[str]:
    """The most frequent characters, which together cover _COVERAGE of the text."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    total, covered, kept = counts.total(), 0, set[str]()
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= _COVERAGE * total:
            break
        kept.add(character)
        covered += count
    return kept


def _declared_names(folder: Path) -> dict[str, str]:
    """The special tokens, by role, that the files next to a tokenizer.json declare."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the second is the newer place
        if not (folder / file).exists():
            continue
        values = read_json_object(folder / file, "download it again")
        for role in _USUAL_NAMES:
            value = values.get(f"{role}_token")
            name = value.get("content") if isinstance(value, dict) else value
            if isinstance(name, str) and name:
                found[role] = name
    return found


def _read_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises bare Exception, and its panics are only BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{path}: is not a tokenizer that the tokenizers library reads ({error}); download or copy it again"
        ) from error


def _read_wordpiece(file: Path) -> tuple[tokenizers.Tokenizer, str, dict[str, str]]:
    """The arguments of `Tokenizer` for a WordPiece vocabulary with one token per line and the settings next to it, as
    `transformers` reads them; lowercased unless the settings say otherwise or a token has a capital.
    """
    from transformers import BertTokenizer  # takes seconds to import

    try:
        tokens = file.read_bytes().decode().removesuffix("\n").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 (byte {error.start}); name a WordPiece vocabulary") from None
    if "[UNK]" not in tokens:
        raise UserError(f"{file}: has no [UNK]; name a WordPiece vocabulary with one token per line")
    with tempfile.TemporaryDirectory() as folder:  # the library expects this file name
        shutil.copy(file, Path(folder, "vocab.txt"))
        settings = file.parent / "tokenizer_config.json"
        declared = read_json_object(settings, "download it again") if settings.exists() else {}
        is_cased = any(token != token.lower() for token in tokens if not re.fullmatch(r"\[.*\]", token))
        options: dict[str, Any] = {
            "do_lower_case": not is_cased,
            **{key: declared[key] for key in _WORDPIECE if key in declared},
        }
        try:
            theirs = BertTokenizer.from_pretrained(folder, **options)
        except Exception as error:  # a setting of another type, say
            problem = f"is not a vocabulary that `transformers` reads with {settings.name} ({error})"
            raise UserError(f"{file}: {problem}; download both again") from error
    names = {role: str(getattr(theirs, f"{role}_token")) for role in _USUAL_NAMES}
    for role, name in names.items():
        if name not in tokens:  # the library would add it after the last token
            raise UserError(
                f"{file}: the tokenizer has no {role} token ({name}); use one that was made for a masked language model"
            )
    return theirs.backend_tokenizer, str(file), names


def _from_transformers(name: str | os.PathLike[str], problem: str) -> tuple[tokenizers.Tokenizer, str, dict[str, str]]:
    """What `Tokenizer` takes, of a tokenizer that transformers downloads or converts."""
    from transformers import AutoTokenizer  # takes seconds to import, which folders need not pay

    try:
        theirs = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
        declared = {role: getattr(theirs, f"{role}_token") for role in _USUAL_NAMES}
        return theirs.backend_tokenizer, str(name), {role: token for role, token in declared.items() if token}
    except Exception as error:
        remedy = "check the name and the network, or download it and name its folder"
        raise UserError(f"{name}: {problem} ({type(error).__name__}); {remedy}") from error
