import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from kd_jax.config.execution import Mesh
from kd_jax.trainer.mesh import make_mesh, shardings
from kd_jax.trainer.optimizer import make_optimizer
from kd_jax.trainer.state import (
    abstract_state,
    check_parts,
    from_plain,
    new_state,
    params_fingerprint,
    params_notes,
    state_shardings,
    to_plain,
)
from kd_jax.types import UserError
from tests.support.toy_training import ABSTRACT, AXES, create_state, init_params, toy_job


@pytest.fixture
def parts():
    optimizer = make_optimizer(toy_job())
    layout = state_shardings(ABSTRACT, optimizer, shardings(make_mesh(Mesh(2, 2, 2)), AXES, ABSTRACT))
    return optimizer, layout


def test_moments_lie_as_their_parameters_and_counters_are_whole(parts):
    _, layout = parts
    assert layout["step"].spec == PartitionSpec()
    for tree in (layout["params"], layout["opt_state"]["adam"].mu, layout["opt_state"]["adam"].nu):
        assert tree["layer"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
        assert tree["layer"]["bias"].spec == PartitionSpec("tensor")
    assert layout["opt_state"]["adam"].count.spec == PartitionSpec()


def test_a_state_is_made_as_its_abstract_says(parts):
    optimizer, layout = parts
    state, abstract = create_state(optimizer, layout), abstract_state(ABSTRACT, optimizer, layout)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract)):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    assert state["step"].dtype == jnp.int32
    # The same draw whatever the mesh.
    np.testing.assert_array_equal(np.asarray(state["params"]["layer"]["kernel"]), init_params()["layer"]["kernel"])


def test_loaded_parameters_are_copied_so_that_the_state_may_be_donated(parts):
    optimizer, layout = parts
    params = jax.device_put(init_params(), layout["params"])
    state = jax.jit(lambda values: new_state(values, optimizer), out_shardings=layout)(params)
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)(state))
    np.testing.assert_array_equal(np.asarray(params["layer"]["kernel"]), init_params()["layer"]["kernel"])


def test_the_plain_layout_has_string_keys_and_no_empty_nodes(parts):
    optimizer, layout = parts
    plain = to_plain(create_state(optimizer, layout))
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(plain)
    }
    assert names == {
        "step",
        "params/layer/kernel",
        "params/layer/bias",
        "opt_state/adam/count",
        "opt_state/adam/mu/layer/kernel",
        "opt_state/adam/mu/layer/bias",
        "opt_state/adam/nu/layer/kernel",
        "opt_state/adam/nu/layer/bias",
        "opt_state/learning_rate/count",
    }

    def only_dicts(node):
        return not isinstance(node, dict) or (
            type(node) is dict and len(node) > 0 and all(map(only_dicts, node.values()))
        )

    assert only_dicts(plain)


def test_plain_and_back_for_states_with_tuples_lists_and_masks():
    optimizer = optax.chain(optax.clip(1.0), optax.masked(optax.adam(1e-3), {"a": True, "b": False}), optax.trace(0.9))
    params = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}
    tree = {"opt_state": optimizer.init(params), "more": [jnp.int32(1), (jnp.int32(2), jnp.int32(3))]}
    back = from_plain(to_plain(tree), tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert all(one is other for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(tree)))


def test_a_missing_leaf_is_an_error():
    with pytest.raises(KeyError):
        from_plain({"a": 1}, {"a": 1, "b": 2})


def test_parameters_are_compared_with_what_a_run_recorded_part_by_part():
    params = {"encoder": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "head": {"bias": jnp.ones(3)}}
    notes = params_notes(params)
    assert notes["parameters_fingerprint"] == params_fingerprint(params)
    check_parts(params, notes["parts"], "run")
    check_parts({"encoder": params["encoder"]}, notes["parts"], "run")
    check_parts(params, {}, "run")  # an older run records none
    other = {**params, "head": {"bias": jnp.ones(3).at[1].set(1.0000001)}}
    check_parts({"encoder": other["encoder"]}, notes["parts"], "run")
    with pytest.raises(UserError, match=r"^run: its checkpoint was changed or damaged .*\(head has other values\)"):
        check_parts(other, notes["parts"], "run")
