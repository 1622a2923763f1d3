"""A student initialized with chosen layers of its teacher, or with its token table alone, at any width."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.types import Params, UserError

# Fields that shape parameters or decide what a layer computes with them.
_SHARED = (
    *("hidden_size", "num_heads", "intermediate_size", "positions", "norm_placement", "embedding_norm", "final_norm"),
    *("skip_first_attention_norm", "use_bias", "norm_bias", "norm_epsilon", "activation", "gated"),
    *("head_style", "head_activation", "head_bias", "decoder_bias"),
)


def from_teacher(
    student: Functional,
    student_params: Params,
    teacher: Functional,
    teacher_params: Params,
    layers: tuple[int, ...],
    kept: np.ndarray | None,
) -> Params:
    """Student parameters with copies of the teacher's embeddings, norms, head, and layer `layers[i]` as layer i.

    Both are of kind "mlm". kept int [student tokens]: the teacher's id of each token of a trimmed vocabulary. A longer
    table of positions is cut. Token types that the student lacks are added to its positions, as every token has type 0.
    Raises UserError naming config.student.<field> where the two do not fit, and ValueError for layers or tokens that
    the teacher does not have.
    """
    check_shapes(student.config, teacher.config, kept)
    if len(layers) != student.config.num_layers or not all(0 <= layer < teacher.config.num_layers for layer in layers):
        raise ValueError(
            f"layers {layers} do not fill {student.config.num_layers} out of {teacher.config.num_layers} layers"
        )
    if kept is not None and (kept.min() < 0 or kept.max() >= teacher.config.vocab_size):
        raise ValueError(f"kept: ids from {kept.min()} to {kept.max()} for {teacher.config.vocab_size} tokens")
    tokens = None if kept is None else jnp.asarray(kept)
    # jit returns new arrays: the training step donates its state's memory, and the teacher's must survive that.
    copied = jax.jit(lambda params, tokens: _copied(student.config, teacher.config, params, layers, tokens))
    return {**student_params, **copied(teacher_params, tokens)}


def principal_table(table_VxH: np.ndarray, counts_V: np.ndarray, width: int, size: float) -> tuple[np.ndarray, float]:
    """(token table float32 [V, width], share of the variance that it keeps): the leading principal components of the
    teacher's table, where token v has weight sqrt(counts[v]).

    The weights are between equal ones and frequencies: frequent tokens matter most, and rare ones still count. The mean
    is removed, since all tokens share it. size: root mean square of the entries; that of a random table suits the first
    norm and the learning rate. A student that is wider than its teacher gets zeros in the remaining columns.
    """
    table, weights = np.asarray(table_VxH, np.float64), np.sqrt(np.asarray(counts_V, np.float64))
    weights = weights / weights.sum()
    centered = table - weights @ table
    variances, directions = np.linalg.eigh((centered * weights[:, None]).T @ centered)
    basis = directions[:, ::-1][:, :width]
    # An eigenvector's sign is arbitrary; fixing it makes the result independent of the library.
    largest = basis[np.abs(basis).argmax(axis=0), np.arange(basis.shape[1])]
    reduced = centered @ (basis * np.sign(largest))
    reduced *= size / np.sqrt(np.mean(np.square(reduced)))
    kept = float(variances[::-1][:width].sum() / max(variances.sum(), 1e-300))
    return np.pad(reduced, ((0, 0), (0, width - basis.shape[1]))).astype(np.float32), kept


def check_table(student: EncoderConfig, teacher: EncoderConfig, kept: np.ndarray | None) -> None:
    """Raises UserError for a student whose tokens are not the teacher's, or the subset `kept` of them."""
    if kept is None and student.vocab_size != teacher.vocab_size:
        raise UserError(
            f"config.student.vocab_size: it is {student.vocab_size}, the teacher's is {teacher.vocab_size}, and a "
            "student that starts from its teacher's token table needs the same; set it to 0, or initialize the student "
            "at random"
        )
    _check_kept(student, kept)


def _check_kept(student: EncoderConfig, kept: np.ndarray | None) -> None:
    if kept is not None and len(kept) != student.vocab_size:
        raise UserError(
            f"config.student.vocab_size: it is {student.vocab_size}, and the trimmed vocabulary has {len(kept)} "
            f"tokens; set it to 0 to take those"
        )


def remarks(student: EncoderConfig, teacher: EncoderConfig, layers: tuple[int, ...]) -> tuple[str, ...]:
    """One sentence for each layer that works differently in the student than in the teacher, for the run's notes."""
    reach = {True: "the whole text", False: "its local window"}
    found: list[str] = []
    for layer, origin in enumerate(layers):
        ours, theirs = student.is_global(layer), teacher.is_global(origin)
        if ours != theirs:
            origins = f"teacher layer {origin}, its origin, to {reach[theirs]}"
            found.append(f"student layer {layer} attends to {reach[ours]}, {origins}")
    if student.tied_decoder and not teacher.tied_decoder:
        found.append("the student's masked-LM head reads its token table, the teacher's has a matrix of its own")
    if teacher.skip_first_attention_norm and layers[0] != 0:
        found.append(f"student layer 0 has no attention norm, unlike teacher layer {layers[0]}, its origin")
    return tuple(found)


def _copied(student: EncoderConfig, teacher: EncoderConfig, params: Params, layers: tuple[int, ...], tokens: Any):
    """The encoder and the masked-LM head of the student."""
    encoder = dict(params["encoder"])
    embeddings, head = dict(encoder["embeddings"]), dict(params["mlm_head"])
    if tokens is not None:
        embeddings["tokens"] = jnp.take(embeddings["tokens"], tokens, axis=0)
        head |= {name: jnp.take(head[name], tokens, axis=0) for name in ("decoder", "bias") if name in head}
    if student.tied_decoder:
        head.pop("decoder", None)
    else:
        head.setdefault("decoder", embeddings["tokens"])
    if teacher.positions == "learned":
        embeddings["positions"] = embeddings["positions"][: student.max_positions + student.position_offset]
    if teacher.type_vocab_size and not student.type_vocab_size:
        embeddings["positions"] = embeddings["positions"] + embeddings.pop("types")[:1]
    chosen = jax.tree.map(lambda leaf: jnp.take(leaf, jnp.asarray(layers), axis=0), encoder["layers"])
    if teacher.skip_first_attention_norm and teacher.embedding_norm:
        # ModernBERT's layer 0 has no attention norm, since it reads what the norm of the embeddings gives. As a later
        # layer of the student it gets that norm instead of the attention norm that was never trained.
        first = [layer for layer, origin in enumerate(layers) if origin == 0]
        for name, leaf in chosen["attention_norm"].items():
            chosen["attention_norm"][name] = leaf.at[jnp.asarray(first, int)].set(embeddings["norm"][name][None])
    return {"encoder": {**encoder, "embeddings": embeddings, "layers": chosen}, "mlm_head": head}


def check_shapes(student: EncoderConfig, teacher: EncoderConfig, kept: np.ndarray | None) -> None:
    """Raises UserError naming the first field in which a student does not fit the layers of that teacher."""
    fields = list(_SHARED)
    learned = student.positions == "learned"
    if learned:
        fields.append("position_offset")
    else:
        fields.append("global_theta")
        if student.global_every > 1 and teacher.global_every > 1:
            fields.append("local_theta")
    if student.type_vocab_size or not learned:
        fields.append("type_vocab_size")
    if kept is None:
        fields.append("vocab_size")
    for field in fields:
        mine, theirs = getattr(student, field), getattr(teacher, field)
        if mine != theirs:
            raise UserError(
                f"config.student.{field}: it is {mine!r}, the teacher's is {theirs!r}, and a student initialized with "
                f"its teacher's layers needs the same; set it to {theirs!r}, or initialize the student at random"
            )
    if learned and student.max_positions > teacher.max_positions:
        raise UserError(
            f"config.student.max_positions: it is {student.max_positions}, and the teacher's table of positions has "
            f"{teacher.max_positions}; give at most that, or initialize the student at random"
        )
    _check_kept(student, kept)
