"""Looks at a user's data before anything is prepared: all errors with file and line, counts, lengths, duplicates."""

import dataclasses
import itertools
import random
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np

from kd_jax.config.data import Prepare, Transfer
from kd_jax.data.packing import pack_stream
from kd_jax.data.prepared import check_settings
from kd_jax.data.rows import no_text
from kd_jax.data.text.files import fill_path
from kd_jax.data.text.sources import load_utterances
from kd_jax.data.text.splits import Splits, shared_with_test, text_key
from kd_jax.data.text.tokenizer import Tokenizer, train_tokenizer
from kd_jax.data.text.utterances import PARTITIONS, Utterance, shared_ids, subset_train
from kd_jax.types import UserError

SHOWN = 10  # errors that are printed; the others are counted
SAMPLE = 2000  # texts of each source and language whose lengths are measured
REMOTE = 1000  # texts that are read of a source on the hub
_WIDTH = 110
_UNBREAKABLE = "\u00a0"


class Findings(NamedTuple):
    """What a check found: the lines to print, and the number of errors."""

    lines: list[str]
    errors: int


class Errors:
    """Keeps the first messages and counts all. As a context it catches the UserError that ends its block.

    A repeated message is counted once: a missing file is not an error of each language.
    """

    def __init__(self):
        self.count, self.first = 0, list[str]()

    def add(self, error: UserError) -> None:
        if (message := str(error)) in self.first:
            return
        self.count += 1
        if self.count <= SHOWN:
            self.first.append(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, UserError):
            self.add(error)
            return True
        return False

    def lines(self) -> list[str]:
        if not self.count:
            return ["errors: none"]
        more = f", the first {SHOWN}" if self.count > SHOWN else ""
        return [f"errors: {self.count:,}{more}", *(f"  {message}" for message in self.first)]


def check(settings: Prepare, transfer: Transfer, max_train: int = 0) -> Findings:
    """Reads what `prepare` would read, in the same way, and writes nothing.

    max_train: config.finetune.max_train, labeled train utterances per locale; 0 takes all.
    An error in a record does not end it; the next record is read. Lengths are measured on SAMPLE texts of each source
    and language, drawn at random, and of a source on the hub only the first REMOTE texts are read. Raises no UserError.
    """
    errors = Errors()
    with errors:
        check_settings(settings)
    utterances: list[Utterance] = []
    with errors:
        utterances = load_utterances(settings.nlu, errors.add)
    lines: list[str] = []
    if utterances:
        lines += [
            *partitions(utterances),
            *translations(utterances),
            *inside_words(utterances),
            "",
            *labels(utterances),
            "",
            *duplicates(utterances, max_train),
            "",
        ]
    lines += [*texts(settings, transfer, utterances, errors), ""]
    return Findings(lines + errors.lines(), errors.count)


def partitions(utterances: Sequence[Utterance]) -> Iterator[str]:
    """The number of utterances by locale and partition."""
    counts = Counter((one.locale, one.partition) for one in utterances)
    locales = list(dict.fromkeys(one.locale for one in utterances))
    rows = [(locale, *(f"{counts[locale, name]:,}" for name in PARTITIONS)) for locale in locales]
    if len(locales) > 1:
        total = Counter(one.partition for one in utterances)
        rows.append(("all", *(f"{total[name]:,}" for name in PARTITIONS)))
    yield from table(("utterances", *PARTITIONS), rows)
    for locale, name in itertools.product(locales, ("dev", "test")):
        if not counts[locale, name]:
            why = "recipes are chosen on it" if name == "dev" else "students are compared on it"
            yield f"note: {locale} has no {name} utterance, and {why}"


def translations(utterances: Sequence[Utterance]) -> Iterator[str]:
    """Whether utterances of one id in several locales can be translations of each other."""
    found = shared_ids(((one.partition, one.id), one.locale, one.intent) for one in utterances)
    if found.shared and found.parallel:
        yield f"ids: {found.shared:,} are shared by locales, and are taken for translations of each other"
    elif found.shared:
        yield (
            f"note: {found.differing:,} of {found.shared:,} ids that locales share have different intents, so "
            "utterances of one id are not taken for translations"
        )


def inside_words(utterances: Sequence[Utterance]) -> Iterator[str]:
    """The number of utterances with a slot mark that begins or ends inside a word."""
    found = [one for one in utterances if one.widened]
    if found:
        example = textwrap.shorten(found[0].annotated(), 80)
        yield (
            f"note: slots that begin or end inside a word get the whole word (utterances: {len(found):,}), e.g. "
            f"{found[0].locale} {found[0].id}: {example!r}; config.nlu.character_locales tags characters instead"
        )


def label_counts(utterances: Iterable[Utterance]) -> dict[str, dict[str, Counter[str]]]:
    """Kind of label -> partition -> how often each name occurs; slots are counted by spans."""
    counts = {kind: {name: Counter[str]() for name in PARTITIONS} for kind in ("domains", "intents", "slots")}
    for one in utterances:
        counts["domains"][one.partition][one.domain] += 1
        counts["intents"][one.partition][one.intent] += 1
        counts["slots"][one.partition].update(tag[2:] for tag in one.tags if tag.startswith("B-"))
    return counts


def labels(utterances: Sequence[Utterance]) -> Iterator[str]:
    """How often each domain, intent and slot occurs in train, and those that occur in dev or test only."""
    counts = label_counts(utterances)
    for kind, found in counts.items():
        named = [f"{name}{_UNBREAKABLE}{count:,}" for name, count in found["train"].most_common()]
        line = f"{kind} in train ({len(named)}): {', '.join(named) or 'none'}"
        wrapped = textwrap.wrap(line, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        yield from (one.replace(_UNBREAKABLE, " ") for one in wrapped)  # no break between a name and its count
    for kind, found in counts.items():
        for label in sorted((found["dev"].keys() | found["test"].keys()) - found["train"].keys()):
            where = ", ".join(f"{count:,} in {name}" for name in ("dev", "test") if (count := found[name][label]))
            yield f"note: {kind[:-1]} {label!r} is not in train, so it is always predicted wrong: {where}"


def duplicates(utterances: Sequence[Utterance], max_train: int = 0) -> Iterator[str]:
    """The number of dev and test utterances whose normalized text is in an earlier partition of their locale, and of
    used labels that have the text of a test utterance.
    """
    found: dict[str, dict[tuple[str, str], Utterance]] = {name: {} for name in PARTITIONS}
    for one in utterances:
        found[one.partition].setdefault((one.locale, text_key(one.text)), one)
    totals = Counter(one.partition for one in utterances)
    yield "the same text in two partitions of a locale (case, punctuation and spaces aside)"
    for name, other in (("dev", "train"), ("test", "train"), ("test", "dev")):
        here = (one for one in utterances if one.partition == name)
        pairs = [(one, twin) for one in here if (twin := found[other].get((one.locale, text_key(one.text))))]
        example = ""
        if pairs:
            one, twin = pairs[0]
            share = f"{len(pairs) / totals[name]:.1%}"
            example = f" ({share}), e.g. {one.locale} {one.id} and {twin.id}: {textwrap.shorten(one.text, 60)!r}"
        yield f"  {name} in {other}: {len(pairs):,} of {totals[name]:,}{example}"
    used = subset_train(utterances, max_train) if max_train else utterances
    labeled = [one for one in used if one.partition == "train"]
    same, covered = shared_with_test(labeled, utterances)
    yield (
        f"  labels used that have the text of a test utterance: {same:,} of {len(labeled):,}, covering {covered:,} of "
        f"{totals['test']:,}; texts that equal them are not distilled on, but the labels stay (test_unseen is without "
        "them)"
    )


@dataclasses.dataclass
class Store:
    """One language of a source as it was read: counts of its texts, and a random sample of them."""

    source: str
    kind: str
    language: str
    whole: bool  # all of its texts were read, not only the first
    read: int = 0
    heldout: int = 0
    left_out: int = 0
    sample: list[str] = dataclasses.field(default_factory=list[str])

    @property
    def name(self) -> str:
        return f"{self.source}-{self.language}"


def read_store(settings: Prepare, splits: Splits, name: str, language: str, errors: Errors) -> Store:
    """Reads all texts of one language of a source (the first REMOTE of a source on the hub)."""
    source = settings.sources[name]
    on_hub = source.format == "huggingface" and not source.path
    store, removed, rng = Store(name, source.kind, language, whole=not on_hub), Counter[str](), random.Random(0)
    with errors:
        marked = splits.marked(name, language, removed, errors.add)
        for text, is_heldout in itertools.islice(marked, REMOTE if on_hub else None):
            store.read += 1
            store.heldout += is_heldout
            # Every text has the same chance to stay in the sample (Vitter 1985, algorithm R).
            index = store.read - 1 if store.read <= SAMPLE else rng.randrange(store.read)
            if index < SAMPLE:
                store.sample[index : index + 1] = [text]
    store.left_out = removed.total()
    return store


def texts(settings: Prepare, transfer: Transfer, utterances: Sequence[Utterance], errors: Errors) -> Iterator[str]:
    """Counts and lengths of the texts of all sources, and the padding that packed rows avoid."""
    # Of a data set on the hub only the beginning is read, so it is not downloaded.
    sources = {name: dataclasses.replace(source, streaming=True) for name, source in settings.sources.items()}
    settings = dataclasses.replace(settings, sources=sources)
    splits = Splits(settings, utterances)
    spoken = {name for one in utterances for name in (one.locale, one.locale.split("-")[0])}
    stores = [
        read_store(settings, splits, name, language, errors)
        for name, source in settings.sources.items()
        for language in source.languages
        # Unreadable labeled data were reported already; that they give no text is not an error of its own.
        if source.format != "utterances" or language in spoken or not errors.count
    ]
    stores = [store for store in stores if store.read]
    if not stores:
        return
    for one in [] if errors.count else stores:  # missing text is expected after a broken record
        for split, count in (("train", one.read - one.heldout), ("heldout", one.heldout)):
            if one.whole and not count and (split == "train" or one.kind == "generic"):
                errors.add(no_text(one.source, one.language, split, {"equal to dev or test": one.left_out}))
    rows: list[tuple[str, ...]] = []
    for one in stores:
        words = [len(text.split()) for text in one.sample]
        rows.append((one.name, f"{one.read:,}", f"{one.heldout:,}", f"{one.left_out:,}", *spread(words)))
    yield from table(("texts", "kept", "of them held out", "left out", "words: mean", "95 %", "longest"), rows)
    yield "left out: equal to a dev or test utterance (case, punctuation and spaces aside)"
    yield from languages(stores, transfer.language_mix)
    yield ""
    with errors:
        yield from lengths(settings, stores)


def languages(stores: Sequence[Store], mix: str) -> Iterator[str]:
    """Languages in which the mix needs text of a kind that has none."""
    found = {kind: {one.language.split("-")[0] for one in stores if one.kind == kind} for kind in ("generic", "task")}
    if not all(found.values()):
        return
    for kind, other in (("generic", "task"), ("task", "generic")):
        missing = sorted(found[other] - found[kind])
        if missing and mix in (other, "uniform"):
            needed = f"transfer.language_mix={mix!r} wants {kind} text of them wherever {kind} text has a share"
            yield f"note: no {kind} text in {', '.join(missing)}; {needed}"


def lengths(settings: Prepare, stores: Sequence[Store]) -> list[str]:
    """Lengths in tokens of the tokenizer that config.tokenizer names; one to be trained is trained on the samples."""
    length = settings.rows.length
    if settings.tokenizer.kind == "load":
        tokenizer = Tokenizer.load(fill_path(settings.tokenizer.path, key="config.tokenizer.path"))
        about = f"{settings.tokenizer.path}, {tokenizer.vocab_size:,} tokens"
    else:
        sampled = itertools.chain.from_iterable(one.sample for one in stores)
        tokenizer = train_tokenizer(sampled, settings.tokenizer.vocab_size)
        about = f"{tokenizer.vocab_size:,} tokens, trained on the sampled texts alone"
    rows: list[tuple[str, ...]] = []
    for one in stores:
        encoded = tokenizer.encode(one.sample)
        sizes = np.array([len(ids) for ids in encoded])
        alone, packed = padding(encoded, tokenizer, length, settings.rows.open_rows)
        cut = f"{np.mean(sizes > length - 2):.1%}"
        rows.append((one.name, *spread(sizes), cut, f"{alone:.0%}", f"{packed:.0%}"))
    head = ("tokens", "mean", "95 %", "longest", "cut", "padding: one text per row", "packed")
    return [
        *table(head, rows),
        f"tokenizer: {about}; rows of {length} tokens (config.rows.length), longer texts are cut into several",
    ]


def padding(encoded: list[np.ndarray], tokenizer: Tokenizer, length: int, open_rows: int) -> tuple[float, float]:
    """The share of padding in rows of `length` tokens with one text each, and with the texts packed."""
    ends = (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id)
    segment_ids = np.concatenate([ids for _, ids in pack_stream([encoded], length, *ends, open_rows)])
    if not len(segment_ids):
        return 0.0, 0.0
    real, segments = np.count_nonzero(segment_ids), int(segment_ids.max(axis=1).sum())
    return 1 - real / (segments * length), 1 - real / segment_ids.size


def spread(sizes: Sequence[int] | np.ndarray) -> tuple[str, str, str]:
    """Mean, 95th percentile and largest."""
    return f"{np.mean(sizes):.1f}", f"{np.percentile(sizes, 95):.0f}", f"{np.max(sizes):,}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in (head, *rows)
    ]
