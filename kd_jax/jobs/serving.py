"""A finetuned model in a folder of its own, for serving: weights, label names and compiled program.

predictor.json holds the shape and the names of the classes, predictor.safetensors the weights in float32 or int8 under
the names of our parameters, and predictor.stablehlo, if requested, the program: `jax.export` for cpu, cuda and tpu, for
any number of texts of any length that the model takes. `predict` reads the folder without the prepared data.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from kd_jax.config.data import CHARACTER_LOCALES
from kd_jax.data.text.text_form import TextForm
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.data.text.utterances import LabelMaps, Utterance, domains_of_intents
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.models.int8 import dequantized, flat_names, quantized
from kd_jax.runtime.copies import describe, verify
from kd_jax.runtime.files import read_json_object, write_sealed
from kd_jax.runtime.paths import as_path, is_there, need_local
from kd_jax.types import Array, Params, UserError

ABOUT = "predictor.json"
WEIGHTS = "predictor.safetensors"
PROGRAM = "predictor.stablehlo"
_CHECKED = ("predictor.", "tokenizer")  # names that the files which `read` reads begin with
RECORD = "export.json"  # replaces a run's config.json, whose name `transformers` uses
PLATFORMS = ("cpu", "cuda", "tpu")
CLASSES = {"dc": ("domains",), "icner": ("intents", "tags")}


class Seen(NamedTuple):
    """What a model has seen of labeled text, for `predict`; the default is for old runs and exports without a record.

    threshold: the probability of its label below which a model gave 5 % of its correct answers on dev.
    character_locales: those of config.nlu.
    """

    form: TextForm = TextForm()
    domains_of_intents: Mapping[str, tuple[str, ...]] = {}
    threshold: float | None = None
    character_locales: tuple[str, ...] = CHARACTER_LOCALES

    @classmethod
    def of(cls, train: Sequence[Utterance], character_locales: tuple[str, ...]) -> "Seen":
        """Of the utterances whose labels the model saw."""
        return cls(TextForm.of(train), domains_of_intents(train), None, character_locales)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        domains = {intent: list(names) for intent, names in self.domains_of_intents.items()}
        form, locales = dataclasses.asdict(self.form), list(self.character_locales)
        return {
            "form": form,
            "domains_of_intents": domains,
            "threshold": self.threshold,
            "character_locales": locales,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Seen":
        """The inverse of `to_json`."""
        domains = {intent: tuple(names) for intent, names in values["domains_of_intents"].items()}
        locales = tuple(values.get("character_locales", CHARACTER_LOCALES))  # fixed in 0.2.0
        return cls(TextForm(**values["form"]), domains, values["threshold"], locales)


class Served(NamedTuple):
    """A model read from its folder; parameters are float32."""

    model: Functional
    params: Params
    maps: LabelMaps
    tokenizer: Tokenizer
    length: int  # tokens in a row
    seen: Seen


def without_padding(model: Functional, params: Params, classes: Mapping[str, tuple[str, ...]]) -> tuple[Any, Params]:
    """The model and parameters without the classes that only pad a label map, which are the last of a head."""
    sizes: dict[str, Any] = {name: len(names) for name, names in classes.items()}
    cut = dict(params)
    for name, size in sizes.items():
        head = f"{name.removesuffix('s')}_head"
        classifier = {key: leaf[..., :size] for key, leaf in cut[head]["classifier"].items()}
        cut[head] = {**cut[head], "classifier": classifier}
    return dataclasses.replace(model, **sizes), cut


def write(
    folder: pathlib.Path,
    model: Functional,
    params: Params,
    classes: Mapping[str, tuple[str, ...]],
    *,
    length: int,
    seen: Seen,
    int8: bool,
    program: bool,
) -> None:
    """Writes the files of a DC or ICNER model whose classes are not padded; the caller writes the tokenizer."""
    about = {
        "task": model.kind,
        "weights": "int8" if int8 else "float32",
        "length": length,
        "pooling": model.pooling,
        "encoder": dataclasses.asdict(model.config),
        **{name: list(classes[name]) for name in CLASSES[model.kind]},
        "seen": seen.to_json(),
    }
    whole = {name: np.asarray(leaf) for name, leaf in flat_names(params).items()}
    tensors = quantized(params) if int8 else whole
    save_file(tensors, folder / WEIGHTS, metadata={"format": "np"})
    if program:
        (folder / PROGRAM).write_bytes(exported_program(model, tensors))
    written = sorted(file.name for file in folder.iterdir() if file.name.startswith(_CHECKED))
    write_sealed(folder / ABOUT, {**about, "files": describe(folder, written)})


def is_served(folder: str | pathlib.Path) -> bool:
    """Whether `write` wrote the folder. Raises UserError for an export for `transformers` only."""
    folder = as_path(folder)
    if is_there(folder / RECORD) and not is_there(folder / ABOUT):
        raise UserError(
            f"{folder}: holds a model for `transformers` only; name the run that it was exported from, or export it "
            "again with --config.export.int8=True or --config.export.stablehlo=True"
        )
    return is_there(folder / ABOUT)


def read(folder: pathlib.Path) -> Served:
    """The model of a folder that `write` wrote. Raises UserError where a file is missing or is of another model."""
    need_local(folder, "an exported model")
    about = read_json_object(folder / ABOUT, "export the model again")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: holds {ABOUT} without {WEIGHTS}; export the model again")
    verify(folder, about.get("files", {}), "export the model again")  # missing in folders of 0.3.0
    names = CLASSES[about["task"]]
    maps = LabelMaps(**{name: tuple(about[name]) if name in names else () for name in ("domains", "intents", "tags")})
    sizes: dict[str, Any] = {name: len(about[name]) for name in names}
    # Folders of 0.2.0 do not name the pooling.
    pooling = about.get("pooling", "first")
    model = Functional(about["task"], EncoderConfig(**about["encoder"]), pooling=pooling, **sizes)
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:  # the library raises an exception of its own
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error}); export the model again") from error
    params = dequantized(tensors)
    found, wanted = (
        {name: leaf.shape for name, leaf in flat_names(tree).items()} for tree in (params, model.abstract())
    )
    if found != wanted:
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise UserError(f"{folder / WEIGHTS}: {wrong[0]} does not match {ABOUT}; export the model again")
    seen = Seen.from_json(about["seen"]) if "seen" in about else Seen()  # missing in folders of 0.2.0
    return Served(model, params, maps, Tokenizer.load(folder), about["length"], seen)


def answers(model: Functional, weights: Mapping[str, Array], input_ids: Array, attention_mask: Array) -> dict[str, Any]:
    """The program: logits of texts, one per row, int32 [B, L] as a tokenizer of `transformers` gives them.

    DC: {"domain": logits [B, domains]}. ICNER: {"intent": logits [B, intents], "tags": logits [B, L, tags]}.
    """
    tokens_BxL, mask_BxL = jnp.asarray(input_ids), jnp.asarray(attention_mask)
    positions_BxL = jnp.arange(tokens_BxL.shape[1], dtype=jnp.int32)[None, :] * mask_BxL
    batch = {
        "tokens": tokens_BxL,
        "segment_ids": mask_BxL,
        "positions": positions_BxL,
        "first_positions": jnp.zeros((tokens_BxL.shape[0], 1), jnp.int32),
    }
    params = dequantized(weights)
    if model.kind == "dc":
        return {"domain": model.domain_logits(params, batch)[:, 0]}
    intents_Bx1xI, tags_BxLxT = model.intent_and_tag_logits(params, batch)
    return {"intent": intents_Bx1xI[:, 0], "tags": tags_BxLxT}


def exported_program(model: Functional, tensors: Mapping[str, np.ndarray]) -> bytes:
    """`answers` of (weights, input_ids, attention_mask) as a serialized jax.export.Exported, in float32."""
    longest = model.config.max_positions
    batch, length = jax.export.symbolic_shape(
        "batch, length", constraints=["batch >= 1", "length >= 1", f"length <= {longest}"]
    )
    text = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    # The weights are an argument, so that the program stays small and int8 weights stay int8 on the device.
    weights = {name: jax.ShapeDtypeStruct(one.shape, one.dtype) for name, one in tensors.items()}
    program = jax.export.export(jax.jit(functools.partial(answers, model)), platforms=PLATFORMS)(weights, text, text)
    return bytes(program.serialize())
