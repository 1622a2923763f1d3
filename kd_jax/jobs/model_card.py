"""README.md of an exported model: what it is, where it comes from, how well it does, how it is used."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from kd_jax.data.prepared import Prepared
from kd_jax.jobs import scores, trained
from kd_jax.jobs.finetune import DEV
from kd_jax.jobs.masked_lm import HELDOUT, summarize
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.runtime.files import read_json
from kd_jax.runtime.paths import as_path

_KINDS = {
    "mlm": ("fill-mask", "A masked language model."),
    "dc": ("text-classification", "A domain classifier: which domain is this utterance for?"),
    "icner": ("token-classification", "Intents and slots: what is wanted, and which words say what about it."),
}
INTENT_HEAD = "intent_head.safetensors"


def model_card(
    kind: str,
    shape: EncoderConfig,
    workdir: pathlib.Path,
    prepared: Prepared,
    parameters: Mapping[str, int],
    block: ConfigDict,
) -> str:
    """The text of the card of the model that the run in `workdir` trained; `block` is config.export."""
    pipeline, what = _KINDS[kind]
    languages = sorted({locale.split("-")[0] for locale in prepared.settings.nlu.locales})
    front = {
        "library_name": "kd_jax" if block.int8 else "transformers",
        "pipeline_tag": pipeline,
        "language": languages,
        "tags": ["knowledge-distillation", "kd_jax"],
    }
    blocks = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()) + "---",
        f"# {workdir.name}",
        what,
        _table(_facts(shape, prepared, parameters)),
        "## Where it comes from",
        "\n".join(f"- {line}" for line in _origin(workdir)),
        "## How well it does",
        *_metrics(workdir, block),
        "## How to use it",
        *([_INT8] if block.int8 else [_usage(kind, shape)]),
        *([_PROGRAM_TEXT, _PROGRAM[kind]] if block.stablehlo else []),
    ]
    return "\n\n".join(blocks) + "\n"


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _facts(shape: EncoderConfig, prepared: Prepared, parameters: Mapping[str, int]) -> dict[str, Any]:
    nlu = prepared.settings.nlu
    sources = [f"{name} ({one.kind}, {one.format})" for name, one in prepared.settings.sources.items()]
    return {
        "layers, hidden size, heads": f"{shape.num_layers}, {shape.hidden_size}, {shape.num_heads}",
        "vocabulary": f"{shape.vocab_size:,} pieces",
        "parameters": f"{parameters['total']:,}, without embeddings {parameters['without_embeddings']:,}",
        "longest text": f"{shape.max_positions} tokens; trained on rows of {prepared.settings.rows.length}",
        "labeled utterances": f"{nlu.format}: {', '.join(nlu.locales)}",
        "text": ", ".join(sources),
        "prepared data": f"`{prepared.fingerprint[:12]}`",
    }


def _origin(workdir: pathlib.Path) -> Iterator[str]:
    """A line for each run that the model went through, the last first."""
    key = "export.checkpoint"
    config = trained.run_config(workdir, key)
    run = read_json(workdir / "run.json")
    if "finetune" in config:
        yield f"Finetuned on {run['train_utterances']} labeled utterances{_job(config.finetune)}, seed {config.seed}."
        start = config.finetune.init_from
        yield from _origin(as_path(start)) if start else ["Its encoder was trained from scratch there."]
    elif "import_model" in config:
        yield f"Imported from {config.import_model.path} ({run['masked_lm_head']} masked-LM head)."
    elif "distill" in config:
        teacher = config.teacher_checkpoint or config.teacher_cache
        names = ", ".join(pathlib.Path(one.strip()).name for one in teacher.split(","))
        terms = ", ".join(sorted(run["terms"]))
        how = f"by {terms}{_job(config.distill)}, seed {config.seed}"
        yield f"Distilled from {names} {how}, on {_transfer_set(config)}."
    else:
        job = config.pretrain
        alone = " of the head alone" if "train_body" in config and not config.train_body else ""
        yield f"Masked-LM pretraining{alone}{_job(job)}, seed {config.seed}, on {_transfer_set(config)}."
        if job.init_from:
            yield from _origin(as_path(job.init_from))
    yield f"Command: `{run['command_line']}` (commit {run['commit']})."


def _job(job: ConfigDict) -> str:
    return f" ({job.steps} steps of {job.batch_size}, learning rate {job.learning_rate:g})"


def _transfer_set(config: ConfigDict) -> str:
    transfer = config.transfer
    share = f"{transfer.task_share:.0%} task-specific text by {transfer.unit}"
    return f"a transfer set of {share}, the rest {transfer.generic}"


def _metrics(workdir: pathlib.Path, block: ConfigDict) -> Iterator[str]:
    """Test results where the model was scored, and what its own run measured."""
    found = scores.results_of(workdir, block.results)
    if found is not None:
        folder, rows = found
        partition = trained.run_config(folder, scores.KEY).evaluate.partition
        weights = ", before the weights were brought to int8" if block.int8 else ""
        yield f"On the {partition} partition (`{folder.name}`{weights}):\n\n{scores.results_table(rows)}"
    if (workdir / DEV).is_file():
        values = {name: value for name, value in read_json(workdir / DEV).items() if name != "score"}
        title = f"On the {values.pop('count')} dev utterances:"
    elif (workdir / HELDOUT).is_file():
        values, title = summarize(read_json(workdir / HELDOUT)), "On held-out text, by kind:"
    else:
        yield "Nothing was measured in its run."
        return
    yield title + "\n\n" + _table({name: f"{value:.4f}" for name, value in values.items()})


def _usage(kind: str, shape: EncoderConfig) -> str:
    lines = {"mlm": _MASKED, "dc": _DOMAIN, "icner": _INTENT}[kind]
    if kind == "icner":
        lines = lines.replace("ACTIVATION", _activation(shape)).replace("INTENT_HEAD", INTENT_HEAD)
        lines = (
            f"The model gives the tags (IOB2). The intent head lies beside it in `{INTENT_HEAD}` and reads the last "
            "hidden state of the first token; the names of its classes are `intents` in config.json.\n\n" + lines
        )
    return lines


def _activation(shape: EncoderConfig) -> str:
    """PyTorch's words for what stands between the two layers of the intent head."""
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


_MASKED = """```python
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForMaskedLM.from_pretrained(folder).eval()
batch = tokenizer("wake me up at seven", return_tensors="pt")
batch["input_ids"][0, 2] = tokenizer.mask_token_id
with torch.no_grad():
    logits = model(**batch).logits
print(tokenizer.convert_ids_to_tokens(logits[0, 2].topk(5).indices.tolist()))
```"""

_DOMAIN = """```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
with torch.no_grad():
    logits = model(**tokenizer("wake me up at seven", return_tensors="pt")).logits
print("domain:", model.config.id2label[logits[0].argmax().item()])
```"""

_INTENT = """```python
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForTokenClassification.from_pretrained(folder).eval()
head = load_file(f"{folder}/INTENT_HEAD")
batch = tokenizer("wake me up at seven", return_tensors="pt")
with torch.no_grad():
    tags = model(**batch).logits[0].argmax(-1).tolist()
    x = model.base_model(**batch).last_hidden_state[0, 0]
    x = torch.nn.functional.linear(x, head["dense.weight"], head.get("dense.bias"))
    x = ACTIVATION
    intent = torch.nn.functional.linear(x, head["classifier.weight"], head["classifier.bias"])
print("intent:", model.config.intents[intent.argmax().item()])
for piece, tag in zip(tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist()), tags):
    print(piece, model.config.id2label[tag])
```"""

_INT8 = """The weights are int8 with a scale for each output channel, which `transformers` does not load. kd_jax does:

```
python -m kd_jax.main.predict --model=. "wake me up at seven"
```"""

_PROGRAM_TEXT = """### The compiled program

`predictor.stablehlo` runs wherever jax does (cpu, cuda, tpu), without kd_jax and PyTorch: it takes the weights of
`predictor.safetensors`, and token ids and mask of any number of texts up to the model's length. It was serialized by
`jax.export` and needs the packages jax, flatbuffers, safetensors and transformers."""

_PROGRAM_START = """```python
import json

import jax
import numpy as np
from safetensors.numpy import load_file
from transformers import AutoTokenizer

folder = "."  # where this file lies
about = json.load(open(f"{folder}/predictor.json", encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(folder)
program = jax.export.deserialize(bytearray(open(f"{folder}/predictor.stablehlo", "rb").read()))
weights = jax.device_put(load_file(f"{folder}/predictor.safetensors"))
predict = jax.jit(program.call)  # compiled once for each shape
texts = ["wake me up at seven", "play some jazz"]
batch = tokenizer(texts, padding=True, return_tensors="np")
logits = predict(weights, batch["input_ids"].astype(np.int32), batch["attention_mask"].astype(np.int32))
"""

_PROGRAM = {
    "dc": _PROGRAM_START
    + """for text, row in zip(texts, logits["domain"]):
    print(text, "->", about["domains"][row.argmax()])
```""",
    "icner": _PROGRAM_START
    + """for text, ids, intent, tags in zip(texts, batch["input_ids"], logits["intent"], logits["tags"]):
    print(text, "->", about["intents"][intent.argmax()])
    for piece, tag in zip(tokenizer.convert_ids_to_tokens(ids), tags.argmax(-1)):
        print(piece, about["tags"][tag])
```""",
}
