"""Hidden states and masked-LM logits equal those of PyTorch `transformers`, for random small models of each family."""

import jax
import numpy as np
import pytest

from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.checkpoint import to_huggingface
from tests.support.huggingface import from_huggingface
from tests.support.small_models import small_config

torch = pytest.importorskip("torch", reason="parity needs PyTorch")
transformers = pytest.importorskip("transformers")

VOCAB, LENGTH, PAD = 120, 40, 1
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def their_model(family):
    if family == "bert":
        config = transformers.BertConfig(**SIZES, max_position_embeddings=LENGTH)
        return transformers.BertForMaskedLM(config)
    if family == "distilbert":
        sizes = {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCAB, "pad_token_id": PAD}
        return transformers.DistilBertForMaskedLM(
            transformers.DistilBertConfig(**sizes, max_position_embeddings=LENGTH)
        )
    if family == "roberta":
        config = transformers.XLMRobertaConfig(
            **SIZES, max_position_embeddings=LENGTH + 2, type_vocab_size=1, layer_norm_eps=1e-5
        )
        return transformers.XLMRobertaForMaskedLM(config)
    if family == "xlmr_xl":
        config = transformers.XLMRobertaXLConfig(**SIZES, max_position_embeddings=LENGTH + 2)
        return transformers.XLMRobertaXLForMaskedLM(config)
    rotary = {
        "full_attention": {"rope_type": "default", "rope_theta": 160_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }
    config = transformers.ModernBertConfig(
        **SIZES,
        max_position_embeddings=LENGTH,
        local_attention=8,
        rope_parameters=rotary,
        cls_token_id=0,
        sep_token_id=2,
    )
    return transformers.ModernBertForMaskedLM(config)


def our_config(family):
    return small_config(
        "bert" if family == "distilbert" else family,
        vocab_size=VOCAB, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=48, local_window=8,
        max_positions=LENGTH, type_vocab_size={"bert": 2, "modernbert": 0, "distilbert": 0}.get(family, 1),
    )  # fmt: skip


@pytest.fixture(scope="module", params=["bert", "distilbert", "roberta", "xlmr_xl", "modernbert"])
def pair(request):
    """(family, their model with every tensor far from its initial value, our config)."""
    torch.manual_seed(0)
    model = their_model(request.param).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(center + 0.2 * torch.randn_like(parameter))
    model.tie_weights()
    return request.param, model, our_config(request.param)


def state(model):
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def test_hidden_states_and_logits(pair):
    family, theirs, config = pair
    rng = np.random.default_rng(0)
    lengths = np.array([LENGTH, 25, 7])
    mask = np.arange(LENGTH)[None] < lengths[:, None]
    tokens = np.where(mask, rng.integers(3, VOCAB, mask.shape), PAD)
    with torch.no_grad():
        output = theirs(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(int)), output_hidden_states=True
        )
        last = theirs.base_model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(int)))[
            0
        ].numpy()

    model = Functional("mlm", config)
    params = from_huggingface(state(theirs), config)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), mask.shape)
    batch = {"tokens": tokens.astype(np.int32), "segment_ids": mask.astype(np.int32), "positions": positions * mask}

    @jax.jit
    def run(params):
        hidden = model.hidden(params, batch)
        return hidden, model.mlm_logits(params, hidden)

    hidden, logits = map(np.asarray, run(params))
    errors = np.abs(hidden - last)[mask].max(), np.abs(logits - output.logits.numpy())[mask].max()
    print(f"{family}: largest error in hidden states {errors[0]:.1e}, in logits {errors[1]:.1e}")
    assert np.abs(last[mask]).max() > 0.5 and np.abs(output.logits.numpy()[mask]).max() > 0.5
    assert max(errors) < 1e-4


def test_packed_rows_equal_their_texts(pair):
    family, theirs, config = pair
    rng = np.random.default_rng(1)
    texts = [rng.integers(3, VOCAB, size) for size in (18, 9, 11)]
    with torch.no_grad():
        expected = [theirs(input_ids=torch.tensor(text[None])).logits.numpy()[0] for text in texts]
    batch = {
        "tokens": np.concatenate([*texts, [PAD, PAD]])[None].astype(np.int32),
        "segment_ids": np.repeat([1, 2, 3, 0], [18, 9, 11, 2])[None].astype(np.int32),
        "positions": np.concatenate([np.arange(n) for n in (18, 9, 11, 2)])[None].astype(np.int32),
    }
    model = Functional("mlm", config)
    params = from_huggingface(state(theirs), config)
    logits = jax.jit(lambda params: model.mlm_logits(params, model.hidden(params, batch)))(params)
    error = np.abs(np.asarray(logits)[0, :38] - np.concatenate(expected)).max()
    print(f"{family}: largest error in packed logits {error:.1e}")
    assert error < 1e-4


def test_way_back(pair):
    _, theirs, config = pair
    tensors = to_huggingface(from_huggingface(state(theirs), config), config)
    again = type(theirs)(theirs.config)
    missing, unexpected = again.load_state_dict({n: torch.tensor(t) for n, t in tensors.items()}, strict=False)
    assert not unexpected
    assert all(
        "decoder" in name or name == "vocab_projector.weight" for name in missing
    )  # the second names of tied tensors
    again.tie_weights()
    for name, tensor in state(theirs).items():
        np.testing.assert_array_equal(state(again)[name], tensor)
