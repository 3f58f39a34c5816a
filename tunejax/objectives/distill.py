"""Distillation: any objective, mixed with a teacher's distribution at the same positions, and with its features.

    alpha · objective + (1 - alpha) · logits · T² · D(teacher at T, student at T) + terms on features

as Hinton et al. (2015, arXiv:1503.02531) mix them: T² keeps the gradient's size when T changes. The teacher runs in the
same program, on the batch that the student saw (tokens hidden by masked_lm included), sharded by its own axes. Its
logits exist for a chunk of positions at a time, as the student's do. Or it ran before, and its likeliest tokens are in
the batch (`from_cache`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tunejax.core import errors
from tunejax.core.method import Context
from tunejax.core.model import Batch, Model, full_batch
from tunejax.core.objective import LossOutput, Objective
from tunejax.core.paths import Params
from tunejax.objectives import chunked, divergences, features
from tunejax.objectives.chunked import Given, Metrics

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "decoupled", "uld")


class Options(NamedTuple):
    """What is common to every source of a teacher's distribution.

    alpha: weight of the wrapped objective, in [0, 1]; at 0 it is measured, and nothing is learned from it.
    logits: a factor on the divergence; 0 leaves it out, so that features alone teach.
    temperature: T > 0, of both sides.
    divergence: one of `DIVERGENCES`.
    beta: of jensen_shannon, in (0, 1); of decoupled, the weight of its second part.
    target_weight: of decoupled, the weight of its first part.
    chunk_size: positions a chunk; by default chosen by memory.
    """

    alpha: float = 0.5
    logits: float = 1.0
    temperature: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    target_weight: float = 1.0
    chunk_size: int | None = None


def make(
    objective: Objective,
    teacher: Model,
    params: Params,
    options: Options = Options(),
    terms: tuple[features.Term, ...] = (),
) -> Objective:
    """``objective`` with a teacher in the same program.

    Args:
      objective: any that calls ``model.hidden`` once and says by ``loss_weights`` what counts.
      teacher: its blueprint; its vocabulary (or labels) must be the student's, entry by entry, unless the divergence is
        "uld". A batch with teacher_tokens and teacher_mask [batch, other length] has the rows as the teacher's
        tokenizer cuts them, and teacher_at [batch, length] says where to compare: see `data.align`.
      params: of the teacher.
      options: how they are mixed.
      terms: losses between hidden states, beside; see `features`.

    Evaluation measures the wrapped objective alone; the teacher does not run.

    Metrics: the objective's; "hard" its loss, "soft" the divergence (times T²), each term by its name before its
    weight. They are sums over positions by the objective's weights (class weights are in them), to be
    divided by its weight_sum as the loss is; a position of which the teacher has no place adds 0.

    Raises:
      ConfigError: an option out of range; (when traced) a vocabulary of another size.
    """
    check_options(options)

    def loss(model: Model, params: Params, frozen: Params, batch: Batch, ctx: Context) -> LossOutput:
        if not ctx.train:  # so that losses of a run with a teacher and of one without can be compared
            return objective.loss(model, params, frozen["objective"], batch, ctx)
        taps = tuple(dict.fromkeys(tap for term in terms for tap in term.taps))
        seen = Seen.by(objective, model, params, frozen["objective"], batch, ctx, taps)
        hidden, theirs = jax.lax.stop_gradient(teacher.hidden(frozen["teacher"], _read(seen.batch), taps=taps))
        hidden, weights = _aligned(hidden, seen.batch)
        head = teacher.head(frozen["teacher"])

        def log_p(given: Given, count: int) -> jax.Array:
            logits = teacher.logits(given.whole, given.rows[0]).astype(jnp.float32)
            if options.divergence != "uld":
                _check_sizes(count, logits.shape[-1])
            return jax.nn.log_softmax(logits / options.temperature, axis=-1)

        def rows(x: jax.Array, given: Given) -> tuple[jax.Array, Metrics]:
            log_q = jax.nn.log_softmax(x / options.temperature, axis=-1)
            return divergence(options, log_p(given, x.shape[-1]), log_q, given.rows[1]), {}

        given = Given((hidden, jnp.maximum(seen.batch["targets"], 0)), head)
        total, weight, metrics = mixed(seen, options, model, params, rows, given, weights, teacher.vocab_size)
        return features.added((total, weight, metrics), terms, model, params, seen.batch, seen.aux, theirs)

    frozen = {"objective": objective.frozen, "teacher": params}
    return objective._replace(name=f"{objective.name}+distill", frozen=frozen, loss=loss)


def from_cache(objective: Objective, options: Options = Options()) -> Objective:
    """``objective`` with a teacher whose likeliest tokens are in the batch.

    A batch has teacher_ids int32 and teacher_logprobs [batch, length, k], at the options' temperature, and teacher_tail
    [batch, length], the log of the mass of all other tokens. The divergence is that between distributions over k + 1
    buckets, the last of which is the tail; where k is the vocabulary there is none, and it is that of `make`. For
    "decoupled" the target's bucket is the tail where it is not among the k.

    Raises:
      ConfigError: an option out of range.
    """
    check_options(options)
    if options.divergence == "uld":
        raise errors.ConfigError("distill.divergence uld sorts whole distributions: it needs the teacher itself")

    def loss(model: Model, params: Params, frozen: Params, batch: Batch, ctx: Context) -> LossOutput:
        if not ctx.train:
            return objective.loss(model, params, frozen, batch, ctx)
        seen = Seen.by(objective, model, params, frozen, batch, ctx)

        def rows(x: jax.Array, given: Given) -> tuple[jax.Array, Metrics]:
            (ids, log_p, tail), targets = given.rows
            log_p, log_q = bucketed(ids, log_p, tail, jax.nn.log_softmax(x / options.temperature, axis=-1))
            hit = ids == targets[:, None]
            bucket = jnp.where(jnp.any(hit, axis=-1), jnp.argmax(hit, axis=-1), ids.shape[-1])
            return divergence(options, log_p, log_q, bucket), {}

        cached = tuple(seen.batch[name] for name in ("teacher_ids", "teacher_logprobs", "teacher_tail"))
        given = Given((cached, jnp.maximum(seen.batch["targets"], 0)))
        return mixed(seen, options, model, params, rows, given, seen.batch["loss_weights"])

    return objective._replace(name=f"{objective.name}+distill", loss=loss)


def bucketed(ids: jax.Array, log_p: jax.Array, tail: jax.Array, log_q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Teacher's and student's log-probabilities of the tokens ``ids`` and of all others together.

    Args:
      ids, log_p: [rows, k] of the teacher. tail: [rows].
      log_q: [rows, vocab] of the student.

    Returns:
      two of [rows, k + 1], or of [rows, k] where k is vocab: the log of an empty tail would be no number.
    """
    ours = jnp.take_along_axis(log_q, ids, axis=-1)
    if ids.shape[-1] == log_q.shape[-1]:
        return log_p, ours
    # Summed over what is left: 1 less the mass of the k would lose a small tail to rounding.
    among = jnp.zeros(log_q.shape, bool).at[jnp.arange(len(ids))[:, None], ids].set(True)
    rest = jax.nn.logsumexp(jnp.where(among, -jnp.inf, log_q), axis=-1)
    return jnp.concatenate([log_p, tail[:, None]], axis=-1), jnp.concatenate([ours, rest[:, None]], axis=-1)


EMPTY = -1e30
"""The log of the mass of an empty tail: finite, so that 0 times it is 0."""


def likeliest(
    model: Model, params: Params, batch: Batch, *, k: int, temperature: float, chunk_size: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `from_cache` wants to find in a batch: the model's k likeliest tokens (or labels) at every position.

    Args:
      k: at most the vocabulary. chunk_size: positions whose logits exist at a time; by default chosen by memory.

    Returns:
      ids int32 and log-probabilities float32 [batch, length, k]; the log of the mass of all others [batch, length].
    """
    hidden, _ = model.hidden(params, batch)
    rows, length = batch["tokens"].shape
    chunk = min(chunk_size or chunked.default_chunk(rows, model.vocab_size), length)
    chunks = -(-length // chunk)
    hidden = jnp.pad(hidden, ((0, 0), (0, chunks * chunk - length), (0, 0)))

    def one(start: jax.Array) -> tuple[jax.Array, ...]:
        x = jax.lax.dynamic_slice_in_dim(hidden, start, chunk, axis=1).reshape(rows * chunk, -1)
        log_p = jax.nn.log_softmax(model.logits(model.head(params), x).astype(jnp.float32) / temperature, axis=-1)
        top, ids = jax.lax.top_k(log_p, k)
        tail = bucketed(ids, top, jnp.zeros(len(ids)), log_p)[1][:, k:]
        tail = jnp.maximum(tail[:, 0], EMPTY) if tail.shape[1] else jnp.full(len(ids), EMPTY)
        return ids.astype(jnp.int32), top, tail

    out = jax.lax.map(one, jnp.arange(chunks) * chunk)
    ids, top, tail = (
        jnp.moveaxis(x.reshape(chunks, rows, chunk, *x.shape[2:]), 0, 1).reshape(rows, -1, *x.shape[2:])[:, :length]
        for x in out
    )
    return ids, top, tail


class Seen(NamedTuple):
    """What a wrapped objective computed: its output, and the batch and hidden states that it came from.

    The batch's loss_weights are those that the objective's weight_sum is of.
    """

    output: LossOutput
    batch: Batch
    hidden: jax.Array
    aux: dict[str, Any]

    @classmethod
    def by(
        cls,
        objective: Objective,
        model: Model,
        params: Params,
        frozen: Params,
        batch: Batch,
        ctx: Context,
        taps: tuple[str, ...] = (),
    ) -> "Seen":
        """Runs the objective once and keeps what it saw, so that nothing runs twice. taps: asked of the model too."""
        calls: list[Any] = []

        def hidden(params: Params, batch: Batch, **options: Any) -> tuple[jax.Array, dict[str, Any]]:
            out = model.hidden(params, batch, **{**options, "taps": (*options.get("taps", ()), *taps)})
            calls.append((batch, *out))
            return out

        output = objective.loss(model._replace(hidden=hidden), params, frozen, batch, ctx)
        if len(calls) != 1:
            raise errors.ConfigError(
                f"{objective.name} runs the model {len(calls)} times a batch; distillation follows exactly one"
            )
        shown, *rest = calls[0]
        if objective.weights is not None:  # so that the teacher's part is a mean over what it is divided by
            shown = {**shown, "loss_weights": objective.weights(shown)}
        return cls(output, shown, *rest)


def mixed(
    seen: Seen,
    options: Options,
    model: Model,
    params: Params,
    rows: Callable[[jax.Array, Given], tuple[jax.Array, Metrics]],
    given: Given,
    weights: jax.Array,
    more_vocabulary: int = 0,
) -> LossOutput:
    """alpha of the objective's loss and 1 - alpha of ``rows`` (per position, before T²), in sums.

    weights: of the positions in ``rows``, [batch, length].
    """
    hard, weight, metrics = seen.output
    if not options.logits:
        return options.alpha * hard, weight, {**metrics, "hard": hard}
    soft, _ = chunked.weighted_sum(
        chunked.differentiated(rows),
        model.logits,
        model.head(params),
        seen.hidden,
        given,
        weights,
        vocab_size=model.vocab_size + more_vocabulary,
        chunk_size=options.chunk_size,
    )
    soft = options.temperature**2 * soft
    total = (1 - options.alpha) * options.logits * soft
    total = options.alpha * hard + total if options.alpha else total
    return total, weight, {**metrics, "hard": hard, "soft": soft}


def _read(batch: Batch) -> Batch:
    """What the teacher reads: the same rows, or those of its own tokenizer."""
    return full_batch(batch["teacher_tokens"], batch["teacher_mask"]) if "teacher_tokens" in batch else batch


def _aligned(hidden: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The teacher's hidden states at the student's positions, and the weights of those where it has one."""
    weights = batch["loss_weights"]
    if "teacher_tokens" not in batch:
        return hidden, weights
    at = batch["teacher_at"]
    return jnp.take_along_axis(hidden, jnp.maximum(at - 1, 0)[..., None], axis=1), weights * (at > 0)


def divergence(options: Options, log_p: jax.Array, log_q: jax.Array, targets: jax.Array) -> jax.Array:
    """The chosen one of rows [rows, n]; targets [rows]."""
    if options.divergence == "decoupled":
        return divergences.decoupled(log_p, log_q, targets, options.target_weight, options.beta)
    if options.divergence == "jensen_shannon":
        return divergences.jensen_shannon(options.beta)(log_p, log_q)
    return getattr(divergences, options.divergence)(log_p, log_q)


def check_options(options: Options) -> None:
    """Raises ConfigError naming the option that is out of range."""
    if options.divergence not in DIVERGENCES:
        near = errors.did_you_mean(options.divergence, DIVERGENCES)
        raise errors.ConfigError(f"distill.divergence is {options.divergence!r}. {near}")
    if not 0 <= options.alpha <= 1:
        raise errors.ConfigError(f"distill.alpha is {options.alpha}; expected 0 (the teacher alone) to 1 (no teacher)")
    if options.temperature <= 0:
        raise errors.ConfigError(
            f"distill.temperature is {options.temperature}; expected more than 0 (1 to 4 is usual)"
        )
    if options.divergence == "jensen_shannon" and not 0 < options.beta < 1:
        raise errors.ConfigError(f"distill.beta is {options.beta}; expected between 0 and 1 for jensen_shannon")


def _check_sizes(ours: int, theirs: int) -> None:
    if ours != theirs:
        raise errors.ConfigError(
            f"the student tells {ours} tokens or labels apart and the teacher {theirs}: "
            "distilling logits needs the same ones (padding of the vocabulary included)"
        )
