"""AdaLoRA: a low-rank product in the form of a singular value decomposition, whose ranks share one budget over all
sites and shrink where they matter least (Zhang et al., 2023, arXiv:2303.10512).

    y = x W + scale · ((x A) · E) B        A [in, rank], B [rank, out] random, E [rank] = 0 at the start

The paper's Q, Λ, P are PEFT's lora_A (A.T), lora_E (E) and lora_B (B.T). The paper sets a pruned entry of Λ to zero and
lets it train on, so that it may come back. A method does not write what trains, so here E = e - zero: pruning sets
``zero`` [rank], in ``state``, to what e is, with the same effect (weight decay alone differs: it draws e, not E, to 0).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import errors, low_rank, portable
from tunejax.core import method as methods
from tunejax.core.method import Context, Method, Site

ALIASES = {
    **{k: v for k, v in low_rank.ALIASES.items() if k not in ("r", "use_rslora")},
    "init_r": "rank",
    "target_r": "target_rank",
    "tinit": "warmup_steps",
    "tfinal": "final_steps",
    "deltaT": "every",
    "total_step": "total_steps",
    "orth_reg_weight": "orthogonal",
}
"""What PEFT calls it -> what it is here."""

Arrays = dict[str, Any]
TRIPLET = ("a", "e", "b")


def _read(tensors: portable.Arrays, arguments: portable.Arguments) -> dict[str, np.ndarray]:
    """PEFT leaves pruned triplets out of a folder; here they are zero."""
    a, e, b = (tensors[f"lora_{k}"] for k in "AEB")
    gone = arguments["rank"] - len(e)
    return {
        "a": np.pad(a.T, ((0, 0), (0, gone))),
        "e": np.pad(e[:, 0], (0, gone)),
        "b": np.pad(b.T, ((0, gone), (0, 0))),
    }


PEFT = portable.Form(
    "ADALORA",
    write=lambda arrays: {
        "lora_A": arrays["a"].T,
        "lora_E": (arrays["e"] - arrays["zero"])[:, None],
        "lora_B": arrays["b"].T,
    },
    read=_read,
    entries={
        "total_steps": "total_step", "rank": "init_r", "target_rank": "target_r", "alpha": "lora_alpha",
        "dropout": "lora_dropout", "warmup_steps": "tinit", "final_steps": "tfinal", "every": "deltaT",
        "beta1": "beta1", "beta2": "beta2", "orthogonal": "orth_reg_weight",
    },
    ignored=frozenset({"r", "use_rslora"}),
    biases="lora_only",
    split=lambda arrays, i, of: {**arrays, "b": np.split(arrays["b"], of, axis=1)[i]},
)  # fmt: skip


def adalora(
    total_steps: int,
    targets: str | list[str] = "/layers/**/kernel",
    rank: int = 12,
    target_rank: int = 8,
    alpha: float = 8.0,
    dropout: float = 0.0,
    warmup_steps: int = 0,
    final_steps: int = 0,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonal: float = 0.5,
    layers: str | int | None = None,
) -> Method:
    """Trains low-rank products whose ranks shrink from ``rank`` to ``target_rank`` on average.

    Args:
      total_steps: of the run.
      targets: globs over kernels; every linear layer of the stack unless told.
      rank: of every site at the start.
      target_rank: mean rank at the end.
      alpha: the product is scaled by alpha / rank.
      dropout: rate on the input of A while training.
      warmup_steps: before the budget begins to shrink.
      final_steps: at the end, with the ranks as they are.
      every: steps between prunings.
      beta1, beta2: of the moving averages of sensitivity and uncertainty.
      orthogonal: weight of the `penalty`.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: ranks, steps or averages out of order.
      TargetError (from init): nothing matched, or what matched is no kernel.
    """
    low_rank.check("adalora", rank, dropout, alpha)
    _check(total_steps, rank, target_rank, warmup_steps, final_steps, every, beta1, beta2)
    scale = alpha / rank

    def new(key: Any, kernel: Any) -> Site:
        *lead, fan_in, fan_out = kernel.shape
        one, two = jax.random.split(key)
        shapes = {"a": (*lead, fan_in, rank), "e": (*lead, rank), "b": (*lead, rank, fan_out)}
        train = {"a": 0.02 * low_rank.normal(one, shapes["a"]), "b": 0.02 * low_rank.normal(two, shapes["b"])}
        averages = {n: {k: jnp.zeros(s) for k, s in shapes.items()} for n in ("sensitivity", "uncertainty")}
        return Site({**train, "e": jnp.zeros(shapes["e"])}, {"zero": jnp.zeros(shapes["e"]), **averages})

    def wrap(kernel: Any, arrays: Arrays, ctx: Context) -> low_rank.LowRank:
        a = arrays["a"] * (arrays["e"] - arrays["zero"])[..., None, :]
        return low_rank.beside(kernel, a, arrays["b"], ctx, scale, dropout)

    def update(train: Any, state: Any, grads: Any, ctx: Context) -> Any:
        learning = jnp.asarray(ctx.step) < total_steps - final_steps
        averaged = {p: averages(train[p], state[p], grads[p], beta1, beta2) for p in train}
        state = jax.tree.map(lambda new, old: jnp.where(learning, new, old), averaged, state)
        scores = {p: importance(state[p]) for p in train}
        flat = jnp.sort(jnp.concatenate([s.ravel() for s in scores.values()]))
        most, least = flat.size, flat.size // rank * target_rank
        share, prunes = schedule(ctx.step, total_steps, warmup_steps, final_steps, every)
        gone = most - (least + jnp.floor(share * (most - least)).astype(jnp.int32))
        prunes &= gone > 0
        worst = flat[jnp.maximum(gone, 1) - 1]
        zeros = {p: jnp.where(prunes & (s <= worst), train[p]["e"], state[p]["zero"]) for p, s in scores.items()}
        return {p: {**state[p], "zero": zeros[p]} for p in state}

    def penalty(train: Any, state: Any, ctx: Context) -> Any:
        return orthogonal * unorthogonality(train) if orthogonal else jnp.zeros(())

    return methods.per_site(
        "adalora", targets, new, wrap, layers=layers, axes=low_rank.AXES, update=update, penalty=penalty,
        updates=min(total_steps, total_steps - final_steps + 1),
    )  # fmt: skip


def averages(train: Arrays, state: Arrays, grads: Arrays, beta1: float, beta2: float) -> Arrays:
    """The state of a site after a step: moving averages of |w dL/dw| and of its deviation (equations 8 to 10)."""
    values = {**train, "e": train["e"] - state["zero"]}
    out: dict[str, Arrays] = {"sensitivity": {}, "uncertainty": {}}
    for k in TRIPLET:
        now = jnp.abs(values[k] * grads[k])
        mean = beta1 * state["sensitivity"][k] + (1 - beta1) * now
        out["sensitivity"][k] = mean
        out["uncertainty"][k] = beta2 * state["uncertainty"][k] + (1 - beta2) * jnp.abs(now - mean)
    return {"zero": state["zero"], **out}


def importance(state: Arrays) -> jax.Array:
    """[..., rank]: how much each triplet matters: the score of its singular value and the means of its vectors'
    (equations 7 and 11)."""
    score = {k: state["sensitivity"][k] * state["uncertainty"][k] for k in TRIPLET}
    return score["e"] + score["a"].mean(-2) + score["b"].mean(-1)


def schedule(step: Any, total: int, warmup: int, final: int, every: int) -> tuple[jax.Array, jax.Array]:
    """The share of the ranks to lose that still stands, from 1 to 0 along a cubic (equation 12), and whether this
    step prunes."""
    step = jnp.asarray(step)
    left = 1 - (step - warmup) / max(total - final - warmup, 1)
    share = jnp.clip(left, 0.0, 1.0) ** 3
    ended = step >= total - final
    return share, (step > warmup) & (ended | (step % every == 0))


def unorthogonality(train: dict[str, Arrays]) -> jax.Array:
    """The mean over all A.T and B of ‖M M.T - I‖.

    The paper (equation 4) adds the squares; its authors' code and PEFT take the mean of the norms, and so does this,
    so that a weight means the same.
    """

    def norms(m: jax.Array) -> jax.Array:
        off = jnp.matmul(m, jnp.swapaxes(m, -1, -2), precision="highest") - jnp.eye(m.shape[-2])
        return jnp.sqrt(jnp.sum(off**2, (-1, -2)) + 1e-20)  # a root has no gradient at 0

    each = [norms(m).ravel() for t in train.values() for m in (jnp.swapaxes(t["a"], -1, -2), t["b"])]
    return jnp.mean(jnp.concatenate(each))


def _check(total: int, rank: int, target: int, warmup: int, final: int, every: int, beta1: float, beta2: float) -> None:
    problems = []
    if not 1 <= target <= rank:
        problems.append(f"target_rank is {target}; it must lie between 1 and rank, which is {rank}")
    if warmup < 0 or final < 0 or warmup + final >= total:
        problems.append(f"warmup_steps {warmup} and final_steps {final} leave none of total_steps {total} between them")
    if every < 1:
        problems.append(f"every is {every}; it must be at least 1")
    problems += [f"{n} is {b}; it must lie in (0, 1)" for n, b in (("beta1", beta1), ("beta2", beta2)) if not 0 < b < 1]
    if problems:
        raise errors.ConfigError("adalora: " + "; ".join(problems))
