"""Settings of the text: where it comes from, how it becomes rows, how rows are mixed and masked."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ml_collections import ConfigDict

from kd_jax.config.settings import Invalid, Settings, check, one_of, plain_names, read

KINDS = ("generic", "task")  # of a source's text
# Locales that MASSIVE tags character by character, since they write no spaces between words.
CHARACTER_LOCALES = ("ja-JP", "zh-CN", "zh-TW")
SOURCE_FORMATS = ("embedded", "text", "jsonl", "parquet", "huggingface", "tfds", "utterances")


@dataclass(frozen=True)
class Nlu:
    """Labeled utterances of the task: `config.nlu`.

    format: embedded | massive | massive_parquet | huggingface.
    path: folder of <locale>.jsonl files, the official tarball, or Parquet files; ${VARIABLE} is filled in.
    name: huggingface: data set on the hub, or NAME@REVISION.
    locales: e.g. ("en-US", "de-DE").
    character_locales: locales whose slots are spans of characters, not of words, e.g. ("th-TH", "zh-HK").
    max_train: train utterances per locale, the same ids in every locale; 0 keeps all.
    """

    format: str = "embedded"
    path: str = ""
    name: str = ""
    locales: tuple[str, ...] = ("en-US",)
    character_locales: tuple[str, ...] = CHARACTER_LOCALES
    max_train: int = 0

    def __post_init__(self):
        one_of(self.format, ("embedded", "massive", "massive_parquet", "huggingface"), "format")
        once = 0 < len(self.locales) == len(set(self.locales))
        check(once, "locales", f"{self.locales} is empty or names a locale twice", "name each locale once")
        plain_names(self.locales, "locales")
        plain_names(self.character_locales, "character_locales")
        both = ", ".join(locale for locale in self.locales if locale in self.character_locales)
        words = self.format != "embedded" or not both
        check(words, "character_locales", f"the embedded data are tagged by word, also {both}", f"leave {both} out")
        check(self.max_train >= 0, "max_train", f"{self.max_train} is negative", "0 keeps all")


@dataclass(frozen=True)
class Source:
    """One source of text in some languages: `config.sources.<name>`.

    kind: generic | task.
    format: embedded | text | jsonl | parquet | huggingface | tfds | utterances (the train partition of config.nlu).
    languages: languages or locales, e.g. ("de", "es") or ("de-DE",).
    path: file, folder or glob; {language} and ${VARIABLE} are filled in.
    field: the field that holds the text (jsonl, parquet, huggingface, tfds).
    name: data set on the hub (or NAME@REVISION) or in TFDS; {language} is filled in.
    subset: its configuration on the hub; {language} is filled in.
    split: its split.
    streaming: huggingface: read over the network without downloading first.
    spoken_share: in [0, 1], share of texts brought to spoken form (lower case, no punctuation).
    weight: > 0, relative share among the sources of the same kind and language.
    max_texts: texts read per language; 0 reads all.
    """

    kind: str
    format: str
    languages: tuple[str, ...]
    path: str = ""
    field: str = "text"
    name: str = ""
    subset: str = ""
    split: str = "train"
    streaming: bool = False
    spoken_share: float = 0.0
    weight: float = 1.0
    max_texts: int = 0

    def __post_init__(self):
        check(self.kind in KINDS, "kind", f"{self.kind!r} is unknown", "use 'generic' or 'task'")
        one_of(self.format, SOURCE_FORMATS, "format")
        check(bool(self.languages), "languages", "is empty", "name at least one language")
        plain_names(self.languages, "languages")
        share = self.spoken_share
        check(0 <= share <= 1, "spoken_share", f"{share} is outside 0 to 1", "give a share")
        check(self.weight > 0, "weight", f"{self.weight} is not above 0", "leave the source out instead")
        check(self.max_texts >= 0, "max_texts", f"{self.max_texts} is negative", "0 reads all")


@dataclass(frozen=True)
class TokenizerSettings:
    """Which tokenizer the rows are made with: `config.tokenizer`.

    kind: train | load.
    path: load: tokenizer.json, vocab.txt, a folder with one of them or a SentencePiece model, a name on the hub, or
        "embedded" (that of the embedded model, see import_model.path).
    model: train: bpe.
    vocab_size: train: tokens, special ones included.
    texts_per_store: train: texts read from each source and language.
    """

    kind: str = "train"
    path: str = ""
    model: str = "bpe"
    vocab_size: int = 8000
    texts_per_store: int = 20000

    def __post_init__(self):
        check(self.kind in ("train", "load"), "kind", f"{self.kind!r} is unknown", "use 'train' or 'load'")


@dataclass(frozen=True)
class Rows:
    """How texts are packed into rows: `config.rows`.

    length: tokens per row, special tokens included, >= 8.
    heldout_share: in (0, 0.5], of the generic texts, chosen by hash; of the task the dev partition is held out.
    open_rows: >= 1, rows kept open while packing.
    """

    length: int = 64
    heldout_share: float = 0.02
    open_rows: int = 64

    def __post_init__(self):
        share = self.heldout_share
        check(0 < share <= 0.5, "heldout_share", f"{share} is outside (0, 0.5]", "0.02 is usual")
        check(self.length >= 8, "length", f"{self.length} tokens are too few for a text", "use at least 8")
        check(self.open_rows >= 1, "open_rows", f"{self.open_rows} is below 1", "64 is usual")


@dataclass(frozen=True)
class Select:
    """Generic text chosen for its similarity to the task's train utterances (docs/selection.md): `config.select`.

    share: in [0, 1], of the texts of each generic source and language; 0 selects none.
    target: language | all | random: similar to the utterances in the text's language, or to all of them; random draws
        texts regardless of their content, as a control of the same size.
    ngrams: longest n-gram of words that is counted, >= 1.
    buckets: n-grams are hashed into this many, >= 2.
    smoothing: > 0, weight of the uniform distribution added to the counted ones; 1 for few utterances.
    seed: of the resampling, separate from config.seed, so that all seeds of a study see the same texts.
    """

    share: float = 0.0
    target: str = "language"
    ngrams: int = 2
    buckets: int = 10_000
    smoothing: float = 0.1
    seed: int = 0

    def __post_init__(self):
        share = self.share
        check(0 <= share <= 1, "share", f"{share} is outside 0 to 1", "0.05 chooses a twentieth of the texts")
        known = self.target in ("language", "all", "random")
        check(known, "target", f"{self.target!r} is unknown", "use 'language', 'all' or 'random'")
        check(self.ngrams >= 1, "ngrams", f"{self.ngrams} is below 1", "2 counts words and pairs of words")
        check(self.buckets >= 2, "buckets", f"{self.buckets} is below 2", "10000 is usual")
        check(self.smoothing > 0, "smoothing", f"{self.smoothing} is not above 0", "0.1 is usual")


@dataclass(frozen=True)
class Prepare:
    """Everything that decides what `prepare` writes: the blocks nlu, sources, tokenizer, rows and select."""

    nlu: Nlu
    sources: Mapping[str, Source]
    tokenizer: TokenizerSettings
    rows: Rows
    select: Select


def read_prepare(config: ConfigDict | Mapping[str, Any]) -> Prepare:
    """What `prepare` reads of a whole config, or the "config" of a manifest. Raises UserError."""

    def of(kind: type[Settings], block: Any, key: str) -> Settings:
        # A manifest has no "select" where nothing was selected, and an old one lacks the keys that came later.
        defaults = {one.name: one.default for one in fields(kind) if one.default is not MISSING}  # type: ignore[arg-type]
        return read(kind, {**defaults, **block}, key)

    return Prepare(
        nlu=of(Nlu, config["nlu"], "nlu"),
        sources={name: of(Source, block, f"sources.{name}") for name, block in config["sources"].items()},
        tokenizer=of(TokenizerSettings, config["tokenizer"], "tokenizer"),
        rows=of(Rows, config["rows"], "rows"),
        select=of(Select, dict(config).get("select", {}), "select"),
    )


@dataclass(frozen=True)
class Transfer:
    """The mix of text that a student is distilled on: `config.transfer`.

    task_share: in [0, 1]; the rest is generic.
    generic: generic | selected: all generic text, or what config.select chose.
    unit: tokens (maskable) | utterances: what the share is a share of.
    language_mix: task | generic | own | uniform: whose language distribution both kinds follow.
    language_temperature: >= 0; p(language) ~ tokens ** temperature; 1 keeps the proportions, 0 is uniform.
    task_texts: about how many texts of each store of task text (a source in a language or locale) are used, a random
        choice that is the same for all seeds, and part of that for any larger number; 0 uses all.
    """

    task_share: float = 0.5
    generic: str = "generic"
    unit: str = "tokens"
    language_mix: str = "task"
    language_temperature: float = 1.0
    task_texts: int = 0

    def __post_init__(self):
        share, temperature = self.task_share, self.language_temperature
        check(0 <= share <= 1, "task_share", f"{share} is outside 0 to 1", "give a share, e.g. 0.5")
        check(self.task_texts >= 0, "task_texts", f"{self.task_texts} is negative", "0 uses all task text")
        known = self.generic in ("generic", "selected")
        check(known, "generic", f"{self.generic!r} is not known", "use 'generic' or 'selected'")
        known = self.unit in ("tokens", "utterances")
        check(known, "unit", f"{self.unit!r} is not known", "use 'tokens' or 'utterances'")
        known = self.language_mix in ("task", "generic", "own", "uniform")
        remedy = "use 'task', 'generic', 'own' or 'uniform'"
        check(known, "language_mix", f"{self.language_mix!r} is not known", remedy)
        remedy = "use 1 to keep the proportions, 0 for uniform"
        check(temperature >= 0, "language_temperature", f"{temperature} is negative", remedy)


@dataclass(frozen=True)
class Masking:
    """Which tokens are masked (Devlin et al. 2019): `config.masking`.

    seed: separate from config.seed, so that all seeds and students see the same masks.
    rate: in (0, 1], share of the maskable tokens.
    mask_share: of the masked tokens, share replaced by the mask token.
    random_share: of the masked tokens, share replaced by a random token; the rest is kept.
    epochs: >= 1, masks repeat after this many passes over a store.
    """

    seed: int = 0
    rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    epochs: int = 8

    def __post_init__(self):
        check(0 < self.rate <= 1, "rate", f"{self.rate} is outside 0 to 1", "0.15 is usual")
        mask, random = self.mask_share, self.random_share
        if mask < 0 or random < 0 or mask + random > 1:
            problem = f"mask_share {mask} and random_share {random} must be at least 0 and sum to at most 1"
            raise Invalid("mask_share", problem, "0.8 and 0.1 are usual")
        check(self.epochs >= 1, "epochs", f"{self.epochs} is below 1", "1 keeps one mask for each row")


@dataclass(frozen=True)
class Vocabulary:
    """The student's vocabulary, the tokenizer's or a part of it: `config.vocabulary`.

    trim: keep only the tokens that the train rows use (the same for all students).
    min_count: >= 1, occurrences in all train rows together that keep a token.
    dropped: renormalize | unknown: where the teacher's probability of dropped tokens goes.
    """

    trim: bool = False
    min_count: int = 1
    dropped: str = "renormalize"

    def __post_init__(self):
        known = self.dropped in ("renormalize", "unknown")
        check(known, "dropped", f"{self.dropped!r} is unknown", "use 'renormalize' or 'unknown'")
        few = f"{self.min_count} is below 1"
        check(not self.trim or self.min_count >= 1, "min_count", few, "1 keeps every token in use")


@dataclass(frozen=True)
class Cache:
    """What `cache_teacher` writes, and for which runs: `config.cache`.

    task_shares: of the transfer sets; () takes config.transfer.task_share alone.
    generic: "generic" or "selected" for each task share; () takes config.transfer.generic for all.
    task_texts: transfer.task_texts for each task share; () takes that of config.transfer for all.
    seeds: of the runs; () takes config.seed alone.
    steps, batch_size: of the runs; 0 takes those of config.distill.
    temperature: top_k and sampled: that of the runs; 0 takes config.distill.kl.temperature.
    format: hidden (exact, serves any temperature) | top_k | sampled.
    dtype: float16 | float32, of hidden states, log probabilities and sample weights.
    k: top_k: tokens per position.
    tail: top_k: renormalize | bucket | zero: what stands for the other tokens.
    samples: sampled: draws per position, >= 1.
    power: sampled: the proposal is p ** power, in (0, 1].
    rows_per_part: rows per file; files are written, checked and resumed one by one.
    batch_rows: rows that the teacher predicts at a time.
    """

    task_shares: tuple[float, ...] = ()
    generic: tuple[str, ...] = ()
    task_texts: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    steps: int = 0
    batch_size: int = 0
    temperature: float = 0.0
    format: str = "hidden"
    dtype: str = "float16"
    k: int = 64
    tail: str = "bucket"
    samples: int = 64
    power: float = 1.0
    rows_per_part: int = 4096
    batch_rows: int = 64

    def __post_init__(self):
        one_of(self.format, ("hidden", "top_k", "sampled"), "format")
        one_of(self.dtype, ("float16", "float32"), "dtype")
        one_of(self.tail, ("renormalize", "bucket", "zero"), "tail")
        check(self.samples >= 1, "samples", f"{self.samples} is below 1", "64 is usual")
        check(0 < self.power <= 1, "power", f"{self.power} is outside (0, 1]", "1.0 samples from the teacher")
        for name in ("rows_per_part", "batch_rows"):
            check((value := getattr(self, name)) >= 1, name, f"{value} is below 1", "give at least 1")
        shares = len(self.task_shares)
        for name in ("generic", "task_texts"):
            given = len(getattr(self, name))
            check(given in (0, shares), name, f"{given} values for {shares} shares", "give one for each task share")


STORE_KINDS = ("generic", "task", "selected")  # of prepared rows


@dataclass(frozen=True)
class States:
    """What `cache_states` writes of every train row, unmasked: `config.states`.

    layers: last | none | "3,-1": layers whose states are kept for every token, counted from 0 (-1 is the last).
    relations: in the same form, layers whose queries, keys and values are kept: three more vectors per token and layer.
    kinds: kinds of train rows, among generic, task and selected; () takes all.
    dtype: float16 | float32.
    components: number of leading principal components to keep of each vector; 0 keeps the whole vector.
    rows_per_part: rows per file; files are written, checked and resumed one by one.
    batch_rows: rows that the teacher reads at a time.
    """

    layers: str = "last"
    relations: str = "none"
    kinds: tuple[str, ...] = ()
    dtype: str = "float16"
    components: int = 0
    rows_per_part: int = 512
    batch_rows: int = 64

    def __post_init__(self):
        one_of(self.dtype, ("float16", "float32"), "dtype")
        for kind in self.kinds:
            one_of(kind, STORE_KINDS, "kinds")
        check(self.components >= 0, "components", f"{self.components} is negative", "0 keeps the whole vector")
        whole = self.relations == "none" or not self.components
        check(whole, "components", "relations need whole vectors", "set it to 0, or states.relations to none")
        for name in ("rows_per_part", "batch_rows"):
            check((value := getattr(self, name)) >= 1, name, f"{value} is below 1", "give at least 1")
