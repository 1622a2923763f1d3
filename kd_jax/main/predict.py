"""Predicts domain, intent and slots of texts, with one finetuned model or a DC and an ICNER model together.

python -m kd_jax.main.predict --model=DIR "weck mich um sieben"
python -m kd_jax.main.predict --model=DC,ICNER --input=lines.txt --output=predictions.jsonl

--model takes workdirs of finetune runs, or folders that `export` wrote with stablehlo or int8; the workdir of a study
means its best distilled students, of the first seed. With two models, the pair of domain and intent with the highest
product of probabilities is taken, among the pairs in the training labels. An ICNER run with a model for each domain
needs a DC run, which chooses the model. --input reads one text per line from a file, or from standard input with "-";
--output writes to a file instead of standard output. --format is text (the default for texts on the command line), json
(one object per line) or massive (the schema of MASSIVE). --locale decides what a word is: a character in the
config.nlu.character_locales of the training data. --prepared is the prepared folder, if it moved since the run.
--probabilities adds those of domain, intent and slots.

Texts are normalized like the training data: lowercased, and punctuation removed or split off, if 99 % of the labeled
utterances are written so; --no-normalize reads them as they are. The output shows text and slots as they were written,
in json and text without the punctuation around a slot.

--threshold=NUMBER, from 0 to 1, gives no domain, intent or slots for a text whose domain (without a DC model: its
intent) has a lower probability. --threshold=auto takes the threshold that finetuning recorded: the 5 % quantile of the
probabilities of the correct answers on dev, so that 5 % of the correct answers are refused.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np
from absl import logging

from kd_jax.config.execution import Mesh
from kd_jax.data.prepared import Prepared
from kd_jax.data.text import files
from kd_jax.data.text.text_form import TextForm, bare
from kd_jax.data.text.utterances import FIELDS, Utterance, split_words
from kd_jax.evaluation.slots import repair_bio
from kd_jax.jobs import finetune, serving, trained
from kd_jax.main.command import MISTAKE, fail
from kd_jax.runtime.files import full_disk_is_user_error, read_json, system_errors_are_user_errors, whole_text_file
from kd_jax.runtime.paths import as_path
from kd_jax.runtime.progress import Count
from kd_jax.study.plan import MODELS
from kd_jax.trainer.mesh import make_mesh
from kd_jax.types import UserError

CHUNK = 4096  # texts in memory at a time
ROWS = 32  # rows in a batch, if there are many texts
FORMATS = ("text", "json", "massive")


class Prediction(NamedTuple):
    """The models' answer for one text; None and "O" if it was refused, if there is no such model, or none for that
    domain."""

    text: str
    words: tuple[str, ...]
    domain: str | None
    intent: str | None
    tags: tuple[str, ...]  # IOB2, one per word
    # If requested: of the domain, of the intent, and of each word's tag (None for a word without tokens).
    domain_probability: float | None = None
    intent_probability: float | None = None
    tag_probabilities: tuple[float | None, ...] = ()
    refused: bool = False  # the probability was below the threshold
    bare: bool = False  # slots are shown without the punctuation around them
    characters: bool = False  # words are characters

    def utterance(self, id: str, locale: str) -> Utterance:
        values = (id, locale, "test", self.domain or "", self.intent or "", self.text, self.words, self.tags)
        return Utterance(*values, self.characters)

    def to_json(self) -> dict[str, Any]:
        """Text, domain, intent and slots; a slot has its name, its words, and the range of its words [start, end).

        With probabilities each has its own; a slot's is the product of those of its words' tags.
        """
        found: list[dict[str, Any]] = []
        joint = "" if self.characters else " "
        for span in self.utterance("", "").spans:
            words = joint.join(self.words[span.start : span.end])
            words = bare(words) if self.bare else words
            found.append({"slot": span.slot, "text": words, "start": span.start, "end": span.end})
            if self.tag_probabilities:
                known = [one for one in self.tag_probabilities[span.start : span.end] if one is not None]
                found[-1]["probability"] = round(math.prod(known), 4)
        values: dict[str, Any] = {"text": self.text}
        for name in ("domain", "intent"):
            values[name], probability = getattr(self, name), getattr(self, f"{name}_probability")
            if probability is not None:
                values[f"{name}_probability"] = round(probability, 4)
        return {**values, "slots": found}


class Predictor:
    """Finetuned models, read once.

    normalize: texts are normalized to the case and punctuation of a model's labeled text. threshold: probability of the
    domain, or of the intent without a DC model, below which a text is refused; "auto" takes the model's own. Raises
    UserError for a folder that is no finetuning run, for two of one task, and for a threshold that no run recorded.
    """

    def __init__(
        self, workdirs: Sequence[str], prepared: str = "", normalize: bool = True, threshold: float | str = 0.0
    ):
        self._mesh, self._normalize = make_mesh(Mesh()), normalize
        self._prepared: dict[str, Prepared] = {}
        self._dc: finetune.Finetuned | None = None
        self._icner: dict[str, finetune.Finetuned] = {}  # by domain; "" is the model of all
        for workdir in workdirs:
            folder = as_path(workdir)
            for domain, one in (finetune.domain_folders(folder) or {"": folder}).items():
                self._add(domain, self._load(one, prepared), workdir)
        if not self._icner and self._dc is None:
            raise UserError("--model: it is empty; give the workdir of a finetune run, or two joined by a comma")
        if self._icner and "" not in self._icner and self._dc is None:
            raise UserError("--model: the ICNER run has a model for each domain; give a DC run too: --model=DC,ICNER")
        self._threshold = self._own_threshold() if threshold == "auto" else float(threshold)
        self._pairs = self._seen_together() if self._dc is not None and "" in self._icner else None

    def _own_threshold(self) -> float:
        one = self._dc or self._icner[""]
        if one.seen.threshold is None:
            raise UserError(
                "--threshold=auto: the model has none, since an older version finetuned it or no dev utterance was "
                "right; give a number, or finetune it again"
            )
        return one.seen.threshold

    def _seen_together(self) -> np.ndarray | None:
        """Which domain occurs with which intent in the training labels, bool [D, I]; None if that is unknown."""
        assert self._dc is not None
        dc, icner = self._dc, self._icner[""]
        known = icner.seen.domains_of_intents or dc.seen.domains_of_intents
        found = np.zeros((len(dc.maps.domains), len(icner.maps.intents)), bool)
        for intent, domains in known.items():
            for domain in domains:
                if (row := dc.maps.domain_id(domain)) >= 0 and (column := icner.maps.intent_id(intent)) >= 0:
                    found[row, column] = True
        return found if found.any() else None

    def _load(self, folder: pathlib.Path, prepared: str) -> finetune.Finetuned:
        if serving.is_served(folder):
            return finetune.served(folder, "auto")
        trained.parameters_fingerprint(folder, "model")  # raises if the run is not finished
        path = prepared or trained.run_config(folder, "model").prepared
        data = self._prepared.setdefault(path, Prepared(path))
        return finetune.load_finetuned(folder, data, self._mesh, "auto", "model")

    def _add(self, domain: str, one: finetune.Finetuned, workdir: str) -> None:
        if one.task == "dc" and self._dc is None:
            self._dc = one
        elif one.task == "icner" and domain not in self._icner:
            self._icner[domain] = one
        else:
            raise UserError(f"--model: {workdir} is a second run for {one.task}; give one DC and one ICNER run")

    def predict(
        self, texts: Sequence[str], locale: str = "", rows: int = ROWS, probabilities: bool = False
    ) -> list[Prediction]:
        """One for each text, in their order; texts share the rows of a batch. A text with more tokens than a training
        row is cut, and the words after the cut have the tag "O"."""
        # Answers use the words of the ICNER model, which tags them.
        tagger = next(iter(self._icner.values()), self._dc)
        assert tagger is not None
        characters = locale in tagger.seen.character_locales
        words = [tuple(split_words(text, characters)) for text in texts]
        full = [number for number, one in enumerate(words) if one]
        likely = "all" if probabilities or self._threshold or self._pairs is not None else "none"

        def ask(one: finetune.Finetuned, chosen: list[int]) -> dict[int, dict[str, Any]]:
            """The records of the chosen texts, with tags for the words as given."""
            form = one.seen.form if self._normalize else TextForm()
            by_character = locale in one.seen.character_locales
            read = [form.words(texts[number], by_character) for number in chosen]
            asked = [
                Utterance("", locale, "", "", "", " ".join(it), tuple(it), ("O",) * len(it), by_character)
                for it, _ in read
            ]
            which = (one.model, one.params, one.masks, asked, [], one.tokenizer, one.length, one.maps, self._mesh)
            records = finetune.predict(*which, batch_rows=rows, probabilities=likely) if asked else []
            for record, (_, places) in zip(records, read, strict=True):
                record |= as_given(record, places) if one.task == "icner" else {}
            return dict(zip(chosen, records, strict=True))

        by_domain = ask(self._dc, full) if self._dc is not None else {}
        domains = {number: record["predicted_domain"] for number, record in by_domain.items()}
        found: dict[int, dict[str, Any]] = {}
        for domain, model in self._icner.items():
            found |= ask(model, [number for number in full if domain in ("", domains.get(number))])
        return [
            self._prediction(text, words[number], characters, by_domain.get(number), found.get(number), probabilities)
            for number, text in enumerate(texts)
        ]

    def _prediction(
        self,
        text: str,
        words: tuple[str, ...],
        characters: bool,
        dc: dict[str, Any] | None,
        icner: dict[str, Any] | None,
        probabilities: bool,
    ) -> Prediction:
        """The answer for one text from the models' records."""
        if dc and icner and self._pairs is not None:
            self._choose_pair(dc, icner)
        outside = ("O",) * len(words)
        decides = dc or icner
        refused = bool(self._threshold and decides and decides["probability"] < self._threshold)
        values: dict[str, Any] = {"refused": refused, "bare": self._normalize, "characters": characters}
        if probabilities and dc:
            values["domain_probability"] = dc["probability"]
        if probabilities and icner:
            values["intent_probability"] = icner["probability"]
            values["tag_probabilities"] = tuple(icner["tag_probabilities"])
        if refused:
            return Prediction(text, words, None, None, outside, **values)
        tags = tuple(icner["predicted_tags"]) if icner else outside
        domain = dc["predicted_domain"] if dc else None
        intent = icner["predicted_intent"] if icner else None
        return Prediction(text, words, domain, intent, tags, **values)

    def _choose_pair(self, dc: dict[str, Any], icner: dict[str, Any]) -> None:
        """Replaces the answers of both models by the most likely pair that occurs in the training labels."""
        assert self._dc is not None and self._pairs is not None
        # If both models are certain of labels that never occur together, every allowed product underflows to zero.
        chances = [np.maximum(one["class_probabilities"], np.finfo(np.float32).tiny) for one in (dc, icner)]
        joint = np.where(self._pairs, np.log(chances[0])[:, None] + np.log(chances[1])[None, :], -np.inf)
        domain, intent = np.unravel_index(joint.argmax(), joint.shape)
        dc["predicted_domain"] = self._dc.maps.domains[domain]
        icner["predicted_intent"] = self._icner[""].maps.intents[intent]
        dc["probability"] = dc["class_probabilities"][domain]
        icner["probability"] = icner["class_probabilities"][intent]


def as_given(record: Mapping[str, Any], places: Sequence[int | None]) -> dict[str, Any]:
    """Tags, and probabilities if any, of the words as given. places: index of the word that was read for each.

    A word that was not read continues the slot around it.
    """
    read = record["predicted_tags"]
    tags: list[str] = []
    for number, place in enumerate(places):
        following = next((read[other] for other in places[number + 1 :] if other is not None), "O")
        tags.append(read[place] if place is not None else following if following.startswith("I-") else "O")
    found: dict[str, Any] = {"predicted_tags": repair_bio(tags)}
    if likely := record.get("tag_probabilities"):
        found["tag_probabilities"] = [None if place is None else likely[place] for place in places]
    return found


def lines_of(predictions: Iterable[Prediction], form: str, locale: str, first: int = 0) -> Iterator[str]:
    """Each prediction in one of FORMATS; numbers count from `first`."""
    for number, one in enumerate(predictions, first):
        if form == "text":
            yield _as_text(one.to_json(), one.refused)
        elif form == "json":
            yield json.dumps(one.to_json(), ensure_ascii=False)
        else:
            it = one.utterance(str(number), locale)
            values = (it.id, locale, it.partition, it.domain, it.intent, it.text, it.annotated())
            yield json.dumps(dict(zip(FIELDS, values, strict=True)), ensure_ascii=False)


def _as_text(values: dict[str, Any], refused: bool) -> str:
    """A line for each of text, domain, intent and slots, with probabilities in parentheses."""

    def likely(holder: dict[str, Any], key: str) -> str:
        return f" ({holder[key]:.2f})" if key in holder else ""

    slots = ", ".join(f"{slot['slot']} = {slot['text']}{likely(slot, 'probability')}" for slot in values["slots"])
    lines = {"text": values["text"], "slots": slots or None}
    for name in ("domain", "intent"):
        answer = "none" if refused else values[name]
        lines[name] = answer and answer + likely(values, f"{name}_probability")
    order = ("text", "domain", "intent", "slots")
    return "\n".join(f"{name + ':':<8}{lines[name]}" for name in order if lines[name] is not None)


def run(options: argparse.Namespace) -> None:
    """Predicts the texts that the options name, one chunk at a time."""
    models = [one for name in options.model.split(",") if name.strip() for one in _runs(name.strip())]
    predictor = Predictor(models, options.prepared, not options.no_normalize, _threshold(options.threshold))
    with contextlib.ExitStack() as stack:
        texts: Iterable[str] = options.texts
        for number, text in enumerate(options.texts, 1):
            files.check_text(text, f"text {number} of the command line")
        if options.input:
            texts = _lines(options.input)
        output: TextIO = sys.stdout
        if options.output:
            pathlib.Path(options.output).parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(whole_text_file(pathlib.Path(options.output)))
        form = options.format or ("json" if options.input else "text")
        rows = ROWS if options.input else 1
        done, texts = 0, iter(texts)
        apart = form == "text"
        # A progress bar would break up lines that are printed to a terminal.
        count = stack.enter_context(Count("predict", "texts", shown=bool(options.output) or not output.isatty()))
        while chunk := list(itertools.islice(texts, CHUNK)):
            predictions = predictor.predict(chunk, options.locale, rows, options.probabilities)
            for number, line in enumerate(lines_of(predictions, form, options.locale, done), done):
                print(f"\n{line}" if apart and number else line, file=output)
            done += len(chunk)
            count.update(len(chunk))


def _runs(name: str) -> list[str]:
    """The runs that one name in --model means: itself, or those named by a finished study."""
    folder = as_path(name)
    if not (folder / MODELS).is_file():
        return [name]
    names = read_json(folder / MODELS)
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise UserError(f"{folder / MODELS}: is not a list of folders; start the study again, which writes it again")
    return [str(folder / one) for one in names]


def _threshold(given: str) -> float | str:
    if given == "auto":
        return given
    try:
        value = float(given or 0)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise UserError(f"--threshold: {given!r} is neither auto nor a probability; give a number from 0 to 1")
    return value


def _lines(name: str) -> Iterator[str]:
    if name == "-":
        numbered = files.decode_lines(sys.stdin.buffer, "standard input")
    elif pathlib.Path(name).is_file():
        numbered = files.numbered_lines(pathlib.Path(name))
    else:
        raise UserError(f"--input: there is no file {name}; name one with a text per line, or - for standard input")
    return (line for _, line in numbered)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kd_jax.main.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail  # type: ignore[method-assign]
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--model", required=True)
    for name in ("input", "output", "locale", "prepared", "threshold"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--format", default="", choices=("", *FORMATS))
    for name in ("probabilities", "no-normalize"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.WARNING)
    try:
        if bool(options.texts) == bool(options.input):
            raise UserError("give texts, or --input with a file of them, and not both")
        if options.probabilities and options.format == "massive":
            raise UserError("--probabilities: the massive format has no field for them; use --format=json")
        with system_errors_are_user_errors(), full_disk_is_user_error(options.output or "standard output"):
            run(options)
    except UserError as error:
        print(f"error: {str(error).replace('config.model:', '--model:')}", file=sys.stderr)
        return MISTAKE
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit fails too
    return 0


if __name__ == "__main__":
    sys.exit(main())
