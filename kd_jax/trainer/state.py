"""The training state {"step", "params", "opt_state"}: its sharding, its abstract form, its layout in checkpoints."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd_jax.trainer.mesh import replicated
from kd_jax.types import Params, UserError

State = dict[str, Any]


def new_state(params: Params, optimizer: optax.GradientTransformation) -> State:
    """A state at step 0 around the given parameters."""
    return {"step": jnp.int32(0), "params": params, "opt_state": optimizer.init(params)}


def state_shardings(
    abstract_params: Params, optimizer: optax.GradientTransformation, params_shardings: Params
) -> State:
    """The sharding of every leaf of a state: moments are sharded like their parameters, counters replicated."""
    whole = replicated(jax.tree.leaves(params_shardings)[0].mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, abstract_params),
        params_shardings,
        transform_non_params=lambda _: whole,
    )
    return {"step": whole, "params": params_shardings, "opt_state": opt_state}


def abstract_state(abstract_params: Params, optimizer: optax.GradientTransformation, layout: State) -> State:
    """The state as ShapeDtypeStructs with the shardings of `layout`: the target of a restore."""
    shapes = jax.eval_shape(lambda params: new_state(params, optimizer), abstract_params)
    return with_shardings(shapes, layout)


def with_shardings(abstract: Any, layout: Any) -> Any:
    """A tree of ShapeDtypeStructs, each with its sharding from the tree `layout`."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, layout
    )


def params_fingerprint(params: Params) -> str:
    """Hex digest of all names and values of a tree, computed on the devices; the same for any sharding."""
    return params_notes(params)["parameters_fingerprint"]


def params_notes(params: Params) -> dict[str, Any]:
    """Entries of DONE about a run's parameters: "parameters_fingerprint" of all, and "parts", that of each top-level
    entry, since a reader may need only some of them."""
    sums = jax.tree.map(int, jax.device_get(_checksums(params)))
    return {"parameters_fingerprint": _hex(sums), "parts": {name: _hex(part) for name, part in sums.items()}}


def check_parts(params: Params, parts: Mapping[str, str], where: str | os.PathLike) -> None:
    """Raises UserError if parameters that were read are not those that a run recorded at its end."""
    if not params.keys() <= parts.keys():  # an older run, which recorded none
        return
    found = params_notes(params)["parts"]
    for name in params:
        if found[name] != parts[name]:
            raise UserError(
                f"{os.fspath(where)}: its checkpoint was changed or damaged since the run has finished ({name} has "
                "other values); restore it from a copy, or run its command again in another directory"
            )


def _hex(sums: Any) -> str:
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


@jax.jit
def _checksums(params):
    # A wrapping sum does not depend on its order, so the digest does not depend on the sharding; each element is mixed
    # with its index, so it does depend on where a value is.
    def checksum(leaf):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).reshape(-1)
        mixed = (bits ^ (jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
        return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)

    return jax.tree.map(checksum, params)


def to_plain(tree: Any) -> dict[str, Any]:
    """The tree as nested dicts with string keys: named tuples by field, sequences by index; empty nodes are left out.

    The optimizer state of a job is {"adam": {"count", "mu": {...}, "nu": {...}}, "learning_rate": {"count"}}.
    """
    plain: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *parents, last = _names(path)
        node = plain
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return plain


def from_plain(plain: dict[str, Any], like: Any) -> Any:
    """The inverse of `to_plain` for a tree with the structure of `like`; KeyError when a leaf is missing."""

    def leaf_at(path, _):
        node = plain
        for name in _names(path):
            node = node[name]
        return node

    return jax.tree_util.tree_map_with_path(leaf_at, like)


def _names(path) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in path]
