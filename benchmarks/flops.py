"""FLOPs of compiled training steps against the formulas, and how often full tuning holds the weights.

    python benchmarks/flops.py

The backend's own `cost_analysis()` counts the body of a loop once, however often it runs, so the layers of a scanned
stack and the chunks of the loss would count once. Here the *compiled* program is read: every `dot` of every
computation counts 2 x (entries of its result) x (entries contracted), and a `while` counts its body as often as the
compiler says that it runs. Elementwise work is left out, as it is in the formulas. The program's products are
counted as the compiler left them: a weight gradient that nothing needs is gone by then, or shows.
"""

import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BATCH, LENGTH = 4, 128
SHAPE = {"vocab_size": 4096, "embed_dim": 512, "num_layers": 8, "num_heads": 8, "head_dim": 64, "mlp_dim": 1376}


class Row(NamedTuple):
    """One line of the table: dots of the compiled step over a formula, and the most that the ratio may be."""

    name: str
    dots: float
    formula: float
    limit: float

    @property
    def ratio(self) -> float:
        """dots / formula."""
        return self.dots / self.formula


def main() -> int:
    """Prints the table; 1 where a limit is passed."""
    sys.path.insert(0, str(ROOT))
    rows, once = table()
    print(f"{'step':24} {'compiled':>10} {'formula':>10} {'ratio':>7} {'limit':>6}")
    for r in rows:
        print(f"{r.name:24} {r.dots / 1e9:8.2f} G {r.formula / 1e9:8.2f} G {r.ratio:7.3f} {r.limit:6.2f}")
    print(f"full: arguments {once.dots / 2**20:.1f} MiB, weights and two moments once {once.formula / 2**20:.1f} MiB")
    return int(any(r.ratio > r.limit for r in [*rows, once]))


def table() -> tuple[list[Row], Row]:
    """The steps of `SHAPE`, and the bytes of full tuning's arguments over weights and moments held once."""
    from tunejax.methods import full, lora

    rank, layers, tokens = 8, SHAPE["num_layers"], BATCH * LENGTH
    forward, attention = 2 * kernels() * tokens, attention_forward()
    adapters = 6 * rank * adapter_width() * layers * tokens
    a_lora, a_full = compiled(lora.lora(rank=rank)), compiled(full.full())
    rows = [
        Row("LoRA, all seven", dots(a_lora.as_text()), 2 * forward + 3 * attention + adapters, 1.15),
        Row("full", dots(a_full.as_text()), 3 * forward + 3 * attention, 1.10),
        Row("last 2 of 8 / forward", dots(compiled(full.last_k(2)).as_text()), forward + attention, 1.70),
    ]
    held = 3 * 4 * parameters()
    batch = 5 * 4 * tokens
    return rows, Row("held once", a_full.memory_analysis().argument_size_in_bytes - batch, held, 1.01)


def kernels() -> int:
    """N: entries of all kernels that multiply a token: those of the layers and the head; the embedding is looked up."""
    c = SHAPE
    return (
        c["num_layers"] * (4 * c["embed_dim"] ** 2 + 3 * c["embed_dim"] * c["mlp_dim"])
        + c["vocab_size"] * c["embed_dim"]
    )


def parameters() -> int:
    """All of them: kernels, the table, two norms a layer and the last."""
    c = SHAPE
    return kernels() + c["vocab_size"] * c["embed_dim"] + (2 * c["num_layers"] + 1) * c["embed_dim"]


def attention_forward() -> int:
    """Scores and mixing over all pairs, as formulas count them: 2 x 2 x batch x length^2 x width a layer."""
    return 4 * BATCH * LENGTH**2 * SHAPE["embed_dim"] * SHAPE["num_layers"]


def adapter_width() -> int:
    """in + out over the seven projections of a layer; each costs 2 rank (in + out) a token, thrice."""
    return 4 * 2 * SHAPE["embed_dim"] + 3 * (SHAPE["embed_dim"] + SHAPE["mlp_dim"])


def compiled(method: Any) -> Any:
    """The compiled training step of a Llama of `SHAPE` (untied head) under ``method``."""
    import jax
    import numpy as np

    from tunejax.models import build
    from tunejax.models.config import ModelConfig
    from tunejax.objectives import causal_lm
    from tunejax.train import optimizer, sharding, state, step

    config = ModelConfig(family="llama", max_positions=LENGTH, num_kv_heads=SHAPE["num_heads"], **SHAPE)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = build.build(config, head="lm", cuts=method.cuts(config.num_layers))
    adamw = optimizer.make_optimizer("adamw", 1e-4)
    held, base = state.start(model, method, adamw, jax.jit(model.init)(jax.random.key(0)), jax.random.key(0), mesh)
    whole = np.ones((BATCH, LENGTH), np.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids"), whole)
    batch |= {
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)),
        "loss_weights": whole * np.float32(1),
    }
    run = step.make_step(model, method, causal_lm.make(), adamw, mesh=mesh)
    return run.lower(held, base, {}, run.put(batch)).compile()


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_RESULT = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]")
_DOT = re.compile(r" dot\(%?([\w.\-]+), ")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def dots(hlo: str) -> float:
    """FLOPs of all products of a compiled program, loops unrolled.

    Raises:
      ValueError: a loop that holds a product and does not say how often it runs.
    """
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        found = _COMPUTATION.match(line)
        if found:
            current = found[2]
            bodies[current] = []
            entry = current if found[1] else entry
        elif current:
            bodies[current].append(line)
    known: dict[str, float] = {}

    def cost(name: str) -> float:
        if name not in known:
            known[name] = sum(_line(line, shapes) for shapes in [_shapes(bodies[name])] for line in bodies[name])
        return known[name]

    def _line(line: str, shapes: dict[str, list[int]]) -> float:
        total = _dot(line, shapes)
        inner = sum(cost(c) for c in _CALLED.findall(line) if c in bodies)
        trips = _TRIPS.search(line)
        if " while(" in line and inner and not trips:
            raise ValueError(f"a loop of unknown length: {line.strip()[:120]}")
        return total + inner * (int(trips[1]) if trips and " while(" in line else 1)

    return cost(entry)


def _shapes(lines: list[str]) -> dict[str, list[int]]:
    return {m[1]: [int(d) for d in m[2].split(",") if d] for m in map(_RESULT.match, lines) if m}


def _dot(line: str, shapes: dict[str, list[int]]) -> float:
    found = _DOT.search(line)
    if not found:
        return 0.0
    out = _RESULT.match(line)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
    if out is None or contracted is None:
        raise ValueError(f"a product that cannot be read: {line.strip()[:120]}")
    left = shapes[found[1]]
    inner = math.prod(left[int(d)] for d in contracted[1].split(",") if d)
    return 2.0 * math.prod(int(d) for d in out[2].split(",") if d) * inner


if __name__ == "__main__":
    sys.exit(main())
