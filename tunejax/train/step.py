"""The one training step: bind, differentiate, clip, update. No method's word in it."""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tunejax.core.method import Context, Method
from tunejax.core.model import Batch, Model
from tunejax.core.objective import Objective, mean
from tunejax.core.paths import Params
from tunejax.train import compiler, sharding
from tunejax.train.state import TrainState

Metrics = dict[str, jax.Array]
Sums = dict[str, tuple[jax.Array, jax.Array]]


class Steps(Protocol):
    """What the loop asks of a `Step`; another may prepare the batch first."""

    objective: Objective
    mesh: Mesh

    def __call__(self, state: TrainState, base: Params, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        """See `Step`."""
        ...

    def put(self, batch: Any) -> Any:
        """This process's rows as what a call takes."""
        ...

    def evaluate(self, state: TrainState, base: Params, frozen: Params, batch: Any) -> Sums:
        """See `Step.evaluate`."""
        ...

    def memory(self, state: TrainState, base: Params, frozen: Params, batch: Any) -> int | None:
        """See `Step.memory`; batch: of the last call."""
        ...


class Step:
    """A compiled step; `make_step` builds it. Called as ``state, metrics = step(state, base, frozen, batch)``.

    ``state`` is donated: use the returned one. ``metrics`` are float32 scalars on the device: loss (the mean over
    the batch's weights), weight (their sum), grad_norm (before clipping), nonfinite (updates skipped in a row), and
    the objective's own as means.
    """

    def __init__(
        self, model: Model, method: Method, objective: Objective, mesh: Mesh, update: Callable,
        sums: Callable | None = None, runs: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.method, self.objective, self.mesh = model, method, objective, mesh
        self._update, self._runs = update, runs
        self._compiled: Any = None
        self._ahead: Future | None = None
        sums = sums or functools.partial(evaluate, model, method, objective)
        self._evaluate = jax.jit(sums, out_shardings=sharding.replicated(mesh))

    def __call__(self, state: TrainState, base: Params, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            ahead.result()  # what failed there fails again, and better told, when it is called
        with jax.set_mesh(self.mesh):
            return self._jitted(state)(state, base, frozen, batch)

    def prepare(self, state: TrainState, base: Params, frozen: Params, batch: Any) -> None:
        """Begins to compile the step in a thread, for the first call to find; meanwhile weights may be read.

        All are shapes with shardings, as of `state.plan` and `sharding.abstract_batch`.
        """
        lowered = self.lower(state, base, frozen, batch)
        self._ahead = ThreadPoolExecutor(1, "compile").submit(lowered.compile)

    def lower(self, state: TrainState, base: Params, frozen: Params, batch: Batch) -> Any:
        """The lowered program, to read or compile; arguments may be ShapeDtypeStructs that carry shardings."""
        with jax.set_mesh(self.mesh), compiler.tracing():
            return self._jitted(state).lower(state, base, frozen, batch)

    def memory(self, state: TrainState, base: Params, frozen: Params, batch: Batch) -> int | None:
        """Bytes that the compiled step holds at once on each device, or None where the backend does not say.

        As the compiler counts: arguments, results that take the place of none, and scratch. Free for shapes that have
        been run: the program is not compiled again.
        """
        found = self.lower(state, base, frozen, batch).compile().memory_analysis()
        if found is None:
            return None
        held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return int(held + found.temp_size_in_bytes)

    def evaluate(self, state: TrainState, base: Params, frozen: Params, batch: Batch) -> Sums:
        """Sums and weights of the loss and the objective's metrics on a batch, without dropout; nothing is donated."""
        with jax.set_mesh(self.mesh):
            return self._evaluate(state.train, state.state, base, frozen, batch)

    def put(self, batch: Any) -> dict[str, jax.Array]:
        """This process's rows as the global batch on the mesh."""
        return sharding.put_batch(batch, self.mesh)

    def _jitted(self, state: TrainState) -> Any:
        if self._compiled is None:
            # The state leaves as it came in, or the next call would compile again and donation would not reuse it.
            places = jax.tree.map(lambda x: x.sharding, state)
            out = (places, sharding.replicated(self.mesh))
            told = compiler.options(self._runs)
            self._compiled = jax.jit(self._update, donate_argnums=0, out_shardings=out, compiler_options=told)
        return self._compiled


def make_step(
    model: Model,
    method: Method,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
    runs: int | None = None,
) -> Step:
    """Builds the training step.

    Args:
      model, method, objective: what is trained, how, and towards what.
      optimizer: an optax transformation over the method's ``train``.
      mesh: as of `sharding.make_mesh`.
      accumulate: micro-batches a step; a batch has ``accumulate`` times as many rows as are run at once. Losses,
        weights and gradients are summed and divided once, so the result is that of one big batch.
      max_grad_norm: clip the global norm to this, as `torch.nn.utils.clip_grad_norm_` does.
      runs: how many steps the run has, if that is known: a short one's compiles sooner (`compiler.options`).
    """
    update = make_update(model, method, objective, optimizer, accumulate, max_grad_norm)
    return Step(model, method, objective, mesh, update, runs=runs)


def make_update(
    model: Model, method: Method, objective: Objective, optimizer: Any, accumulate: int, max_grad_norm: float | None
) -> Callable[[TrainState, Params, Params, Batch], tuple[TrainState, Metrics]]:
    """The step as a plain function, to compile or to transform further; arguments as of `make_step`."""
    gradients = _gradients(model, method, objective)

    def update(state: TrainState, base: Params, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        ctx = Context(step=state.step, key=key, train=True, turn=state.step * accumulate)
        if accumulate == 1:
            grads, loss, weight, sums = gradients(state, base, frozen, batch, ctx)
        else:
            grads, loss, weight, sums = _accumulated(gradients, accumulate, state, base, frozen, batch, ctx)
        loss, norm = mean(loss, weight), optax.tree.norm(grads) / jnp.maximum(weight, 1e-9)
        scale = 1 / jnp.maximum(weight, 1e-9)
        if max_grad_norm is not None:
            scale *= jnp.minimum(1.0, max_grad_norm / (norm + 1e-6))
        grads = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, state.train)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = _updated(method, optimizer, state, base, grads, ctx._replace(loss=loss), finite)
        metrics = {"loss": loss, "weight": weight, "grad_norm": norm, "nonfinite": new.nonfinite[0].astype(jnp.float32)}
        return new, {**{name: mean(*pair) for name, pair in sums.items()}, **metrics}

    return update


def _gradients(model: Model, method: Method, objective: Objective) -> Callable:
    """(state, base, frozen, batch, ctx) -> gradients of the summed loss in float32, loss, weight, metrics as sums."""

    def total(train: Any, state: Any, base: Params, frozen: Params, batch: Batch, ctx: Context) -> Any:
        bound = method.bind(base, train, state, ctx._replace(key=jax.random.fold_in(ctx.key, 0)))
        ctx = ctx._replace(key=jax.random.fold_in(ctx.key, 1))
        loss, weight, metrics = objective.loss(model, bound, frozen, batch, ctx)
        loss, weight = loss.astype(jnp.float32), jax.lax.stop_gradient(weight).astype(jnp.float32)
        return loss + weight * method.penalty(train, state, ctx), (loss, weight, pairs(metrics, weight))

    def gradients(state: TrainState, base: Params, frozen: Params, batch: Batch, ctx: Context) -> Any:
        grads, out = jax.grad(total, has_aux=True)(state.train, state.state, base, frozen, batch, ctx)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), *out

    return gradients


def _accumulated(
    gradients: Callable, parts: int, state: TrainState, base: Params, frozen: Params, batch: Batch, ctx: Context
) -> Any:
    """The sums of ``gradients`` over micro-batches, each with a key of its own."""
    # Micro-batch j is rows j, j + parts, ...: each device then splits the rows that it has, and none move.
    micro = {k: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1) for k, x in batch.items()}

    def one(j: jax.Array, rows: Batch) -> Any:
        return gradients(state, base, frozen, rows, ctx._replace(key=jax.random.fold_in(ctx.key, j), turn=ctx.turn + j))

    def body(sums: Any, at: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, one(*at)), None

    indices = jnp.arange(parts)
    shapes = jax.eval_shape(lambda m: one(indices[0], {k: x[0] for k, x in m.items()}), micro)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, (indices, micro))[0]


def _updated(
    method: Method, optimizer: Any, state: TrainState, base: Params, grads: Any, ctx: Context, finite: jax.Array
) -> TrainState:
    """The next state; where the loss or a gradient is not finite, everything but the counters stays as it was."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.train)
    updates = jax.tree.map(lambda u, rate: u if rate == 1 else rate * u, updates, method.rates(state.train))
    train = optax.apply_updates(state.train, updates)
    ctx = ctx._replace(params=lambda: method.bind(base, train, state.state, Context()))
    kept = (state.train, state.state, state.opt_state)
    made = (train, method.update(train, state.state, grads, ctx), opt_state)
    train, method_state, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), made, kept)
    skipped = jnp.where(finite, jnp.zeros_like(state.nonfinite), 1)
    row, all_ = state.nonfinite[0], state.nonfinite[1]
    nonfinite = jnp.stack([jnp.where(finite, 0, row + 1), all_ + skipped[1]]).astype(jnp.int32)
    return TrainState(state.step + 1, train, method_state, opt_state, state.key, nonfinite)


def evaluate(
    model: Model,
    method: Method,
    objective: Objective,
    train: Any,
    state: Any,
    base: Params,
    frozen: Params,
    batch: Batch,
) -> Sums:
    """(sum, weight) of the loss and of each metric of the objective, with dropout off."""
    ctx = Context()
    loss, weight, metrics = objective.loss(model, method.bind(base, train, state, ctx), frozen, batch, ctx)
    return pairs({"loss": loss, **metrics}, weight)


def pairs(metrics: dict[str, Any], weight: jax.Array) -> Sums:
    """Each metric as float32 (sum, weight); one that is not a pair yet has the loss's weight."""
    both = {name: x if isinstance(x, tuple) else (x, weight) for name, x in metrics.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), both)
