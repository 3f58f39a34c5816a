"""A small run in a process of its own: ``python worker.py FOLDER --steps 40 ...``. Prints one JSON line at the end."""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--mesh", default="-1,1,1")
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--process", default="0/1")
parser.add_argument("--port", default="")
parser.add_argument("--method", default="full")
parser.add_argument("--xla", default="", help="further flags of XLA")
args = parser.parse_args()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices} {args.xla}"
sys.path[:0] = [str(Path(__file__).parents[i]) for i in range(3)]

import jax  # noqa: E402
import numpy as np  # noqa: E402

index, count = (int(x) for x in args.process.split("/"))
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{args.port}", count, index)

import toy  # noqa: E402

from tunejax.objectives import causal_lm  # noqa: E402
from tunejax.train import checkpoint, loop, metrics, optimizer, schedule, sharding, state, step  # noqa: E402


class Slow(toy.Loader):
    """Gives a kill something to interrupt."""

    def __next__(self):
        time.sleep(args.pause)
        return super().__next__()


def shrinking():
    """(model, method, parameters): a Llama that loses some of every dimension in stages, until 4 steps are left."""
    import tiny

    from tunejax.methods import registry
    from tunejax.models import build

    config = dataclasses.replace(tiny.LLAMA, vocab_size=toy.VOCAB)
    keep = {"heads": 0.5, "mlp": 0.5, "depth": 0.67, "hidden": 0.75}
    shrink = {"name": "shrink", "keep": keep, "schedule": "stages", "begin": 2, "steps": args.steps - 6, "every": 2}
    method = registry.build([{"name": "full"}, shrink], facts={"num_kv_heads": config.num_kv_heads})
    params = jax.tree.map(lambda x: x.copy(), tiny.params(config))
    return build.build(config, head="lm", constrain=sharding.constrainer(mesh)), method, params


def toys():
    """The same of the toy model."""
    model = toy.model(constrain=sharding.constrainer(mesh))
    return model, toy.full() if args.method == "full" else toy.low_rank(), model.init(jax.random.key(0))


mesh = sharding.make_mesh(*(int(n) for n in args.mesh.split(",")))
model, method, params = shrinking() if args.method == "shrink" else toys()
rate = schedule.make_schedule("cosine", 1e-2, total_steps=100, warmup_steps=4)
tuner = optimizer.make_optimizer("adamw", rate, weight_decay=0.01)
begun, base = state.start(model, method, tuner, params, jax.random.key(1), mesh)
one = step.make_step(model, method, causal_lm.make(chunk_size=5), tuner, mesh=mesh, max_grad_norm=1.0)
folder = Path(args.folder)
result = loop.fit(
    one, begun, base, Slow(8, shard=(index, count)),
    loop.Options(max_steps=args.steps, logging_steps=1, save_steps=3, eval_steps=10, progress=False),
    eval_loader=lambda: toy.Loader(4, total=2, shard=(index, count)),
    checkpointer=checkpoint.Checkpointer(folder / "checkpoints"),
    writers=lambda n: metrics.make_writers(folder, (), n),
    learning_rate=rate,
)  # fmt: skip
kept = {"train": result.state.train, "state": result.state.state}
kept = jax.tree.map(lambda x: jax.device_get(jax.device_put(x, sharding.replicated(mesh))), kept)
if index == 0:
    np.savez(folder / "arrays.npz", **{jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(kept)})
    losses = [h["loss"] for h in result.history if "loss" in h]
    print(json.dumps({"stopped": result.stopped, "step": result.step, "losses": losses,
                      "resumed_from": result.resumed_from}))  # fmt: skip
