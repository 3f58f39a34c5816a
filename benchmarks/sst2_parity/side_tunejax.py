"""tunejax on SST-2, from the start that the torch side wrote: the same head, adapter, rows and order."""

import dataclasses
from typing import Any

import common
import numpy as np


def main() -> None:
    """Trains what the flags name and prints one JSON line."""
    import jax
    import jax.numpy as jnp

    from tunejax.interop import hf
    from tunejax.models import build
    from tunejax.objectives import classification
    from tunejax.train import optimizer, schedule, sharding, state, step

    args = common.arguments()
    config = dataclasses.replace(hf.read_config(args.start), num_labels=2, dropout=0.0)
    params, _ = hf.load(args.start, config, head="classification")
    method, mesh = tuning(args.method), sharding.make_mesh()
    model = build.build(config, head="classification", cuts=method.cuts(config.num_layers))
    rate = schedule.make_schedule(
        "linear", common.LEARNING_RATE[args.method], total_steps=args.steps, warmup_ratio=common.WARMUP
    )
    adamw = optimizer.make_optimizer("adamw", rate)
    held, base = state.start(model, method, adamw, params, jax.random.key(args.seed), mesh)
    del params
    if args.method == "lora":
        with np.load(args.start / "adapter.npz") as found:
            for site, a in found.items():
                held.train["0:lora"][f"layers/0/attention/{site}/kernel"]["a"] = jnp.asarray(a)
    run = step.make_step(model, method, classification.make(), adamw, mesh=mesh, max_grad_norm=common.MAX_GRAD_NORM)
    tokenizer = hf.tokenizer(args.start)
    texts, labels = common.read(args.assets / "data/sst2/train.tsv")
    losses = []
    for rows in common.training_batches(common.encode(tokenizer, texts), labels, args.seed, args.steps):
        held, metrics = run(held, base, {}, run.put(batch(*rows)))
        losses.append(float(metrics["loss"]))
    texts, labels = common.read(args.assets / "data/sst2/dev.tsv")
    right = 0.0
    for rows in common.dev_batches(common.encode(tokenizer, texts), labels):
        right += float(run.evaluate(held, base, {}, run.put(batch(*rows)))["accuracy"][0])
    common.report("tunejax", args, right / len(labels), losses)


def tuning(name: str) -> Any:
    """The method: each trains the classifier, as the torch side does."""
    from tunejax.core.method import chain
    from tunejax.methods import bitfit, full, lora

    if name == "full":
        return full.full()
    if name == "lora":
        wrapped = lora.lora(targets="attention/{q,v}/kernel", rank=common.RANK, alpha=common.ALPHA)
        return chain(wrapped, full.full(targets="/classifier/*"))
    return chain(bitfit.bitfit(fill_empty=False), full.full(targets="/classifier/kernel"))


def batch(ids: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The label is the target of the first token, which alone is in the loss."""
    targets, weights = np.zeros_like(ids), np.zeros(ids.shape, np.float32)
    targets[:, 0], weights[:, 0] = labels, 1.0
    positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))
    return {"tokens": ids, "targets": targets, "loss_weights": weights, "positions": positions, "segment_ids": mask}


if __name__ == "__main__":
    main()
