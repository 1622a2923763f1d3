"""Studies on incomplete data end with a report, or before any training with a one-sentence error."""

import json

import pytest

from kd_jax.config import base
from kd_jax.main import study
from kd_jax.types import UserError
from tests.support import pretrained

LOCALES = ("en-US", "de-DE")
WORDS = ("lamp", "oven", "radio", "heater", "fan", "blind", "door", "fridge")
ACTIONS = {"turn_on": "turn on the", "turn_off": "turn off the", "ask": "how is the"}


def utterances(locale, counts, domains=("home", "kitchen"), intents=tuple(ACTIONS)):
    """The lines of a locale in MASSIVE's format; counts: partition -> how many."""
    lines, number = [], 0
    for partition, count in counts.items():
        for _ in range(count):
            word = WORDS[number % len(WORDS)]
            domain, intent = domains[number % len(domains)], intents[number // 2 % len(intents)]
            text, rest = f"{ACTIONS[intent]} {word}", f"in room {number} {locale[:2]} {domain}"
            lines.append(
                {
                    "id": str(number),
                    "locale": locale,
                    "partition": partition,
                    "scenario": domain,
                    "intent": intent,
                    "utt": f"{text} {rest}",
                    "annot_utt": f"{ACTIONS[intent]} [device : {word}] {rest}",
                }
            )
            number += 1
    return lines


ENOUGH = {"train": 60, "dev": 12, "test": 24}


def only_in_test():
    """An intent and a domain that no train utterance has."""
    lines = utterances("en-US", ENOUGH, intents=("turn_on", "turn_off"))
    lines[-1] |= {"intent": "ask", "scenario": "garden"}
    return lines


CASES = {
    "no dev partition": {locale: utterances(locale, {**ENOUGH, "dev": 0}) for locale in LOCALES},
    "one class": {locale: utterances(locale, ENOUGH, ("home",), ("ask",)) for locale in LOCALES},
    "labels only in test": {"en-US": only_in_test(), "de-DE": utterances("de-DE", ENOUGH)},
    "twenty labels": {locale: utterances(locale, {"train": 10, "dev": 4, "test": 24}) for locale in LOCALES},
}


def config_for(folder, lines):
    (folder / "nlu").mkdir()
    (folder / "texts").mkdir()
    for locale, rows in lines.items():
        (folder / "nlu" / f"{locale}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts = [f"The {word} of house {number} is in {locale}." for number in range(60) for word in WORDS]
        (folder / "texts" / f"{locale[:2]}.txt").write_text("\n".join(texts) + "\n")
    config = pretrained.get_config("smoke")
    config.nlu.update({"format": "massive", "path": str(folder / "nlu"), "locales": LOCALES})
    languages = tuple(locale[:2] for locale in LOCALES)
    config.sources.generic = base.source("generic", "text", languages, path=f"{folder}/texts/{{language}}.txt")
    config.sources.task = base.source("task", "utterances", LOCALES)
    config.tokenizer.vocab_size = 250
    config.finetune.update({"max_train": 0, "patience": 1})
    config.study.transfer_sets = {"generic": 0.0, "task": 1.0}
    config.study.update({"adapted_sets": (), "latency": False})
    config.update({"progress": False, "tensorboard": False})
    return config


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_the_report_comes_with_every_row(case, tmp_path):
    config = config_for(tmp_path, CASES[case])
    if case == "no dev partition":
        config.finetune.patience = 0
    study.run(config, tmp_path / "study")
    report = (tmp_path / "study" / "report.md").read_text()
    table = report.split("| Student | DC error")[1].split("\n\n")[0]
    for row in ("n-grams", "teacher, frozen, linear probe", "from scratch", "distilled, task 100 %"):
        (cells,) = (line.split(" | ")[1:] for line in table.splitlines() if line.strip("|* ").startswith(row))
        assert cells[0][0].isdigit() and cells[1][0].isdigit(), row


def test_a_locale_without_train_utterances_is_one_sentence(tmp_path):
    config = config_for(tmp_path, {"en-US": utterances("en-US", ENOUGH), "de-DE": utterances("de-DE", {"test": 24})})
    with pytest.raises(UserError, match="de-DE") as error:
        study.run(config, tmp_path / "study")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "study").glob("stages/*/DONE"))


@pytest.mark.long
def test_early_stopping_without_dev_utterances_is_one_sentence(tmp_path):
    config = config_for(tmp_path, CASES["no dev partition"])
    with pytest.raises(UserError, match="dev") as error:
        study.run(config, tmp_path / "study")
    assert "\n" not in str(error.value)
