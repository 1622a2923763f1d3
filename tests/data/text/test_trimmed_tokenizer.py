"""A trimmed vocabulary's own tokenizer reads text of kept pieces as the student was trained, and no id is too large."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from kd_jax.data.text.tokenizer import Tokenizer, train_tokenizer
from kd_jax.data.text.trimmed_tokenizer import standalone
from kd_jax.data.vocabulary import TrimmedTokenizer
from kd_jax.types import UserError

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


@pytest.fixture(scope="module", params=["bpe", "unigram", "wordpiece", "byte_level"])
def pair(request, tmp_path_factory):
    """(trimmed tokenizer, its own tokenizer, number of helpers), trimmed to the pieces of some texts."""
    if request.param in ("bpe", "unigram"):
        full = train_tokenizer(corpus(0, 200), request.param, 200)
    else:
        full = wordpiece(tmp_path_factory.mktemp("wordpiece")) if request.param == "wordpiece" else byte_level()
    used = np.unique(np.concatenate(full.encode(corpus(1, 6))))
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
    full = train_tokenizer(corpus(0, 200), "unigram", 200)
    used = np.unique(np.concatenate(full.encode(corpus(1, 6))))
    trimmed = TrimmedTokenizer(full, np.union1d(used, full.special_ids).astype(np.int32))
    found, _ = standalone(trimmed)
    lowest = [min(score for _, score in json.loads(one.backend.to_str())["model"]["vocab"]) for one in (full, found)]
    assert lowest[0] == lowest[1]


def test_what_cannot_be_trimmed_is_refused(monkeypatch):
    full = train_tokenizer(corpus(0, 200), "bpe", 200)
    kept = np.union1d(full.encode(["wake me up"])[0], full.special_ids).astype(np.int32)
    trimmed = TrimmedTokenizer(full, kept)
    read = Tokenizer.encode

    def other(self, texts):
        return [ids[::-1] for ids in read(self, texts)] if self is not trimmed.full else read(self, texts)

    monkeypatch.setattr(Tokenizer, "encode", other)
    with pytest.raises(UserError, match="'wake me up' would be read otherwise"):
        standalone(trimmed, ["wake me up"])
    monkeypatch.undo()
    content = json.loads(full.backend.to_str())
    content["post_processor"]["special_tokens"]["<s>"]["tokens"] = ["▁weather"]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    monkeypatch.setattr(full, "backend", backend)
    with pytest.raises(UserError, match="puts ▁weather around texts, which was dropped"):
        standalone(trimmed)
