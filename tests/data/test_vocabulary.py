"""A trimmed vocabulary: the pieces in use numbered anew, everything else as it was."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from kd_jax.config import to_dict
from kd_jax.config.data import Masking, Transfer, Vocabulary, read_prepare
from kd_jax.config.settings import block, read
from kd_jax.data.batches import MaskedBatches, heldout_batches
from kd_jax.data.labeled import LabeledSet
from kd_jax.data.prepared import Prepared, prepare
from kd_jax.data.text.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from kd_jax.data.text.utterances import LabelMaps
from kd_jax.data.transfer_set import TransferSet
from kd_jax.data.vocabulary import TrimmedTokenizer, kept_ids, seen_by_student, standalone
from kd_jax.types import UserError
from tests.data.test_batches import restored
from tests.support import pretrained

TRIM = Vocabulary(trim=True, min_count=3)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    config = pretrained.get_config("smoke")
    prepare(read_prepare(config), to_dict(config), folder)
    return Prepared(folder)


@pytest.fixture(scope="module")
def trimmed(full):
    return seen_by_student(full, TRIM)


def test_without_trimming_it_is_the_same_folder(full):
    same = seen_by_student(full, Vocabulary())
    assert same is full
    assert kept_ids(same) is None


def test_kept_are_the_special_pieces_and_those_in_use(full, trimmed):
    size = full.tokenizer.vocab_size
    counts = sum(store.token_counts(size) for store in full.stores("train"))
    expected = sorted({*np.flatnonzero(counts >= 3).tolist(), *full.tokenizer.special_ids})
    assert kept_ids(trimmed).tolist() == expected
    assert trimmed.tokenizer.vocab_size == len(expected) < size
    assert trimmed.tokenizer.tokens() == [full.tokenizer.tokens()[i] for i in expected]
    assert trimmed.tokenizer.fingerprint != full.tokenizer.fingerprint


def test_rows_and_texts_map_back_to_the_full_ids(full, trimmed):
    kept, unknown = kept_ids(trimmed), full.tokenizer.unk_id
    for ours, theirs in zip(trimmed.stores("train"), full.stores("train"), strict=True):
        index = np.arange(min(20, ours.num_rows))
        tokens, segments = ours.rows(index)
        whole, same = theirs.rows(index)
        np.testing.assert_array_equal(kept[tokens], np.where(np.isin(whole, kept), whole, unknown))
        np.testing.assert_array_equal(segments, same)
        assert ours.fingerprint == theirs.fingerprint
        np.testing.assert_array_equal(
            ours.token_counts(len(kept)), theirs.token_counts(full.tokenizer.vocab_size)[kept]
        )
    texts = [one.text for one in full.utterances[:50]]
    for ours, theirs in zip(trimmed.tokenizer.encode(texts), full.tokenizer.encode(texts)):
        np.testing.assert_array_equal(kept[ours], np.where(np.isin(theirs, kept), theirs, unknown))


def test_the_teacher_reads_a_dropped_token_where_the_student_reads_unknown(full, trimmed):
    stores, kept = trimmed.stores("train"), kept_ids(trimmed)
    transfer_set = TransferSet(stores, transfer=Transfer(), seed=0, weights={"generic": 1.0, "task": 1.0})
    batches = MaskedBatches(stores, transfer_set, Masking(), trimmed.tokenizer, 256, kept)
    batch = batches.batch(0)
    source, _, row = transfer_set.locate(np.arange(256))
    whole = np.stack([full.stores("train")[s].rows(r)[0] for s, r in zip(source, row)])
    masked = np.zeros(whole.shape, bool)
    rows, slots = np.nonzero(batch["masked_weights"])
    masked[rows, batch["masked_positions"][rows, slots]] = True
    dropped = ~np.isin(whole, kept)
    assert dropped.any() and not (dropped & masked).any()
    assert (batch["tokens"][dropped] == trimmed.tokenizer.unk_id).all()
    expected = np.where(masked, kept[batch["tokens"]], whole)
    np.testing.assert_array_equal(batch["teacher_tokens"], expected)
    assert batch["teacher_tokens"].dtype == np.int32
    np.testing.assert_array_equal(batches.batch(0, 1, 4)["teacher_tokens"], expected[64:128])


def test_random_replacements_are_kept_pieces_and_masks_stand_where_they_stood(full, trimmed):
    config = pretrained.get_config("smoke")
    weights = dict.fromkeys(config.sources, 1.0)

    def batch(prepared):
        stores = prepared.stores("train")
        transfer_set = TransferSet(stores, transfer=Transfer(), seed=0, weights=weights)
        return MaskedBatches(stores, transfer_set, Masking(), prepared.tokenizer, 64).batch(0)

    ours, theirs = batch(trimmed), batch(full)
    assert ours["tokens"].max() < trimmed.tokenizer.vocab_size
    # A dropped piece reads as unknown and is not masked, so rows that hold one have other masks.
    rows = np.isin(restored(theirs), kept_ids(trimmed)).all(axis=1)
    assert rows.sum() > 10
    np.testing.assert_array_equal(
        kept_ids(trimmed)[ours["masked_targets"][rows]] * ours["masked_weights"][rows].astype(int),
        theirs["masked_targets"][rows] * theirs["masked_weights"][rows].astype(int),
    )


def test_heldout_text_with_dropped_pieces_is_never_masked_there(trimmed):
    unknown = trimmed.tokenizer.unk_id
    met = 0
    for store in trimmed.stores("heldout"):
        for batch in heldout_batches(store, Masking(), trimmed.tokenizer, 16, 64):
            used = batch["masked_weights"] > 0
            assert (batch["masked_targets"][used] != unknown).all()
            met += int((batch["tokens"] == unknown).sum())
    assert met > 0


def test_finetuning_reads_the_same_utterances(full, trimmed):
    train = [one for one in full.utterances if one.partition == "train"][:60]
    maps = LabelMaps.from_train(train)
    ours = LabeledSet(train, trimmed.tokenizer, maps, "icner", 32)
    theirs = LabeledSet(train, full.tokenizer, maps, "icner", 32)
    np.testing.assert_array_equal(ours.tags, theirs.tags)
    known = np.isin(theirs.tokens, kept_ids(trimmed))
    np.testing.assert_array_equal(kept_ids(trimmed)[ours.tokens][known], theirs.tokens[known])
    assert (ours.tokens[~known] == trimmed.tokenizer.unk_id).all()


def test_mistakes_name_the_key():
    for changes, message in (({"dropped": "zero"}, r"config\.vocabulary\.dropped"), ({"min_count": 0}, "min_count: 0")):
        with pytest.raises(UserError, match=message):
            read(Vocabulary, block(Vocabulary, trim=True, **changes), "vocabulary")


def test_a_trimmed_tokenizer_is_not_saved_as_if_it_were_the_full_one(tmp_path):
    tokenizer = train_tokenizer(["eins zwei drei"] * 5, 40)
    kept = np.array([*tokenizer.special_ids, tokenizer.vocab_size - 1], np.int32)
    with pytest.raises(TypeError, match="save the full one"):
        TrimmedTokenizer(tokenizer, kept).save(tmp_path)


# A trimmed vocabulary's own tokenizer reads text of kept tokens as the student was trained, and no id is too large.
SENTENCE = (
    "wake me up at seven play some jazz music what is the weather like tomorrow morning turn the lights off set an "
    "alarm weckt mich bitte morgen um sieben spiele musik wie wird das wetter schalte das licht aus quelle heure"
)
WORDS = SENTENCE.split()


def corpus(seed, count):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(2, 9))) for _ in range(count)]


def wordpiece(folder):
    """BERT's: characters, their continuations, some words and ends of words."""
    letters = sorted({letter for word in WORDS for letter in word})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    pieces += [*sorted(set(WORDS)), *sorted({f"##{word[2:]}" for word in WORDS if len(word) > 3})]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n", encoding="utf-8")
    return Tokenizer.load(folder / "vocab.txt")


def byte_level():
    """As ModernBERT's: bytes, special tokens that stand outside of the model, and no unknown token in it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus(0, 200), trainer)
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"])
    ids = {name: backend.token_to_id(name) for name in ("[CLS]", "[SEP]")}
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=list(ids.items())
    )
    return Tokenizer(backend, "test")


def unigram():
    """As SentencePiece's: scores, with the special tokens first, whole words, and every character."""
    words = {f"▁{word}": -2.0 - 0.125 * number for number, word in enumerate(dict.fromkeys(WORDS))}
    characters = dict.fromkeys(sorted(set("".join(words))), -9.0)
    vocabulary = [*((token, 0.0) for token in SPECIAL_TOKENS), *words.items(), ("heureux", -12.5), *characters.items()]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, SPECIAL_TOKENS.index("<unk>"), byte_fallback=False))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return Tokenizer(backend, "test")


@pytest.fixture(scope="module", params=["bpe", "unigram", "wordpiece", "byte_level"])
def pair(request, tmp_path_factory):
    """(trimmed tokenizer, its own tokenizer, number of helpers), trimmed to the pieces of some texts."""
    makers = {"bpe": lambda: train_tokenizer(corpus(0, 200), 200), "unigram": unigram, "byte_level": byte_level}
    full = makers[request.param]() if request.param in makers else wordpiece(tmp_path_factory.mktemp("wordpiece"))
    spelled = [" ".join("".join(WORDS))] if request.param == "unigram" else []
    used = np.unique(np.concatenate(full.encode(corpus(1, 6) + spelled)))
    trimmed = TrimmedTokenizer(full, np.union1d(used, full.special_ids).astype(np.int32))
    assert trimmed.vocab_size < full.vocab_size
    return trimmed, *standalone(trimmed, corpus(2, 100))


def test_ids_of_kept_pieces(pair):
    trimmed, found, helpers = pair
    assert found.tokens()[: trimmed.vocab_size] == trimmed.tokens()
    assert found.vocab_size == trimmed.vocab_size + helpers
    assert (helpers > 0) == (json.loads(found.backend.to_str())["model"]["type"] == "BPE")
    for role in ("cls_id", "sep_id", "pad_id", "mask_id", "unk_id"):
        assert getattr(found, role) == getattr(trimmed, role), role
    whole = 0
    texts = corpus(1, 6) + corpus(3, 300)
    for text, full, ours, theirs in zip(texts, trimmed.full.encode(texts), trimmed.encode(texts), found.encode(texts)):
        if np.isin(full, trimmed.kept).all():
            np.testing.assert_array_equal(theirs, ours, text)
            whole += 1
        assert theirs.max(initial=0) < found.vocab_size
    assert 6 <= whole < len(texts)


def test_other_text_is_split_finer(pair):
    trimmed, found, _ = pair
    texts = [text for text in corpus(3, 300) if trimmed.unk_id in trimmed.encode([text])[0]]
    assert texts
    finer = [len(found.encode([text])[0]) >= len(trimmed.encode([text])[0]) for text in texts]
    if trimmed.full.backend.model.__class__.__name__ != "WordPiece":  # which gives up on a whole word
        assert all(finer)


def test_saved_and_read_by_transformers(pair, tmp_path):
    from transformers import AutoTokenizer

    trimmed, found, _ = pair
    found.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in corpus(1, 6):
        wanted = [trimmed.cls_id, *trimmed.encode([text])[0].tolist(), trimmed.sep_id]
        if trimmed.full.backend.post_processor is not None:
            assert theirs(text)["input_ids"] == wanted
    assert (theirs.mask_token_id, theirs.pad_token_id) == (trimmed.mask_id, trimmed.pad_id)


def test_unknown_characters_cost_what_they_cost_before():
    """The price of an unknown character hangs on the unlikeliest piece of all, kept or not."""
    full = unigram()
    used = np.unique(np.concatenate(full.encode(corpus(1, 6))))
    trimmed = TrimmedTokenizer(full, np.union1d(used, full.special_ids).astype(np.int32))
    found, _ = standalone(trimmed)
    lowest = [min(score for _, score in json.loads(one.backend.to_str())["model"]["vocab"]) for one in (full, found)]
    assert lowest[0] == lowest[1]


def test_what_cannot_be_trimmed_is_refused(monkeypatch):
    full = train_tokenizer(corpus(0, 200), 200)
    kept = np.union1d(full.encode(["wake me up"])[0], full.special_ids).astype(np.int32)
    trimmed = TrimmedTokenizer(full, kept)
    read = Tokenizer.encode

    def other(self, texts):
        return [ids[::-1] for ids in read(self, texts)] if self is not trimmed.full else read(self, texts)

    monkeypatch.setattr(Tokenizer, "encode", other)
    with pytest.raises(UserError, match="'wake me up' would be read differently"):
        standalone(trimmed, ["wake me up"])
    monkeypatch.undo()
    content = json.loads(full.backend.to_str())
    content["post_processor"]["special_tokens"]["<s>"]["tokens"] = ["▁weather"]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    monkeypatch.setattr(full, "backend", backend)
    with pytest.raises(UserError, match="puts ▁weather around texts, which was dropped"):
        standalone(trimmed)
