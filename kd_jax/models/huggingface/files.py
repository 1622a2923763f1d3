"""Reading the weights of a `transformers` model from its safetensors files, one tensor at a time, onto the devices."""

import contextlib
import functools
import json
import math
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.names import LAYERS, TIED, Tensor, canonical_names, check_names, family, name_map, untied
from kd_jax.types import Params, UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FLOATS = ("F16", "BF16", "F32", "F64")
_CHUNK = 2**20  # elements that are converted or compared at a time


class TensorFiles(contextlib.AbstractContextManager):
    """The tensors of a folder's model.safetensors, or of the files that its index names, opened but not read.

    Raises UserError when there is no such file, when a file is broken, and when the index and the files disagree.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        self._stack = contextlib.ExitStack()
        self._slices: dict[str, Any] = {}
        self._files: dict[str, pathlib.Path] = {}
        with contextlib.ExitStack() as stack:
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
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            by_file: dict[str, set[str]] = defaultdict(set)
            for name, file in places.items():
                by_file[file].add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: is no index of safetensors files ({error!r}); download it again") from None
        for file, names in sorted(by_file.items()):
            if pathlib.PurePath(file).name != file:
                raise UserError(f"{index}: names {file!r}, which lies outside its folder; download the model again")
            yield self.folder / file, names

    def _open(self, stack: contextlib.ExitStack, file: pathlib.Path, names: set[str] | None) -> None:
        try:
            opened = stack.enter_context(safe_open(file, "numpy"))
        except FileNotFoundError:
            raise UserError(f"{file}: is missing, and {INDEX} names it; download the model again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: is no whole safetensors file ({error}); download it again") from None
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
        # A few rows at a time, so that a narrow type does not lie beside its float32 as a whole.
        step = max(1, _CHUNK // max(values[:1].size, 1))
        (first, last), *others = bounds
        for start in range(first, last, step):
            rows = slice(start, min(start + step, last))
            values[start - first : rows.stop - first] = part[(rows, *(slice(*pair) for pair in others))]
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
    """Whether the files hold a masked-LM head beside the body; see `load_params` for the arguments.

    Raises UserError naming the tensor that is missing, unknown, of another shape, or untied.
    """
    names = canonical_names(files.names(), config)
    has_head = check_names(names.keys(), config)
    reader = _Reader(files, names, config.vocab_size, stored_vocab_size)
    abstract = Functional("mlm", config).abstract()
    for entry in reader.entries(config):
        reader.check(entry, _part_shape(entry, _at(abstract, entry.path).shape))
    for name, first in TIED[family(config)].items():
        if name in names and first in names and not files.equal(names[name], names[first]):
            raise untied(name, first)
    return has_head


def load_params(
    files: TensorFiles, config: EncoderConfig, shardings: Any, *, stored_vocab_size: int, head_key: jax.Array
) -> Params:
    """Float32 parameters of kind "mlm" on the devices, of files that `check_files` has passed.

    shardings: a NamedSharding for each parameter. Without a head it is drawn from `head_key`, tied as all heads are.
    Of the `stored_vocab_size` rows of the token table the first config.vocab_size are taken: some tables are padded.
    On the host there is at most one layer's part of a parameter or one tensor at a time; a tensor that is stored as we
    hold it is read only in the parts that lie on this process's devices.
    """
    names = canonical_names(files.names(), config)
    reader = _Reader(files, names, config.vocab_size, stored_vocab_size)
    abstract = Functional("mlm", config).abstract()
    by_path: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for entry in reader.entries(config):
        by_path[entry.path].append(entry)
    params: Params = {}
    for path, of_path in by_path.items():
        shape, sharding = _at(abstract, path).shape, _at(shardings, path)
        stacked = path[: len(LAYERS)] == LAYERS
        leaf = _stacked(reader, of_path, shape, sharding) if stacked else reader.place(of_path[0], shape, sharding)
        _put(params, path, leaf)
    if "mlm_head" not in params:
        draw = jax.jit(lambda key: Functional("mlm", config).init(key)["mlm_head"], out_shardings=shardings["mlm_head"])
        params["mlm_head"] = draw(head_key)
    return params


class _Reader:
    """Tensors by our names, checked, in our layout."""

    def __init__(self, files: TensorFiles, names: dict[str, str], rows: int, stored_rows: int):
        self.files, self.names, self.rows, self.stored_rows = files, names, rows, stored_rows

    def entries(self, config: EncoderConfig) -> list[Tensor]:
        """What of the map the files have."""
        return [entry for entry in name_map(config) if entry.name in self.names]

    def _has_vocabulary(self, entry: Tensor) -> bool:
        return entry.path in (("encoder", "embeddings", "tokens"), ("mlm_head", "bias"))

    def check(self, entry: Tensor, shape: tuple[int, ...]) -> None:
        """Raises UserError when the tensor's shape is not that of our part."""
        expected = entry.their_shape(shape)
        if self._has_vocabulary(entry):
            expected = (self.stored_rows, *expected[1:])
        stored = self.files.shape(self.names[entry.name])
        if stored != expected:
            raise UserError(f"{entry.name}: its shape is {stored}, the model needs {expected}; check the config")

    def part(self, entry: Tensor, shape: tuple[int, ...]) -> np.ndarray:
        """A whole tensor as our part of that shape."""
        return entry.to_ours(self.files.read(self.names[entry.name]), shape)

    def place(self, entry: Tensor, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
        """A parameter that is one tensor, on its devices."""
        if entry.inputs is not None:
            whole = self.part(entry, shape)
            return jax.make_array_from_callback(shape, sharding, lambda index: np.ascontiguousarray(whole[index]))

        def read(index: Any) -> np.ndarray:
            # An open end is that of our rows, of which the file may have more.
            inside = [slice(*one.indices(size)[:2]) for one, size in zip(index, shape, strict=True)]
            return self.files.read(self.names[entry.name], inside)

        return jax.make_array_from_callback(shape, sharding, read)


def _stacked(reader: _Reader, entries: list[Tensor], shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """A parameter of all layers, filled layer by layer where it lies; ones where a layer has no tensor."""
    make = jax.jit(lambda: jnp.ones(shape, jnp.float32), out_shardings=sharding)
    leaf = make()
    one = NamedSharding(sharding.mesh, PartitionSpec(*tuple(sharding.spec)[1:]))
    by_layer: dict[int, list[Tensor]] = defaultdict(list)
    for entry in entries:
        by_layer[entry.index[0]].append(entry)
    for layer, of_layer in by_layer.items():
        if len(of_layer) == 1 and len(of_layer[0].index) == 1:
            part = reader.part(of_layer[0], shape[1:])
        else:  # queries, keys and values that are stored apart
            part = np.empty(shape[1:], np.float32)
            for entry in of_layer:
                part[entry.index[1:]] = reader.part(entry, part[entry.index[1:]].shape)
        placed = jax.make_array_from_callback(
            shape[1:], one, lambda index, part=part: np.ascontiguousarray(part[index])
        )
        leaf = _set_layer(sharding)(leaf, placed, np.int32(layer))
    return leaf


@functools.cache
def _set_layer(sharding: NamedSharding):
    """Jitted (leaf, part, layer) -> leaf with that layer replaced, in place."""

    def set_layer(leaf, part, layer):
        return jax.lax.dynamic_update_index_in_dim(leaf, part, layer, 0)

    return jax.jit(set_layer, donate_argnums=0, out_shardings=sharding)


def _part_shape(entry: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the part of an array that a tensor fills."""
    sizes = iter(shape)
    kept = [size for size, item in zip(sizes, entry.index, strict=False) if isinstance(item, slice)]
    return (*kept, *shape[len(entry.index) :])


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
