"""The step on the real models and methods: one device and eight agree, and so do remat and cuts."""

import jax
import numpy as np
import pytest
import toy

from tunejax.methods import registry
from tunejax.models import build
from tunejax.models import config as config_lib
from tunejax.objectives import causal_lm
from tunejax.train import optimizer, sharding, state, step

CONFIG = config_lib.ModelConfig(
    family="llama", vocab_size=toy.VOCAB, embed_dim=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4,
    mlp_dim=32, max_positions=32,
)  # fmt: skip
SPECS = {
    "full": [{"name": "full"}],
    "last_k": [{"name": "last_k", "k": 1}],
    "lora": [{"name": "lora", "rank": 2, "dropout": 0.1}],
    "bitfit": [{"name": "bitfit"}],
    "ia3": [{"name": "ia3"}],
    "houlsby": [{"name": "houlsby", "width": 4, "drop_random": 2}, {"name": "norm_tuning"}],
    "parallel_adapter": [{"name": "parallel_adapter", "width": 5}],
    "compacter": [{"name": "compacter", "width": 4, "phm_dim": 2}],
    "fish": [{"name": "fish", "mask_steps": 1, "density": 0.1}],
    "lt_sft": [{"name": "lt_sft", "mask_steps": 2, "density": 0.2, "l1": 0.1, "targets": "mlp/**"}],
    "diff_pruning": [{"name": "diff_pruning", "mask_steps": 2, "density": 0.2, "targets": "mlp/**"}],
}


def losses(spec, shape, steps=4, **kw):
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    method = registry.build(spec)
    model = build.build(
        CONFIG, head="lm", cuts=method.cuts(CONFIG.num_layers), constrain=sharding.constrainer(mesh), **kw
    )
    tuner = optimizer.make_optimizer("adamw", 1e-2)
    s, base = state.start(model, method, tuner, model.init(jax.random.key(1)), jax.random.key(0), mesh)
    one = step.make_step(model, method, causal_lm.make(), tuner, mesh=mesh, max_grad_norm=1.0)
    out = []
    for i in range(steps):
        s, metrics = one(s, base, {}, one.put(toy.batch(i % 2)))
        out.append(float(metrics["loss"]))
    return out


@pytest.mark.parametrize("name", sorted(SPECS))
def test_one_device_and_eight_agree(name):
    one = losses(SPECS[name], (1, 1, 1))
    np.testing.assert_allclose(losses(SPECS[name], (2, 2, 2), remat="full"), one, atol=1e-5)
    assert one[-1] < one[0]
