"""tunejax: its model, methods, chunked loss and training step, as `tunejax train` puts them together.

One JSON line (see common.py). The persistent compilation cache is off unless --cache names a folder.
"""

import common
import numpy as np


def main() -> None:
    """Measures what the flags name."""
    args = common.arguments(cache={"default": None, "help": "folder of a persistent compilation cache"})
    common.measure("tunejax" if args.cache is None else "tunejax_cached", args, lambda mode: setup(mode, args.cache))


def setup(mode: str, cache: str | None = None) -> common.Setup:
    """The training step of ``mode`` on a fresh model, and how many parameters it trains."""
    import jax

    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

    from tunejax.methods import full, lora
    from tunejax.models import build
    from tunejax.models.config import ModelConfig
    from tunejax.objectives import causal_lm
    from tunejax.train import optimizer, sharding, state
    from tunejax.train import step as steps

    config = ModelConfig(
        family="llama",
        vocab_size=common.VOCAB,
        embed_dim=common.WIDTH,
        num_layers=common.LAYERS,
        num_heads=common.HEADS,
        num_kv_heads=common.HEADS,
        head_dim=common.WIDTH // common.HEADS,
        mlp_dim=common.MLP,
        max_positions=common.LENGTH,
        tie_embeddings=True,
    )
    method = lora.lora(rank=common.RANK, alpha=common.ALPHA) if mode == "lora" else full.full()
    mesh = sharding.make_mesh()
    model = build.build(config, head="lm", cuts=method.cuts(common.LAYERS), constrain=sharding.constrainer(mesh))
    adamw = optimizer.make_optimizer("adamw", common.LEARNING_RATE, weight_decay=common.WEIGHT_DECAY)
    params = jax.jit(model.init)(jax.random.key(0))
    held, base = state.start(model, method, adamw, params, jax.random.key(0), mesh)
    del params
    trained = state.count(held.train)
    update = steps.make_step(model, method, causal_lm.make(), adamw, mesh=mesh)

    def step(rows: np.ndarray) -> float:
        nonlocal held
        held, metrics = update(held, base, {}, update.put(batch(rows)))
        return float(metrics["loss"])

    return step, trained


def batch(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows [BATCH, LENGTH + 1] as the data pipeline hands them up: one example a row, nothing padded."""
    tokens, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_weights": np.ones(tokens.shape, np.float32),
        "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape).copy(),
        "segment_ids": np.ones(tokens.shape, np.int32),
    }


if __name__ == "__main__":
    main()
