"""Weights from safetensors files: whole, sharded, of other types and names; placed on a mesh; clear errors."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from kd_jax.config.execution import Mesh
from kd_jax.models.functional import Functional
from kd_jax.models.huggingface import files as huggingface_files
from kd_jax.models.huggingface.checkpoint import BODY, exported, head_map, name_map, to_huggingface, unused_heads
from kd_jax.models.huggingface.config import family, read_config
from kd_jax.models.huggingface.files import INDEX, SINGLE, TensorFiles, check_files, load_params
from kd_jax.trainer.mesh import make_mesh, shardings
from kd_jax.types import UserError
from tests.support.huggingface import from_huggingface
from tests.support.small_models import FAMILIES, parameters, small_config

ALL = (*FAMILIES, "distilbert")


def config_of(family, **changes):
    return (
        small_config("bert", type_vocab_size=0, **changes)
        if family == "distilbert"
        else small_config(family, **changes)
    )


@pytest.fixture(scope="module", params=ALL)
def case(request):
    config = config_of(request.param)
    params = parameters(Functional("mlm", config))
    return config, params, to_huggingface(params, config)


def layout(config, **axes):
    model = Functional("mlm", config)
    mesh = make_mesh(Mesh(**axes))
    return shardings(mesh, model.logical_axes(), model.abstract())


def load(folder, config, rows=None, **axes):
    with TensorFiles(folder) as files:
        key, rows = jax.random.key(0), rows or config.vocab_size
        has_head = check_files(files, config, stored_vocab_size=rows)
        return load_params(files, config, layout(config, **axes), stored_vocab_size=rows, head_key=key), has_head


def equal(ours, theirs):
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(np.asarray(one), np.asarray(other)), ours, theirs)


def test_equal_to_reading_all_at_once_on_a_mesh(case, tmp_path):
    config, params, tensors = case
    save_file(tensors, tmp_path / SINGLE)
    loaded, has_head = load(tmp_path, config, data=2, fsdp=2, tensor=2)
    assert has_head
    equal(loaded, params)
    wanted = layout(config, data=2, fsdp=2, tensor=2)
    assert jax.tree.all(jax.tree.map(lambda leaf, one: leaf.sharding == one, loaded, wanted))


def test_shards_of_an_index_and_narrow_types(tmp_path):
    config = config_of("bert")
    tensors = to_huggingface(parameters(Functional("mlm", config)), config)
    types = [np.float16, jnp.bfloat16]
    parts = [{}, {}]
    for number, (name, tensor) in enumerate(tensors.items()):
        parts[number % 2][name] = tensor.astype(types[number % 2])
    places = {name: f"part-{number}.safetensors" for number, part in enumerate(parts) for name in part}
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"part-{number}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    loaded, _ = load(tmp_path, config)
    equal(loaded, from_huggingface({n: t.astype(np.float32) for part in parts for n, t in part.items()}, config))

    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"part-1\.safetensors: is missing"):
        load(tmp_path, config)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "../part-0.safetensors"}}))
    with pytest.raises(UserError, match="outside its folder"):
        load(tmp_path, config)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_body_alone_gets_a_head_from_the_seed(family, tmp_path):
    config = config_of(family)
    params = parameters(Functional("mlm", config))
    tensors = to_huggingface(params, config)
    head = {entry.name for entry in head_map(config)}
    prefix = BODY[family]
    save_file({n.removeprefix(prefix): t for n, t in tensors.items() if n not in head}, tmp_path / SINGLE)
    loaded, has_head = load(tmp_path, config)
    assert not has_head
    equal(loaded["encoder"], params["encoder"])
    again, _ = load(tmp_path, config)
    equal(loaded, again)
    assert np.std(loaded["mlm_head"]["dense"]["kernel"]) > 0
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, params)


def test_old_names_of_norms(tmp_path):
    config = config_of("bert")
    params = parameters(Functional("mlm", config))
    old = {".weight": ".gamma", ".bias": ".beta"}

    def renamed(name):
        for new, former in old.items():
            name = name.replace(f"LayerNorm{new}", f"LayerNorm{former}")
        return name

    save_file({renamed(name): tensor for name, tensor in to_huggingface(params, config).items()}, tmp_path / SINGLE)
    equal(load(tmp_path, config)[0], params)


def test_names_of_wrapped_models_and_buffers(case, tmp_path):
    config, params, tensors = case
    buffers = {f"{BODY[family(config)]}embeddings.{name}": np.arange(3) for name in ("position_ids", "token_type_ids")}
    for wrapper in ("module.", "module._orig_mod."):
        save_file({wrapper + name: tensor for name, tensor in (tensors | buffers).items()}, tmp_path / SINGLE)
        equal(load(tmp_path, config)[0], params)
    renamed = {f"module.{name}": tensor for name, tensor in (tensors | {"surprise.weight": np.zeros(3)}).items()}
    save_file(renamed, tmp_path / SINGLE)
    with pytest.raises(UserError, match=r": module\.surprise\.weight: "):  # as the file has it
        load(tmp_path, config)


@pytest.mark.parametrize("kind", ["dc", "icner"])
def test_the_head_of_a_finetuned_model_is_left_out(case, kind, tmp_path):
    config, params, _ = case
    sizes = {"dc": {"domains": 3}, "icner": {"intents": 2, "tags": 3}}[kind]
    params = {**parameters(Functional(kind, config, **sizes)), "encoder": params["encoder"]}
    classes = {"domains": ("a", "b", "c"), "intents": ("x", "y"), "tags": ("O", "B-a", "I-a")}
    tensors = exported(Functional(kind, config, **sizes), params, classes).tensors
    if family(config) == "distilbert":  # which is exported as BERT
        config = small_config("bert", type_vocab_size=1)
    save_file(tensors, tmp_path / SINGLE)
    loaded, has_head = load(tmp_path, config)
    assert not has_head
    equal(loaded["encoder"]["layers"], params["encoder"]["layers"])
    heads = unused_heads(tensors, config)
    assert heads and all(name.startswith(("classifier.", "head.")) for name in heads)


def test_rows_beyond_the_tokenizer_are_left_out(tmp_path):
    config = config_of("roberta")
    params = parameters(Functional("mlm", config))
    save_file(to_huggingface(params, config), tmp_path / SINGLE)
    loaded, _ = load(tmp_path, config_of("roberta", vocab_size=40), rows=config.vocab_size)
    table = params["encoder"]["embeddings"]["tokens"]
    equal(loaded["encoder"]["embeddings"]["tokens"], table[:40])
    equal(loaded["mlm_head"]["bias"], params["mlm_head"]["bias"][:40])


def test_errors_name_the_tensor(case, tmp_path):
    config, _, tensors = case
    names = [entry.name for entry in name_map(config)]
    save_file({name: tensor for name, tensor in tensors.items() if name != names[5]}, tmp_path / SINGLE)
    with pytest.raises(UserError, match=names[5].replace(".", r"\.")):
        load(tmp_path, config)
    save_file(tensors | {"surprise.weight": np.zeros(3)}, tmp_path / SINGLE)
    with pytest.raises(UserError, match=r"surprise\.weight"):
        load(tmp_path, config)
    for name in (names[0], names[3], names[5]):
        save_file(tensors | {name: np.zeros((2, 3), np.float32)}, tmp_path / SINGLE)
        with pytest.raises(UserError, match=rf"{name}: its shape is \(2, 3\)".replace(".", r"\.")):
            load(tmp_path, config)
    save_file(tensors | {names[5]: tensors[names[5]].astype(np.int8)}, tmp_path / SINGLE)
    with pytest.raises(UserError, match=rf"{names[5]} is of type I8".replace(".", r"\.")):
        load(tmp_path, config)


def test_an_untied_decoder_is_refused_if_the_config_ties_it(tmp_path):
    config = config_of("bert")
    tensors = to_huggingface(parameters(Functional("mlm", config)), config)
    table = tensors["bert.embeddings.word_embeddings.weight"]
    save_file(tensors | {"cls.predictions.decoder.weight": table.copy()}, tmp_path / SINGLE)
    load(tmp_path, config)
    save_file(tensors | {"cls.predictions.decoder.weight": table + 1}, tmp_path / SINGLE)
    with pytest.raises(UserError, match=r"cls\.predictions\.decoder\.weight: differs"):
        load(tmp_path, config)


def test_files_that_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match=r"holds no model\.safetensors.*pickle.*save_pretrained"):
        TensorFiles(tmp_path)
    save_file({"a": np.zeros((50, 50), np.float32)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    for broken in (whole[:-100], whole[:20], b""):
        (tmp_path / SINGLE).write_bytes(broken)
        with pytest.raises(UserError, match=r"is not a complete safetensors file"):
            TensorFiles(tmp_path)


def test_host_memory_stays_near_the_largest_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(
        huggingface_files, "_CHUNK", 2**14
    )  # small beside this model, as the real one is beside real ones
    config = config_of("bert", hidden_size=64, intermediate_size=256, num_layers=16, vocab_size=6000)
    params = parameters(Functional("mlm", config))
    save_file(to_huggingface(params, config), tmp_path / SINGLE)
    load(tmp_path, config)  # compiles
    tracemalloc.start()
    load(tmp_path, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    largest = 6000 * 64 * 4  # the token table; NumPy's arrays are traced, those of the devices are not
    assert peak < 1.5 * largest < sum(sizes) / 2


def test_multilingual_e5_small(data_dir):
    folder = data_dir / "models" / "multilingual-e5-small-trimmed"
    values = read_config(folder)
    assert (values["num_layers"], values["hidden_size"], values["head_style"]) == (12, 384, "bert")
