"""Pretrain the embedded model from nothing on the generated text, and write what the package ships.

    python experiments/embedded_model/pretrain.py                     # about 25 minutes on two cores
    python experiments/embedded_model/pretrain.py --resume            # go on after it was stopped

The same seed and machine give the same model; another machine's rounding gives one that is as good.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corpus
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizer

from tunejax.core.method import Context
from tunejax.core.paths import Params
from tunejax.models import build
from tunejax.models.config import ModelConfig
from tunejax.objectives import causal_lm

CONFIG = ModelConfig(
    family="llama",
    vocab_size=tokenizer.VOCAB_SIZE,
    embed_dim=128,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=256,
    max_positions=512,
    norm_eps=1e-5,
    tie_embeddings=True,
    extra=(
        ("bos_token_id", tokenizer.BOS),
        ("eos_token_id", tokenizer.EOS),
        ("initializer_range", 0.02),
        ("pad_token_id", tokenizer.PAD),
    ),
)
LENGTH, ROWS, STEPS, LEARNING_RATE, SEED = 128, 16, 3700, 3e-3, 0
PROMPT_WEIGHT = 0.2
"""Prompts are mostly random words: most of the loss should be on what follows from them."""


def examples(seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless (ids, weight of predicting each id) of whole rows, with <s> and </s>."""
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(str(tokenizer.ASSETS / "tokenizer.json"))
    for _, row in corpus.rows(seed):
        ids = np.array([*bpe.encode(tokenizer.text(row)).ids, tokenizer.EOS], np.int32)
        starts = np.flatnonzero(ids == tokenizer.ASSISTANT)
        answer = np.arange(len(ids)) > (starts[0] if len(starts) else 0)
        yield ids, np.where(answer, 1.0, PROMPT_WEIGHT).astype(np.float32)


def batches(seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches [ROWS, LENGTH] of packed examples, none cut."""
    source = examples(seed)
    ids, weights = next(source)
    while True:
        batch = {k: np.zeros((ROWS, LENGTH), np.int32) for k in ("tokens", "targets", "positions", "segment_ids")}
        batch["loss_weights"] = np.zeros((ROWS, LENGTH), np.float32)
        for row in range(ROWS):
            at, segment = 0, 1
            while at + len(ids) - 1 <= LENGTH:
                here = slice(at, at + len(ids) - 1)
                batch["tokens"][row, here], batch["targets"][row, here] = ids[:-1], ids[1:]
                batch["loss_weights"][row, here] = weights[1:]
                batch["positions"][row, here] = np.arange(len(ids) - 1)
                batch["segment_ids"][row, here] = segment
                at, segment = here.stop, segment + 1
                ids, weights = next(source)
        yield batch


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW; the rate warms up for 100 steps, stays, and falls to a hundredth over the last 30% of ``steps``."""
    fall = int(0.3 * steps)
    rate = optax.schedules.join_schedules(
        (
            optax.schedules.linear_schedule(0.0, LEARNING_RATE, 100),
            optax.schedules.linear_schedule(LEARNING_RATE, 1e-2 * LEARNING_RATE, fall),
        ),
        (steps - fall,),
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=0.05, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    )


def train(steps: int, out: Path, resume: bool = False) -> Params:
    """Train, write parameters and optimiser state to ``out`` every 25 steps, and return the parameters.

    Since the rate is constant before it falls, a run cut short can be resumed with fewer steps and equals a run of
    that many.
    """
    model, objective, optimizer = build.build(CONFIG, head="lm"), causal_lm.make(), make_optimizer(steps)

    def loss(params: Params, batch: Any) -> Any:
        total, weight, _ = objective.loss(model, params, {}, batch, Context(train=True))
        return total / weight

    @jax.jit
    def step(params: Params, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = model.init(jax.random.key(SEED))
    carried, done = (params, optimizer.init(params)), 0
    if resume:
        carried, done = load(out, carried)
    source, losses, begin = itertools.islice(batches(SEED), done, None), [], time.monotonic()
    for i, batch in zip(range(done + 1, steps + 1), source, strict=False):
        params, state, value = step(*carried, batch)
        carried = (params, state)
        losses.append(value)
        if i % 25 == 0 or i == steps:
            speed = (i - done) * ROWS * LENGTH / (time.monotonic() - begin)
            print(f"step {i:5} loss {float(np.mean(losses[-25:])):.4f} {speed:.0f} tokens/s", flush=True)
        if i % 25 == 0 or i == steps:
            save(out, carried, i)
    return carried[0]


def save(out: Path, carried: Any, step: int) -> None:
    """Write (params, optimiser state) and the step at once: a reader never sees half of it."""
    with open(f"{out}.part", "wb") as f:
        np.savez(f, *jax.tree.leaves(carried), step=step)
    os.replace(f"{out}.part", out)


def load(out: Path, like: Any) -> tuple[Any, int]:
    """What `save` wrote, in the structure of ``like``."""
    leaves, structure = jax.tree.flatten(like)
    with np.load(out) as arrays:
        values = [jnp.asarray(arrays[f"arr_{i}"]) for i in range(len(leaves))]
        return jax.tree.unflatten(structure, values), int(arrays["step"])


def export(params: Params) -> None:
    """Write model.safetensors (bfloat16), config.json and generation_config.json into the package."""
    from tunejax.interop import hf

    hf.save(tokenizer.ASSETS, params, CONFIG, head="lm", dtype=jnp.bfloat16, tokenizer_from=tokenizer.ASSETS)
    ids = {"bos_token_id": tokenizer.BOS, "eos_token_id": tokenizer.EOS, "pad_token_id": tokenizer.PAD}
    (tokenizer.ASSETS / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/embedded_model/state.npz"))
    parser.add_argument("--resume", action="store_true", help="go on from --out")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    export(train(args.steps, args.out, args.resume))
