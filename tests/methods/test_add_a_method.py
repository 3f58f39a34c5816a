"""The code of docs/add_a_method.md, run as a user would."""

import re
from pathlib import Path

import jax
import numpy as np
import tiny
import yaml

from tunejax.core.method import Context
from tunejax.methods import lora, registry

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "add_a_method.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.S)


def test_the_document(tmp_path, monkeypatch):
    (code,), (config,) = blocks("python"), blocks("yaml")
    assert len([line for line in code.splitlines() if line.strip()]) <= 35
    (tmp_path / "my_method.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    method = registry.build(yaml.safe_load(config)["method"])

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
