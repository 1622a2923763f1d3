"""The embedded data: the same everywhere, split by template, well formed, and readable in each language."""

import hashlib
import json
import random
import re
import struct
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from kd_jax.data.embedded import generic as embedded_generic
from kd_jax.data.embedded import templates as embedded_templates
from kd_jax.data.embedded import utterances as embedded
from kd_jax.data.embedded.utterances import LOCALES, embedded_texts, embedded_utterances
from kd_jax.data.embedded.words import load_words
from kd_jax.data.text.utterances import parse_annotated
from kd_jax.types import UserError

GOLDEN_UTTERANCES = "cf133cf0f4cc2f5a"
GOLDEN_TEXTS = "112dd99d6b779ffb"


def fingerprint(lines) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def utterances():
    return embedded_utterances(LOCALES)


def by_locale(utterances):
    groups = defaultdict(list)
    for utterance in utterances:
        groups[utterance.locale].append(utterance)
    return groups


def normalized(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def test_golden(utterances):
    sample = [f"{u.id} {u.partition} {u.domain} {u.intent} {u.annotated()}" for u in utterances[::40]]
    texts = [text for locale in LOCALES for text in list(embedded_texts(locale))[::40]]
    message = (
        "the embedded data has changed: if you meant this (new words, templates or package versions), take over the "
        "new value, and say in the changelog that results on the embedded data before and after do not compare"
    )
    assert (fingerprint(sample), fingerprint(texts)) == (GOLDEN_UTTERANCES, GOLDEN_TEXTS), message


def test_the_same_in_another_process_with_another_hash_seed(utterances):
    program = (
        "from kd_jax.data.embedded.utterances import embedded_texts, embedded_utterances; import json; "
        "rows = [[u.id, u.annotated()] for u in embedded_utterances(['es-ES'])]; "
        "print(json.dumps(rows + list(embedded_texts('es'))))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONHASHSEED": "77"}, capture_output=True, text=True, check=True
    )
    here = [[u.id, u.annotated()] for u in utterances if u.locale == "es-ES"] + list(embedded_texts("es"))
    assert json.loads(result.stdout) == here


def test_sizes_and_labels(utterances):
    for locale, group in by_locale(utterances).items():
        sizes = Counter(u.partition for u in group)
        assert 1200 <= sizes["train"] <= 2500, (locale, sizes)
        assert 250 <= sizes["dev"] <= 400, (locale, sizes)
        assert 400 <= sizes["test"] <= 600, (locale, sizes)
        train, test = ([u for u in group if u.partition == p] for p in ("train", "test"))
        assert {u.intent for u in group} == {u.intent for u in train}
        assert {u.domain for u in test} <= {u.domain for u in train}
        assert len({u.domain for u in test}) >= 15 and len({u.intent for u in test}) >= 45
        # An intent belongs to one domain, as in MASSIVE.
        assert len({(u.domain, u.intent) for u in group}) == len({u.intent for u in group})


def test_each_utterance_is_valid(utterances):
    for utterance in utterances:
        assert utterance.text == " ".join(utterance.words) == utterance.text.lower()
        words, tags, _ = parse_annotated(utterance.annotated(), utterance.text)
        assert (words, tags) == (utterance.words, utterance.tags)
        assert not set(utterance.text) & set("[]{}<>|%°()"), utterance.text
    for group in by_locale(utterances).values():
        assert len({u.id for u in group}) == len(group)


def test_dev_and_test_have_slot_values_that_train_never_has(utterances):
    for locale, group in by_locale(utterances).items():
        names = load_words(locale).names["light"]
        values = defaultdict(set)
        for u in group:
            values[u.partition] |= {" ".join(u.words[s.start : s.end]) for s in u.spans if s.slot == "name"}
        held_out = {text for _, text in names[2::3]}
        assert not values["train"] & held_out and values["train"] & {text for _, text in names}, locale
        assert (values["test"] | values["dev"]) & held_out, locale


def test_no_sentence_is_repeated(utterances):
    for locale, group in by_locale(utterances).items():
        repeated = [text for text, count in Counter(normalized(u.text) for u in group).items() if count > 1]
        assert not repeated, (locale, repeated[:5])


@pytest.mark.parametrize("locale", LOCALES)
def test_partitions_share_no_template(locale):
    templates = embedded_templates.Grammar(locale).templates()
    partitions = embedded._split(templates, locale)
    keys = {name: {template.key for template in group} for name, group in partitions.items()}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["dev"] and not keys["dev"] & keys["test"]
    assert set.union(*keys.values()) == {template.key for template in templates}
    # The order of the package's file does not matter.
    shuffled = list(templates)
    random.Random(5).shuffle(shuffled)
    again = embedded._split(shuffled, locale)
    moved = sum(keys[name] != {template.key for template in again[name]} for name in keys)
    assert moved == 0


def grammar_with(monkeypatch, locale: str, *sentences: str):
    """A grammar of the locale's words and these templates of one light intent."""
    grammar = embedded_templates.Grammar(locale)
    entry = {"sentences": list(sentences), "slots": {"domain": "light"}}
    monkeypatch.setitem(grammar._data, "intents", {"HassTurnOn": {"data": [entry]}})
    return grammar


def drawn(grammar, count: int = 300) -> list[str]:
    rng = random.Random(0)
    (template,) = grammar.templates()
    sentences = (grammar.draw(template, rng) for _ in range(count))
    return [" ".join(word.text for word in words) for _, _, words in filter(None, sentences)]


def test_the_walk_knows_every_expression(monkeypatch):
    grammar = grammar_with(monkeypatch, "en-US", "(dim|light) [up] ((slowly;now)) {area}[ please]")
    found = {
        sentence
        for sentence in drawn(grammar)
        if "kitchen" in sentence and not sentence.startswith(("hey", "can", "could"))
    }
    assert "dim up slowly now kitchen" in found and "light now slowly kitchen please" in found
    assert all(
        set(sentence.split()) <= {"dim", "light", "up", "slowly", "now", "kitchen", "please"} for sentence in found
    )


@pytest.mark.parametrize(
    ("locale", "template", "right", "wrong"),
    [
        (
            "de-DE",
            "mach (der|die|das|dem|den) (lampe|ventilator|licht) an",
            {"die lampe", "den ventilator", "das licht"},
            None,
        ),
        (
            "de-DE",
            "licht (in|im) [der|die|das] {area} an",
            set(),
            {"der wohnzimmer", "im küche", "in die", "in das", "im der"},
        ),
        ("es-ES", "enciende (el|la|los|las) (luz|luces|ventilador)", {"la luz", "las luces", "el ventilador"}, None),
        ("fr-FR", "allume (le|la|les) (lampe|lampes|ventilateur)", {"la lampe", "les lampes", "le ventilateur"}, None),
        ("en-US", "wait {timer_minutes:minutes} (minute|minutes) longer", set(), {"minute longer"}),
        ("en-US", "start (a|the) {timer_minutes:minutes} (minute|minutes) timer", set(), {"minutes timer"}),
    ],
)
def test_grammar_rejects_what_does_not_agree(monkeypatch, locale, template, right, wrong):
    sentences = drawn(grammar_with(monkeypatch, locale, template), 600)
    assert sentences
    if wrong is None:
        articles = {
            " ".join(s.replace("bitte ", "").split()[1:3])
            for s in sentences
            if s.split()[0] in ("mach", "enciende", "allume")
        }
        assert articles == right
    else:
        assert not [s for s in sentences for phrase in wrong if phrase in s]


def test_a_french_elided_article_belongs_to_the_slot_word(monkeypatch):
    grammar = grammar_with(monkeypatch, "fr-FR", "éclaire (l'|la ){area}")
    rng = random.Random(0)
    (template,) = grammar.templates()
    found = [grammar.draw(template, rng) for _ in range(400)]
    words = [word for draw in found if draw for word in draw[2] if word.slot]
    assert {"l'entrée", "cuisine"} <= {word.text for word in words}
    assert not {"entrée", "l'cuisine"} & {word.text for word in words}


def test_texts():
    for locale in LOCALES:
        texts = list(embedded_texts(locale))
        assert texts == list(embedded_texts(locale.split("-")[0]))
        assert len(texts) >= 1000, (locale, len(texts))
        assert len({normalized(text) for text in texts}) == len(texts)
        for text in texts:
            assert len(re.findall(r"[^\W\d_]+", text)) >= 3 and not set(text) & set("{}<>|\n"), text
    english, german = set(embedded_texts("en")), set(embedded_texts("de"))
    assert "This field is required." in english and "Dieses Feld ist zwingend erforderlich." in german
    assert len(english & german) < 20


def test_sentences_of_a_message():
    def sentences(text):
        return list(embedded_generic._sentences(text))

    assert sentences("<b>Save</b> the page first.<br/>Then close &amp; go home.") == [
        "Save the page first.",
        "Then close & go home.",
    ]
    assert sentences("The %(name)s was deleted. You may add another one.") == ["You may add another one."]
    assert sentences("Home page") == sentences("See https://example.org/x for all of it.") == []


def test_catalog_reader():
    pairs = [(b"", b"Project: x"), (b"menu\x04Save page", b"Seite sichern"), (b"one day\x00days", b"ein Tag\x00Tage")]
    head = 28
    tables, blob = b"", b""
    for column in (0, 1):
        for pair in pairs:
            tables += struct.pack("<2I", len(pair[column]), head + 16 * len(pairs) + len(blob))
            blob += pair[column] + b"\0"
    data = struct.pack("<7I", 0x950412DE, 0, len(pairs), head, head + 8 * len(pairs), 0, 0) + tables + blob
    assert list(embedded_generic._read_catalog(data)) == [
        ("Save page", "Seite sichern"),
        ("one day", "ein Tag"),
        ("days", "Tage"),
    ]


def test_unknown_locale_and_language():
    with pytest.raises(UserError, match=r"nlu\.locales.*'sw-KE'.*de-DE, en-US, es-ES, fr-FR"):
        embedded_utterances(["en-US", "sw-KE"])
    with pytest.raises(UserError, match=r"'sw'.*de, en, es, fr"):
        embedded_texts("sw")


def test_missing_package(monkeypatch):
    monkeypatch.setattr(embedded_generic.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'hassil.*pip install "kd_jax\[demo\]"'):
        embedded_utterances(["en-US"])
    embedded_generic.messages.cache_clear()
    with pytest.raises(UserError, match=r'Django.*pip install "kd_jax\[demo\]"'):
        embedded_texts("de")
