"""Domain, intent and slots of texts, by one finetuned model or by a DC and an ICNER model together.

python -m kd_jax.main.predict --model=DIR "weck mich um sieben"
python -m kd_jax.main.predict --model=DC,ICNER --input=lines.txt --output=predictions.jsonl

--model takes workdirs of finetune runs, or folders that `export` wrote with stablehlo or int8. An ICNER run with a
model for each domain also needs a DC run, which chooses the model. --input reads one text per line from a file, or from
standard input with "-"; --output writes to a file instead of standard output. --format is text (the default for texts
on the command line), json (one object per line) or massive (the schema of MASSIVE). --locale decides what a word is: in
ja-JP, zh-CN and zh-TW a character; --prepared is the prepared folder, if it moved since the run. --probabilities adds
those of domain, intent and slots.
"""

import argparse
import contextlib
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

from absl import logging

from kd_jax.config.execution import Mesh
from kd_jax.data.prepared import Prepared
from kd_jax.data.text import files
from kd_jax.data.text.utterances import FIELDS, Utterance, split_words
from kd_jax.jobs import finetune, serving, trained
from kd_jax.main.command import MISTAKE, fail
from kd_jax.runtime.files import full_disk_is_user_error
from kd_jax.runtime.paths import as_path
from kd_jax.runtime.progress import Count
from kd_jax.trainer.mesh import make_mesh
from kd_jax.types import UserError

CHUNK = 4096  # texts in memory at a time
ROWS = 32  # rows in a batch, if there are many texts
FORMATS = ("text", "json", "massive")


class Prediction(NamedTuple):
    """The models' answer for one text; None and "O" where no model was asked, or none was trained on that domain."""

    text: str
    words: tuple[str, ...]
    domain: str | None
    intent: str | None
    tags: tuple[str, ...]  # IOB2, one per word
    # If requested: of the domain, of the intent, and of each word's tag (None for a word without tokens).
    domain_probability: float | None = None
    intent_probability: float | None = None
    tag_probabilities: tuple[float | None, ...] = ()

    def utterance(self, id: str, locale: str) -> Utterance:
        return Utterance(id, locale, "test", self.domain or "", self.intent or "", self.text, self.words, self.tags)

    def to_json(self, locale: str = "") -> dict[str, Any]:
        """Text, domain, intent and slots; a slot has its name, its words, and the range of its words [start, end).

        With probabilities each has its own; a slot's is the product of those of its words' tags.
        """
        found: list[dict[str, Any]] = []
        joint = "" if split_words("ab", locale) == ["a", "b"] else " "
        for span in self.utterance("", locale).spans:
            words = joint.join(self.words[span.start : span.end])
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
    """Finetuned models, read once. Raises UserError for a folder that is no finetuning run, and for two of one task."""

    def __init__(self, workdirs: Sequence[str], prepared: str = ""):
        self._mesh = make_mesh(Mesh())
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
        utterances: list[Utterance] = []
        for text in texts:
            words = tuple(split_words(text, locale))
            utterances.append(Utterance("", locale, "", "", "", text, words, ("O",) * len(words)))

        def ask(one: finetune.Finetuned, chosen: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
            if chosen:
                asked = [utterances[number] for number in chosen]
                which = (one.model, one.params, one.masks, asked, [], one.tokenizer, one.length, one.maps, self._mesh)
                records = finetune.predict(*which, batch_rows=rows, probabilities=probabilities)
                yield from zip(chosen, records, strict=True)

        full = [number for number, one in enumerate(utterances) if one.words]
        by_domain = dict(ask(self._dc, full)) if self._dc is not None else {}
        domains = {number: record["predicted_domain"] for number, record in by_domain.items()}
        found: dict[int, dict[str, Any]] = {}
        for domain, model in self._icner.items():
            found |= ask(model, [number for number in full if domain in ("", domains.get(number))])
        predictions: list[Prediction] = []
        for number, one in enumerate(utterances):
            values: dict[str, Any] = {"intent": None, "tags": one.tags}
            if number in found:
                record = found[number]
                values = {"intent": record["predicted_intent"], "tags": tuple(record["predicted_tags"])}
                if probabilities:
                    values["tag_probabilities"] = tuple(record["tag_probabilities"])
                    values["intent_probability"] = record["probability"]
            if probabilities and number in by_domain:
                values["domain_probability"] = by_domain[number]["probability"]
            predictions.append(Prediction(one.text, one.words, domains.get(number), **values))
        return predictions


def lines_of(predictions: Iterable[Prediction], form: str, locale: str, first: int = 0) -> Iterator[str]:
    """Each prediction in one of FORMATS; numbers count from `first`."""
    for number, one in enumerate(predictions, first):
        if form == "text":
            yield _as_text(one.to_json(locale))
        elif form == "json":
            yield json.dumps(one.to_json(locale), ensure_ascii=False)
        else:
            it = one.utterance(str(number), locale)
            values = (it.id, locale, it.partition, it.domain, it.intent, it.text, it.annotated())
            yield json.dumps(dict(zip(FIELDS, values, strict=True)), ensure_ascii=False)


def _as_text(values: dict[str, Any]) -> str:
    """A line for each of text, domain, intent and slots, with probabilities in parentheses."""

    def likely(holder: dict[str, Any], key: str) -> str:
        return f" ({holder[key]:.2f})" if key in holder else ""

    slots = ", ".join(f"{slot['slot']} = {slot['text']}{likely(slot, 'probability')}" for slot in values["slots"])
    lines = {"text": values["text"], "slots": slots or None}
    for name in ("domain", "intent"):
        lines[name] = values[name] and values[name] + likely(values, f"{name}_probability")
    order = ("text", "domain", "intent", "slots")
    return "\n".join(f"{name + ':':<8}{lines[name]}" for name in order if lines[name] is not None)


def run(options: argparse.Namespace) -> None:
    """Predicts the texts that the options name, one chunk at a time."""
    predictor = Predictor([name.strip() for name in options.model.split(",") if name.strip()], options.prepared)
    with contextlib.ExitStack() as stack:
        texts: Iterable[str] = options.texts
        for number, text in enumerate(options.texts, 1):
            files.check_text(text, f"text {number} of the command line")
        if options.input:
            texts = _lines(options.input)
        output: TextIO = sys.stdout
        if options.output:
            pathlib.Path(options.output).parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(open(options.output, "w", encoding="utf-8"))
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
    for name in ("input", "output", "locale", "prepared"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--format", default="", choices=("", *FORMATS))
    parser.add_argument("--probabilities", action="store_true")
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.WARNING)
    try:
        if bool(options.texts) == bool(options.input):
            raise UserError("give texts, or --input with a file of them, and not both")
        if options.probabilities and options.format == "massive":
            raise UserError("--probabilities: the massive format has no field for them; use --format=json")
        with full_disk_is_user_error(options.output or "standard output"):
            run(options)
    except UserError as error:
        print(f"error: {str(error).replace('config.model:', '--model:')}", file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
