"""Every method on every family: five steps with falling loss, the same on one device and, with remat, on eight."""

import dataclasses
import itertools

import branches
import jax
import numpy as np
import pytest
import tiny
import trains

from tunejax.core import gradual
from tunejax.methods import registry

FAMILIES = {"llama": tiny.LLAMA, "qwen3": tiny.QWEN3, "gpt2": tiny.GPT2, "bert": tiny.BERT}
SPECS = {name: {"name": name} for name in registry.NAMES} | {
    "last_k": {"name": "last_k", "k": 1},
    "lora": {"name": "lora", "rank": 2, "dropout": 0.1},
    "lora_plus": {"name": "lora_plus", "rank": 2, "ratio": 2.0},
    "quantize": [{"name": "quantize", "kind": "int8"}, {"name": "lora", "rank": 2, "targets": "mlp/down/kernel"}],
    "fish": {"name": "fish", "mask_steps": 1, "density": 0.1},
    "lt_sft": {"name": "lt_sft", "mask_steps": 2, "density": 0.2, "l1": 0.1, "targets": "mlp/**"},
    "diff_pruning": {"name": "diff_pruning", "mask_steps": 2, "density": 0.2, "targets": "mlp/**"},
    "adalora": {"name": "adalora", "rank": 4, "target_rank": 2, "total_steps": 5},
    "oft": {"name": "oft", "block_size": 8},
    "boft": {"name": "boft", "block_size": 4, "factors": 2},
    "hra": {"name": "hra", "rank": 2},
    "fourierft": {"name": "fourierft", "n_frequency": 30},
    "miss": {"name": "miss", "rank": 5},
    "said": {"name": "said", "dim": 50, "targets": "attention/v/kernel"},
    "compacter": {"name": "compacter", "targets": "mlp/down/kernel"},
    "mam": {"name": "mam", "length": 3, "hidden": 5, "width": 4},
    "gated": {"name": "gated", "method": {"name": "lora", "rank": 2, "targets": "attention/q/kernel"}},
    "unipelt": {"name": "unipelt", "length": 3, "rank": 2, "width": 4},
    "s4": {"name": "s4", "budget": 4},
    "loftq": {"name": "loftq", "rank": 2},
    "lst": {"name": "lst", "reduction_factor": 2},
    "prune": [{"name": "full"}, {"name": "prune", "density": 0.9, "steps": 4, "every": 1}],
    "supernet": [{"name": "full"}, {"name": "supernet", "keep": {"heads": 1.0, "mlp": 0.9}, "sizes": 3}],
    "shrink": [{"name": "full"}, {"name": "shrink", "keep": {"heads": 1.0, "mlp": 0.8}, "steps": 4, "every": 1}],
}
TWO = "{attention/q,mlp/down}/kernel"
for _name in (
    "lora", "lora_fa", "lora_plus", "dora", "pissa", "olora", "vera", "adalora", "loha", "lokr", "krona",
    "oft", "boft", "loftq", "hra", "fourierft", "miss",
):  # fmt: skip
    SPECS[_name] |= {"targets": TWO}  # one kernel of either part of a block; the methods' own tests have the rest
DEPTH = {"s4": 4}
"""Layers that a method needs."""
MASKS = {"shrink", "shrunk", "prune", "supernet"}
"""Whose masks are the same on any mesh."""
SEARCH = {"fish": 1, "lt_sft": 2, "diff_pruning": 2}
"""Steps in which a method looks for its mask, and after which it begins again from the base."""


VARIANTS = {
    "random_skips": [{"name": "houlsby", "width": 4, "drop_random": 2}, {"name": "norm_tuning"}],
    "first_skipped": {"name": "pfeiffer", "width": 8, "drop_first": 1, "reads": "sum"},
    "lstm": {"name": "p_tuning", "length": 4, "encoder": "lstm", "hidden": 8},
    "projected": {"name": "prefix_tuning", "length": 4, "project": True},
    "gates_of_rows": {
        "name": "unipelt",
        "length": 3,
        "rank": 2,
        "width": 4,
        "positions": False,
        "per": "row",
        "adapter_reads": "sum",
    },
    "nf4": [{"name": "quantize", "kind": "nf4"}, {"name": "dora", "rank": 2, "targets": "mlp/down/kernel"}],
    "shrunk": [
        {"name": "lora", "rank": 2, "targets": "**/layers/**/kernel"},
        {"name": "shrink", "keep": {"hidden": 0.9, "depth": 1.0}, "steps": 4, "every": 1, "importance": "movement"},
    ],
    "many": [{"name": "lora", "rank": 2}, {"name": "ia3"}, {"name": "bitfit"}, {"name": "prompt_tuning", "length": 2}],
}
"""Options that change what is compiled, and chains: on one family."""
CASES = [(name, family) for name in SPECS for family in FAMILIES] + [(name, "llama") for name in VARIANTS]


def trained(config):
    """Two adapters of different widths, moved off their start."""
    p = tiny.params(config, "mlm" if config.kind == "encoder" else "lm")
    parts = [registry.build({"name": "pfeiffer", "width": w}).init(jax.random.key(w), p).train for w in (2, 4)]
    return [branches.noisy(x, 0.1) for x in parts]


def fused(config):
    """AdapterFusion of `trained` ones."""
    return {"name": "adapter_fusion", "adapters": trained(config)}


def stacked(config):
    """A new adapter above `trained` ones."""
    return [{"name": "adapter_stack", "adapters": trained(config)}, {"name": "pfeiffer", "width": 4}]


OF_TRAINED = {"adapter_fusion": fused, "adapter_stack": stacked}


@pytest.mark.parametrize(("name", "family"), CASES)
def test_trains(name, family):
    spec, search, config = {**SPECS, **VARIANTS}[name], SEARCH.get(name, 0), FAMILIES[family]
    spec = OF_TRAINED[name](config) if name in OF_TRAINED else spec
    config = dataclasses.replace(config, num_layers=DEPTH.get(name, config.num_layers))
    options = {"steps": search + 5, "learning_rate": 1e-2, "config": config}
    one, own = trains.run(spec, remat="none", **options)
    eight, theirs = trains.run(spec, remat="full", shape=(2, 2, 2), **options)
    assert all(b < a for a, b in itertools.pairwise(one[search:])), one
    np.testing.assert_allclose(eight, one, atol=1e-5)
    if name in MASKS:
        alone, spread = units_of(own.state), units_of(theirs.state)
        assert any(not np.all(x) for x in jax.tree.leaves(alone))
        jax.tree.map(np.testing.assert_array_equal, spread, alone)


def units_of(state):
    """The masks that a chain's state holds, or, of a supernet, those of its smallest size."""
    last = state[max(state)]
    if "kept" in last:
        return last["kept"]
    return {name: gradual.greatest(x, last["counts"][name][-1]) for name, x in last["importance"].items()}
