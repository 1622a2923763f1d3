"""What the report of a finished study states apart from its results: the data, the caches, the best models."""

import pathlib
from typing import Any

import numpy as np

from kd_jax.data.prepared import Prepared
from kd_jax.data.text.splits import shared_with_test
from kd_jax.evaluation.similarity import jensen_shannon, matched_jsd, vocabulary_overlap
from kd_jax.jobs.finetune import labeled_train
from kd_jax.runtime.files import read_json
from kd_jax.study.report.numbers import HEADLINE, Numbers
from kd_jax.study.run import Study


def best_models(study: Study, numbers: Numbers) -> list[pathlib.Path]:
    """For each task, the model directory (first seed) of the distilled student with the lowest mean test error."""
    found = []
    for task in numbers.tasks():
        means = {
            student: mean.mean
            for student in numbers.students
            if student.kind == "distilled" and (mean := numbers.mean(student, task, HEADLINE[task].error)) is not None
        }
        if means:
            best = min(means, key=means.__getitem__)
            recipe = study.chosen[best.name, task]
            found.append(study.folder(study.planner.finetune(best, study.settings.seeds[0], task, recipe)))
    return found


def cached_predictions(study: Study) -> dict[str, str]:
    """What was cached of each teacher, and how often at most a mask was repeated in a run of cached predictions."""
    found = {}
    for stage in study.planner.plan(study.chosen):  # not planned(), which all processes must call
        if stage.command == "cache_states":
            cache = read_json(study.folder(stage) / "cache.json")
            found[f"states of the {stage.name.removeprefix('states-')} teacher"] = (
                f"{cache['rows']:,} rows of unmasked text, {cache['tokens']:,} tokens and {cache['texts']:,} texts, "
                f"{cache['bytes'] / 2**20:.1f} MiB, {cache['bytes_per_token']:.0f} bytes per token"
            )
        if stage.command != "cache_teacher":
            continue
        cache = read_json(study.folder(stage) / "cache.json")
        most = max(one["masks_repeat"] for one in cache["runs"])
        found[f"predictions of the {stage.name.removeprefix('cache-')} teacher"] = (
            f"{cache['rows']:,} rows, {cache['bytes'] / 2**20:.1f} MiB, {cache['bytes_per_position']:.0f} bytes per "
            f"masked position, {cache['mass_kept']:.1%} of its probability; a mask is used at most {most:.1f} times in "
            "a run"
        )
    return found


def about_data(prepared: Prepared, max_train: int) -> dict[str, str]:
    """Overlap with held-out utterances: texts that decontamination removed from each store, and labels that remain."""
    stores = [store for store in prepared.manifest["stores"] if store["removed"].get("decontaminated")]
    counts = ", ".join(f"{store['name']} {store['removed']['decontaminated']}" for store in stores)
    labeled = labeled_train(prepared, max_train, "")
    same, covered = shared_with_test(labeled, prepared.utterances)
    return {
        "left out, equal to a dev or test utterance": counts or "no text",
        "labeled utterances with the text of a test utterance of their locale": (
            f"{same:,} of {len(labeled):,}, which cover {covered:,} test utterances; test_unseen is without these"
        ),
    }


def domains_against_generic(prepared: Prepared) -> list[dict[str, Any]]:
    """The similarity of each domain's train text to the generic train text, by token counts."""
    vocabulary = prepared.tokenizer.vocab_size
    generic = np.zeros(vocabulary, np.int64)
    for store in prepared.stores("train"):
        if store.kind == "generic":
            generic += store.token_counts(vocabulary)
    by_domain: dict[str, list[str]] = {}
    for utterance in prepared.utterances:
        if utterance.partition == "train":
            by_domain.setdefault(utterance.domain, []).append(utterance.text)
    counts = {
        domain: np.bincount(np.concatenate(prepared.tokenizer.encode(texts)), minlength=vocabulary)
        for domain, texts in sorted(by_domain.items())
    }
    # The divergence of two samples falls with their size, so domains are also compared at the size of the smallest.
    size = int(min(count.sum() for count in counts.values()))
    return [
        {
            "domain": domain,
            "jsd": jensen_shannon(count, generic),
            "jsd_matched": matched_jsd(count, generic, size, seed=0),
            "overlap": vocabulary_overlap(count, generic),
            "tokens": int(count.sum()),
        }
        for domain, count in counts.items()
    ]
