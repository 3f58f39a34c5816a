"""The time of a step of several LoRAs in one program over that of one: `python benchmarks/many.py`.

The embedded model (1M parameters, 6 layers of width 128), AdamW, at several sizes of a member's batch. All programs run
in one process, their steps in turn; the median of each; every step waits for its loss. Members have a seed and a
learning rate of their own. Exit code 1 where a setting's checked size is not below --limit.
"""

import argparse
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from tunejax import assets
from tunejax.interop import hf
from tunejax.methods import registry
from tunejax.models import build
from tunejax.objectives import causal_lm
from tunejax.train import many, optimizer, sharding, state, step

SIZES = ("1x8", "1x32", "4x32", "8x128")
WARM_UP = 3


class Case(NamedTuple):
    """What trains; whether all members see the same rows; the size that must be below the limit."""

    method: dict[str, Any]
    shared: bool
    checked: str | None


SETTINGS = {
    "all kernels": Case({"name": "lora", "rank": 8}, False, None),
    "q and v": Case({"name": "lora", "rank": 4, "targets": "attention/{q,v}/kernel"}, False, "1x8"),
    "upper third": Case({"name": "lora", "rank": 8, "layers": "-2:"}, True, "1x32"),
}


def rows_of(size, vocab, seed=0):
    """Full rows of random tokens of "rows x length"."""
    rows, length = map(int, size.split("x"))
    tokens = np.random.default_rng(seed).integers(4, vocab, (rows, length + 1)).astype(np.int32)
    ones = np.ones((rows, length), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": ones.astype(np.float32),
        "segment_ids": ones,
        "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
    }


class Setting:
    """The model, LoRA on it, and both programs."""

    def __init__(self, members, method):
        folder = assets.path("tiny")
        config = hf.read_config(folder)
        self.mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        self.method = registry.build(method)
        self.cuts = self.method.cuts(config.num_layers)
        self.model = build.build(config, head="lm", cuts=self.cuts)
        self.params, _ = hf.load(folder, config, head="lm", cuts=self.cuts)
        self.objective, self.members, self.vocab = causal_lm.make(), members, config.vocab_size

    def one(self):
        """(step, state, base) of one member."""
        tuner = optimizer.make_optimizer("adamw", 1e-3)
        s, base = state.start(self.model, self.method, tuner, self.params, jax.random.key(0), self.mesh)
        made = step.make_step(self.model, self.method, self.objective, tuner, mesh=self.mesh, max_grad_norm=1.0)
        return made, s, base

    def all(self):
        """(step, state, base) of all members, which have a seed and a learning rate of their own."""
        shapes = jax.eval_shape(self.method.init, jax.random.key(0), self.params)
        factors = [many.factors_of(shapes, {})] * self.members
        keys = [jax.random.key(i) for i in range(self.members)]
        rates = [1e-3 * (i + 1) for i in range(self.members)]
        tuner = lambda rate: optimizer.make_optimizer("adamw", lambda update: rate)  # noqa: E731
        same = [self.method] * self.members
        s, base = many.start(self.model, self.method, same, factors, tuner(1.0), self.params, keys, self.mesh)
        made = many.make_step(self.model, self.method, self.objective, tuner, rates, mesh=self.mesh, max_grad_norm=1.0)
        return made, s, base


def median(made, s, base, batches, steps):
    """A generator of nothing that runs a step a turn; its last value is the median of the timed ones, in seconds."""
    found = []
    for i in range(WARM_UP + steps):
        rows = made.put(batches)
        begun = time.perf_counter()
        s, metrics = made(s, base, {}, rows)
        float(metrics["loss"])
        if i >= WARM_UP:
            found.append(time.perf_counter() - begun)
        yield
    return statistics.median(found)


def in_turn(runs):
    """What each generator returns, all of them advanced one step at a time."""
    out = [None] * len(runs)
    while None in out:
        for i, run in enumerate(runs):
            try:
                next(run)
            except StopIteration as e:
                out[i] = e.value
    return out


def measure(setting, size, steps, shared):
    """Seconds of a step: of one member, of all, and of one member whose batch has as many rows as all together."""
    batch = rows_of(size, setting.vocab)
    each = {k: np.stack([x] * setting.members) for k, x in batch.items()}
    rows, length = map(int, size.split("x"))
    wide = rows_of(f"{rows * setting.members}x{length}", setting.vocab)
    batches = [(setting.one(), batch), (setting.all(), batch if shared else each), (setting.one(), wide)]
    return in_turn([median(*built, b, steps) for built, b in batches])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--limit", type=float, default=4.0, help="of all / one, where CHECKED says")
    parser.add_argument("--only", choices=SETTINGS, help="one of the settings")
    args = parser.parse_args()
    failed = []
    for name, case in SETTINGS.items():
        if args.only not in (None, name):
            continue
        setting = Setting(args.members, case.method)
        print(f"\n{name}: {args.members} members, {case.method}, {'the same' if case.shared else 'own'} rows\n")
        print("| rows x length of a member | one (ms) | all (ms) | all / one | all / one with all rows |")
        print("|---|---|---|---|---|")
        for size in SIZES:
            one, every, wide = measure(setting, size, args.steps, case.shared)
            cells = f"{1e3 * one:.1f} | {1e3 * every:.1f} | {every / one:.2f} | {every / wide:.2f}"
            print(f"| {size} | {cells} |", flush=True)
            if size == case.checked and every / one >= args.limit:
                failed.append(f"{name} at {size}: {every / one:.2f}, not below {args.limit:g}")
    print("\n".join(failed))
    sys.exit(int(bool(failed)))


if __name__ == "__main__":
    main()
