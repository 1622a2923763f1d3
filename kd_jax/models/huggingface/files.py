"""Reading the weights of a `transformers` model from its safetensors files, one tensor at a time, onto the devices."""

import contextlib
import functools
import json
import math
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.checkpoint import (
    EMBEDDINGS,
    LAYERS,
    Path,
    Tensor,
    body_map,
    canonical_names,
    check_names,
    name_map,
    tied_names,
)
from kd_jax.models.huggingface.config import CONFIG
from kd_jax.types import Params, UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FLOATS = ("F16", "BF16", "F32", "F64")
_CHUNK = 2**20  # elements that are converted or compared at a time

# Parameters with a row for each token, of which a file may have more: tables are padded to round sizes.
_BY_TOKEN = ((*EMBEDDINGS, "tokens"), ("mlm_head", "decoder"), ("mlm_head", "bias"))


class TensorFiles(contextlib.AbstractContextManager["TensorFiles"]):
    """The tensors of a folder's model.safetensors, or of the files that its index names, opened but not read.

    Raises UserError when there is no such file, when a file is broken, and when the index and the files disagree.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        self._stack = contextlib.ExitStack()
        self._slices: dict[str, Any] = {}
        self._files: dict[str, pathlib.Path] = {}
        with contextlib.ExitStack() as stack:  # closes what is open if a later file is broken
            for file, names in self._listing():
                self._open(stack, file, names)
            self._stack = stack.pop_all()

    def _listing(self) -> Iterator[tuple[pathlib.Path, set[str] | None]]:
        """Each file, and the tensors that the index expects in it (None: all)."""
        if (self.folder / SINGLE).is_file():
            yield self.folder / SINGLE, None
            return
        index = self.folder / INDEX
        if not index.is_file():
            raise UserError(
                f"{self.folder}: holds no {SINGLE}, and only safetensors are read, since a pickle (pytorch_model.bin) "
                'may run code; convert the model once where PyTorch is installed, python -c "from transformers import '
                f"AutoModelForMaskedLM as M; M.from_pretrained('{self.folder}').save_pretrained('CONVERTED')\", and "
                "copy the tokenizer's files into CONVERTED"
            )
        try:
            by_file: dict[str, set[str]] = defaultdict(set)
            for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                pathlib.PurePath(file)  # a TypeError if it is not a string
                by_file[file].add(name)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index}: is not an index of safetensors files ({error!r}); download it again") from None
        for file, names in sorted(by_file.items()):
            if pathlib.PurePath(file).name != file:
                raise UserError(f"{index}: names {file!r}, which is outside its folder; download the model again")
            yield self.folder / file, names

    def _open(self, stack: contextlib.ExitStack, file: pathlib.Path, names: set[str] | None) -> None:
        try:
            opened = stack.enter_context(safe_open(file, "numpy"))
        except FileNotFoundError:
            raise UserError(f"{file}: is missing, and {INDEX} names it; download the model again") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file}: is not a complete safetensors file ({error}); download it again") from None
        held = set(opened.keys())
        for name in sorted(names or held):
            if name not in held:
                raise UserError(f"{file}: lacks {name}, which {INDEX} places there; download the model again")
            self._slices[name], self._files[name] = opened.get_slice(name), file

    def __exit__(self, *_: Any) -> None:
        self._slices.clear()
        self._stack.close()

    def names(self) -> tuple[str, ...]:
        return tuple(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        """A tensor (of one axis or more) or a part of it, read from disk now, in float32; UserError where it holds no
        floats. `index` has a slice with step 1 for each of the first axes.
        """
        part = self._slices[name]
        if part.get_dtype() not in _FLOATS:
            raise UserError(
                f"{self._files[name]}: {name} is of type {part.get_dtype()}, and only float16, bfloat16, float32 and "
                "float64 are read; import a model that is not quantized"
            )
        bounds = [(0, size) for size in self.shape(name)]
        bounds[: len(index)] = [one.indices(size)[:2] for one, size in zip(index, self.shape(name), strict=False)]
        values = np.empty([end - start for start, end in bounds], np.float32)
        # A few rows at a time, so that the host never holds both a narrow tensor and its float32 copy.
        step = max(1, _CHUNK // max(values[:1].size, 1))
        (first, last), *others = bounds
        for start in range(first, last, step):
            rows = slice(start, min(start + step, last))
            values[start - first : rows.stop - first] = part[(rows, *(slice(*pair) for pair in others))]
        if not np.isfinite(values).all():
            raise UserError(f"{self._files[name]}: {name} holds values that are not finite; download the model again")
        return values

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors are the same, compared a few rows at a time."""
        if self.shape(name) != self.shape(other):
            return False
        rows = self.shape(name)[0]
        step = max(1, _CHUNK * rows // max(math.prod(self.shape(name)), 1))
        parts = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
        return all(np.array_equal(self.read(name, (part,)), self.read(other, (part,))) for part in parts)


def check_files(files: TensorFiles, config: EncoderConfig, *, stored_vocab_size: int) -> bool:
    """Whether the files hold a masked-LM head on the body; see `load_params` for the arguments.

    Raises UserError naming the tensor that is missing, unknown, of another shape, or untied.
    """
    try:
        return _checked(files, config, stored_vocab_size)
    except UserError as error:
        named = str(error).startswith(str(files.folder))
        raise UserError(str(error) if named else f"{files.folder}: {error}") from None


def _checked(files: TensorFiles, config: EncoderConfig, stored_vocab_size: int) -> bool:
    names = canonical_names(files.names(), config)
    has_head = check_names(names, config)
    shapes = _by_path(Functional("mlm", config).abstract())
    for entry in name_map(config) if has_head else body_map(config):
        expected = entry.their_shape(_part_shape(entry, shapes[entry.path].shape))
        if entry.path in _BY_TOKEN:
            expected = (stored_vocab_size, *expected[1:])
        stored = files.shape(names[entry.name])
        if stored != expected:
            raise UserError(f"{entry.name}: its shape is {stored}, the model needs {expected}; check the config")
    for name, first in tied_names(config).items():
        if name in names and first in names and not files.equal(names[name], names[first]):
            remedy = "set its tie_word_embeddings to false if the model was trained so"
            raise UserError(f"{name}: differs from {first}, and {CONFIG} ties the two; {remedy}")
    return has_head


def load_params(
    files: TensorFiles, config: EncoderConfig, shardings: Any, *, stored_vocab_size: int, head_key: jax.Array
) -> Params:
    """Float32 parameters of kind "mlm" on the devices, of files that `check_files` has passed.

    shardings: a NamedSharding for each parameter. Without a head it is drawn from `head_key`, tied as all heads are.
    Of the `stored_vocab_size` rows of the token table the first config.vocab_size are taken: some tables are padded.
    On the host there is at most one layer's part of a parameter or one tensor at a time; a tensor that is stored as we
    hold it is read only in the parts that this process's devices hold.
    """
    names = canonical_names(files.names(), config)
    shapes, placed = _by_path(Functional("mlm", config).abstract()), _by_path(shardings)
    by_path: dict[Path, list[Tensor]] = defaultdict(list)
    for entry in name_map(config):
        if entry.name in names:
            by_path[entry.path].append(entry)
    flat: dict[Path, jax.Array] = {}
    for path, entries in by_path.items():
        shape, sharding = shapes[path].shape, placed[path]
        if path[: len(LAYERS)] == LAYERS:
            flat[path] = _stacked(files, names, entries, shape, sharding)
        else:
            flat[path] = _whole(files, names[entries[0].name], entries[0], shape, sharding)
    params: Params = unflatten_dict(flat)
    if "mlm_head" not in params:
        draw = jax.jit(lambda key: Functional("mlm", config).init(key)["mlm_head"], out_shardings=shardings["mlm_head"])
        params["mlm_head"] = draw(head_key)
    return params


def _by_path(tree: Any) -> dict[Path, Any]:
    return cast(Any, flatten_dict(tree))


def _whole(files: TensorFiles, name: str, entry: Tensor, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """A parameter that is one tensor, on its devices."""
    if entry.inputs is not None:  # stored transposed: a device's part is scattered over the file, so all is read once
        whole = entry.to_ours(files.read(name), shape)
        return jax.make_array_from_callback(shape, sharding, lambda index: np.ascontiguousarray(whole[index]))

    def read(index: Any) -> np.ndarray:
        # An open end is that of our rows, of which the file may have more.
        return files.read(name, [slice(*one.indices(size)[:2]) for one, size in zip(index, shape, strict=True)])

    return jax.make_array_from_callback(shape, sharding, read)


def _stacked(
    files: TensorFiles, names: dict[str, str], entries: list[Tensor], shape: tuple[int, ...], sharding: NamedSharding
) -> jax.Array:
    """A parameter of all layers, filled layer by layer on its devices; ones where a layer has no tensor."""
    # The host never holds all layers: each is sent to the devices, where a donated update writes it in place.
    leaf = jax.jit(lambda: jnp.ones(shape, jnp.float32), out_shardings=sharding)()
    one = NamedSharding(sharding.mesh, PartitionSpec(*tuple(sharding.spec)[1:]))
    by_layer: dict[int, list[Tensor]] = defaultdict(list)
    for entry in entries:
        by_layer[entry.index[0]].append(entry)
    for layer, of_layer in by_layer.items():
        part = np.empty(shape[1:], np.float32)
        for entry in of_layer:  # one, or queries, keys and values that are stored apart
            index = entry.index[1:]
            part[index] = entry.to_ours(files.read(names[entry.name]), part[index].shape)
        sent = jax.make_array_from_callback(shape[1:], one, lambda index, part=part: np.ascontiguousarray(part[index]))
        leaf = _set_layer(sharding)(leaf, sent, np.int32(layer))
    return leaf


@functools.cache
def _set_layer(sharding: NamedSharding):
    """Jitted (leaf, part, layer) -> leaf with that layer replaced, in place."""

    def set_layer(leaf: jax.Array, part: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(leaf, part, layer, 0)

    return jax.jit(set_layer, donate_argnums=0, out_shardings=sharding)


def _part_shape(entry: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the part of an array that a tensor fills."""
    kept = [size for size, item in zip(shape, entry.index, strict=False) if isinstance(item, slice)]
    return (*kept, *shape[len(entry.index) :])
