"""From a config to the pure functions of `core.model.Model`."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, paths
from tunejax.core.ladder import SLOT
from tunejax.core.model import AUXILIARY, Model, key_shape
from tunejax.core.paths import Params
from tunejax.models import axes, decoder, encoder, ladder, stack, view
from tunejax.models import cache as caches
from tunejax.models.blueprint import blueprint
from tunejax.models.config import ModelConfig

ENTRANCE = "embedding"
"""The tap of what enters the stack, [1, batch, length, embed]; the others are `stack.TAPS`."""


def build(
    config: ModelConfig,
    *,
    head: str,
    cuts: tuple[int, ...] = (),
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: str = "none",
    constrain: stack.Constrain = lambda x, axes: x,
) -> Model:
    """The model of ``config`` as pure functions of a parameter dict.

    Args:
      config: sizes and choices.
      head: "lm" (decoder), "mlm" (encoder), "classification" or "none".
      cuts: layers before which the stack is cut into segments.
      dtype: of the computation; norms, softmax and losses stay in float32.
      param_dtype: of fresh parameters.
      remat: one of `stack.REMAT`.
      constrain: (array, logical axes) -> array with a sharding constraint on it: ("batch", "length", None).

    Raises:
      ConfigError: a head, cut or remat policy that does not fit.
      CheckpointError: an activation or rope scaling that is not supported.
    """
    kind = _kind(config, head)
    sizes = stack.sizes(config.num_layers, cuts)
    block_type, outer_type = (
        (decoder.DecoderBlock, decoder.Decoder) if kind is decoder else (encoder.EncoderBlock, encoder.Encoder)
    )
    block = blueprint(lambda noise: block_type(config, dtype=param_dtype, noise=noise), flat=True)
    outer = blueprint(lambda noise: outer_type(config, head, dtype=param_dtype, noise=noise))
    head_keys = kind.head_keys(config, head)

    def init(key: Any) -> Params:
        outer_key, stack_key = jax.random.split(key)
        return {**outer.init(outer_key), "layers": stack.init(block, sizes, stack_key), SLOT: None}

    def hidden(
        params: Params,
        batch: Mapping[str, jax.Array],
        *,
        cache: caches.Cache | None = None,
        taps: Sequence[str] = (),
        key: Any = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        where = view.where(batch, stack.prefix_length(params["layers"]))
        cache = None if cache is None else caches.enter(cache, where)
        keys = (None, None) if key is None or config.dropout == 0.0 else jax.random.split(key)
        ends = outer.merge({name: value for name, value in params.items() if name not in ("layers", SLOT, AUXILIARY)})
        first = constrain(ends.enter(batch, where, dtype, keys[0]), stack.HIDDEN_AXES)
        made, beside = view.make(config, where, cache), params.get(SLOT)
        x, layers, aux = stack.run(
            block,
            params["layers"],
            first,
            made,
            cache=cache and cache["layers"],
            key=keys[1],
            taps=tuple(name for name in (*taps, *(() if beside is None else ("hidden",))) if name != ENTRANCE),
            remat=remat,
            constrain=constrain,
        )
        if beside is not None:
            own = cache and (cache.get(SLOT) or ladder.empty(config, beside, cache["layers"]))
            added, own = ladder.run(
                block_type, config, beside, first, aux["hidden"], made, cache=own, remat=remat, constrain=constrain
            )
            x, aux = x + added, {name: aux[name] for name in taps if name != ENTRANCE}
            cache = cache and {**cache, SLOT: own}
        if ENTRANCE in taps:
            aux[ENTRANCE] = first[None]
        if cache is not None:
            aux["cache"] = caches.leave(cache, layers, where.positions.shape[1])
        return ends.leave(x), aux

    shapes = jax.eval_shape(init, key_shape())
    return Model(
        init=init,
        hidden=hidden,
        head=lambda params: {k: params[k] for k in head_keys},
        logits=lambda params, x: kind.logits(config, head, params, x),
        cache=(lambda batch, length, dtype: caches.empty(config, sizes, batch, length, dtype))
        if kind is decoder
        else None,
        axes={path: axes.of(path, head) for path in paths.flatten(shapes)},
        vocab_size=config.vocab_size,
        depth=config.num_layers,
    )


def _kind(config: ModelConfig, head: str) -> ModuleType:
    kind = {"decoder": decoder, "encoder": encoder}[config.kind]
    if head not in kind.HEADS:
        raise errors.ConfigError(
            f"head {head!r} does not fit {config.family}, a {config.kind}. {errors.did_you_mean(head, kind.HEADS)}"
        )
    if head == "classification" and config.num_labels < 1:
        raise errors.ConfigError("a classification head needs num_labels of at least 1")
    return kind
