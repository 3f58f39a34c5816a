"""The code of docs/add_a_method.md, run as a user would."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import tiny
import trains
import yaml

from tunejax.core import paths
from tunejax.core.method import Context, chain
from tunejax.interop import peft
from tunejax.methods import lora, registry

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "add_a_method.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.S)


def built(i, name, folder, monkeypatch):
    """The method of the document's example number ``i``."""
    code, config = blocks("python")[i], blocks("yaml")[i]
    assert len([line for line in code.splitlines() if line.strip()]) <= 35
    (folder / name).write_text(code, encoding="utf-8")
    monkeypatch.chdir(folder)
    return registry.build(yaml.safe_load(config)["method"])


def test_every_example_is_run():
    assert len(blocks("python")) == len(blocks("yaml")) == 2


def test_the_document(tmp_path, monkeypatch):
    method = built(0, "my_method.py", tmp_path, monkeypatch)

    m, p = tiny.model(), tiny.params()
    start = method.init(jax.random.key(0), p)
    before = tiny.outputs(m, p)
    np.testing.assert_array_equal(before, tiny.outputs(m, method.bind(p, start.train, {}, Context())))
    train = jax.tree.map(lambda x: x + 0.1, start.train)
    bound = tiny.outputs(m, method.bind(p, train, {}, Context()))
    ours = lora.lora("attention/{q,v}/kernel", rank=4, alpha=16.0)
    np.testing.assert_allclose(bound, tiny.outputs(m, ours.bind(p, train, {}, Context())), atol=1e-5)
    np.testing.assert_allclose(bound, tiny.outputs(m, method.merge(p, train, {})), atol=1e-5)
    assert method.axes(m.axes, train) == ours.axes(m.axes, train)


def test_the_example_with_state(tmp_path, monkeypatch):
    method = built(1, "my_sparse.py", tmp_path, monkeypatch)
    m, p, (q, v) = tiny.model(), tiny.params(), [f"layers/0/attention/{x}/kernel" for x in "qv"]
    start = method.init(jax.random.key(0), p)
    before = tiny.outputs(m, p)
    np.testing.assert_array_equal(before, tiny.outputs(m, method.bind(p, start.train, start.state, Context())))

    train = {path: jax.random.normal(jax.random.key(i), x.shape) for i, (path, x) in enumerate(start.train.items())}
    kept = method.update(train, start.state, train, Context(step=3))
    jax.tree.map(np.testing.assert_array_equal, kept, start.state)
    state = method.update(train, start.state, train, Context(step=4))
    for path, x in train.items():
        mask, size = np.asarray(state["mask"][path]), np.abs(np.asarray(x))
        assert mask.sum() == round(0.1 * size.size + 0.4)
        assert size[mask].min() > size[~mask].max()

    counted = {path: p["layers"]["0"]["attention"][path.split("/")[3]]["kernel"] + x * state["mask"][path]
               for path, x in train.items()}  # fmt: skip
    merged = method.merge(p, train, state)
    np.testing.assert_allclose(paths.get(merged, q), counted[q], atol=1e-6)
    np.testing.assert_allclose(paths.get(merged, v), counted[v], atol=1e-6)
    total = jax.grad(lambda t: sum(x.sum() for x in jax.tree.leaves(method.bind(p, t, state, Context()))))(train)
    assert all((x == 1).all() for x in total.values())
    assert method.axes(m.axes, train)[q] == m.axes[q]
    _, end = trains.run(method, steps=5, remat="none")
    assert 0 < sum(int(x.sum()) for x in end.state["mask"].values()) < 0.12 * sum(x.size for x in train.values())


def test_the_examples_chain(tmp_path, monkeypatch):
    low_rank, sparse = built(0, "my_method.py", tmp_path, monkeypatch), built(1, "my_sparse.py", tmp_path, monkeypatch)
    m, p = tiny.model(), tiny.params()
    for both in (chain(low_rank, sparse), chain(sparse, low_rank)):
        start = both.init(jax.random.key(0), p)
        bound = tiny.outputs(m, both.bind(p, start.train, start.state, Context()))
        np.testing.assert_allclose(bound, tiny.outputs(m, p), atol=1e-6)


def test_a_form_that_is_reused_needs_no_argument_of_its_first_owner(tmp_path, monkeypatch):
    """The document's LoRA has no dropout and no other scale; PEFT's defaults say the same."""
    built(0, "my_method.py", tmp_path, monkeypatch)
    with (tmp_path / "my_method.py").open("a") as file:
        file.write("\nfrom tunejax.core import low_rank\nPEFT, PRODUCT = low_rank.PEFT, low_rank.PRODUCT\n")
    spec = {"name": "my_method.py:my_lora", "rank": 4}
    method, p = registry.build(spec), tiny.params()
    start = method.init(jax.random.key(0), p)
    tuned = peft.Tuned([spec], method, p, start.train, start.state)
    peft.write(tmp_path / "out", tuned, tiny.LLAMA, head="lm", base_name="x")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings.get("lora_dropout", 0.0)) == (4, 16.0, 0.0)
    _, arguments, module = registry.resolved(spec)
    assert module.PRODUCT.scale(arguments) == 4.0
