"""Classifiers that students have to beat: n-grams, and a linear probe of the frozen teacher.

scikit-learn and python-crfsuite are imported where they are used, since that takes seconds.
"""

import functools
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from kd_jax.config.commands import Baseline
from kd_jax.data.prepared import Prepared
from kd_jax.data.text.utterances import Utterance
from kd_jax.evaluation.records import Record, assign_test_sets, domain_record, intent_slot_record
from kd_jax.evaluation.results import RECORDS, RESULTS, TERMS, results
from kd_jax.evaluation.slots import repair_bio
from kd_jax.jobs.finetune import DEV, dev_scores, labeled_dev, labeled_train, of_domain, predicted_labels
from kd_jax.jobs.states import mean_states
from kd_jax.jobs.teachers import Teacher
from kd_jax.runtime.files import write_json_lines, write_sealed
from kd_jax.runtime.paths import make_folder
from kd_jax.runtime.preemption import interruptible
from kd_jax.runtime.progress import Count
from kd_jax.trainer.run_directory import RunDirectory
from kd_jax.types import UserError

ABOUT = "baseline.json"
CRF_ITERATIONS = 50  # of L-BFGS; more changed slot F1 on dev by less than half a point in either direction
KINDS = {"ngrams": "ngrams", "teacher": "probe"}  # config.baseline.features -> the row's kind in a study


class Model(Protocol):
    """A fitted model: one prediction for each row of features, or for each utterance's words."""

    def predict(self, x: Any, /) -> Sequence[Any]: ...


class Trial(NamedTuple):
    """One fit; part: domain | intent | slots; dev_score: accuracy or slot F1, None without dev utterances."""

    part: str
    c: float
    dev_score: float | None
    chosen: bool


class Labeled(NamedTuple):
    """The utterances of one task: labels to learn, dev for the choice of C, test."""

    train: list[Utterance]
    dev: list[Utterance]
    test: list[Utterance]


def labeled(prepared: Prepared, settings: Baseline, task: str) -> Labeled:
    """The utterances that a student of these labels is trained and tested on. Raises UserError if either is missing."""
    given, test = labeled_train(prepared, settings.max_train, ""), of_domain(prepared.utterances, "test", "")
    for name, part in (("train", given), ("test", test)):
        if not part:
            raise UserError(f"config.nlu: there is no utterance to {name} on; give a data set with a {name} partition")
    more = predicted_labels(prepared, settings, task, "baseline")
    return Labeled([*given, *more], labeled_dev(prepared, settings), test)


def run(
    directory: RunDirectory,
    settings: Baseline,
    data: Mapping[str, Labeled],
    prepared: Prepared,
    teacher: Teacher | None,
    mesh: jax.sharding.Mesh,
    progress: bool = False,
) -> dict[str, Any]:
    """Fits and scores each task; writes records.jsonl, results.jsonl and dev.json in a folder for each, and
    baseline.json. The models are not kept.
    """
    directory.start(tokenizer_fingerprint=prepared.tokenizer.fingerprint)
    started, spent = time.monotonic(), {}
    utterances = list({id(one): one for each in data.values() for part in each for one in part}.values())
    states = None
    if teacher is not None:  # all processes take part
        with Count("teacher's states", "utterances", len(utterances), shown=progress) as count:
            states = mean_states(teacher.model, teacher.params(mesh), prepared, utterances, mesh, count.update)
        spent["states"] = time.monotonic() - started
    if jax.process_index() != 0:
        return {}
    about: dict[str, Any] = {"seconds": spent}
    who = {"student": KINDS[settings.features], "transfer_set": ""}
    who |= {"teacher": "labeled" if settings.labels else "", "seed": None}
    seen = labeled_train(prepared, settings.max_train, "")
    for task, each in data.items():
        started = time.monotonic()
        if states is None:
            features = ngrams(each.train)
        else:
            rows = {id(one): row for one, row in zip(utterances, states, strict=True)}
            features = functools.partial(_rows, rows)
        found = fit(task, each, features, settings)
        folder = directory.path / task
        make_folder(folder)
        records = found.records(each.test, seen)
        write_json_lines(folder / RECORDS, records)
        write_json_lines(folder / RESULTS, results(records, identity=who))
        write_sealed(folder / DEV, {**scores(found.records(each.dev, seen), task), "count": len(each.dev)})
        spent[task] = time.monotonic() - started
        about[task] = {
            "train_utterances": len(each.train),
            "features": found.size,
            "trials": [one._asdict() for one in found.trials],
            "notes": found.notes,
        }
    write_sealed(directory.path / ABOUT, about)
    return {}


def _rows(rows: Mapping[int, np.ndarray], utterances: Sequence[Utterance]) -> np.ndarray:
    return np.stack([rows[id(one)] for one in utterances])


class Fitted(NamedTuple):
    """The models of one task. tagger: None if no slots are predicted."""

    task: str
    features: Callable[[Sequence[Utterance]], Any]
    classifier: Model
    tagger: Model | None
    size: int  # features of an utterance
    trials: list[Trial]
    notes: list[str]

    def records(self, utterances: Sequence[Utterance], train: Sequence[Utterance]) -> list[Record]:
        """The records of the utterances; train: those whose labels were given, which decide the test sets."""
        if not utterances:
            return []
        named = [str(name) for name in self.classifier.predict(self.features(utterances))]
        sets = assign_test_sets(utterances, train)
        if self.task == "dc":
            return [domain_record(*each) for each in zip(utterances, sets, named, strict=True)]
        tags = [None] * len(named) if self.tagger is None else tags_of(self.tagger, utterances)
        return [intent_slot_record(*each) for each in zip(utterances, sets, named, tags, strict=True)]


def fit(task: str, data: Labeled, features: Callable[[Sequence[Utterance]], Any], settings: Baseline) -> Fitted:
    """Logistic regression on the features for domains or intents, and, with n-grams, a CRF for slots."""
    part = "domain" if task == "dc" else "intent"
    labels, notes = [getattr(one, part) for one in data.train], list[str]()
    x = features(data.train)
    dev_x, dev_labels = features(data.dev) if data.dev else None, np.array([getattr(one, part) for one in data.dev])
    if not data.dev:
        notes.append(f"there is no dev partition, so C was fixed at {settings.c_without_dev:g}")

    def choose(part: str, make: Callable[[float], Model], score: Callable[[Model], float]) -> tuple[Model, list[Trial]]:
        """The first of the models with the best score."""
        if not data.dev:
            return make(settings.c_without_dev), [Trial(part, settings.c_without_dev, None, True)]
        models = [make(float(c)) for c in interruptible(settings.c_values, f"C for {part}", alone=True)]
        values = [score(model) for model in models]
        best = int(np.argmax(values))
        tried = zip(settings.c_values, values, strict=True)
        return models[best], [Trial(part, c, value, number == best) for number, (c, value) in enumerate(tried)]

    classes = sorted(set(labels))
    if len(classes) == 1:
        notes.append(f"all labels are {classes[0]!r}, which is predicted for every utterance")
    classifier, trials = choose(
        part,
        lambda c: logistic_regression(x, labels, c),
        lambda model: float(np.mean(np.asarray(model.predict(dev_x)) == dev_labels)),
    )
    tagger = None
    if task == "icner" and settings.features == "ngrams":
        if all(tag == "O" for one in data.train for tag in one.tags):
            notes.append("no label has a slot, so none is predicted")
        tagger, more = choose(
            "slots", lambda c: crf(data.train, c), lambda model: slot_f1(data.dev, tags_of(model, data.dev))
        )
        trials += more
    return Fitted(task, features, classifier, tagger, x.shape[1], trials, notes)


def scores(records: Sequence[Record], task: str) -> dict[str, float | None]:
    """`dev_scores`; "score" excludes slots if none are predicted, and is None without records."""
    found: dict[str, float | None] = {**dev_scores(records, task)}
    if not records:
        found["score"] = None
    elif task == "icner" and records[0]["predicted_tags"] is None:
        found["score"] = found["intent_accuracy"]
    return found


def logistic_regression(x: Any, labels: Sequence[str], c: float) -> Model:
    """scikit-learn's logistic regression, or a constant if there is one class."""
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    if len(set(labels)) == 1:
        return DummyClassifier(strategy="most_frequent").fit(x, labels)
    # On one thread: a sum's order, and with it the last bits, would depend on the number of cores.
    with threadpool_limits(1), warnings.catch_warnings():
        # With few labels, many names occur once, and scikit-learn asks whether this should be a regression.
        warnings.filterwarnings("ignore", message="The number of unique classes is greater than 50%")
        return LogisticRegression(C=c, max_iter=1000).fit(x, labels)


def ngrams(train: Sequence[Utterance]) -> Callable[[Sequence[Utterance]], Any]:
    """Utterances -> sparse float64 [utterances, n-grams]: TF-IDF of words 1-2 and of characters 2-5 within words, with
    the n-grams and frequencies of the train utterances.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import FeatureUnion

    # Every run of word characters is a word, even of length one, so that no language has an empty vocabulary.
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+")
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5))
    union = FeatureUnion([("words", words), ("characters", characters)])
    union.fit([one.text for one in train])
    return lambda utterances: union.transform([one.text for one in utterances])


class Tagger:
    """A conditional random field over words (crfsuite's). Its predictions are lists of IOB2 tags."""

    def __init__(self, model: bytes):
        import pycrfsuite

        self._model = model  # crfsuite reads these bytes without owning them
        self._tagger = pycrfsuite.Tagger()
        self._tagger.open_inmemory(model)

    def predict(self, sequences: Sequence[list[list[str]]], /) -> list[list[str]]:
        return [self._tagger.tag(words) for words in sequences]


def crf(train: Sequence[Utterance], c: float) -> Model:
    """A linear-chain CRF with L2 penalty 1 / (2 c), as in the logistic regression, trained by L-BFGS."""
    import pycrfsuite

    trainer = pycrfsuite.Trainer(algorithm="lbfgs", verbose=False)
    trainer.set_params({"c1": 0.0, "c2": 0.5 / c, "max_iterations": CRF_ITERATIONS})
    for one in train:
        trainer.append(word_features(one.words), one.tags)
    with tempfile.TemporaryDirectory() as folder:  # crfsuite can only write to a file
        file = f"{folder}/model"
        trainer.train(file)
        with open(file, "rb") as model:
            return Tagger(model.read())


def word_features(words: Sequence[str]) -> list[list[str]]:
    """Features of each word: the word, its prefixes and suffixes, its shape, and the words around it."""
    lower = [word.casefold() for word in words]
    around = ["<s>", "<s>", *lower, "</s>", "</s>"]
    found = []
    for number, (word, plain) in enumerate(zip(words, lower)):
        before2, before, _, after, after2 = around[number : number + 5]
        features = [f"word={plain}", f"shape={_shape(word)}"]
        for size in range(2, min(5, len(plain))):
            features += [f"begin={plain[:size]}", f"end={plain[-size:]}"]
        features += [f"-1={before}", f"+1={after}", f"-2={before2}", f"+2={after2}"]
        features += [f"-1,0={before} {plain}", f"0,+1={plain} {after}"]
        found.append(features)
    return found


def _shape(word: str) -> str:
    """The word with its letters as x or X and its digits as 0."""
    return "".join("0" if one.isdigit() else "X" if one.isupper() else "x" if one.isalpha() else one for one in word)


def tags_of(tagger: Model, utterances: Sequence[Utterance]) -> list[list[str]]:
    """Valid IOB2 tags of each utterance."""
    return [repair_bio(tags) for tags in tagger.predict([word_features(one.words) for one in utterances])]


def slot_f1(utterances: Sequence[Utterance], tags: Sequence[Sequence[str]]) -> float:
    """Micro F1 as in results.py; 0 without any slot."""
    term = TERMS["icner"]["slot_f1"]
    terms = [term(intent_slot_record(one, (), "", found)) for one, found in zip(utterances, tags, strict=True)]
    spans = sum(total for _, total in terms)
    return sum(right for right, _ in terms) / spans if spans else 0.0
