"""Tokenizers trained here and read from files: determinism, ids, and which word each piece belongs to."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from kd_jax.data.text.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from kd_jax.data.text.utterances import read_massive
from kd_jax.types import UserError

WORDS = ["turn", "turning", "turned", "light", "lights", "lighter", "night", "nightly", "knight", "kitchen"]
WORDS += ["küche", "straße", "grün", "grüner", "灯", "रोशनी"]
LOCALES = ("de-DE", "en-US", "es-ES", "fr-FR", "hi-IN")


def corpus(lines: int = 400) -> list[str]:
    rng = random.Random(3)
    return [" ".join(rng.choices(WORDS, range(len(WORDS), 0, -1), k=8)) for _ in range(lines)]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(iter(corpus()), 80)


def wordpiece_file(
    folder, pieces=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "wake", "me", "up", "##s", "at", "Ü", "##ber")
):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return folder


def byte_level(path, vocabulary: list[str]):
    """A byte-level BPE without merges, as RoBERTa and ModernBERT have with."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {piece: i for i, piece in enumerate([*vocabulary, *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(ids, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(vocabulary)
    backend.save(str(path))
    return path


def massive_words(data_dir, locale: str, count: int):
    utterances = read_massive(data_dir / "nlu" / "massive", [locale])
    return [one.words for one in utterances[:: max(len(utterances) // count, 1)]]


def check_alignment(tokenizer: Tokenizer, texts, joined: bool = False):
    """Against piece-by-piece decoding: a word's pieces, encoded together, spell that word."""
    plain = tokenizer.encode([("" if joined else " ").join(words) for words in texts])
    for words, (ids, index), expected in zip(texts, tokenizer.encode_words(texts, joined), plain, strict=True):
        np.testing.assert_array_equal(ids, expected)
        assert ids.dtype == index.dtype == np.int32 and len(ids) == len(index)
        assert (np.diff(index) >= 0).all()
        assert set(index.tolist()) == set(range(len(words))), (words, index)
        for i, word in enumerate(words):
            pieces = ids[index == i].tolist()
            if tokenizer.unk_id not in pieces:
                spelled = tokenizer.backend.decode(pieces).replace(" ", "")
                wanted = tokenizer.backend.normalizer.normalize_str(word) if tokenizer.backend.normalizer else word
                assert spelled.strip() == wanted.replace(" ", "").strip(), (word, spelled)


def test_special_tokens(trained):
    assert trained.tokens()[:5] == list(SPECIAL_TOKENS)
    assert (trained.cls_id, trained.pad_id, trained.sep_id, trained.unk_id, trained.mask_id) == (0, 1, 2, 3, 4)
    assert trained.special_ids == (0, 1, 2, 3, 4)
    assert 40 < trained.vocab_size <= 80 and len(set(trained.tokens())) == trained.vocab_size


def test_training_is_the_same_in_every_process():
    here = train_tokenizer(corpus(), 80).fingerprint
    program = (
        "import sys; sys.path.insert(0, 'tests/data/text'); from test_tokenizer import corpus, train_tokenizer; "
        "print(train_tokenizer(corpus(), 80).fingerprint)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONHASHSEED": "5"}, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == here


def test_the_order_of_the_texts_does_not_matter():
    texts = corpus()
    shuffled = texts[::-1]
    assert train_tokenizer(texts, 80).fingerprint == train_tokenizer(shuffled, 80).fingerprint
    assert train_tokenizer(texts[:200], 80).fingerprint != train_tokenizer(texts, 80).fingerprint


def test_rare_characters_are_unknown():
    texts = [*corpus(3000), "☃ turn"]
    tokenizer = train_tokenizer(texts, 80)
    assert "☃" not in "".join(tokenizer.tokens())
    (ids,) = tokenizer.encode(["turn ☃☃ light"])
    assert (ids == tokenizer.unk_id).sum() == 1
    assert tokenizer.unk_id not in tokenizer.encode([" ".join(WORDS)])[0]


def test_encoding_is_normalized(trained):
    plain, spaced, wide = trained.encode(["turn light", "  turn\u00a0 \t light ", "ｔｕｒｎ light"])
    np.testing.assert_array_equal(plain, spaced)
    np.testing.assert_array_equal(plain, wide)
    assert plain.dtype == np.int32 and not set(plain.tolist()) & set(trained.special_ids)
    assert [ids.tolist() for ids in trained.encode(["", " "])] == [[], []] and trained.encode([]) == []
    assert len(trained.encode(["turn " * 3000])[0]) >= 3000


def test_a_text_cannot_name_a_special_token(trained, tmp_path):
    texts = ["turn <mask> light </s> <s> <pad>", "<mask>"]
    for tokenizer in (trained, Tokenizer.load(wordpiece_file(tmp_path / "w")), byte_tokenizer(tmp_path)):
        texts_of_ids = tokenizer.encode(texts) + tokenizer.encode(["wake [MASK] up [SEP]", "[PAD]"])
        ids = np.concatenate(texts_of_ids)
        assert len(ids) and not set(ids.tolist()) & (set(tokenizer.special_ids) - {tokenizer.unk_id})


def byte_tokenizer(folder) -> Tokenizer:
    return Tokenizer.load(byte_level(folder / "bytes.json", ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]))


def test_words_of_pieces(trained):
    texts = [tuple(text.split()) for text in corpus(50)]
    check_alignment(trained, [*texts, ("turn",), ("ｔｕｒｎ", "lights")])
    assert trained.encode_words([()])[0][0].shape == (0,) == trained.encode_words([()])[0][1].shape


def test_words_of_characters(trained):
    texts = [tuple("küche"), tuple("turning")]
    for words, (ids, index) in zip(texts, trained.encode_words(texts, joined=True)):
        np.testing.assert_array_equal(ids, trained.encode(["".join(words)])[0])
        lengths = [len(trained.tokens()[i].replace("▁", "")) for i in ids]
        assert index.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()
    mixed = trained.encode_words([("turn", "light"), tuple("turn")], joined=[False, True])
    np.testing.assert_array_equal(mixed[0][0], trained.encode(["turn light"])[0])
    np.testing.assert_array_equal(mixed[1][0], trained.encode(["turn"])[0])


def test_a_lone_space_mark_belongs_to_the_word_after_it():
    vocabulary = [*((token, 0.0) for token in SPECIAL_TOKENS), ("▁", -1.0), ("ab", -1.0), ("c", -2.0), ("▁c", -9.0)]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, 3, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = Tokenizer(backend, "here")
    ((ids, index),) = tokenizer.encode_words([("ab", "c", "ab")])
    assert [tokenizer.tokens()[i] for i in ids] == ["▁", "ab", "▁", "c", "▁", "ab"]
    assert index.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_word_that_normalizes_to_nothing_has_no_piece(trained, tmp_path):
    tokenizer = Tokenizer.load(wordpiece_file(tmp_path))
    ((ids, index),) = tokenizer.encode_words([("wake", "\u200b", "up")])
    assert [tokenizer.tokens()[i] for i in ids] == ["wake", "up"] and index.tolist() == [0, 2]


def test_wordpiece_from_vocabulary(tmp_path):
    tokenizer = Tokenizer.load(wordpiece_file(tmp_path))
    ((ids, index),) = tokenizer.encode_words([("wakes", "Über", "ups", "über")])
    assert [tokenizer.tokens()[i] for i in ids] == ["wake", "##s", "Ü", "##ber", "up", "##s", "[UNK]"]
    assert index.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    # Without capitals in the vocabulary it is an uncased one.
    uncased = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "wake")
    tokenizer = Tokenizer.load(wordpiece_file(tmp_path / "uncased", uncased))
    assert tokenizer.encode(["WAKE"])[0].tolist() == [5]


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False}])
def test_wordpiece_reads_as_transformers_does(tmp_path, settings):
    from transformers import BertTokenizer

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    # A line separator is a character like any other in a vocabulary.
    folder = wordpiece_file(tmp_path, (*special, "a", "à", "musste", "müsste", "\u2028", "a\u2028b", "##b", "周", "Ab"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = Tokenizer.load(folder)
    theirs = BertTokenizer.from_pretrained(folder, **({} if settings else {"do_lower_case": False}))
    assert ours.vocab_size == 14 and ours.tokens()[13] == "Ab"
    for text in (
        "musste MÜSSTE müsste",
        "a à ab AB",
        "周 a周b",
        "a\u2028b",
        "a\u200bb\u0301 \ufffd\x00 \t a",
        "[MASK a",
    ):
        assert ours.encode([text])[0].tolist() == theirs(text, add_special_tokens=False).input_ids, text


def test_byte_level(tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    ((ids, index),) = tokenizer.encode_words([("wake", "über", "灯")])
    assert index.tolist() == [0] * 4 + [1] * 6 + [2] * 4
    np.testing.assert_array_equal(ids, tokenizer.encode(["wake über 灯"])[0])


def test_saved_and_loaded(trained, tmp_path):
    trained.save(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint == trained.fingerprint and again.tokens() == trained.tokens()
    for name in (tmp_path / "saved" / "tokenizer.json", str(tmp_path / "saved")):
        np.testing.assert_array_equal(Tokenizer.load(name).encode(corpus(1))[0], trained.encode(corpus(1))[0])


def test_transformers_loads_what_was_saved(trained, tmp_path):
    from transformers import AutoTokenizer

    for i, tokenizer in enumerate((trained, Tokenizer.load(wordpiece_file(tmp_path / "w")))):
        tokenizer.save(tmp_path / str(i))
        theirs = AutoTokenizer.from_pretrained(tmp_path / str(i))
        text = "wake me turn lights up"
        inside = tokenizer.encode([text])[0].tolist()
        assert theirs(text)["input_ids"] == [tokenizer.cls_id, *inside, tokenizer.sep_id]
        assert theirs.mask_token_id == tokenizer.mask_id and theirs.pad_token_id == tokenizer.pad_id
        assert len(theirs) == tokenizer.vocab_size


def test_the_fingerprint_is_of_what_decides_the_ids(trained, tmp_path):
    trained.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1}
    content["padding"] |= {"pad_type_id": 0, "pad_token": "<pad>"}
    content["post_processor"] = None
    (tmp_path / "other.json").write_text(json.dumps(content), encoding="utf-8")
    other = Tokenizer.load(tmp_path / "other.json")
    assert other.fingerprint == trained.fingerprint
    assert len(other.encode(["turn light night kitchen turn"])[0]) >= 5
    content["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "other.json").write_text(json.dumps(content), encoding="utf-8")
    assert Tokenizer.load(tmp_path / "other.json").fingerprint != trained.fingerprint


@pytest.mark.parametrize("role", ["mask", "pad", "cls", "sep"])
def test_a_missing_special_token(role, tmp_path):
    pieces = [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a") if name != f"[{role.upper()}]"]
    with pytest.raises(UserError, match=rf"vocab\.txt: the tokenizer has no {role} token"):
        Tokenizer.load(wordpiece_file(tmp_path, pieces))


def test_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor vocab\.txt"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: is not a tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"no \[UNK\]"):
        Tokenizer.load(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["", " "], 100)
    with pytest.raises(UserError, match=r"vocab_size: 20 is less"):
        train_tokenizer(corpus(), 20)


def test_hub_name_without_network():
    with pytest.raises(UserError, match=r"^some-user/no-such-model: there is no such folder here, and the hub gave"):
        Tokenizer.load("some-user/no-such-model")


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("name", ["models/multilingual-e5-small-trimmed", "tokenizers/bert-base-multilingual-cased"])
def test_words_of_massive(data_dir, name, locale, request):
    tokenizer = Tokenizer.load(data_dir / name)
    check_alignment(tokenizer, massive_words(data_dir, locale, 400))


def test_words_of_massive_with_a_trained_tokenizer(data_dir):
    words = {locale: massive_words(data_dir, locale, 1500) for locale in LOCALES}
    tokenizer = train_tokenizer((" ".join(text) for texts in words.values() for text in texts), 3000)
    for texts in words.values():
        check_alignment(tokenizer, texts[::4])


def test_e5_against_transformers(data_dir):
    from transformers import AutoTokenizer

    folder = data_dir / "models" / "multilingual-e5-small-trimmed"
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    texts = [" ".join(words) for words in massive_words(data_dir, "fr-FR", 50)]
    for ids, expected in zip(ours.encode(texts), theirs(texts, add_special_tokens=False)["input_ids"]):
        assert ids.tolist() == expected
    assert ours.mask_id == 67904 == ours.vocab_size - 1 and ours.special_ids == (0, 1, 2, 3, 67904)


def html_vocabulary(folder, **declared):
    """A tokenizer of which <s> and </s> are HTML tags, as in Gemma's and mmBERT's, with what its files declare."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level(folder / "tokenizer.json", ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<s>", "</s>"])
    if declared:
        (folder / "tokenizer_config.json").write_text(json.dumps(declared))
    return folder


def test_declared_special_tokens_come_before_the_usual_names(tmp_path):
    folder = html_vocabulary(
        tmp_path / "a", cls_token="<bos>", sep_token="<eos>", mask_token={"content": "<mask>", "lstrip": True}
    )
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.pad_id, tokenizer.sep_id, tokenizer.cls_id, tokenizer.unk_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    tokenizer.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert (again.cls_id, again.sep_id, again.fingerprint) == (2, 1, tokenizer.fingerprint)
    # The older place of the same.
    (folder / "tokenizer_config.json").rename(folder / "special_tokens_map.json")
    assert Tokenizer.load(folder).cls_id == 2
    # Undeclared, nothing but the names can tell.
    assert Tokenizer.load(html_vocabulary(tmp_path / "b")).cls_id == 5


def test_a_declared_special_token_that_is_missing_or_unreadable(tmp_path):
    folder = html_vocabulary(tmp_path, cls_token="<start>")
    with pytest.raises(UserError, match=r"no cls token \(<start>\)"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: broken JSON"):
        Tokenizer.load(folder)
