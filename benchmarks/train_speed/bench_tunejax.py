"""tunejax: its model, methods, chunked loss and training step, as `tunejax train` puts them together.

One JSON line (see common.py). The persistent compilation cache is off unless --cache names a folder.
"""

import common
import numpy as np


def main() -> None:
    """Measures what the flags name."""
    args = common.arguments(
        cache={"default": None, "help": "folder of a persistent compilation cache"},
        remat={"default": "projections", "help": "as model.remat in a config"},
        runs={"type": int, "help": "steps of the run that it is compiled for; by default those that are measured"},
    )
    name = "tunejax" if args.cache is None else "tunejax_cached"
    runs = args.runs or args.warmup + args.steps
    common.measure(name, args, lambda: setup(args.mode, args.model, args.remat, runs, args.cache))


def setup(mode: str, folder: str, remat: str, runs: int, cache: str | None = None) -> common.Setup:
    """A step of ``mode`` on the model in ``folder``, for a run of ``runs`` steps, and how many parameters it trains."""
    import jax

    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

    from tunejax.core.model import key_shape
    from tunejax.interop import hf
    from tunejax.methods import full, lora
    from tunejax.models import build
    from tunejax.objectives import causal_lm
    from tunejax.train import optimizer, sharding, state
    from tunejax.train import step as steps

    config = hf.read_config(folder)
    method = lora.lora(rank=common.RANK, alpha=common.ALPHA) if mode == "lora" else full.full()
    mesh = sharding.make_mesh()
    cuts, constrain = method.cuts(common.LAYERS), sharding.constrainer(mesh)
    model = build.build(config, head="lm", cuts=cuts, remat=remat, constrain=constrain)
    adamw = optimizer.make_optimizer("adamw", common.LEARNING_RATE, weight_decay=common.WEIGHT_DECAY)
    update = steps.make_step(model, method, causal_lm.make(), adamw, mesh=mesh, runs=runs)
    planned = state.plan(model, method, adamw, jax.eval_shape(model.init, key_shape()), mesh)
    like = batch(np.zeros((common.BATCH, common.LENGTH + 1), np.int32))
    update.prepare(*planned, {}, sharding.abstract_batch(like, mesh))
    params, _ = hf.load(folder, config, head="lm", cuts=cuts)
    held, base = state.start(model, method, adamw, params, jax.random.key(0), mesh)
    del params
    trained = state.count(held.train)

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
