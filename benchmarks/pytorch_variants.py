"""The same step in PyTorch: the loop that a user of `transformers` would write, and the best that was found.

The only module outside tests that imports torch, which is an optional extra ("parity").
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
import transformers
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from benchmarks.layouts import one_text_a_row, with_labels
from benchmarks.worker import Run
from benchmarks.workloads import read_arrays, read_batches
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.flops import distill_flops
from kd_jax.models.huggingface.config import their_config

Spec = Mapping[str, Any]
Batches = list[dict[str, np.ndarray]]
Losses = tuple[torch.Tensor, torch.Tensor]  # (KL, cross entropy), means over the masked positions
SLOT_MULTIPLE = 16


class UsualLoop:
    """Padded batches, full logits, the cross entropy inside the model, the KL at the masked positions.

    Weights, texts, masks and the settings of AdamW are those of kd_jax.
    """

    def __init__(self, spec: Spec, *, compiled: bool, fused: bool):
        torch.set_num_threads(spec["threads"] or torch.get_num_threads())
        self.spec, self.compiled, self.fused = spec, compiled, fused
        self.device = torch.device("cpu" if spec["device"] == "cpu" else "cuda")
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
        self.batches = [
            {name: torch.from_numpy(values).to(self.device) for name, values in batch.items()} for batch in batches
        ]
        self.build()
        return {
            "framework": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "rows": len(batches[0]["tokens"]),
            "length": batches[0]["tokens"].shape[1],
            "flops": sum(self.flops(batch) for batch in batches),
        }

    def run(self, first: int, steps: int) -> list[dict[str, float]]:
        losses = [self.step(self.batches[step % len(self.batches)]) for step in range(first, first + steps)]
        return [{"kl": float(kl), "mlm": float(mlm)} for kl, mlm in losses]

    def step(self, batch: Mapping[str, torch.Tensor]) -> Losses:
        """One update; the two losses before it."""
        job = self.spec["job"]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.spec["dtype"] == "bfloat16"):
            kl, mlm = self.losses(batch)
        (self.spec["kl_weight"] * kl + self.spec["mlm_weight"] * mlm).backward()
        if job["clip_norm"] > 0:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), job["clip_norm"])
        self.optimizer.step()
        return kl.detach(), mlm.detach()

    def layout(self, batches: Batches) -> Batches:
        """The packed batches as this loop reads them: one text a row, as long as the longest of the batch."""
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
        if self.compiled:
            self.student, self.teacher = torch.compile(self.student), torch.compile(self.teacher)

    def flops(self, batch: Mapping[str, np.ndarray]) -> float:
        rows, length = batch["tokens"].shape
        return distill_flops(self.shapes["student"], self.shapes["teacher"], rows, length, length)

    def losses(self, batch: Mapping[str, torch.Tensor]) -> Losses:
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

    def _model(self, name: str) -> transformers.ModernBertForMaskedLM:
        torch.manual_seed(0)
        # The texts are tokenized already; these ids only have to exist.
        ids = {f"{token}_token_id": self.spec["pad_id"] for token in ("pad", "bos", "eos", "cls", "sep")}
        config = transformers.ModernBertConfig.from_dict(their_config(self.shapes[name]) | ids)
        model = transformers.ModernBertForMaskedLM(config)
        weights = read_arrays(f"{self.spec['weights']}/{name}-torch.npz")
        tensors = {key: torch.from_numpy(values) for key, values in weights.items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        if unexpected or any("decoder.weight" not in key for key in missing):
            raise ValueError(f"{name}: the weights do not fit ModernBertForMaskedLM: {missing}, {unexpected}")
        model.tie_weights()
        return model.to(self.device)

    def _optimizer(self) -> torch.optim.Optimizer:
        job = self.spec["job"]
        decayed = [parameter for parameter in self.student.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in self.student.parameters() if parameter.ndim < 2]
        groups = [{"params": decayed, "weight_decay": job["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
        betas = (job["beta1"], job["beta2"])
        fused = {"fused": True} if self.fused else {}
        return torch.optim.AdamW(groups, lr=job["learning_rate"], betas=betas, eps=job["epsilon"], **fused)


class BestLoop(UsualLoop):
    """Packed rows with a mask between texts, logits at the masked positions, the whole loss in one compiled program."""

    narrow = False  # whether the last layers are computed at the masked positions only

    def layout(self, batches: Batches) -> Batches:
        """Packed rows; the used mask slots of a batch as one list, of the same length in all batches."""
        most = max(int(batch["masked_weights"].sum()) for batch in batches)
        size = -(-most // SLOT_MULTIPLE) * SLOT_MULTIPLE
        return [self._flat(batch, size) for batch in batches]

    def _flat(self, batch: Mapping[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
        rows, slots = np.nonzero(batch["masked_weights"])

        def filled(values: np.ndarray) -> np.ndarray:
            return np.pad(values.astype(np.int64), (0, size - len(rows)))

        columns = batch["masked_positions"]
        in_batch = rows * batch["tokens"].shape[1] + columns[rows, slots]
        return {
            "tokens": batch["tokens"].astype(np.int64),
            "segment_ids": batch["segment_ids"],
            "positions": batch["positions"].astype(np.int64),
            "places": filled(in_batch),  # among all columns of the batch
            "numbers": filled(rows * columns.shape[1] + slots),  # among all mask slots of the batch
            "columns": columns.astype(np.int64),
            "targets": filled(batch["masked_targets"][rows, slots]),
            "weights": filled(np.ones(len(rows))).astype(np.float32),
        }

    def _logits(self, name: str, tokens, segment_ids, positions, places, **_):
        model = self._modules[name]
        masks = self._masks(self.shapes[name], segment_ids)
        hidden = model.model(input_ids=tokens, attention_mask=masks, position_ids=positions).last_hidden_state
        return model.decoder(model.head(hidden.flatten(0, 1)[places]))

    def build(self) -> None:
        self._losses = torch.compile(self._losses_of, fullgraph=True, dynamic=False)

    def flops(self, batch: Mapping[str, np.ndarray]) -> float:
        rows, length = batch["tokens"].shape
        logits = len(batch["places"]) / rows
        return distill_flops(self.shapes["student"], self.shapes["teacher"], rows, length, logits, narrow=self.narrow)

    def losses(self, batch: Mapping[str, torch.Tensor]) -> Losses:
        return self._losses(**batch)

    @staticmethod
    def _masks(shape: EncoderConfig, segment_ids) -> dict[str, torch.Tensor]:
        """What may see what, bool [R, 1, L, L] by kind of layer."""
        whole = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        columns = torch.arange(segment_ids.shape[1], device=segment_ids.device)
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
    """The same with a last layer of our own, which only computes keys and values where nothing is masked."""

    narrow = True

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
        row = torch.arange(len(tokens), device=tokens.device)[:, None]
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


def _variant(kind: type[UsualLoop], compiled: bool, fused: bool, spec: Spec) -> tuple[dict[str, Any], Run]:
    loop = kind(spec, compiled=compiled, fused=fused)
    return loop.prepare(), loop.run


eager = functools.partial(_variant, UsualLoop, False, False)
compiled = functools.partial(_variant, UsualLoop, True, False)
best = functools.partial(_variant, BestLoop, True, True)
narrow = functools.partial(_variant, NarrowLoop, True, True)


def gemm(spec: Spec) -> tuple[dict[str, Any], Run]:
    """The machine's peak by PyTorch; see jax_variants.gemm."""
    torch.set_num_threads(spec["threads"] or torch.get_num_threads())
    size = spec["gemm_size"]
    device = torch.device("cpu" if spec["device"] == "cpu" else "cuda")
    left = torch.randn(size, size, dtype=getattr(torch, spec["dtype"]), device=device)
    right = left / size**0.5

    def run(first: int, steps: int) -> list[dict[str, float]]:
        del first
        product = left
        for _ in range(steps):
            product = product @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        return [{} for _ in range(steps)]

    return {"framework": f"torch {torch.__version__}", "flops": 2.0 * size**3 * spec["gemm_steps"]}, run
