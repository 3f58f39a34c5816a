import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tunejax.core import errors, paths
from tunejax.core import method as methods
from tunejax.core.method import Context
from tunejax.methods import full, lora

KEY = jax.random.key(0)


def begin(method, params):
    start = method.init(KEY, params)
    return methods.apply_edits(params, start.edits), start


def test_everything_moves_and_nothing_lies_twice():
    p = tiny.params()
    base, start = begin(full.full(), p)
    assert jax.tree.leaves(base) == []
    bound = full.full().bind(base, start.train, start.state, Context())
    assert all(a is b for a, b in zip(jax.tree.leaves(bound), jax.tree.leaves(p), strict=True))


def test_masters_are_float32_over_a_bfloat16_base():
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params())
    _, start = begin(full.full("attention/{q,v}/kernel"), p)
    assert {x.dtype for x in start.train.values()} == {jnp.dtype("float32")}
    assert list(start.train) == ["layers/0/attention/q/kernel", "layers/0/attention/v/kernel"]


def test_layers_cut_the_stack():
    method = full.full("mlp/**", layers="-2:")
    assert method.cuts(3) == (1,)
    _, start = begin(method, tiny.params(cuts=(1,)))
    assert {p.split("/")[1] for p in start.train} == {"1"}


def test_what_is_wrapped_is_refused_either_way():
    with pytest.raises(errors.TargetError, match="put full first"):
        methods.chain(lora.lora("attention/q/kernel"), full.full()).init(KEY, tiny.params())
    methods.chain(full.full("attention/q/kernel"), lora.lora("attention/q/kernel")).init(KEY, tiny.params())


def test_integers_cannot_train():
    with pytest.raises(errors.TargetError, match="int8"):
        full.full("a/**").init(KEY, {"a": {"w": jnp.ones((2, 2), jnp.int8)}})


@pytest.mark.parametrize(
    ("config", "head", "ends"),
    [
        (tiny.LLAMA, "lm", {"norm", "head"}),
        (tiny.LLAMA, "none", {"norm"}),
        (tiny.BERT, "classification", {"pooler", "classifier"}),
        (tiny.BERT, "mlm", {"mlm"}),
    ],
)
def test_last_k(config, head, ends):
    method = full.last_k(1)
    cuts = method.cuts(3)
    assert cuts == (2,)
    p = tiny.params(config, head, cuts)
    start = method.init(KEY, p)
    assert {k.split("/")[0] for k in start.train} == ends | {"layers"}
    inside = {k for k in start.train if k.startswith("layers/")}
    assert inside == {k for k, x in paths.flatten(p).items() if k.startswith("layers/1/") and x is not None}


def test_last_k_options_and_limits():
    p = tiny.params(cuts=(2,))
    assert not any(k.startswith(("norm", "head")) for k in full.last_k(1, norm=False, head=False).init(KEY, p).train)
    assert set(full.last_k(0).init(KEY, p).train) == {"norm/scale", "head/kernel"}
    assert full.last_k(3).cuts(3) == ()
    assert len(full.last_k(3).init(KEY, tiny.params()).train) == 11
    with pytest.raises(errors.ConfigError, match="3 layers"):
        full.last_k(4).cuts(3)
    with pytest.raises(errors.ConfigError, match="at least 0"):
        full.last_k(-1)
    with pytest.raises(errors.TargetError, match="trains nothing"):
        full.last_k(0, norm=False, head=False).init(KEY, p)


def test_the_backward_pass_visits_the_last_segment_only():
    method = full.last_k(1)
    m, p = tiny.model(cuts=(2,)), tiny.params(cuts=(2,))
    base, start = begin(method, p)

    def loss(train, base):
        p = method.bind(base, train, {}, Context())
        return jnp.sum(m.logits(m.head(p), m.hidden(p, tiny.batch())[0]) ** 2)

    program = jax.make_jaxpr(jax.grad(loss))(start.train, base)
    scans = [e for e in program.jaxpr.eqns if e.primitive.name == "scan"]
    assert [e.params["length"] for e in scans if not e.params["reverse"]] == [2, 1]
    assert sorted(e.params["length"] for e in scans if e.params["reverse"]) == [1]
    found = jax.jit(jax.grad(loss))(start.train, base)
    every = jax.jit(jax.grad(lambda p: jnp.sum(tiny.outputs(m, p) ** 2)))(p)
    for path, g in found.items():
        np.testing.assert_allclose(g, paths.get(every, path), rtol=1e-4, atol=1e-4)
