"""Words that fill and check the sentence templates of the embedded data: words/<locale>.toml.

The templates of home-assistant-intents are made to recognize sentences: they leave the names of rooms and devices open,
and their article slots admit every gender. The values here are our own, and the small grammar rejects most of what no
speaker would say.

Each noun has a class: m, f, n for singular, M, F for plural where gender shows; s and p where it does not; x for a name
that takes no article; mp for a word whose plural looks like its singular. "f:door" is the value "door" of class f.
"""

import dataclasses
import functools
import tomllib
from pathlib import Path

VOWELS = frozenset("aeiouyhàâäéèêëîïôöùûœ")
PLURAL = frozenset("pMF")

# Lists with open-ended values in real use, as are all names of devices.
_OPEN = frozenset(
    {"area", "message", "search_query", "timer_name", "timer_command", "shopping_list_item", "todo_list_item"}
)
_FEWEST_OPEN = 6  # a list with fewer values keeps all

_NOT_DEVICES = frozenset({"area", "floor", "zone", "state", "timer_name"})

Values = dict[str, tuple[tuple[str, str], ...]]
Sets = dict[str, frozenset[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """Values and small grammar of one locale; sets and tables are empty where a language does not need them."""

    values: Values  # list -> (class, value), in place of the package's
    names: Values  # entity domain -> values of {name}
    rules: dict[str, str]  # expansion rules in place of the package's
    percent: str
    degrees: str
    polite: tuple[tuple[str, str], ...]  # what may stand before (a sentence that begins with an imperative) and after
    imperatives: frozenset[str]
    # Single words.
    nouns: dict[str, str]  # words of the templates -> class
    blocked: frozenset[str]  # words that no sentence has
    blocked_pairs: frozenset[tuple[str, ...]]  # neighboring words that no sentence has
    fixes: dict[str, str]  # respellings
    never_first: frozenset[str]
    never_last: frozenset[str]
    # Numbers.
    units: frozenset[str]  # in the singular: wrong after a number,
    plural_units: frozenset[str]
    ones: frozenset[str]  # unless it is one of these,
    compounds: frozenset[str]  # or a noun that the number qualifies follows
    # Determiners.
    determiners: dict[str, str]  # determiner -> classes it may stand before
    articles: frozenset[str]
    stacked: frozenset[tuple[str, ...]]  # determiners that may stand together
    predeterminers: frozenset[str]  # these want another determiner after them
    pronouns: frozenset[str]  # determiners that may end a sentence
    only_after: Sets  # "determiner:class" -> the words it may follow
    never_after: Sets  # "determiner:class" -> words it may not follow
    never_with: Sets  # "determiner:class" -> words that no sentence with it has
    no_apposition: bool  # a noun is never followed by an article or a place at once
    places_qualify: bool  # a place stands before what it qualifies, so no article follows it
    elided: frozenset[str]  # wrong before a vowel,
    aspirated: frozenset[str]  # but not before these words
    # Prepositions.
    prepositions: frozenset[str]
    wants_article: bool  # between preposition and value,
    quantities: frozenset[str]  # except in these ("how many of"), which want a plural
    wants_determiner: frozenset[str]  # nouns of the templates that never stand without one
    never_bare: frozenset[str]  # prepositions that want an article before a noun of the templates
    wrong_prepositions: Sets  # slot -> prepositions it may not follow
    # Agreement of the device with its verb and state.
    verbs: dict[str, str]  # verb form -> s or p
    places: frozenset[str]  # nouns that are never the device

    def is_device(self, text: str, slot: str | None, mark: str) -> bool:
        """Whether a word can be what a state is said of."""
        return bool(mark) and slot not in _NOT_DEVICES and text not in self.places

    def of_train(self) -> "Words":
        """The lists without every third value of the open ones, so dev and test have slot values unseen in train."""
        values = {key: _two_thirds(found) if key in _OPEN else found for key, found in self.values.items()}
        names = {key: _two_thirds(found) for key, found in self.names.items()}
        return dataclasses.replace(self, values=values, names=names)


@functools.cache
def load_words(locale: str) -> Words:
    """The words of a locale from its file next to this module."""
    raw = tomllib.loads((Path(__file__).parent / "words" / f"{locale}.toml").read_text(encoding="utf-8"))
    raw["nouns"] = {noun: mark for mark, nouns in raw["nouns"].items() for noun in nouns}
    fields = {}
    for field in dataclasses.fields(Words):
        value = raw.pop(field.name, None)
        if field.type is Values:
            value = {key: tuple(_split_mark(text) for text in texts) for key, texts in value.items()}
        elif field.type is Sets:
            value = {key: frozenset(texts) for key, texts in (value or {}).items()}
        elif field.name in ("blocked_pairs", "stacked"):
            value = frozenset(tuple(pair.split()) for pair in value or ())
        elif field.type == frozenset[str]:
            value = frozenset(value or ())
        elif field.name == "polite":
            value = tuple((before, after) for before, after in value)
        elif field.type is bool:
            value = bool(value)
        fields[field.name] = {} if value is None else value
    if raw:
        raise KeyError(f"words/{locale}.toml: unknown keys {sorted(raw)}")
    return Words(**fields)


def _two_thirds(values: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    if len(values) < _FEWEST_OPEN:
        return values
    return tuple(value for i, value in enumerate(values) if i % 3 != 2)


def _split_mark(text: str) -> tuple[str, str]:
    mark, colon, value = text.rpartition(":")
    return (mark, value) if colon else ("", text)
