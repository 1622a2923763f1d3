"""README.md of an exported model: what it is, where it comes from, how well it does, how it is used."""

import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from kd_jax.config.commands import Export
from kd_jax.data.embedded.teacher import model_title
from kd_jax.data.prepared import Prepared
from kd_jax.evaluation.results import MASSIVE_METRICS, RESULTS
from kd_jax.jobs import trained
from kd_jax.jobs.finetune import DEV
from kd_jax.jobs.job import BEST_STEP
from kd_jax.jobs.masked_lm import HELDOUT, summarize
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.checkpoint import head_apart
from kd_jax.runtime.files import read_json, read_json_lines, read_json_object
from kd_jax.runtime.paths import as_path
from kd_jax.trainer.run_directory import CONFIG, RUN, is_done
from kd_jax.types import UserError

KEY = "export.results"
TEXT_HEADS = {"dc": "domain_head.safetensors", "icner": "intent_head.safetensors"}  # if they are separate files

# Metrics that the card shows, in percent, under the names of the report's tables.
SHOWN = {
    "error_rate": "DC error",
    "intent_error_rate": "Intent error",
    "slot_f1": "Slot F1",
    "exact_match": "Exact match",
    "semer": "SemER",
    **{name: name.replace("_", " ").replace("massive", "MASSIVE") for name in MASSIVE_METRICS},
}

_CARD = """---
{metadata}
---

# {name}

{what}

{facts}

## Where it comes from

{origin}

## How well it does

{metrics}

## How to use it

{usage}
"""

_KINDS = {
    "mlm": ("fill-mask", "A masked language model."),
    "dc": ("text-classification", "A domain classifier: which domain is this utterance for?"),
    "icner": ("token-classification", "Intents and slots: what is wanted, and which words say what about it."),
}

_TRANSFORMERS = """```python
import torch
{imports}from transformers import {model}, AutoTokenizer

folder = "."  # the folder of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {model}.from_pretrained(folder).eval()
{use}
```"""

_USE = {
    "mlm": """batch = tokenizer("wake me up at seven", return_tensors="pt")
batch["input_ids"][0, 2] = tokenizer.mask_token_id
with torch.no_grad():
    logits = model(**batch).logits
print(tokenizer.convert_ids_to_tokens(logits[0, 2].topk(5).indices.tolist()))""",
    "dc": """with torch.no_grad():
    logits = model(**tokenizer("wake me up at seven", return_tensors="pt")).logits
print("domain:", model.config.id2label[logits[0].argmax().item()])""",
    "dc_apart": """head = load_file(f"{folder}/domain_head.safetensors")
batch = tokenizer("wake me up at seven", return_tensors="pt")
with torch.no_grad():
    states = model(**batch).last_hidden_state[0]  # one text without padding
HEAD
print("domain:", model.config.domains[logits.argmax().item()])""",
    "icner": """head = load_file(f"{folder}/intent_head.safetensors")
batch = tokenizer("wake me up at seven", return_tensors="pt")
with torch.no_grad():
    tags = model(**batch).logits[0].argmax(-1).tolist()
    states = model.base_model(**batch).last_hidden_state[0]  # one text without padding
HEAD
print("intent:", model.config.intents[logits.argmax().item()])
for token, tag in zip(tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist()), tags):
    print(token, model.config.id2label[tag])""",
}

# The head that classifies a text, applied to the states of its tokens.
_HEAD = """x = POOLED
x = torch.nn.functional.linear(x, head["dense.weight"], head.get("dense.bias"))
x = ACTIVATION
logits = torch.nn.functional.linear(x, head["classifier.weight"], head["classifier.bias"])"""

_POOLED = {"first": "states[0]", "mean": "states.mean(0)", "max": "states.amax(0)"}
_READS = {
    "first": "the last hidden state of the first token",
    "mean": "the mean of the last hidden states of all tokens",
    "max": "the maximum of the last hidden states of all tokens",
}

_INT8 = """The weights are int8 with a scale for each output channel, which `transformers` does not load. kd_jax does:

```
python -m kd_jax.main.predict --model=. "wake me up at seven"
```"""

_PROGRAM = """### The compiled program

`predictor.stablehlo` runs wherever jax does (cpu, cuda, tpu), without kd_jax and PyTorch. It takes the weights of
`predictor.safetensors`, and token ids and mask of any number of texts up to the model's length. It was serialized by
`jax.export` and needs the packages jax, flatbuffers, safetensors and transformers.

```python
import json

import jax
import numpy as np
from safetensors.numpy import load_file
from transformers import AutoTokenizer

folder = "."  # the folder of this file
about = json.load(open(f"{folder}/predictor.json", encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(folder)
program = jax.export.deserialize(bytearray(open(f"{folder}/predictor.stablehlo", "rb").read()))
weights = jax.device_put(load_file(f"{folder}/predictor.safetensors"))
predict = jax.jit(program.call)  # compiled once for each shape
texts = ["wake me up at seven", "play some jazz"]
batch = tokenizer(texts, padding=True, return_tensors="np")
logits = predict(weights, batch["input_ids"].astype(np.int32), batch["attention_mask"].astype(np.int32))
"""

_PROGRAM_USE = {
    "dc": """for text, row in zip(texts, logits["domain"]):
    print(text, "->", about["domains"][row.argmax()])
```""",
    "icner": """for text, ids, intent, tags in zip(texts, batch["input_ids"], logits["intent"], logits["tags"]):
    print(text, "->", about["intents"][intent.argmax()])
    for token, tag in zip(tokenizer.convert_ids_to_tokens(ids), tags.argmax(-1)):
        print(token, about["tags"][tag])
```""",
}


def model_card(
    model: Functional,
    workdir: pathlib.Path,
    prepared: Prepared,
    parameters: Mapping[str, int],
    settings: Export,
) -> str:
    """The text of the card of the model that the run in `workdir` trained."""
    kind, shape = model.kind, model.config
    pipeline, what = _KINDS[kind]
    if kind == "dc" and head_apart(model):
        pipeline = "feature-extraction"  # all that `transformers` does with the folder by itself
    usage = [_INT8 if settings.int8 else _usage(model)]
    if settings.stablehlo:
        usage.append(_PROGRAM + _PROGRAM_USE[kind])
    imported = _imported(workdir)
    bases = list(dict.fromkeys(run["hub_name"] for run in imported if run.get("hub_name")))
    licenses = list(dict.fromkeys(run.get("license", "") for run in imported))
    license = settings.license or (licenses[0] if len(licenses) == 1 else "")
    metadata = {
        "library_name": "kd_jax" if settings.int8 else "transformers",
        "pipeline_tag": pipeline,
        "language": sorted({locale.split("-")[0] for locale in prepared.settings.nlu.locales}),
        "license": license,
        "base_model": bases[0] if len(bases) == 1 else bases,
        "tags": ["knowledge-distillation", "kd_jax"],
    }
    origin = list(_origin(workdir))
    if not license:
        origin.append("No license is stated. Set config.export.license to state one.")
    return _CARD.format(
        metadata="\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items() if value),
        name=workdir.name,
        what=what,
        facts=_table(_facts(shape, prepared, parameters)),
        origin="\n".join(f"- {line}" for line in origin),
        metrics="\n\n".join(_metrics(workdir, settings)),
        usage="\n\n".join(usage),
    )


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _facts(shape: EncoderConfig, prepared: Prepared, parameters: Mapping[str, int]) -> dict[str, Any]:
    nlu, sources = prepared.settings.nlu, prepared.settings.sources
    return {
        "layers, hidden size, heads": f"{shape.num_layers}, {shape.hidden_size}, {shape.num_heads}",
        "vocabulary": f"{shape.vocab_size:,} tokens",
        "parameters": f"{parameters['total']:,}, without embeddings {parameters['without_embeddings']:,}",
        "longest text": f"{shape.max_positions} tokens; trained on rows of {prepared.settings.rows.length}",
        "labeled utterances": f"{nlu.format}: {', '.join(nlu.locales)}",
        "text": ", ".join(f"{name} ({one.kind}, {one.format})" for name, one in sources.items()),
        "prepared data": f"`{prepared.fingerprint[:12]}`",
    }


def _origin(workdir: pathlib.Path) -> Iterator[str]:
    """A line for each run that the model went through, the last first."""
    config = trained.run_config(workdir, "export.checkpoint")
    run, start = read_json_object(workdir / "run.json"), ""
    if "finetune" in config:
        start = config.finetune.init_from
        best = trained.ended(workdir).get(BEST_STEP)
        kept = "" if best is None else f", the parameters of step {best}, the best on dev"
        how = f"{_job(config.finetune)}, pooling {config.finetune.pooling}, seed {config.seed}{kept}"
        yield f"Finetuned on {run['train_utterances']} labeled utterances{how}."
    elif "import_model" in config:
        yield f"Imported from {model_title(config.import_model.path)} ({run['masked_lm_head']} masked-LM head)."
    elif trained.run_command(workdir) == "initialize":
        yield f"Started from layers of {_names(config)}, not trained, seed {config.seed}."
    elif "distill" in config:
        names = _names(config)
        how = f"by {', '.join(sorted(run['terms']))}{_job(config.distill)}, seed {config.seed}"
        yield f"Distilled from {names} {how}, on {_transfer_set(config)}."
    else:
        start = config.pretrain.init_from
        part = " of the head only" if "train_body" in config and not config.train_body else ""
        yield f"Masked-LM pretraining{part}{_job(config.pretrain)}, seed {config.seed}, on {_transfer_set(config)}."
    if start:
        yield from _origin(as_path(start))
    elif "finetune" in config:
        yield "Its encoder was trained from scratch there."
    yield f"Command: `{run['command_line']}` (commit {run['commit']})."


def _chain(workdir: pathlib.Path) -> list[tuple[pathlib.Path, ConfigDict]]:
    """A run and those that it started from, the earliest last; empty if its directory is gone."""
    if not (workdir / CONFIG).is_file():
        return []
    config = trained.run_config(workdir, "export.checkpoint")
    start = next((config[job].init_from for job in ("finetune", "pretrain") if job in config), "")
    return [(workdir, config), *(_chain(as_path(start)) if start else [])]


def _teachers(config: ConfigDict) -> list[str]:
    """The directories of a distilled or initialized student's teachers."""
    checkpoints, caches = (
        [one.strip() for one in config[key].split(",") if one.strip()] if key in config else []
        for key in ("teacher_checkpoint", "teacher_cache")
    )
    if checkpoints:
        return checkpoints
    # If a cache is gone, only its name is known.
    of_caches = [_teachers(chain[0][1]) if (chain := _chain(as_path(one))) else [one] for one in caches]
    return list(dict.fromkeys(itertools.chain.from_iterable(of_caches)))


def _names(config: ConfigDict) -> str:
    return " and ".join(_name(as_path(one)) for one in _teachers(config)) or "its teacher"


def _name(teacher: pathlib.Path) -> str:
    """A teacher by its model, not by the directory of its run."""
    if not (chain := _chain(teacher)):
        return teacher.name
    first, config = chain[-1]
    last = chain[0][1]
    if "import_model" in config:
        path = config.import_model.path
        name = f"{path.rstrip('/').rpartition('/')[2]} (imported from {path})"
    else:
        shape = trained.encoder_block(first, "export.checkpoint")
        name = f"a teacher of {shape['num_layers']} layers x {shape['hidden_size']} wide, "
        name += f"distilled from {_names(config)}" if "distill" in config else f"pretrained on {_transfer_set(config)}"
    if len(chain) == 1:
        return name
    head_only = "train_body" in last and not last.train_body
    part = "with a masked-LM head trained" if head_only else "trained further"
    return f"{name}, {part} on {_transfer_set(last)}"


def _imported(workdir: pathlib.Path) -> list[Mapping[str, Any]]:
    """run.json of every imported model that a run descends from, by its start or its teachers."""
    found: list[Mapping[str, Any]] = []
    for folder, config in _chain(workdir):
        if "import_model" in config:
            found.append(read_json_object(folder / RUN))
        for teacher in _teachers(config):
            found += _imported(as_path(teacher))
    return found


def _job(job: ConfigDict) -> str:
    return f" ({job.steps} steps of {job.batch_size}, learning rate {job.learning_rate:g})"


def _transfer_set(config: ConfigDict) -> str:
    transfer = config.transfer
    share = f"{transfer.task_share:.0%} task-specific text by {transfer.unit}"
    limit = f", of {transfer.task_texts:,} texts per store" if transfer.task_texts else ""
    return f"a transfer set of {share}{limit}, the rest {transfer.generic}"


def _metrics(workdir: pathlib.Path, settings: Export) -> Iterator[str]:
    """Test results, if the model was scored, and what its own run measured."""
    folder = scored_by(workdir, settings.results)
    if folder is not None:
        partition = trained.run_config(folder, KEY).evaluate.partition
        weights = ", before the weights were brought to int8" if settings.int8 else ""
        rows = [
            row
            for row in read_json_lines(trained.whole(folder / RESULTS))
            if row["scope"] == "all" and row["value"] is not None
        ]
        yield f"On the {partition} partition (`{folder.name}`{weights}):\n\n{results_table(rows)}"
    if trained.whole(workdir / DEV).is_file():
        values = read_json_object(workdir / DEV)
        shown = {SHOWN[name]: _percent(values[name]) for name in SHOWN if values.get(name) is not None}
        title = f"On the {values['count']} dev utterances, in %:"
    elif trained.whole(workdir / HELDOUT).is_file():
        shown, title = {}, "On held-out text:"
        for name, value in summarize(read_json(workdir / HELDOUT)).items():
            kind, _, metric = name.removeprefix("heldout_").partition("/")
            if metric == "loss":
                shown[f"masked-LM loss on {kind} text, nats per masked token"] = f"{value:.2f}"
            else:
                shown[f"masked-token accuracy on {kind} text, %"] = _percent(value)
    else:
        yield "Nothing was measured in its run."
        return
    yield f"{title}\n\n{_table(shown)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def scored_by(workdir: pathlib.Path, named: str) -> pathlib.Path | None:
    """The `evaluate` run that scored the model trained in `workdir`: the one named, else one next to `workdir` if any.

    Raises UserError when the named one is not a finished evaluate run of this model.
    """
    if not named:
        near = sorted(workdir.absolute().parent.iterdir())
        return next((one for one in near if _is_scored(one) and _same(_scored(one), workdir)), None)
    folder = as_path(named)
    if not _is_scored(folder):
        raise UserError(f"config.{KEY}: {named} is not a finished evaluate run; give the workdir of one")
    if not _same(_scored(folder), workdir):
        raise UserError(
            f"config.{KEY}: {named} scored {_scored(folder)}, not {workdir}; give the run that scored this model"
        )
    return folder


def _is_scored(folder: pathlib.Path) -> bool:
    return (folder / RESULTS).is_file() and is_done(folder)


def _scored(folder: pathlib.Path) -> str:
    config = read_json_object(folder / "config.json")["config"]
    # Labels for other models to learn from are not a score.
    scored = "evaluate" in config and config["evaluate"]["partition"] != "unlabeled"
    return config["evaluate"]["checkpoint"] if scored else ""


def _same(scored: str, workdir: pathlib.Path) -> bool:
    return bool(scored) and as_path(scored).resolve() == workdir.resolve()


def results_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with a row for each of SHOWN and a column for each test set, the whole partition first; in %."""
    sets = list(dict.fromkeys(row["test_set"] for row in rows))
    sets.sort(key=lambda name: name not in ("test", "dev"))
    values = {(row["metric"], row["test_set"]): _percent(row["value"]) for row in rows}
    lines = [f"| in % | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
    for metric, title in SHOWN.items():
        cells = [values.get((metric, name), "") for name in sets]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _usage(model: Functional) -> str:
    kind, apart = model.kind, head_apart(model)
    loaded = {"mlm": "ForMaskedLM", "dc": "ForSequenceClassification", "icner": "ForTokenClassification"}[kind]
    if kind == "dc" and apart:
        loaded = ""  # the encoder alone
    imports = "from safetensors.torch import load_file\n" if apart else ""
    head = _HEAD.replace("POOLED", _POOLED[model.pooling]).replace("ACTIVATION", _activation(model.config))
    use = _USE["dc_apart" if kind == "dc" and apart else kind].replace("HEAD", head)
    code = _TRANSFORMERS.format(imports=imports, model=f"AutoModel{loaded}", use=use)
    if not apart:
        return code
    gives, name = ("The model gives the tags (IOB2). ", "intent") if kind == "icner" else ("", "domain")
    return (
        f"{gives}The {name} head is in `{TEXT_HEADS[kind]}` and reads {_READS[model.pooling]}; the names of its "
        f"classes are `{name}s` in config.json.\n\n{code}"
    )


def _activation(shape: EncoderConfig) -> str:
    """PyTorch code for the activation between the two layers of a head."""
    if shape.head_style != "modernbert":
        return "torch.tanh(x)"
    activation = {
        "gelu": "torch.nn.functional.gelu(x)",
        "gelu_tanh": "torch.nn.functional.gelu(x, approximate='tanh')",
        "relu": "torch.relu(x)",
        "silu": "torch.nn.functional.silu(x)",
        "tanh": "torch.tanh(x)",
    }[shape.head_activation]
    norm = f"x.shape[-1:], head['norm.weight'], head.get('norm.bias'), {shape.norm_epsilon!r}"
    return f"torch.nn.functional.layer_norm({activation}, {norm})"
