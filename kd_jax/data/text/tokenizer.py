"""One face for all tokenizers: trained here, or read from a folder, a file or the hub."""

import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from kd_jax.data.text.unigram import train_unigram
from kd_jax.runtime.files import write_atomically
from kd_jax.types import UserError

# Ids 0 to 4 of a tokenizer trained here: the first four as XLM-R has them; its <mask> comes last in the vocabulary,
# ours stays in place whatever the size.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

_USUAL_NAMES = {
    "cls": ("<s>", "[CLS]"),
    "sep": ("</s>", "[SEP]"),
    "pad": ("<pad>", "[PAD]"),
    "mask": ("<mask>", "[MASK]"),
    "unk": ("<unk>", "[UNK]"),
}
_CHUNK = 4096  # texts that are encoded at a time
_COVERAGE = 0.9998  # of the characters of the training texts; the rest becomes <unk>
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class Tokenizer:
    """Text to pieces. `cls_id`, `sep_id`, `pad_id`, `mask_id`, `unk_id` are ints (unk_id None where there is none),
    `special_ids` is the sorted tuple of them, `vocab_size` the number of ids.

    `names` are those of the special tokens, by role ("cls", ...), where they were declared; the usual names are looked
    for where not. Raises UserError, with `place` at its start, where one but <unk> is missing.
    """

    def __init__(self, backend: tokenizers.Tokenizer, place: str, names: Mapping[str, str] | None = None):
        backend.no_truncation()
        backend.no_padding()
        # A text that says "<mask>" is encoded like any other.
        backend.encode_special_tokens = True
        self.backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._names: dict[str, str | None] = {}
        for role, usual in _USUAL_NAMES.items():
            # Declared ones first: in some vocabularies <s> is the HTML tag.
            wanted = [names[role]] if names and role in names else usual
            found = [name for name in wanted if name in vocabulary]
            if not found and role != "unk":
                raise UserError(
                    f"{place}: the tokenizer has no {role} token ({' or '.join(wanted)}); "
                    "use one that was made for a masked language model"
                )
            self._names[role] = found[0] if found else None
        ids = {role: vocabulary[name] for role, name in self._names.items() if name is not None}
        self.cls_id, self.sep_id, self.pad_id, self.mask_id = (ids[role] for role in ("cls", "sep", "pad", "mask"))
        self.unk_id = ids.get("unk")
        self.special_ids = tuple(sorted(set(ids.values())))

    @classmethod
    def load(cls, name: str | os.PathLike) -> "Tokenizer":
        """Reads a tokenizer.json, a vocab.txt (WordPiece), a folder with one of them, or a tokenizer of the hub."""
        path, names = Path(name).expanduser(), {}
        if path.is_dir():
            names = _declared_names(path)
            files = [path / file for file in ("tokenizer.json", "vocab.txt") if (path / file).is_file()]
            if not files:
                raise UserError(f"{path}: holds neither tokenizer.json nor vocab.txt; name a tokenizer's folder")
            path = files[0]
        if path.is_file():
            read = _read_wordpiece if path.suffix == ".txt" else _read_json
            return cls(read(path), str(path), names)
        backend, names = _from_hub(str(name))
        return cls(backend, str(name), names)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` loads as well."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {f"{role}_token": name for role, name in self._names.items() if name is not None}
        write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2))
        write_atomically(folder / "tokenizer.json", self.backend.to_str())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides which ids a text gets."""
        content = json.loads(self.backend.to_str())
        parts = {key: content[key] for key in ("normalizer", "pre_tokenizer", "model")}
        parts["added_tokens"] = [[token["id"], token["content"]] for token in content["added_tokens"]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def tokens(self) -> list[str]:
        """The piece of each id; "" for an id that stands for none."""
        pieces = [""] * self.vocab_size
        for piece, i in self.backend.get_vocab(with_added_tokens=True).items():
            pieces[i] = piece
        return pieces

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32, without special tokens and never cut."""
        encoded = []
        for start in range(0, len(texts), _CHUNK):
            batch = self.backend.encode_batch_fast(list(texts[start : start + _CHUNK]), add_special_tokens=False)
            encoded += [self._ids(encoding.ids) for encoding in batch]
        return encoded

    def encode_words(
        self, texts: Sequence[Sequence[str]], joined: bool | Sequence[bool] = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, word index) of texts given as words, int32 each: the ids of the words joined by a space, or by nothing
        where `joined` (characters), and the word that each piece belongs to.

        Word indices never fall. A word that normalizes to nothing has no piece; a piece of several joined characters
        belongs to the first.
        """
        flags = [joined] * len(texts) if isinstance(joined, bool) else joined
        encoded = []
        for start in range(0, len(texts), _CHUNK):
            chunk = list(zip(texts[start : start + _CHUNK], flags[start : start + _CHUNK], strict=True))
            whole = [("" if flag else " ").join(words) for words, flag in chunk]
            batch = self.backend.encode_batch(whole, add_special_tokens=False)
            for encoding, (words, flag) in zip(batch, chunk):
                encoded.append((self._ids(encoding.ids), _word_index(encoding.offsets, words, 0 if flag else 1)))
        return encoded

    def _ids(self, ids: list[int]) -> np.ndarray:
        """As int32; a piece that spells a special token is unknown."""
        array = np.array(ids, np.int32)
        if self.unk_id is not None and not self._specials.isdisjoint(ids):
            array[np.isin(array, self.special_ids)] = self.unk_id
        return array

    @functools.cached_property
    def _specials(self) -> frozenset[int]:
        return frozenset(self.special_ids) - {self.unk_id}


def _word_index(offsets: list[tuple[int, int]], words: Sequence[str], gap: int) -> np.ndarray:
    """The word of each piece by its first character; the space before a word counts as the word's."""
    if not offsets:
        return np.zeros(0, np.int32)
    starts = np.array(offsets)[:, 0]
    ends = np.cumsum([len(word) + gap for word in words]) - gap
    return np.minimum(np.searchsorted(ends, starts, side="right"), len(words) - 1).astype(np.int32)


def train_tokenizer(texts: Iterable[str], model: str, vocab_size: int) -> Tokenizer:
    """Trains a unigram or BPE tokenizer of at most `vocab_size` pieces, special tokens included; fewer where the texts
    give no more. The same texts give the same tokenizer.

    Raises UserError for an unknown model, a vocabulary too small for the characters, and when there is no text.
    """
    if model not in ("unigram", "bpe"):
        raise UserError(f"config.tokenizer.model: {model!r} is unknown; use 'unigram' or 'bpe'")
    one_space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    normalizer = normalizers.Sequence([normalizers.NFKC(), one_space, normalizers.Strip()])
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text).split())
    if not counts:
        raise UserError("config.tokenizer: there is no text to train a tokenizer on; check config.sources")
    words = {f"▁{word}": count for word, count in counts.items()}
    characters = _characters(words)
    room = vocab_size - len(SPECIAL_TOKENS)
    if len(characters) > room:
        raise UserError(
            f"config.tokenizer.vocab_size: {vocab_size} is less than the {len(SPECIAL_TOKENS)} special tokens and "
            f"{len(characters)} characters of the training texts; raise it"
        )
    alphabet = set(characters)
    words = {word: count for word, count in words.items() if alphabet.issuperset(word)}
    backend = _unigram(words, characters, room) if model == "unigram" else _bpe(words, vocab_size)
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    cls, _, sep, _, _ = SPECIAL_TOKENS
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} {sep} $B {sep}", special_tokens=[(cls, 0), (sep, 2)]
    )
    return Tokenizer(backend, "config.tokenizer")


def _characters(words: dict[str, int]) -> list[str]:
    """The most frequent characters, which together cover _COVERAGE of the text."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    total, covered, kept = counts.total(), 0, []
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= _COVERAGE * total:
            break
        kept.append(character)
        covered += count
    return kept


def _unigram(words: dict[str, int], characters: list[str], room: int) -> tokenizers.Tokenizer:
    scores = train_unigram(words, characters, room)
    special = [(token, 0.0) for token in SPECIAL_TOKENS]
    unknown = SPECIAL_TOKENS.index("<unk>")
    return tokenizers.Tokenizer(models.Unigram([*special, *scores.items()], unknown, byte_fallback=False))


def _bpe(words: dict[str, int], vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    backend.train_from_iterator((_repeated(word, count) for word, count in sorted(words.items())), trainer)
    return backend


def _repeated(word: str, count: int) -> str:
    return " ".join([word] * count)


def _declared_names(folder: Path) -> dict[str, str]:
    """The special tokens, by role, that the files beside a tokenizer.json declare."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the second is the newer place
        try:
            values = json.loads((folder / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise UserError(f"{folder / file}: broken JSON ({error}); download it again") from None
        found |= _declared(values) if isinstance(values, dict) else {}
    return found


def _declared(values: Mapping[str, Any]) -> dict[str, str]:
    """Role -> name of the values "cls_token" and so on, each a string or an object with the string as its content."""
    named = {role: values.get(f"{role}_token") for role in _USUAL_NAMES}
    plain = {role: value.get("content") if isinstance(value, dict) else value for role, value in named.items()}
    return {role: value for role, value in plain.items() if isinstance(value, str) and value}


def _read_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: is no tokenizer that the tokenizers library reads ({error})") from error


def _read_wordpiece(path: Path) -> tokenizers.Tokenizer:
    """BERT's WordPiece from its vocabulary, one piece a line; lower-cased unless some piece has a capital."""
    try:
        pieces = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); name a WordPiece vocabulary") from None
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if "[UNK]" not in vocabulary:
        raise UserError(f"{path}: has no [UNK]; name a WordPiece vocabulary with one piece a line")
    is_cased = any(piece != piece.lower() for piece in pieces if not re.fullmatch(r"\[.*\]", piece))
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=not is_cased)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = [name for names in _USUAL_NAMES.values() for name in names if name in vocabulary]
    backend.add_special_tokens(special)
    if "[CLS]" in vocabulary and "[SEP]" in vocabulary:
        backend.post_processor = processors.BertProcessing(
            ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
        )
    return backend


def _from_hub(name: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{name}: there is no such file or folder; name a tokenizer's folder or its name on the hub")
    from transformers import AutoTokenizer  # takes seconds to import, which folders need not pay

    try:
        theirs = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
        return theirs.backend_tokenizer, _declared(
            {f"{role}_token": getattr(theirs, f"{role}_token") for role in _USUAL_NAMES}
        )
    except Exception as error:
        raise UserError(
            f"{name}: there is no such folder here, and the hub gave no tokenizer of that name "
            f"({type(error).__name__}); check the name and the network, or download it and name its folder"
        ) from error
