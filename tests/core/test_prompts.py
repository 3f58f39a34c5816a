"""Extended tables and prefixes: what is looked up, what is answered, what has gradients, and what cannot be merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunejax.core import errors, operators, prompts, sites

TABLE = jnp.arange(12.0).reshape(4, 3)
ROWS = -jnp.ones((2, 3)) * jnp.array([[1.0], [2.0]])


def test_lookup_and_attend():
    op = prompts.Extended(TABLE, ROWS)
    ids = jnp.array([[0, 4], [5, 3], [6, 9]])
    found = sites.lookup(op, ids)
    expected = np.concatenate([TABLE, ROWS, np.zeros((4, 3))])[np.asarray(ids)]
    np.testing.assert_array_equal(found, expected)
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(sites.attend(op, x), sites.attend(TABLE, x))
    assert op.shape == (6, 3)
    assert sites.lookup(op, ids, jnp.bfloat16).dtype == jnp.bfloat16


def test_nested_the_outer_rows_come_last():
    op = prompts.Extended(prompts.Extended(TABLE, ROWS), 10 * ROWS)
    np.testing.assert_array_equal(op.lookup(jnp.arange(8)), np.concatenate([TABLE, ROWS, 10 * ROWS]))
    assert sites.attend(op, jnp.ones((1, 3))).shape == (1, 4)


def test_gradients_come_from_virtual_tokens_alone():
    ids, slope = jnp.array([0, 4, 4, 2]), jnp.arange(4.0)[:, None] * jnp.ones(3)
    grads = jax.grad(lambda op: jnp.sum(sites.lookup(op, ids) * slope))(prompts.Extended(TABLE, ROWS))
    np.testing.assert_array_equal(grads.rows, [[3, 3, 3], [0, 0, 0]])
    np.testing.assert_array_equal(grads.table[:, 0], [0, 0, 3, 0])


def test_a_bfloat16_table_does_not_round_the_rows():
    op = prompts.Extended(TABLE.astype(jnp.bfloat16), ROWS + 1e-3)
    np.testing.assert_array_equal(sites.lookup(op, jnp.array([4]), jnp.float32), (ROWS + 1e-3)[:1])


def test_neither_has_a_kernel():
    params = {
        "embed": {"table": prompts.Extended(TABLE, ROWS)},
        "layers": {"0": {"attention": {"prefix": prompts.Prefix(jnp.ones((2, 5, 8)), jnp.ones((2, 5, 8)))}}},
    }
    with pytest.raises(errors.NotLinear, match=r"embed/table: 2 virtual.*\n.*attention/prefix: 5 trained keys"):
        operators.densify(params)
    with pytest.raises(errors.NotLinear, match="looked up"):
        sites.linear(params["embed"]["table"], jnp.ones((1, 6)))
