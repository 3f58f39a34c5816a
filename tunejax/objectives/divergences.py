"""How far a student's distribution lies from a teacher's: functions of log-probabilities, row by row.

Each takes ``log_p`` (teacher) and ``log_q`` (student), both float32 [..., n], and gives [...]. p and q are theirs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def forward_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) (Hinton et al., 2015, arXiv:1503.02531): the student covers all that the teacher may say."""
    return _kl(log_p, log_q)


def reverse_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(q || p) (MiniLLM, Gu et al., 2024, arXiv:2306.08543): the student keeps to what the teacher finds likely."""
    return _kl(log_q, log_p)


def jensen_shannon(beta: float = 0.5) -> Divergence:
    """The generalised one of GKD (Agarwal et al., 2024, arXiv:2306.13649, equation 1), 0 < beta < 1.

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. Divided by beta it tends to the forward KL
    as beta goes to 0, divided by 1 - beta to the reverse one as beta goes to 1.
    """

    def divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)

    return divergence


def total_variation(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Half the sum of |p - q| (Wen et al., 2023, arXiv:2307.15190)."""
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def uld(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """The sum of |p - q|, each sorted by itself and the shorter one filled up with 0 (Boizard et al., 2024,
    arXiv:2402.12030, section 3): the Wasserstein distance that does not ask which token has a probability.

    log_p, log_q: [..., n] and [..., m], of vocabularies that have nothing in common.
    """
    falling = [-jnp.sort(-jnp.exp(x), axis=-1) for x in (log_p, log_q)]
    size = max(x.shape[-1] for x in falling)
    p, q = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]) for x in falling)
    return jnp.sum(jnp.abs(p - q), axis=-1)


def decoupled(log_p: jax.Array, log_q: jax.Array, targets: jax.Array, alpha: float, beta: float) -> jax.Array:
    """Decoupled KD (Zhao et al., 2022, arXiv:2203.08679, equation 7): alpha TCKD + beta NCKD.

    TCKD is the KL between (p of the target, the rest); NCKD that between the distributions over all but the target.
    With alpha 1 and beta = 1 - p(target) it is the forward KL.

    targets: int [...].
    """
    at = jnp.arange(log_p.shape[-1]) == targets[..., None]
    hit_p, hit_q = (jnp.sum(jnp.where(at, x, 0), axis=-1) for x in (log_p, log_q))
    others_p, others_q = (jnp.where(at, -jnp.inf, x) for x in (log_p, log_q))
    rest_p, rest_q = (jax.nn.logsumexp(x, axis=-1) for x in (others_p, others_q))
    target = jnp.exp(hit_p) * (hit_p - hit_q) + jnp.exp(rest_p) * (rest_p - rest_q)
    # Finite where the target is left out: 0 times an infinite difference has no gradient.
    within_p = jnp.where(at, 0, log_p - rest_p[..., None])
    within_q = jnp.where(at, 0, log_q - rest_q[..., None])
    others = jnp.sum(jnp.where(at, 0, jnp.exp(within_p) * (within_p - within_q)), axis=-1)
    return alpha * target + beta * others


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)
