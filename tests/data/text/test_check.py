"""`prepare --check`: every error of a broken folder with its place, the counts of a whole one, and nothing written."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from kd_jax.config import base, to_dict
from kd_jax.config.data import Transfer, read_prepare
from kd_jax.config.settings import read
from kd_jax.data.prepared import prepare
from kd_jax.data.text import check as check_module
from kd_jax.data.text.check import REMOTE, SAMPLE, SHOWN, Errors, inside_words, label_counts, padding
from kd_jax.data.text.tokenizer import train_tokenizer
from kd_jax.data.text.utterances import Utterance
from kd_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[3]


def record(number, **changes):
    values = {
        "id": str(number), "locale": "en-US", "partition": "train", "scenario": "timer", "intent": "timer_start",
        "utt": f"start timer number {number}", "annot_utt": f"start timer number [name : {number}]",
    }  # fmt: skip
    return values | changes


def write(folder, locale, lines):
    folder.mkdir(parents=True, exist_ok=True)
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / f"{locale}.jsonl").write_bytes(b"".join(line + b"\n" for line in encoded))


def config_of(folder, locales=("en-US",), **generic):
    config = base.get_config()
    config.nlu.update({"format": "massive", "path": str(folder / "nlu"), "locales": locales})
    languages = tuple(dict.fromkeys(locale.split("-")[0] for locale in locales))
    values = {"path": str(folder / "{language}.txt"), **generic}
    config.sources.generic = base.source("generic", values.pop("format", "text"), languages, **values)
    config.sources.task = base.source("task", "utterances", locales)
    config.tokenizer.vocab_size = 80
    config.rows.length = 16
    config.rows.heldout_share = 0.3  # of few texts
    return config


def check(config, max_train=0):
    return check_module.check(read_prepare(config), read(Transfer, config.transfer, "transfer"), max_train)


@pytest.fixture
def whole(tmp_path):
    """A folder without errors: 20 train, 5 dev and 6 test utterances, of which some are worth a remark."""
    lines = [record(number) for number in range(20)]
    lines += [record(number, partition="dev") for number in range(20, 25)]
    lines += [record(number, partition="test") for number in range(25, 29)]
    seen = {"utt": "START, timer number 3!", "annot_utt": "START, timer number 3!"}
    lines.append(record(29, partition="test", **seen))
    strange = {"scenario": "tea", "intent": "tea_brew", "utt": "brew green tea", "annot_utt": "brew [kind : green] tea"}
    lines.append(record(30, partition="test", **strange))
    write(tmp_path / "nlu", "en-US", lines)
    texts = [
        f"The kettle in room {number} is quite old and nobody knows why it is still there." for number in range(40)
    ]
    (tmp_path / "en.txt").write_text("\n".join([*texts, "Brew green tea.", "", "start timer number 20"]) + "\n")
    return tmp_path


def found_line(findings, begins):
    """The cells of the only line that begins so."""
    lines = [line for line in findings.lines if line.startswith(begins)]
    assert len(lines) == 1, (begins, findings.lines)
    return lines[0].split()


def test_counts_of_a_whole_folder(whole):
    findings = check(config_of(whole))
    assert findings.errors == 0 and findings.lines[-1] == "errors: none"
    assert found_line(findings, "en-US ") == ["en-US", "20", "5", "6"]
    assert "domains in train (1): timer 20" in findings.lines
    assert "slots in train (1): name 20" in findings.lines
    rows = [line.split() for line in findings.lines if line.startswith(("generic-en", "task-en-US"))]
    # Kept, held out, left out: the two texts that are test and dev utterances; one train utterance that is a test one.
    assert rows[0][0] == "generic-en" and rows[0][1] == "40" and rows[0][3] == "2"
    assert rows[1][:4] == ["task-en-US", "19", "0", "1"]
    # Words: 16 in each generic sentence, 4 in each utterance.
    assert rows[0][4:] == ["16.0", "16", "16"] and rows[1][4:] == ["4.0", "4", "4"]


@pytest.mark.parametrize(("share", "problem"), [(1e-9, "was held out; raise"), (0.5, "is left to train on; give")])
def test_text_that_is_all_on_one_side_is_an_error_as_it_is_for_prepare(whole, tmp_path, share, problem):
    (whole / "en.txt").write_text("The kettle is quite old and nobody knows why.\n" * 5)
    config = config_of(whole)
    config.rows.heldout_share = share
    findings = check(config)
    assert findings.errors == 1 and f"config.sources.generic: no text of en {problem}" in findings.lines[-1]
    with pytest.raises(UserError) as error:
        prepare(read_prepare(config), to_dict(config), tmp_path / "p")
    assert findings.lines[-1].strip() == str(error.value)


def test_labels_that_train_does_not_have(whole):
    notes = [line for line in check(config_of(whole)).lines if line.startswith("note: ")]
    for kind, name in (("domain", "tea"), ("intent", "tea_brew"), ("slot", "kind")):
        assert any(f"{kind} {name!r} is not in train" in note and "1 in test" in note for note in notes), notes
    assert sum("is not in train" in note for note in notes) == 3


def test_the_same_text_in_two_partitions(whole):
    lines = check(config_of(whole)).lines
    assert "  dev in train: 0 of 5" in lines and "  test in dev: 0 of 6" in lines
    (line,) = [line for line in lines if line.startswith("  test in train: ")]
    assert line.startswith("  test in train: 1 of 6 (16.7%), e.g. en-US 29 and 3: 'START, timer number 3!'")


def test_labels_that_have_the_text_of_a_test_utterance_are_counted_among_those_used(whole):
    start = "  labels used that have the text of a test utterance: "

    def counted(max_train):
        (line,) = [line for line in check(config_of(whole), max_train=max_train).lines if line.startswith(start)]
        return line.removeprefix(start).partition(";")[0]

    assert counted(0) == "1 of 20, covering 1 of 6"
    assert counted(1) == "0 of 1, covering 0 of 6"


def test_a_locale_without_dev_and_a_language_without_generic_text(whole):
    write(whole / "nlu", "de-DE", [record(0, locale="de-DE"), record(1, locale="de-DE", partition="test")])
    config = config_of(whole, ("en-US", "de-DE"))
    config.sources.generic.languages = ("en",)
    notes = [line for line in check(config).lines if line.startswith("note: ")]
    assert any("de-DE has no dev utterance" in note for note in notes)
    assert any("no generic text in de; transfer.language_mix='task'" in note for note in notes)
    config.transfer.language_mix = "own"
    assert not any("no generic text" in line for line in check(config).lines)


def test_ids_of_two_locales_are_translations_only_with_the_same_intents(whole):
    def told(intent):
        write(whole / "nlu", "de-DE", [record(number, locale="de-DE", intent=intent(number)) for number in range(20)])
        lines = check(config_of(whole, ("en-US", "de-DE"))).lines
        return [line for line in lines if "shared by locales" in line or "ids that locales share" in line]

    assert told(lambda number: "timer_start") == [
        "ids: 20 are shared by locales, and are taken for translations of each other"
    ]
    assert told(lambda number: "timer_start" if number < 6 else "timer_stop") == [
        "note: 14 of 20 ids that locales share have different intents, so utterances of one id are not taken for "
        "translations"
    ]
    (whole / "nlu" / "de-DE.jsonl").unlink()
    assert not any("ids" in line for line in check(config_of(whole)).lines)


def broken_folder(folder):
    """(errors that must be found, as (file, line, words)): one of each kind, between whole records."""
    lines = [
        record(0),
        b'{"id": "1", "locale": "en-US"',
        record(2, partition="training"),
        b"caf\xe9",
        record(4, annot_utt="start timer number [name 4]"),
        record(5, locale="de-DE"),
        record(0, utt="once more", annot_utt="once more"),
        {name: value for name, value in record(7).items() if name != "intent"},
        record(8, annot_utt="start another timer"),
        record(9),
        record(10, partition="dev"),
        record(11, partition="test"),
    ]
    write(folder / "nlu", "en-US", lines)
    texts = [b'{"text": "a kettle"}', b'{"body": "no text"}', b'{"text": 5}', b'{"text": "\xff"}', b"[]"]
    (folder / "en.jsonl").write_bytes(b"\n".join([*texts, b'{"text": "another kettle"}']) + b"\n")
    wanted = [(2, "JSON"), (3, "'training'"), (4, "UTF-8"), (5, "colon"), (6, "de-DE"), (7, "second time")]
    wanted += [(8, "'intent'"), (9, "without its marks")]
    utterances = [(folder / "nlu" / "en-US.jsonl", line, word) for line, word in wanted]
    generic = [(2, "no field 'text'"), (3, "int"), (4, "UTF-8"), (5, "list")]
    return utterances + [(folder / "en.jsonl", line, word) for line, word in generic]


def test_every_error_of_a_broken_folder_is_found_with_file_and_line(tmp_path):
    wanted = broken_folder(tmp_path)
    config = config_of(tmp_path, ("en-US", "xx-XX"), format="jsonl", path=str(tmp_path / "en.jsonl"))
    config.sources.generic.languages = ("en",)
    config.sources.task.languages = ("en-US",)
    findings = check(config)
    assert findings.errors == len(wanted) + 1  # and the locale that is not there
    shown = findings.lines[findings.lines.index(f"errors: {findings.errors}, the first {SHOWN}") + 1 :]
    assert len(shown) == SHOWN
    for (file, line, word), message in zip(wanted[:8], shown):
        assert message.startswith(f"  {file}:{line}: ") and word in message
    assert "no locale 'xx-XX'" in shown[8]
    file, line, word = wanted[8]
    assert shown[9].startswith(f"  {file}:{line}: ") and word in shown[9]
    # What is whole is counted all the same.
    assert found_line(findings, "en-US ") == ["en-US", "2", "1", "1"]
    assert any(line.split()[:2] == ["generic-en", "2"] for line in findings.lines)


def test_an_unreadable_source_does_not_hide_the_others(whole):
    config = config_of(whole)
    config.sources.lost = base.source("generic", "text", ("en",), path=str(whole / "nowhere.txt"))
    findings = check(config)
    assert (
        findings.errors == 1
        and "nowhere.txt" in findings.lines[-1]
        and "config.sources.lost.path" in findings.lines[-1]
    )
    assert any(line.startswith("generic-en") for line in findings.lines)


def test_a_missing_file_is_one_error_however_many_languages_want_it(whole):
    locales = ("en-US", "de-DE")
    config = config_of(whole, locales, path=str(whole / "nothing"))
    config.nlu.path = str(whole / "nowhere")
    findings = check(config)
    assert findings.errors == 2, findings.lines
    shown = "\n".join(findings.lines)
    assert shown.count("config.nlu.path: no folder") == shown.count("config.sources.generic.path: no file") == 1
    config.nlu.path = str(whole / "nlu")
    shown = "\n".join(check(config).lines)
    assert "has no locale 'de-DE'" in shown and "there is no train utterance of" not in shown


def test_of_a_source_on_the_hub_the_beginning_is_streamed(whole, monkeypatch):
    asked = []

    def load(name, subset=None, **options):
        import datasets

        asked.append((name, subset, options["streaming"]))
        texts = [f"text number {number}" for number in range(REMOTE * 3)]
        return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()

    monkeypatch.setattr("kd_jax.data.text.files.load_hub", load)
    config = config_of(whole, format="huggingface", path="", name="someone/texts", subset="{language}")
    findings = check(config)
    assert findings.errors == 0 and asked == [("someone/texts", "en", True)]
    row = next(line.split() for line in findings.lines if line.startswith("generic-en"))
    assert row[1] == f"{REMOTE:,}"


def test_the_sample_is_drawn_from_all_texts(whole):
    total = 3 * SAMPLE
    (whole / "en.txt").write_text(
        "".join(("long " * 9 if number >= SAMPLE else "s") + f" {number}\n" for number in range(total))
    )
    row = next(line.split() for line in check(config_of(whole)).lines if line.startswith("generic-en"))
    assert row[1] == f"{total:,}"
    # A third of the texts has two words, two thirds have ten: the first SAMPLE alone would have a mean of two.
    assert float(row[4]) == pytest.approx(22 / 3, abs=0.5)


def test_padding_of_rows_counted_by_hand():
    texts = ["a b c d", "a b", "a b c d"]
    tokenizer = train_tokenizer(texts, 20)
    encoded = tokenizer.encode(texts)
    sizes = [len(ids) for ids in encoded]
    assert sizes == [4, 2, 4]
    # [cls] and [sep] make 6, 4 and 6 tokens: three rows of 8 when alone, 6 + 4 do not fit into 8 but 6 + 6 + 4 into 16.
    alone, packed = padding(encoded, tokenizer, 16, 4)
    assert alone == pytest.approx(1 - 16 / 48) and packed == pytest.approx(0.0)
    # A text that is cut into two is two rows: 4 pieces in rows of 5 are 3 + 1.
    alone, _ = padding(encoded[:1], tokenizer, 5, 4)
    assert alone == pytest.approx(1 - (5 + 3) / 10)


def test_slots_that_end_inside_a_word_are_reported():
    words = ("play", "x,", "please")
    one = Utterance("7", "en-US", "dev", "d", "i", " ".join(words), words, ("O", "B-song", "O"), widened=True)
    (line,) = inside_words([one, dataclasses.replace(one, widened=False)])
    assert "(utterances: 1), e.g. en-US 7: 'play [song : x,] please'; config.nlu.character_locales" in line
    assert not list(inside_words([dataclasses.replace(one, widened=False)]))


def test_slots_are_counted_by_spans():
    one = Utterance("1", "en-US", "dev", "d", "i", "a b c", ("a", "b", "c"), ("B-x", "I-x", "B-x"))
    assert label_counts([one])["slots"]["dev"] == {"x": 2}


def test_errors_keep_the_first_and_let_others_pass():
    errors = Errors()
    for number in range(SHOWN + 5):
        with errors:
            raise UserError(f"problem {number}")
    assert errors.count == SHOWN + 5 and errors.first == [f"problem {number}" for number in range(SHOWN)]
    with pytest.raises(KeyError), errors:
        raise KeyError("a mistake of ours")


def command(*arguments):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "kd_jax.main.prepare", "--config=configs/massive.py", "--check", *arguments]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_command_line_ends_with_0_or_2_and_writes_nothing(whole):
    arguments = [
        f"--config.nlu.path={whole / 'nlu'}", '--config.nlu.locales=("en-US",)', "--config.tokenizer.vocab_size=80",
        f"--config.sources.generic.path={whole}/{{language}}.txt", '--config.sources.generic.languages=("en",)',
        '--config.sources.task.languages=("en-US",)', f"--workdir={whole / 'workdir'}",
        "--config.rows.heldout_share=0.3",
    ]  # fmt: skip
    before = sorted(whole.rglob("*"))
    good = command(*arguments)
    assert good.returncode == 0, good.stderr
    assert good.stdout.rstrip().endswith("errors: none")
    with open(whole / "nlu" / "en-US.jsonl", "a") as lines:
        lines.write("{}\n")
    bad = command(*arguments)
    assert bad.returncode == 2 and "Traceback" not in bad.stderr
    assert bad.stderr.strip().splitlines()[-1].startswith("error: the data have 1 error")
    assert "en-US.jsonl:32: field 'id' is missing" in bad.stdout
    assert sorted(whole.rglob("*")) == before
