import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Doubled, Squared

from tunejax.core import errors, operators, sites


def test_an_operator_is_a_pytree_whose_static_fields_are_structure():
    op = Doubled(jnp.ones((2, 3)))
    leaves, tree = jax.tree.flatten(op)
    assert len(leaves) == 1
    assert jax.tree.unflatten(tree, leaves).factor == 2.0
    assert tree != jax.tree.structure(Doubled(jnp.ones((2, 3)), 3.0))
    assert isinstance(op, operators.Operator)
    assert operators.is_operator(op)
    assert not operators.is_array(op)


def test_sites_apply_what_they_find():
    kernel, x, bias = jnp.arange(6.0).reshape(2, 3), jnp.array([[1.0, -1.0]]), jnp.ones(3)
    np.testing.assert_allclose(sites.linear(kernel, x, bias), x @ kernel + 1)
    np.testing.assert_allclose(sites.linear(Doubled(kernel), x, bias), 2 * (x @ kernel) + 1)
    nested = Doubled(Doubled(kernel))
    np.testing.assert_allclose(sites.linear(nested, x), x @ nested.dense())


def test_densify_names_every_path_that_cannot():
    k = jnp.ones((2, 2))
    assert operators.densify({"a": {"kernel": Doubled(k)}, "b": None})["a"]["kernel"].sum() == 8
    with pytest.raises(errors.NotLinear, match=r"(?s)a/kernel.*b/kernel"):
        operators.densify({"a": {"kernel": Squared(k)}, "b": {"kernel": Doubled(Squared(k))}, "c": {"kernel": k}})


def test_an_operator_scans():
    stack = Doubled(jnp.stack([jnp.eye(2), 3 * jnp.eye(2)]))
    out, _ = jax.lax.scan(lambda x, op: (sites.linear(op, x), None), jnp.ones((1, 2)), stack)
    np.testing.assert_allclose(out, 12 * np.ones((1, 2)))
