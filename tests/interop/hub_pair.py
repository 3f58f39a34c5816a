"""A model here and in AdapterHub's library `adapters`: what the tests of its folders share.

TUNEJAX_HUB_PYTHON names an interpreter that has `adapters` 1.3.0, which wants an older transformers than the tests do.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors import numpy as safetensors

from tunejax.core import errors
from tunejax.core.method import Context
from tunejax.core.model import full_batch
from tunejax.interop import adapter_folders, adapterhub, hf
from tunejax.interop import found as found_lib
from tunejax.interop.peft import Tuned
from tunejax.methods import registry
from tunejax.models import build

HERE = Path(__file__).parent
LISTING = json.loads((HERE / "adapterhub_listing.json").read_text(encoding="utf-8"))
TOKENS = jnp.asarray([[3, 14, 15, 9, 26, 5, 8], [2, 7, 18, 28, 1, 8, 2]])
KEY = jax.random.key(0)
HEADS = {"bert": "classification", "mlm": "mlm", "llama": "lm", "mistral": "lm", "gpt2": "lm"}
CONFIGS = {"bert": tiny.BERT, "llama": tiny.LLAMA, "gpt2": tiny.GPT2, "qwen3": tiny.QWEN3}


@functools.cache
def loaded(folder, head, cuts=()):
    return hf.load(folder, hf.read_config(folder), head=head, cuts=cuts)[0]


@functools.cache
def forward(config, head, cuts):
    model = build.build(config, head=head, cuts=cuts)
    return jax.jit(lambda p: model.logits(model.head(p), model.hidden(p, full_batch(TOKENS))[0]))


def our_logits(config, head, cuts, params):
    logits = np.asarray(forward(config, head, cuts)(params))
    return logits[:, 0] if head == "classification" else logits


def read(folder, config, head, load):
    """(what was found, the method, params, what trains) of an adapter folder. load: (cuts) -> params."""
    found = adapter_folders.read(folder, config, head=head)
    method = registry.build(found.specs)
    cuts = method.cuts(config.num_layers)
    params = load(cuts)
    train = found_lib.trained(found, method, jax.eval_shape(method.init, KEY, params).train, cuts)
    return found, method, params, train


def bound(method, params, train):
    """With the holes of what trains whole filled."""
    return method.bind(params, train, method.init(KEY, params).state, Context())


def noise(shapes):
    """Random arrays of these shapes; nothing is compiled."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes)


def written(specs, config, head, load, out):
    """(method, params, what trains, random) of a folder that was written here."""
    method = registry.build(specs)
    params = load(method.cuts(config.num_layers))
    start = jax.eval_shape(method.init, KEY, params)
    train = noise(start.train)
    adapterhub.write(out, Tuned(specs, method, params, train, start.state), config, head=head, base_name="base")
    return method, params, train


def tiny_of(kind):
    """(config, head, load) of a tiny model."""
    config, head = CONFIGS[kind], "classification" if kind == "bert" else "lm"
    return config, head, lambda cuts: tiny.params(config, head, cuts)


def changed(folder, entries, **outer):
    file = folder / found_lib.CONFIG
    contents = json.loads(file.read_text()) | outer
    contents["config"] |= entries
    file.write_text(json.dumps(contents))


def check_listing(case, specs, out):
    """Writes random arrays of that method, and compares the folder with what the library writes."""
    config, head, load = tiny_of(case.split()[0])
    written(specs, config, head, load, out)
    expected = LISTING[case]
    assert {p.name for p in out.iterdir()} == {*expected["configs"], *expected["tensors"]}
    for file, tensors in expected["tensors"].items():
        found = safetensors.load_file(out / file)
        renamed = {k.replace(".tunejax.", ".there."): list(x.shape) for k, x in found.items()}
        assert renamed == tensors
    for file, contents in expected["configs"].items():
        found = json.loads((out / file).read_text())
        same = found | ({"name": "there"} if found["name"] else {})
        assert same == contents


def check_refused(specs, said, folder):
    """A description or several that cannot be written leave nothing behind."""
    config, head, load = tiny_of("llama")
    with pytest.raises(errors.ConfigError, match=said):
        written(specs if isinstance(specs, list) else [specs], config, head, load, folder / "out")
    assert not list(folder.iterdir())
