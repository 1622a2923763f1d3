"""The default data, which needs no download beyond pip: smart-home utterances and software messages in four languages.

Labeled utterances are drawn from the sentence templates of home-assistant-intents (Apache-2.0) and split by template:
all sentences of a template are in one partition, and a third of the names of rooms, devices, songs and the like never
occur in train. Generic text is the translated messages of permissively licensed packages (`embedded_generic`). Both are
the same on every call, in every process and on every machine, as long as the package versions are.
"""

import functools
import hashlib
import random
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kd_jax.data.embedded.generic import messages, require
from kd_jax.data.text.utterances import Utterance
from kd_jax.types import UserError

if TYPE_CHECKING:  # hassil, which it imports, is needed for this data only
    from kd_jax.data.embedded.grammar import Word
    from kd_jax.data.embedded.templates import Grammar, Template

Row = tuple[str, str, tuple[str, ...], tuple[str, ...]]  # domain, intent, words, tags

LOCALES = ("de-DE", "en-US", "es-ES", "fr-FR")

# Utterances a locale that the draw aims at; duplicates and templates with few sentences keep it below.
_TARGETS = {"test": 560, "dev": 360, "train": 2300}
_SHARES = {"test": 0.22, "dev": 0.14}  # of the templates of an intent
_ATTEMPTS = 60  # draws for one utterance


def embedded_utterances(locales: Sequence[str]) -> list[Utterance]:
    """Labeled utterances of the given locales, by locale, then partition (train, dev, test).

    Ids are unique within a locale and not parallel across locales. Raises UserError for a locale that is not in LOCALES
    and for a missing package.
    """
    for locale in locales:
        if locale not in LOCALES:
            raise UserError(
                f"nlu.locales: {locale!r} is not in the embedded data, choose from {', '.join(LOCALES)} "
                "or set nlu.format to other data"
            )
    require("hassil", "home_assistant_intents")
    return [utterance for locale in locales for utterance in _render(locale)]


def embedded_texts(language: str) -> Iterator[str]:
    """Generic sentences of a language ("de" or "de-DE") in a fixed shuffled order, without repeats.

    Raises UserError for a language without embedded text and for a missing package.
    """
    short = language.split("-")[0]
    if short not in {locale.split("-")[0] for locale in LOCALES}:
        known = ", ".join(locale.split("-")[0] for locale in LOCALES)
        raise UserError(f"sources: the embedded format has no generic text for {language!r}, choose from {known}")
    return iter(messages(short))


@functools.cache
def _render(locale: str) -> tuple[Utterance, ...]:
    from kd_jax.data.embedded.templates import Grammar

    partitions = _split(Grammar(locale).templates(), locale)
    seen: set[str] = set()
    drawn: dict[str, list[Row]] = {}
    for (
        partition,
        target,
    ) in _TARGETS.items():  # test first: a sentence that two templates give stays where it is held out
        drawn[partition] = []
        grammar = Grammar(locale, train=partition == "train")
        for template, quota in _quotas(partitions[partition], target):
            rng = _rng(locale, template.key)
            for _ in range(quota):
                fresh = _draw_fresh(grammar, template, rng, seen)
                if fresh is None:
                    break
                drawn[partition].append(fresh)
    known = {intent for _, intent, _, _ in drawn["train"]}
    utterances = []
    for partition in ("train", "dev", "test"):
        rows = [row for row in drawn[partition] if row[1] in known]
        rows.sort(key=lambda row: _digest(locale, " ".join(row[2])))
        for domain, intent, words, tags in rows:
            number, text = str(len(utterances)), " ".join(words)
            utterances.append(Utterance(number, locale, partition, domain, intent, text, words, tags))
    return tuple(utterances)


def _draw_fresh(grammar: "Grammar", template: "Template", rng: random.Random, seen: set[str]) -> Row | None:
    """(domain, intent, words, tags) of a sentence not in `seen`, which it joins; None after too many attempts."""
    for _ in range(_ATTEMPTS):
        sentence = grammar.draw(template, rng)
        if sentence is None:
            continue
        domain, intent, words = sentence
        key = "".join(c for c in unicodedata.normalize("NFKC", " ".join(w.text for w in words)) if c.isalnum())
        if key not in seen:
            seen.add(key)
            return domain, intent, tuple(word.text for word in words), _tags(words)
    return None


def _tags(words: Sequence["Word"]) -> tuple[str, ...]:
    tags, last = [], 0
    for word in words:
        tags.append("O" if word.slot is None else f"{'I' if word.value == last else 'B'}-{word.slot}")
        last = word.value
    return tuple(tags)


def _split(templates: Sequence["Template"], locale: str) -> dict[str, list["Template"]]:
    """Templates by partition: those of an intent and device are dealt in hashed order, so that each gets some;
    a single one is train's."""
    groups = defaultdict(list)
    for template in templates:
        groups[template.label].append(template)
    partitions: dict[str, list[Template]] = {"test": [], "dev": [], "train": []}
    for group in groups.values():
        group.sort(key=lambda template: _digest(locale, template.key))
        start = 0
        for partition, share in _SHARES.items():
            count = max(round(share * len(group)), int(len(group) >= (2 if partition == "test" else 4)))
            partitions[partition] += group[start : start + count]
            start += count
        partitions["train"] += group[start:]
    return partitions


def _quotas(templates: Sequence["Template"], target: int) -> Iterator[tuple["Template", int]]:
    """(template, sentences to draw): an intent's share goes by the square root of its templates, so that the hundreds
    of ways to change a timer do not drown the rest."""
    groups = defaultdict(list)
    for template in templates:
        groups[template.label].append(template)
    total = sum(len(group) ** 0.5 for group in groups.values())
    for group in groups.values():
        wanted = target * len(group) ** 0.5 / total
        for i, template in enumerate(group):
            quota = round(wanted * (i + 1) / len(group)) - round(wanted * i / len(group))
            yield template, max(quota, 1)


def _rng(*names: str) -> random.Random:
    return random.Random(int(_digest(*names)[:16], 16))


def _digest(*names: str) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
