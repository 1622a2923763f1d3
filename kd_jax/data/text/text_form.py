"""Case and punctuation of labeled text, so that other text can be normalized to them before a model reads it."""

import itertools
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

from kd_jax.data.text.sources import APOSTROPHES
from kd_jax.data.text.utterances import Utterance, split_words

NEARLY_ALL = 0.99  # of the utterances; in real data the rest are slips


@dataclass(frozen=True)
class TextForm:
    """Case and punctuation of labeled text; the default fits any text and changes nothing.

    lower: it has no capitals. punctuation: "absent", "apart" (separate words) or "attached" (to words, or mixed).
    """

    lower: bool = False
    punctuation: Literal["absent", "apart", "attached"] = "attached"

    @classmethod
    def of(cls, utterances: Iterable[Utterance]) -> Self:
        """The form that NEARLY_ALL utterances have; the default without utterances."""
        count = capitals = attached = apart = 0
        for one in utterances:
            count += 1
            capitals += one.text != one.text.lower()
            cores = [core for word in one.words for before, core, after in [_parts(word)] if before or after]
            # Where words are characters, punctuation is a word too, and says nothing about the others.
            apart += bool(cores)
            attached += any(cores)
        few = (1 - NEARLY_ALL) * count
        if not count:
            return cls()
        return cls(capitals <= few, "absent" if apart <= few else "apart" if attached <= few else "attached")

    def words(self, text: str, characters: bool = False) -> tuple[list[str], list[int | None]]:
        """The words of `text` that a model reads, and for each word of `split_words` the index of its word among them.

        The index is None for a word of punctuation alone that is removed. A text of punctuation alone is kept as it is.
        """
        given = split_words(text, characters)
        found: list[str] = []
        places: list[int | None] = []
        for word in given:
            before, core, after = ("", word, "") if self.punctuation == "attached" else _parts(word)
            if self.punctuation == "absent":
                before = after = ""
            parts = [*_runs(before), *([core] if core else []), *_runs(after)]
            places.append(len(found) + (len(_runs(before)) if core else 0) if parts else None)
            found += parts
        if not found:
            found, places = given, list(range(len(given)))
        return [word.lower() for word in found] if self.lower else found, places


def bare(text: str) -> str:
    """The text without the punctuation before and after it."""
    core = _parts(text)[1].strip()
    return text if core in ("", text) else bare(core)


def _parts(word: str) -> tuple[str, str, str]:
    """A word as the punctuation before it, itself, and the punctuation after it; the first two are empty for a word of
    punctuation alone. The dots of `p.m.` and `b.` belong to the word, as do apostrophes and hyphens.
    """
    core = word.rstrip("".join(filter(_is_mark, set(word))))
    after = word[len(core) :]
    kept = core.lstrip("".join(filter(_is_mark, set(core))))
    before = core[: len(core) - len(kept)]
    if after.startswith(".") and kept and (len(kept) == 1 or "." in kept):
        kept, after = kept + ".", after[1:]
    return before, kept, after


def _is_mark(character: str) -> bool:
    """Whether it is punctuation between phrases, and not part of a word."""
    return (
        unicodedata.category(character) in ("Po", "Ps", "Pe", "Pi", "Pf") and character not in APOSTROPHES + "&@#%*/\\"
    )


def _runs(marks: str) -> list[str]:
    return ["".join(run) for _, run in itertools.groupby(marks)]
