"""The small grammar that drawn sentences must pass: agreement, articles and prepositions, by `embedded_words`."""

from collections.abc import Sequence
from typing import NamedTuple

from kd_jax.data.embedded.words import PLURAL, VOWELS, Words


class Word(NamedTuple):
    """One whitespace word; `slot` is None outside the slots, `value` numbers the values of a sentence from 1, `mark` is
    the class of a noun, or of a value on its first word (see `embedded_words`)."""

    text: str
    slot: str | None
    value: int
    mark: str


class Check:
    """The small grammar of a locale, applied to one sentence."""

    def __init__(self, words: Sequence[Word], table: Words):
        self._words, self._table = words, table
        self._texts = [word.text for word in words]

    def passes(self) -> bool:
        if not self._texts or not self._table.blocked.isdisjoint(self._texts):
            return False
        if len(self._texts) > 1 and (
            self._texts[0] in self._table.never_first or self._texts[-1] in self._table.never_last
        ):
            return False
        pairs = zip(self._words, self._words[1:])
        return (
            not any(self._pair_is_wrong(a, b) for a, b in pairs)
            and all(
                self._is_determined(i) and self._is_placed(i) and self._is_counted(i) for i in range(len(self._words))
            )
            and self._numbers_agree()
        )

    def _pair_is_wrong(self, a: Word, b: Word) -> bool:
        table = self._table
        if a.text == b.text or (a.text, b.text) in table.blocked_pairs:
            return True
        return a.text in table.elided and b.text[0] in VOWELS and b.text not in table.aspirated

    def _is_determined(self, i: int) -> bool:
        """Whether word i, if a determiner, fits the noun after it in gender and number, and the word before in case."""
        table, text = self._table, self._texts[i]
        before = self._words[i - 1] if i else Word("", None, 0, "")
        if table.elided and text[:2] in ("l'", "d'"):
            return text[2:3] in VOWELS and not (text[0] == "l" and (self._words[i].mark in PLURAL or _is_noun(before)))
        if text not in table.determiners or (self._words[i].slot and text not in table.ones):
            return True
        follows = (table.no_apposition and _is_noun(before)) or (table.places_qualify and _is_place(before))
        if follows and text in table.articles:
            return False
        if i + 1 == len(self._words):
            return text in table.pronouns
        after = self._words[i + 1]
        if (after.slot == "state" and not after.mark) or (
            text in table.predeterminers and after.text not in table.determiners
        ):
            return False
        for j in range(i + 1, min(i + 4, len(self._words))):
            if self._texts[j] in table.determiners and not self._words[j].slot:
                if j > i + 1:
                    return True
                if (text, self._texts[j]) not in table.stacked:
                    return False
            elif self._words[j].mark:
                return any(self._fits(text, mark, before.text) for mark in self._words[j].mark)
            elif self._texts[j] in table.verbs:
                return True
        return True

    def _fits(self, determiner: str, mark: str, before: str) -> bool:
        table, key = self._table, f"{determiner}:{mark}"
        return (
            mark in table.determiners[determiner]
            and before in table.only_after.get(key, (before,))
            and before not in table.never_after.get(key, ())
            and table.never_with.get(key, frozenset()).isdisjoint(self._texts)
        )

    def _is_counted(self, i: int) -> bool:
        """Whether a unit is singular after one or before a noun it qualifies ("a 5 minute timer"), else plural."""
        table, text = self._table, self._texts[i]
        if not i or self._words[i].slot or not self._words[i - 1].slot:
            return True
        after = self._texts[i + 1] if i + 1 < len(self._texts) else ""
        wants_singular = self._texts[i - 1] in table.ones or after in table.compounds
        return not ((text in table.units and not wants_singular) or (text in table.plural_units and wants_singular))

    def _is_placed(self, i: int) -> bool:
        """Whether a noun, or a value's first word, has the preposition that suits it, and the article that wants."""
        word, table = self._words[i], self._table
        if not i or not (word.slot or word.mark) or (word.slot and self._words[i - 1].value == word.value):
            return True
        before = self._words[i - 1]
        if not word.slot:
            if word.text in table.wants_determiner and before.text not in table.determiners and not before.slot:
                return False
            if i > 1 and f"{self._texts[i - 2]} {before.text}" in table.quantities:
                return word.mark in PLURAL
            return before.text not in table.never_bare or bool(before.slot)
        if table.no_apposition and (_is_place(word) or word.slot == "name") and _is_noun(before):
            return before.text in table.places
        j = i - 1
        if before.text in table.prepositions and not before.slot:
            if j and f"{self._texts[j - 1]} {before.text}" in table.quantities:
                return word.mark in PLURAL
            if table.wants_article and word.mark not in ("", "x") and not word.text.startswith("l'"):
                return False
        elif j and before.text in table.articles:
            j -= 1
        if _is_place(word) and self._words[j].slot == "state":
            return False
        is_particle = j and self._texts[j - 1] in table.imperatives  # turn on the kitchen lights
        return bool(is_particle) or self._texts[j] not in table.wrong_prepositions.get(word.slot, ())

    def _numbers_agree(self) -> bool:
        """Whether verb and state word agree with the first device that the sentence names."""
        table = self._table
        marks = (word.mark for word in self._words if table.is_device(word.text, word.slot, word.mark))
        mark = next(marks, "")
        if len(mark) != 1 or mark == "x":
            return True
        verbs = {table.verbs[text] for text in self._texts if text in table.verbs}
        states = {word.mark for word in self._words if word.slot == "state" and word.mark}
        return verbs <= {"p" if mark in PLURAL else "s"} and states <= {mark}


def _is_noun(word: Word) -> bool:
    return (bool(word.mark) and not word.slot) or word.slot in ("name", "device_class")


def _is_place(word: Word) -> bool:
    return word.slot in ("area", "floor")
