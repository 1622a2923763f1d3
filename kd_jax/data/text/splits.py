"""Which texts of the config's sources are trained on, which are held out, and which are left out."""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from kd_jax.data.text.decontamination import FilterCount, HeldOut, normalize
from kd_jax.data.text.files import Report, raise_error
from kd_jax.data.text.sources import read_texts
from kd_jax.data.text.utterances import Utterance

# Letters that decide whether a generic text is held out, and the characters at its head that nearly always hold them.
_LETTERS = 24
_HEAD = 40


class Splits:
    """The texts of config.sources and config.nlu by side; dev and test utterances are left out of all of them."""

    def __init__(self, config: ConfigDict, utterances: Sequence[Utterance]):
        self._config, self._utterances = config, utterances
        self._held_out = HeldOut(utterances)

    def marked(
        self, name: str, language: str, count: FilterCount, report: Report = raise_error
    ) -> Iterator[tuple[str, bool]]:
        """(text, whether it is held out) of one language of a source; `count` learns what was left out, `report`
        what is wrong with a record.

        Generic texts are held out by their content, so equal texts are on the same side.
        """
        source = self._config.sources[name]
        texts = read_texts(source, language, self._utterances, key=f"config.sources.{name}", report=report)
        limit = self._config.rows.heldout_share * 2**64 if source.kind == "generic" else 0
        for text in self._held_out.filter(texts, count):
            yield text, limit > 0 and content_hash(text) < limit

    def train(self, name: str, language: str) -> Iterator[str]:
        """The texts of one language of a source that are trained on."""
        return (text for text, heldout in self.marked(name, language, FilterCount()) if not heldout)

    def task(self, language: str) -> list[str]:
        """The train utterances whose locale speaks `language`, e.g. "de" or "de-DE"; of every locale where it is ""."""
        base = language.split("-")[0]
        texts = (
            one.text for one in self._utterances if one.partition == "train" and base in ("", one.locale.split("-")[0])
        )
        return list(self._held_out.filter(texts, FilterCount()))


def content_hash(text: str) -> int:
    """A 64-bit hash of the first letters of the normalized text, which texts equal but for case and marks share.

    The letters are taken from the text's head where what follows cannot change them: normalizing all of it would take a
    sixth of the time of tokenizing it.
    """
    letters = normalize(text[:_HEAD]).replace(" ", "")
    if len(text) > _HEAD and all(unicodedata.combining(character) for character in letters[_LETTERS:]):
        letters = normalize(text).replace(" ", "")
    return int.from_bytes(hashlib.blake2b(letters[:_LETTERS].encode(), digest_size=8).digest(), "little")
