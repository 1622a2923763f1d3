"""User files: paths filled in, files found, lines numbered, and one sentence for what is wrong with them."""

import gzip

import pytest

from kd_jax.data.text.files import (
    check_text,
    fill_path,
    find_files,
    hub_error,
    json_records,
    load_hub,
    numbered_lines,
)
from kd_jax.types import UserError


def test_fill_path(monkeypatch):
    monkeypatch.setenv("KD_JAX_A", "/data {language}")
    monkeypatch.setenv("HOME", "/home/me")
    assert fill_path("${KD_JAX_A}/{language}/{x}/*.txt", "de") == "/data de/de/{x}/*.txt"
    assert fill_path("~/text.txt") == "/home/me/text.txt"
    for value in (None, ""):
        monkeypatch.delenv("KD_JAX_A") if value is None else monkeypatch.setenv("KD_JAX_A", value)
        with pytest.raises(UserError, match=r"config.sources.web.path: environment variable KD_JAX_A is not set"):
            fill_path("${KD_JAX_A}/de.txt", "de", key="config.sources.web.path")


def test_find_files(tmp_path):
    for name in ("b.txt", "a.txt.gz", "c.md", "sub/d.txt", "e[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(path):
        return [str(file.relative_to(tmp_path)) for file in find_files(str(path), (".txt", ".txt.gz"))]

    assert found(tmp_path) == ["a.txt.gz", "b.txt", "e[1].txt", "sub/d.txt"]
    assert found(tmp_path / "*.txt*") == ["a.txt.gz", "b.txt", "e[1].txt"]
    assert found(tmp_path / "**" / "d.txt") == ["sub/d.txt"]
    assert found(tmp_path / "c.md") == ["c.md"]
    assert found(tmp_path / "e[1].txt") == ["e[1].txt"]
    with pytest.raises(UserError, match=r"path: no file .*x\.txt"):
        found(tmp_path / "x.txt")
    with pytest.raises(UserError, match=r"sub holds no file that ends in .md or .rst"):
        find_files(str(tmp_path / "sub"), (".md", ".rst"))
    with pytest.raises(UserError, match=r"config.x: is empty"):
        find_files("", (".txt",), key="config.x")


def test_numbered_lines(tmp_path):
    # A line separator inside a text (U+2028, U+0085) ends no line; the byte order mark goes.
    content = "\ufeffeins\u2028zwei\r\n\nदो\x85\u200d".encode()
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for file in (plain, packed):
        assert list(numbered_lines(file)) == [(1, "eins\u2028zwei"), (2, ""), (3, "दो\x85\u200d")]


def test_carriage_returns_alone_as_line_endings_are_refused(tmp_path):
    file = tmp_path / "mac.txt"
    file.write_bytes(b"one\rtwo\rthree\r")
    with pytest.raises(UserError, match=r"mac.txt:1: lines end in a carriage return alone; convert"):
        list(numbered_lines(file))
    file.write_bytes(b"one\rtwo\nthree\r\n\r")  # inside a text it is a character like any other
    assert [text for _, text in numbered_lines(file)] == ["one\rtwo", "three", ""]


def test_text_that_is_not_unicode_is_named():
    check_text("Grüße 😀", "here")
    with pytest.raises(UserError, match=r"^here: character 6 is half a surrogate pair; fix"):
        check_text("play \ud83d now", "here")
    with pytest.raises(UserError, match=r"^text 1: character 3 is byte 0xff, which is not UTF-8; fix"):
        check_text(b"ab\xff".decode(errors="surrogateescape"), "text 1")


def test_what_is_wrong_with_a_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"gut\nschlecht: " + "ü".encode("latin-1") + b"ber\n")
    lines = numbered_lines(file)
    assert next(lines) == (1, "gut")
    with pytest.raises(UserError, match=r"a.txt:2: byte 0xfc at column 11 is not UTF-8"):
        next(lines)
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(b"many lines\n" * 1000)[:-12])
    with pytest.raises(UserError, match=r"a.txt.gz: is not a whole gzip file"):
        list(numbered_lines(packed))
    packed.write_bytes(b"plain text\n")
    with pytest.raises(UserError, match=r"a.txt.gz: is not a whole gzip file"):
        list(numbered_lines(packed))
    with pytest.raises(UserError, match=r"none.txt: cannot be read \(No such file"):
        list(numbered_lines(tmp_path / "none.txt"))


def test_json_records():
    assert list(json_records([(1, '{"a": 1}'), (2, " ")], "f")) == [("f:1", {"a": 1})]
    for line, reason in (("{", "broken JSON"), ('"a"', "holds a JSON str"), ("[" * 100000, "broken JSON")):
        with pytest.raises(UserError, match=f"f:7: {reason}"):
            list(json_records([(7, line)], "f"))


def test_a_hub_out_of_reach_is_one_sentence():
    with pytest.raises(UserError, match=r"^data set nobody/nothing \(de\) cannot be read: .*network.*`path`") as caught:
        load_hub("nobody/nothing", "de", split="train")
    assert "\n" not in str(caught.value)
    assert str(hub_error("a/b", None, ValueError("first\nsecond"))).startswith(
        "data set a/b cannot be read: ValueError: first;"
    )


def test_a_revision_is_named_after_the_data_set(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **options: asked.append((arguments, options)))
    load_hub("a/b", "de")
    load_hub("a/b@v2", "de", split="train")
    (tmp_path / "a@b").mkdir()
    load_hub(str(tmp_path / "a@b"))
    assert asked == [
        (("a/b", "de"), {}),
        (("a/b", "de"), {"split": "train", "revision": "v2"}),
        ((str(tmp_path / "a@b"), None), {}),
    ]
