import jax
import tiny

from tunejax.core import method as methods
from tunejax.methods import bitfit, full, lora, report

KEY = jax.random.key(0)


def describe(method, params):
    return report.describe(method, params, jax.eval_shape(method.init, KEY, params))


def test_each_pattern_of_each_method():
    method = methods.chain(lora.lora(["attention/{q,v}/kernel", "mlp/up/kernel"], rank=2), full.full("/norm/scale"))
    found = describe(method, tiny.params())
    assert [(e.method, e.pattern, e.leaves) for e in found.entries] == [
        ("lora", "attention/{q,v}/kernel", 2),
        ("lora", "mlp/up/kernel", 1),
        ("full", "/norm/scale", 1),
    ]
    assert found.entries[0].parameters == 3 * 2 * (16 + 16 + 16 + 8)
    assert found.entries[0].matched["layers/*/attention/q/kernel"] == [0, 1, 2]
    assert found.trained == sum(e.parameters for e in found.entries)
    assert found.warnings == []
    assert "lora mlp/up/kernel: 1 leaves, 240 trained parameters\n  layers/*/mlp/up/kernel (layers 0-2)" in found.text()


def test_part_of_a_named_set_is_a_warning():
    found = describe(lora.lora("attention/{q,vv}/kernel"), tiny.params())
    assert found.warnings == ["lora: of 'attention/{q,vv}/kernel', 'attention/vv/kernel' matches nothing in this model"]


def test_some_layers_only_is_a_warning_unless_asked_for():
    cut = tiny.params(cuts=(2,))
    found = describe(lora.lora("layers/0/attention/q/kernel"), cut)
    assert found.entries[0].left_out == {"layers/*/attention/q/kernel": [2]}
    assert "leaves out layers/*/attention/q/kernel (layers 2)" in found.warnings[0]
    asked = describe(lora.lora("attention/q/kernel", layers="2:"), cut)
    assert asked.entries[0].left_out == {"layers/*/attention/q/kernel": [0, 1]}
    assert asked.warnings == []
    assert "left out: layers/*/attention/q/kernel (layers 0-1)" in asked.text()


def test_methods_without_patterns_and_filled_slots():
    found = describe(full.last_k(1), tiny.params(cuts=(2,)))
    assert found.entries[0].pattern == "(by itself)"
    assert found.warnings == []
    assert describe(bitfit.bitfit(), tiny.params()).entries[0].leaves == 7


def test_braces():
    assert report.expand("a/{b,{c,d}}/{e,f}") == ["a/b/e", "a/b/f", "a/c/e", "a/c/f", "a/d/e", "a/d/f"]
