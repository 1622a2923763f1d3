"""Which texts of the config's sources are trained on, which are held out, and which are left out."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from kd_jax.config.data import Prepare
from kd_jax.data.text.files import Report, raise_error
from kd_jax.data.text.sources import read_texts
from kd_jax.data.text.utterances import Utterance

# Letters that decide whether a generic text is held out, and the characters at its head that nearly always hold them.
_LETTERS = 24
_HEAD = 40


class _Removed(dict[int, int | None]):
    """Translation table, filled on demand: marks that carry no letters are removed, everything else stays.

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
    if text.isascii():
        return " ".join(text.lower().split())
    # Marks are removed before NFKC, which would split a spacing accent (a symbol) into a space and a combining mark,
    # and again after it, since NFKC and folding make new ones.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold().translate(_REMOVED))
    return " ".join(text.split())


def text_key(text: str) -> str:
    """What texts that count as equal share: the normalized text without spaces; `e-mail`, `e mail`, `email` are one."""
    return normalize(text).replace(" ", "")


def shared_with_test(labeled: Iterable[Utterance], utterances: Iterable[Utterance]) -> tuple[int, int]:
    """(labeled utterances with the text of a test utterance of their locale, test utterances whose text they have).

    Labels are not decontaminated: a data set's train partition is used as it was published, and the test set
    "test_unseen" leaves these utterances out.
    """
    known = Counter((one.locale, text_key(one.text)) for one in labeled)
    tested = Counter((one.locale, text_key(one.text)) for one in utterances if one.partition == "test")
    both = known.keys() & tested.keys()
    return sum(known[one] for one in both), sum(tested[one] for one in both)


class HeldOut:
    """The dev and test texts of all locales; a text equals one of them when their `text_key` is the same."""

    # Most texts differ from every held-out one in their first letters, and normalizing those is much faster.
    PREFIX = 12
    HEAD = 32

    def __init__(self, utterances: Iterable[Utterance]):
        self._texts = {text_key(utterance.text) for utterance in utterances if utterance.partition != "train"}
        self._texts.discard("")
        self._prefixes = {text[: self.PREFIX] for text in self._texts}

    def __contains__(self, text: str) -> bool:
        if len(text) > self.HEAD:
            head = text_key(text[: self.HEAD])
            # Combining marks after the cut may still reorder with those before it, back to the last base character.
            stable = any(not unicodedata.combining(character) for character in head[self.PREFIX :])
            if stable and head[: self.PREFIX] not in self._prefixes:
                return False
        return text_key(text) in self._texts

    def filter(self, texts: Iterable[str], removed: Counter[str]) -> Iterator[str]:
        """Yields the texts that equal no held-out text, and counts the others as removed["decontaminated"]."""
        for text in texts:
            if text in self:
                removed["decontaminated"] += 1
            else:
                yield text


class Splits:
    """The texts of config.sources and config.nlu by side; dev and test utterances are left out of all of them."""

    def __init__(self, settings: Prepare, utterances: Sequence[Utterance]):
        self._settings, self._utterances = settings, utterances
        self._held_out = HeldOut(utterances)

    def marked(
        self, name: str, language: str, removed: Counter[str], report: Report = raise_error
    ) -> Iterator[tuple[str, bool]]:
        """(text, whether it is held out) of one language of a source; see `HeldOut.filter` and `read_texts`.

        Generic texts are held out by a hash of their content, so equal texts are on the same side.
        """
        source = self._settings.sources[name]
        texts = read_texts(source, language, self._utterances, key=f"config.sources.{name}", report=report)
        limit = self._settings.rows.heldout_share * 2**64 if source.kind == "generic" else 0
        for text in self._held_out.filter(texts, removed):
            yield text, limit > 0 and content_hash(text) < limit

    def train(self, name: str, language: str) -> Iterator[str]:
        """The texts of one language of a source that are trained on."""
        return (text for text, is_heldout in self.marked(name, language, Counter()) if not is_heldout)

    def task(self, language: str) -> list[str]:
        """The train utterances whose locale speaks `language`, e.g. "de" or "de-DE"; of every locale where it is ""."""
        base = language.split("-")[0]
        train = (one for one in self._utterances if one.partition == "train")
        texts = (one.text for one in train if base in ("", one.locale.split("-")[0]))
        return list(self._held_out.filter(texts, Counter()))


def content_hash(text: str) -> int:
    """A 64-bit hash of the first letters of the normalized text: the same whatever its case, marks and ending.

    The letters are taken from the text's head where what follows cannot change them: normalizing all of it would take a
    sixth of the time of tokenizing it.
    """
    letters = text_key(text[:_HEAD])
    if len(text) > _HEAD and all(unicodedata.combining(character) for character in letters[_LETTERS:]):
        letters = text_key(text)
    return int.from_bytes(hashlib.blake2b(letters[:_LETTERS].encode(), digest_size=8).digest(), "little")
