"""Sentences from the templates of home-assistant-intents, by a random walk over the expressions that hassil parses.

A template is made to recognize: it accepts far more than people say. So a drawn sentence is held against the locale's
small grammar (`embedded_grammar`) and thrown away if it fails.
"""

import dataclasses
import functools
import importlib.resources
import json
import random
import re
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from hassil.expression import Alternative, Expression, Group, ListReference, Permutation, RuleReference, TextChunk
from hassil.parse_expression import parse_sentence
from unicode_rbnf import RbnfEngine

from kd_jax.data.embedded.grammar import Check, Word
from kd_jax.data.embedded.words import Words, load_words

T = TypeVar("T")

# Home Assistant's entity domains -> ours: those with a handful of templates join their nearest neighbor.
_DOMAINS = {
    "binary_sensor": "sensor",
    "button": "scene",
    "input_button": "scene",
    "script": "scene",
    "input_boolean": "switch",
    "valve": "cover",
    "todo": "lists",
    "media_player": "media",
    "lawn_mower": "robots",
    "vacuum": "robots",
}
# Domain of the intents whose templates name no entity domain, by the first of these words in the intent's name.
_INTENT_DOMAINS = {
    "timer": "timer",
    "date": "datetime",
    "time": "datetime",
    "list": "lists",
    "media": "media",
    "volume": "media",
    "climate": "climate",
    "light": "light",
    "fan": "fan",
    "weather": "weather",
    "vacuum": "robots",
    "mower": "robots",
    "position": "cover",
    "state": "sensor",
}
_NUMBERS = {
    "temperature": tuple(range(15, 27)),
    "color_temperature": tuple(range(2000, 6600, 500)),
    "timer_seconds": (5, 10, 15, 20, 30, 40, 45, 50, 90),
    "timer_minutes": (2, 3, 4, 5, 7, 8, 10, 12, 15, 20, 25, 30, 35, 40, 45, 50, 90),
    "timer_hours": (2, 3, 4, 5, 6, 8, 10, 12),
}
_PERCENTAGES = tuple(range(5, 101, 5))
_POLITE_SHARE = 0.15
_WRITTEN_OUT_SHARE = 0.7


class Piece(NamedTuple):
    """A stretch of a drawn sentence: text of the template, or the value of a slot with its class."""

    text: str
    slot: str | None = None
    mark: str = ""


@dataclasses.dataclass(frozen=True)
class Template:
    """One sentence template of one intent and the groups of entity domains it stands for."""

    intent: str
    text: str
    domains: tuple[tuple[str, ...], ...]

    @property
    def key(self) -> str:
        """What the partitions are split by."""
        return f"{self.intent}\n{self.text}"

    @property
    def label(self) -> str:
        """The intent of its sentences; where it stands for several kinds of device, of the first."""
        return _labels(self.domains[0][0], self.intent)[1]


def pick(items: Sequence[T], rng: random.Random) -> T:
    """A uniform choice through rng.random() alone, whose stream Python keeps from version to version."""
    return items[int(rng.random() * len(items))]


class Grammar:
    """The templates, lists and rules of one locale, ready to draw sentences from.

    train: only with the slot values of train; dev and test also have others.
    """

    def __init__(self, locale: str, train: bool = False):
        language = locale.split("-")[0]
        resource = importlib.resources.files("home_assistant_intents") / "data" / f"{language}.json"
        self._data = json.loads(resource.read_text(encoding="utf-8"))
        words = load_words(locale)
        self._words: Words = words.of_train() if train else words
        self._rules = {**self._data["expansion_rules"], **self._words.rules}
        engine = RbnfEngine.for_language(language)
        self._in_words = functools.cache(lambda number: engine.format_number(number).text.replace("\u00ad", ""))
        self._parse = functools.cache(lambda text: parse_sentence(text).expression)

    def templates(self) -> list[Template]:
        """All templates, in the order of the package's file."""
        found: dict[tuple[str, str], dict[tuple[str, ...], None]] = {}
        for intent, body in self._data["intents"].items():
            for entry in body["data"]:
                domains = entry.get("slots", {}).get("domain") or entry.get("requires_context", {}).get("domain") or ""
                domains = (domains,) if isinstance(domains, str) else tuple(domains)
                for text in entry["sentences"]:
                    found.setdefault((intent, text), {})[domains] = None
        return [Template(intent, text, tuple(domains)) for (intent, text), domains in found.items()]

    def draw(self, template: Template, rng: random.Random) -> tuple[str, str, list[Word]] | None:
        """One drawn sentence as (domain, intent, words), or None if it does not pass the grammar."""
        entity = pick(pick(template.domains, rng), rng)
        pieces: list[Piece] = []
        self._walk(self._parse(template.text), rng, entity, pieces)
        words = self._join(pieces)
        if words is None or not Check(words, self._words).passes():
            return None
        if rng.random() < _POLITE_SHARE:
            before, after = pick(self._words.polite, rng)
            before = before if words[0].text in self._words.imperatives else ""
            words = [_free(text) for text in before.split()] + words + [_free(text) for text in after.split()]
        domain, intent = _labels(entity, template.intent)
        return domain, intent, words

    def _walk(self, node: Expression, rng: random.Random, entity: str, pieces: list[Piece]) -> None:
        if isinstance(node, TextChunk):
            pieces.append(Piece(node.original_text))
        elif isinstance(node, Alternative):
            self._walk(pick(node.items, rng), rng, entity, pieces)
        elif isinstance(node, Permutation):
            rest = list(node.items)
            while rest:
                self._walk(rest.pop(int(rng.random() * len(rest))), rng, entity, pieces)
        elif isinstance(node, Group):
            for item in node.items:
                self._walk(item, rng, entity, pieces)
        elif isinstance(node, RuleReference):
            self._walk(self._parse(self._rules[node.rule_name]), rng, entity, pieces)
        elif isinstance(node, ListReference):
            mark, text = self._value(node.list_name, rng, entity, pieces)
            pieces.append(Piece(text, _slot(node), mark))
        else:
            raise TypeError(f"hassil expression {type(node).__name__} is not known here")

    def _value(self, name: str, rng: random.Random, entity: str, before: Sequence[Piece]) -> tuple[str, str]:
        """(class, text) of one value of a list, agreeing with the words before it where some value does."""
        table = self._words.names if name == "name" else self._words.values
        values = table.get(entity if name == "name" else name, ())
        if values:
            wanted = self._wanted(before, is_state=name.endswith("_states"))
            agreeing = [value for value in values if not value[0] or set(value[0]) & set(wanted)] if wanted else ()
            return pick(agreeing or values, rng)
        body = self._data["lists"][name]
        if "range" in body:
            number = pick(_NUMBERS.get(name, _PERCENTAGES), rng)
            if rng.random() < _WRITTEN_OUT_SHARE:
                return "", self._in_words(number)
            return "", str(number)
        value = pick(body["values"], rng)
        pieces: list[Piece] = []
        self._walk(self._parse(value["in"] if isinstance(value, dict) else value), rng, entity, pieces)
        return "", "".join(piece.text for piece in pieces)

    def _wanted(self, before: Sequence[Piece], is_state: bool) -> str:
        """The classes that the next value may have: the device's for a state, else those of the determiner before."""
        if is_state:
            words = self._join(before) or ()
            return next((word.mark for word in words if self._words.is_device(word.text, word.slot, word.mark)), "")
        last = "".join(piece.text for piece in before[-4:]).lower().split()[-1:]
        return self._words.determiners.get(last[0], "") if last else ""

    def _join(self, pieces: Sequence[Piece]) -> list[Word] | None:
        """Lower-case whitespace words; None where a value shares a word with anything but an elided article."""
        words: list[Word] = []
        is_open, after_slot, values = False, False, 0
        for piece in pieces:
            text = piece.text.lower()
            if piece.slot is None:
                text = text.replace("%", f" {self._words.percent} ").replace("°", f" {self._words.degrees} ")
                text = " " + text[1:] if after_slot and text.startswith("-") else text
            values += piece.slot is not None
            for i, part in enumerate(text.split()):
                word = Word(part, piece.slot, values if piece.slot else 0, piece.mark if i == 0 else "")
                if not (is_open and i == 0 and not text[0].isspace()):
                    words.append(word)
                elif not words[-1].slot and (not word.slot or words[-1].text.endswith("'")):
                    words[-1] = word._replace(text=words[-1].text + part)
                else:
                    return None
            if text:
                is_open, after_slot = not text[-1].isspace(), piece.slot is not None
        return [self._respell(word) for word in words]

    def _respell(self, word: Word) -> Word:
        text = self._words.fixes.get(word.text, word.text)
        mark = word.mark or ("" if word.slot else self._words.nouns.get(text, ""))
        return Word(text, word.slot, word.value, mark)


def _free(text: str) -> Word:
    return Word(text, None, 0, "")


def _slot(node: ListReference) -> str:
    """Slot name of a list reference: the template's own name for it, kept apart where that is just "name"."""
    if node.list_name == "todo_list_item":
        return "todo_item"
    return node.list_name if node.slot_name == "name" else node.slot_name


def _labels(entity: str, intent: str) -> tuple[str, str]:
    """(domain, intent): HassTurnOn of a light is (light, light_turn_on), HassStartTimer (timer, start_timer)."""
    parts = re.findall(r"[A-Z][a-z]*", intent.removeprefix("Hass"))
    name = "_".join(parts).lower()
    domain = entity or next((value for word, value in _INTENT_DOMAINS.items() if word in name), "assistant")
    domain = _DOMAINS.get(domain, domain)
    return domain, name if domain in name else f"{domain}_{name}"
