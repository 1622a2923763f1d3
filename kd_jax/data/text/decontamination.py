"""Keeps dev and test utterances out of everything that is trained on."""

import dataclasses
import unicodedata
from collections.abc import Iterable, Iterator

from kd_jax.data.text.utterances import Utterance


class _Removed(dict):
    """Translation table, filled on demand: marks that carry no letters go, everything else stays.

    They are punctuation (P), symbols (S), invisible format and control characters (C) and variation selectors. White
    space stays, and so do combining marks, without which Devanagari has no vowels.
    """

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        removed = unicodedata.category(character)[0] in "PSC" and not character.isspace()
        removed |= 0xFE00 <= code <= 0xFE0F
        self[code] = None if removed else code
        return self[code]


_REMOVED = _Removed()


def normalize(text: str) -> str:
    """NFKC, case folded, without punctuation, symbols and invisible characters, white space collapsed; idempotent."""
    text = text.translate(_REMOVED)
    if not text.isascii():
        # Once before, so that a spacing accent (a symbol) goes whole; once after, since NFKC and folding make new ones.
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold().translate(_REMOVED))
    else:
        text = text.lower()
    return " ".join(text.split())


@dataclasses.dataclass
class FilterCount:
    """How many texts `HeldOut.filter` let through and how many it removed."""

    kept: int = 0
    removed: int = 0


class HeldOut:
    """The dev and test texts of all locales; a text equals one of them when their `normalize` agree, spaces aside.

    Spaces do not count, so that `e-mail`, `e mail` and `email` are one, in spoken form as well.
    """

    # Most texts are told apart by their first letters, from which far fewer characters must be normalized.
    PREFIX = 12
    HEAD = 32

    def __init__(self, utterances: Iterable[Utterance]):
        self._texts = {text_key(utterance.text) for utterance in utterances if utterance.partition != "train"}
        self._texts.discard("")
        self._prefixes = {text[: self.PREFIX] for text in self._texts}

    def __contains__(self, text: str) -> bool:
        if len(text) > self.HEAD:
            head = text_key(text[: self.HEAD])
            # What follows can still change the last base character and its marks, never what stands before them.
            stable = any(not unicodedata.combining(character) for character in head[self.PREFIX :])
            if stable and head[: self.PREFIX] not in self._prefixes:
                return False
        return text_key(text) in self._texts

    def filter(self, texts: Iterable[str], counter: FilterCount) -> Iterator[str]:
        """Yields the texts that equal no held-out text, and counts both kinds in `counter`."""
        for text in texts:
            if text in self:
                counter.removed += 1
            else:
                counter.kept += 1
                yield text


def text_key(text: str) -> str:
    """What two texts share that count as equal: the normalized text without its spaces."""
    return normalize(text).replace(" ", "")
