"""The same step in PyTorch: the loop that a user of `transformers` would write, and the best that was found.

The only module of kd_jax that imports torch, which is an optional extra ("parity") and is asked for by the benchmark
alone.
"""

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
import transformers
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from benchmarks.handover import read_arrays, read_batches
from benchmarks.layouts import one_text_a_row, with_labels
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.flops import distill_flops

Spec = Mapping[str, Any]
Batches = list[dict[str, np.ndarray]]
SLOT_MULTIPLE = 16


class _Distill(abc.ABC):
    """What both loops share: models from the same weights, AdamW with the same settings, batches as tensors."""

    def __init__(self, spec: Spec, *, compiled: bool, fused: bool):
        torch.set_num_threads(spec["threads"] or torch.get_num_threads())
        self.spec, self.compiled, self.fused = spec, compiled, fused
        self.shapes = {name: EncoderConfig(**values) for name, values in spec["models"].items()}

    def prepare(self) -> dict[str, Any]:
        """Reads batches and weights, and makes the step."""
        self.student, self.teacher = (self._model(name) for name in ("student", "teacher"))
        self.teacher.requires_grad_(False).eval()
        self.student.train()  # dropout is 0
        self._modules = {"student": self.student, "teacher": self.teacher}
        self.optimizer = self._optimizer()
        packed = read_batches(self.spec["batches"])
        batches = self.layout(packed)
        self.batches = [{name: torch.from_numpy(values) for name, values in batch.items()} for batch in batches]
        self.build()
        return {
            "framework": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "rows": len(batches[0]["tokens"]),
            "length": batches[0]["tokens"].shape[1],
            "flops": sum(self.flops(batch) for batch in batches),
        }

    def run(self, first: int, steps: int) -> list[dict[str, float]]:
        """See worker.Variant."""
        losses = [self.step(self.batches[step % len(self.batches)]) for step in range(first, first + steps)]
        return [{"kl": float(kl), "mlm": float(mlm)} for kl, mlm in losses]

    def step(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """One update; the two losses before it."""
        job = self.spec["job"]
        self.optimizer.zero_grad(set_to_none=True)
        kl, mlm = self.losses(batch)
        (self.spec["kl_weight"] * kl + self.spec["mlm_weight"] * mlm).backward()
        if job["clip_norm"] > 0:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), job["clip_norm"])
        self.optimizer.step()
        return kl.detach(), mlm.detach()

    @abc.abstractmethod
    def layout(self, batches: Batches) -> Batches:
        """The packed batches in the layout of this loop."""

    @abc.abstractmethod
    def build(self) -> None:
        """Compiles what is to be compiled."""

    @abc.abstractmethod
    def flops(self, batch: Mapping[str, np.ndarray]) -> float:
        """Of a step."""

    @abc.abstractmethod
    def losses(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(KL, cross entropy), means over the masked positions."""

    def _model(self, name: str) -> transformers.ModernBertForMaskedLM:
        torch.manual_seed(0)
        model = transformers.ModernBertForMaskedLM(modernbert_config(self.shapes[name], self.spec["pad_id"]))
        weights = read_arrays(f"{self.spec['weights']}/{name}-torch.npz")
        tensors = {key: torch.from_numpy(values) for key, values in weights.items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        if unexpected or any("decoder.weight" not in key for key in missing):
            raise ValueError(f"{name}: the weights do not fit ModernBertForMaskedLM: {missing}, {unexpected}")
        model.tie_weights()
        return model

    def _optimizer(self) -> torch.optim.Optimizer:
        job = self.spec["job"]
        decayed = [parameter for parameter in self.student.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in self.student.parameters() if parameter.ndim < 2]
        groups = [{"params": decayed, "weight_decay": job["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
        betas = (job["beta1"], job["beta2"])
        fused = {"fused": True} if self.fused else {}
        return torch.optim.AdamW(groups, lr=job["learning_rate"], betas=betas, eps=job["epsilon"], **fused)


class UsualLoop(_Distill):
    """Padded batches, full logits, the cross entropy inside the model, the KL at the masked positions."""

    def layout(self, batches: Batches) -> Batches:
        """One text a row, as long as the longest of the batch."""
        labeled = [with_labels(one_text_a_row(batch, self.spec["pad_id"])) for batch in batches]
        return [
            {
                "tokens": batch["tokens"].astype(np.int64),
                "attention_mask": batch["segment_ids"].astype(np.int64),
                "labels": batch["labels"].astype(np.int64),
            }
            for batch in labeled
        ]

    def build(self) -> None:
        """Compiles the two models, where that is asked for."""
        if self.compiled:
            self.student, self.teacher = torch.compile(self.student), torch.compile(self.teacher)

    def flops(self, batch: Mapping[str, np.ndarray]) -> float:
        """Logits are formed at every column."""
        rows, length = batch["tokens"].shape
        return distill_flops(self.shapes["student"], self.shapes["teacher"], rows, length, length)

    def losses(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(KL, cross entropy), means over the masked positions."""
        tokens, mask, labels = batch["tokens"], batch["attention_mask"], batch["labels"]
        temperature = self.spec["temperature"]
        with torch.no_grad():
            theirs = self.teacher(input_ids=tokens, attention_mask=mask).logits
        ours = self.student(input_ids=tokens, attention_mask=mask, labels=labels)
        masked = labels != -100
        log_q = F.log_softmax(ours.logits[masked] / temperature, dim=-1)
        log_p = F.log_softmax(theirs[masked] / temperature, dim=-1)
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * temperature**2
        return kl, ours.loss


class BestLoop(_Distill):
    """Packed rows told apart by a mask, logits at the masked positions only, the whole loss in one compiled program."""

    def layout(self, batches: Batches) -> Batches:
        """Packed rows; the used mask slots of a batch in one list, of the same length in all batches."""
        most = max(int(batch["masked_weights"].sum()) for batch in batches)
        size = -(-most // SLOT_MULTIPLE) * SLOT_MULTIPLE
        return [self._flat(batch, size) for batch in batches]

    def _flat(self, batch: Mapping[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
        rows, slots = np.nonzero(batch["masked_weights"])
        places, targets = np.zeros(size, np.int64), np.zeros(size, np.int64)
        weights = np.zeros(size, np.float32)
        places[: len(rows)] = rows * batch["tokens"].shape[1] + batch["masked_positions"][rows, slots]
        targets[: len(rows)] = batch["masked_targets"][rows, slots]
        weights[: len(rows)] = 1.0
        return {
            "tokens": batch["tokens"].astype(np.int64),
            "segment_ids": batch["segment_ids"],
            "positions": batch["positions"].astype(np.int64),
            "places": places,
            "targets": targets,
            "weights": weights,
        }

    def _logits(self, name: str, tokens, segment_ids, positions, places):
        """Logits of a model at the places of the list."""
        model = self._modules[name]
        masks = self._masks(self.shapes[name], segment_ids)
        hidden = model.model(input_ids=tokens, attention_mask=masks, position_ids=positions).last_hidden_state
        return model.decoder(model.head(hidden.flatten(0, 1)[places]))

    def build(self) -> None:
        """Compiles both models and the losses as one program."""
        self._losses = torch.compile(self._losses_of, fullgraph=True, dynamic=False)

    def flops(self, batch: Mapping[str, np.ndarray]) -> float:
        """Logits are formed at the places of the list."""
        rows, length = batch["tokens"].shape
        logits = len(batch["places"]) / rows
        return distill_flops(self.shapes["student"], self.shapes["teacher"], rows, length, logits)

    def losses(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(KL, cross entropy), means over the masked positions."""
        return self._losses(**batch)

    @staticmethod
    def _masks(shape: EncoderConfig, segment_ids) -> dict[str, torch.Tensor]:
        """What may see what, bool [R, 1, L, L] by kind of layer."""
        whole = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        columns = torch.arange(segment_ids.shape[1])
        distance = (columns[:, None] - columns[None, :]).abs()
        near = whole & (distance <= shape.local_window // 2)[None, None]
        return {"full_attention": whole, "sliding_attention": near}

    def _losses_of(self, targets, weights, **where):
        with torch.no_grad():
            theirs = self._logits("teacher", **where)
        ours = self._logits("student", **where)
        temperature, count = self.spec["temperature"], weights.sum()
        log_q = F.log_softmax(ours / temperature, dim=-1)
        log_p = F.log_softmax(theirs / temperature, dim=-1)
        kl = ((log_p.exp() * (log_p - log_q)).sum(-1) * weights).sum() / count * temperature**2
        mlm = (F.cross_entropy(ours, targets, reduction="none") * weights).sum() / count
        return kl, mlm


class NarrowLoop(BestLoop):
    """The same with a last layer written by hand, which computes only keys and values where nothing is masked; no
    module of `transformers` does.
    """

    def _flat(self, batch: Mapping[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
        rows, slots = np.nonzero(batch["masked_weights"])
        numbers = np.zeros(size, np.int64)
        numbers[: len(rows)] = rows * batch["masked_positions"].shape[1] + slots
        flat = super()._flat(batch, size)
        return {**flat, "numbers": numbers, "columns": batch["masked_positions"].astype(np.int64)}

    def flops(self, batch: Mapping[str, np.ndarray]) -> float:
        """See BestLoop."""
        rows, length = batch["tokens"].shape
        logits = len(batch["places"]) / rows
        return distill_flops(self.shapes["student"], self.shapes["teacher"], rows, length, logits, narrow=True)

    def _logits(self, name: str, tokens, segment_ids, positions, places, numbers, columns):
        model = self._modules[name]
        masks = self._masks(self.shapes[name], segment_ids)
        body = model.model
        states = body.embeddings(input_ids=tokens)
        angles = {kind: body.rotary_emb(states, positions, kind) for kind in masks}
        *layers, last = body.layers
        for layer in layers:
            kind = layer.attention_type
            states = layer(states, attention_mask=masks[kind], position_embeddings=angles[kind])
        row = torch.arange(len(tokens))[:, None]
        normed, attention = last.attn_norm(states), last.attn
        if attention.Wqkv.bias is not None:
            raise ValueError("a last layer with biases is not written")

        def heads(projected):
            return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        for_query, for_key, for_value = attention.Wqkv.weight.chunk(3)
        cosine, sine = angles[last.attention_type]
        query, key = heads(F.linear(normed[row, columns], for_query)), heads(F.linear(normed, for_key))
        query, _ = apply_rotary_pos_emb(query, query, cosine[row, columns], sine[row, columns])
        key, _ = apply_rotary_pos_emb(key, key, cosine, sine)
        mask = masks[last.attention_type][:, 0][row, columns][:, None]
        mixed = F.scaled_dot_product_attention(query, key, heads(F.linear(normed, for_value)), attn_mask=mask)
        mixed = mixed.transpose(1, 2).flatten(2).flatten(0, 1)[numbers]
        at_places = states.flatten(0, 1)[places] + attention.Wo(mixed)
        at_places = at_places + last.mlp(last.mlp_norm(at_places))
        return model.decoder(model.head(body.final_norm(at_places)))


def usual_eager(spec: Spec) -> UsualLoop:
    """The usual loop as it is."""
    return UsualLoop(spec, compiled=False, fused=False)


def usual_compiled(spec: Spec) -> UsualLoop:
    """The usual loop with torch.compile around each model."""
    return UsualLoop(spec, compiled=True, fused=False)


def best(spec: Spec) -> BestLoop:
    """The best loop."""
    return BestLoop(spec, compiled=True, fused=True)


def narrow(spec: Spec) -> NarrowLoop:
    """The best loop with a narrow last layer."""
    return NarrowLoop(spec, compiled=True, fused=True)


def modernbert_config(shape: EncoderConfig, pad_id: int) -> transformers.ModernBertConfig:
    """The `transformers` config of an encoder of ModernBERT's shape; dropout is 0."""
    rotary: dict[Any, dict] = {
        "full_attention": {"rope_type": "default", "rope_theta": shape.global_theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": shape.local_theta},
    }
    layers = ["full_attention" if shape.is_global(layer) else "sliding_attention" for layer in range(shape.num_layers)]
    return transformers.ModernBertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=shape.max_positions,
        norm_eps=shape.norm_epsilon,
        norm_bias=shape.norm_bias,
        attention_bias=shape.use_bias,
        mlp_bias=shape.use_bias,
        decoder_bias=shape.decoder_bias,
        classifier_bias=shape.head_bias,
        hidden_activation=shape.activation,
        classifier_activation=shape.head_activation,
        local_attention=shape.local_window,
        layer_types=layers,
        rope_parameters=rotary,
        pad_token_id=pad_id,
        # The texts are tokenized already; these ids only have to exist.
        bos_token_id=pad_id,
        eos_token_id=pad_id,
        cls_token_id=pad_id,
        sep_token_id=pad_id,
    )


class PyTorchGemm:
    """The machine's peak by PyTorch; see gemm.JaxGemm."""

    def __init__(self, spec: Spec):
        torch.set_num_threads(spec["threads"] or torch.get_num_threads())
        self.size, self.steps = spec["gemm_size"], spec["gemm_steps"]

    def prepare(self) -> dict[str, Any]:
        """Makes the matrices."""
        self._left = torch.randn(self.size, self.size)
        self._right = self._left / self.size**0.5
        return {"framework": f"torch {torch.__version__}", "flops": 2.0 * self.size**3 * self.steps}

    def run(self, first: int, steps: int) -> list[dict[str, float]]:
        """Multiplies; nothing is computed that others could be compared with."""
        product = self._left
        for _ in range(steps):
            product = product @ self._right
        return [{} for _ in range(steps)]
