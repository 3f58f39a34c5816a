"""tunejax on stories260k, from the adapter that the torch side wrote, on the same rows."""

import common
import numpy as np


def main() -> None:
    """Trains and prints one JSON line with the loss of every step."""
    import jax
    import jax.numpy as jnp

    from tunejax.interop import hf
    from tunejax.methods import lora
    from tunejax.models import build
    from tunejax.objectives import causal_lm
    from tunejax.train import optimizer, sharding, state, step

    args = common.arguments()
    folder = args.assets / "models/stories260k"
    config, mesh = hf.read_config(folder), sharding.make_mesh()
    params, _ = hf.load(folder, config, head="lm")
    method = lora.lora(rank=common.RANK, alpha=common.ALPHA)
    model = build.build(config, head="lm")
    adamw = optimizer.make_optimizer("adamw", common.LEARNING_RATE)
    held, base = state.start(model, method, adamw, params, jax.random.key(0), mesh)
    with np.load(args.adapter) as found:
        for site, a in found.items():
            part = "mlp" if site in ("gate", "up", "down") else "attention"
            held.train[f"layers/0/{part}/{site}/kernel"]["a"] = jnp.asarray(a)
    run = step.make_step(model, method, causal_lm.make(), adamw, mesh=mesh)
    losses = []
    for rows in common.batches(hf.tokenizer(folder), args.assets, args.steps):
        held, metrics = run(held, base, {}, run.put(batch(rows)))
        losses.append(float(metrics["loss"]))
    common.report("tunejax", losses)


def batch(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows [batch, LENGTH + 1] of ids with -1 after the end, one story a row."""
    here, ahead = rows[:, :-1], rows[:, 1:]
    return {
        "tokens": np.maximum(here, 0),
        "targets": np.maximum(ahead, 0),
        "loss_weights": (ahead >= 0).astype(np.float32),
        "positions": np.tile(np.arange(here.shape[1], dtype=np.int32), (len(here), 1)),
        "segment_ids": (here >= 0).astype(np.int32),
    }


if __name__ == "__main__":
    main()
