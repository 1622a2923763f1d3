"""Writes the data of docs/own-data.md: utterances to a kitchen assistant, and generic sentences.

python -m docs.examples.own_data.write_data runs/own_data

Writes nlu/<locale>.jsonl in MASSIVE's format and texts/<language>.txt, one text a line. Replace it by a
script that writes your own utterances in this format.
"""

import itertools
import json
import pathlib
import random
import re
import sys

# (domain, intent, patterns); [slot : words] marks a slot, {name} stands for one of VALUES.
PATTERNS = {
    "en-US": [
        ("timer", "timer_start", "start a timer for [duration : {number} minutes]"),
        ("timer", "timer_start", "set the [timer_name : {dish}] timer to [duration : {number} minutes] please"),
        ("timer", "timer_start", "wake me when the [timer_name : {dish}] has had [duration : {number} minutes]"),
        ("timer", "timer_stop", "stop the [timer_name : {dish}] timer"),
        ("timer", "timer_stop", "the [timer_name : {dish}] is done so be quiet"),
        ("timer", "timer_query", "how long does the [timer_name : {dish}] still need"),
        ("shopping", "shopping_add", "put [item : {item}] on my list"),
        ("shopping", "shopping_add", "we are out of [item : {item}] and need [amount : {number}]"),
        ("shopping", "shopping_add", "please add [amount : {number}] packs of [item : {item}]"),
        ("shopping", "shopping_remove", "i already bought [item : {item}]"),
        ("shopping", "shopping_remove", "cross out the [item : {item}]"),
        ("shopping", "shopping_query", "do we have [item : {item}] on the list"),
    ],
    "de-DE": [
        ("timer", "timer_start", "stell einen wecker auf [duration : {number} minuten]"),
        ("timer", "timer_start", "gib mir nach [duration : {number} minuten] bescheid wegen der [timer_name : {dish}]"),
        ("timer", "timer_stop", "halte die uhr für die [timer_name : {dish}] an"),
        ("timer", "timer_query", "wie lange braucht die [timer_name : {dish}] noch"),
        ("timer", "timer_query", "ist die [timer_name : {dish}] bald fertig"),
        ("shopping", "shopping_add", "schreib [item : {item}] auf den zettel"),
        ("shopping", "shopping_add", "wir brauchen [amount : {number}] packungen [item : {item}]"),
        ("shopping", "shopping_remove", "streich [item : {item}] von der liste"),
        ("shopping", "shopping_remove", "[item : {item}] habe ich schon gekauft"),
        ("shopping", "shopping_query", "steht [item : {item}] schon auf der liste"),
    ],
}
VALUES = {
    "en-US": {
        "number": ["two", "three", "four", "five", "six", "eight", "ten", "twelve", "fifteen", "twenty", "forty"],
        "dish": ["rice", "soup", "bread", "noodles", "potatoes", "lentils", "pizza", "cake", "porridge", "beans"],
        "item": ["oat milk", "flour", "green tea", "onions", "butter", "dark chocolate", "eggs", "salt", "olive oil"],
    },
    "de-DE": {
        "number": ["zwei", "drei", "vier", "fünf", "sechs", "acht", "zehn", "zwölf", "fünfzehn", "zwanzig", "vierzig"],
        "dish": ["suppe", "soße", "pizza", "torte", "pasta", "polenta", "quiche", "brühe", "lasagne"],
        "item": ["hafermilch", "mehl", "grüner tee", "zwiebeln", "butter", "zartbitterschokolade", "eier", "salz"],
    },
}
# Generic text: every way through the parts is a sentence.
SENTENCES = {
    "en": [
        ["The old harbor", "Our small museum", "The railway bridge", "A quiet street in the north", "The town library"],
        ["was built", "was painted", "was closed", "was repaired", "was almost forgotten"],
        [
            "two hundred years ago",
            "before the war",
            "in a very cold winter",
            "by three brothers",
            "with borrowed money",
        ],
        [
            "and is full of visitors in summer.",
            "and nobody remembers why.",
            "and it still stands.",
            "for the first time.",
        ],
    ],
    "de": [
        ["Der alte Hafen", "Unser kleines Museum", "Die Brücke am Bahnhof", "Eine stille Straße", "Die Bücherei"],
        ["wurde gebaut", "wurde gestrichen", "wurde geschlossen", "wurde erneuert", "wurde beinahe vergessen"],
        [
            "vor zweihundert Jahren",
            "vor dem Krieg",
            "in einem kalten Winter",
            "von drei Brüdern",
            "mit geliehenem Geld",
        ],
        ["und ist im Sommer voller Gäste.", "und niemand weiß warum.", "und steht noch immer.", "zum ersten Mal."],
    ],
}


def utterances(locale: str) -> list[dict[str, str]]:
    """All fillings of the patterns, shuffled with a fixed seed; of every ten, two are for test and one is for dev."""
    records = []
    for domain, intent, pattern in PATTERNS[locale]:
        names = re.findall(r"{(\w+)}", pattern)
        for values in itertools.product(*(VALUES[locale][name] for name in names)):
            annotated = pattern.format(**dict(zip(names, values)))
            text = re.sub(r"\[\w+ : ([^\]]*)\]", r"\1", annotated)
            records.append({"scenario": domain, "intent": intent, "utt": text, "annot_utt": annotated})
    random.Random(0).shuffle(records)
    partitions = ("test", "test", "dev", *["train"] * 7)
    return [
        {"id": str(number), "locale": locale, "partition": partitions[number % 10], **record}
        for number, record in enumerate(records)
    ]


def main(folder: pathlib.Path) -> None:
    for name in ("nlu", "texts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for locale in PATTERNS:
        lines = [json.dumps(record, ensure_ascii=False) for record in utterances(locale)]
        (folder / "nlu" / f"{locale}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for language, parts in SENTENCES.items():
        texts = [" ".join(words) for words in itertools.product(*parts)]
        random.Random(0).shuffle(texts)
        (folder / "texts" / f"{language}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
