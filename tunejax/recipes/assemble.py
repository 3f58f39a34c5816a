"""From a config to its parts: the same few lines that every recipe begins with."""

import dataclasses
from typing import Any, NamedTuple

import jax

from tunejax.config import locate, schema
from tunejax.core import digest, errors, paths
from tunejax.core.method import Method
from tunejax.core.model import Model
from tunejax.core.objective import Objective
from tunejax.interop import hf
from tunejax.methods import registry
from tunejax.models import build
from tunejax.models.config import ModelConfig
from tunejax.objectives import causal_lm, classification, masked_lm
from tunejax.recipes import adapter
from tunejax.train import sharding

OBJECTIVES = {"causal_lm": causal_lm.make, "masked_lm": masked_lm.make, "classification": classification.make}


class Parts(NamedTuple):
    """What a config names, built; no parameters yet. name: of the model, as the config gives it."""

    config: schema.Config
    name: str
    folder: str
    model_config: ModelConfig
    tokenizer: Any
    method: Method
    model: Model
    objective: Objective
    mesh: jax.sharding.Mesh


class Loaded(NamedTuple):
    """Parameters of the base. fresh: paths of a head that the checkpoint lacks, drawn from the seed."""

    params: paths.Params
    base: adapter.Base
    fresh: list[str]


def parts(config: schema.Config, *, num_labels: int | None = None, mesh: Any = None) -> Parts:
    """Builds everything but parameters and data. num_labels: as the data has it, where the config does not say."""
    method = registry.build(config.method)
    folder = hf.resolve(locate.model(config.model.path))
    model_config = model_shape(config, hf.read_config(folder), num_labels)
    tokenizer = hf.tokenizer(locate.locate(config.model.tokenizer) if config.model.tokenizer else folder)
    if len(tokenizer) > model_config.vocab_size:
        raise errors.ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {model_config.vocab_size}; "
            "model.tokenizer belongs to another model"
        )
    mesh = sharding.make_mesh(**config.mesh.model_dump()) if mesh is None else mesh
    model = build.build(
        model_config,
        head=config.model.head or "lm",
        cuts=method.cuts(model_config.num_layers),
        dtype=jax.numpy.dtype(config.model.dtype),
        param_dtype=jax.numpy.dtype(config.model.param_dtype),
        remat=config.model.remat,
        constrain=sharding.constrainer(mesh),
    )
    made = objective(config, tokenizer)
    return Parts(config, config.model.path, folder, model_config, tokenizer, method, model, made, mesh)


def model_shape(config: schema.Config, found: ModelConfig, num_labels: int | None) -> ModelConfig:
    """The checkpoint's shape with what the config changes. Raises ConfigError where they do not fit."""
    changes: dict[str, Any] = {}
    if config.model.dropout is not None:
        changes["dropout"] = config.model.dropout
    if config.model.head == "classification":
        labels = config.model.num_labels or len(config.data.labels or ()) or num_labels or found.num_labels
        if not labels:
            raise errors.ConfigError("classification needs data.labels or model.num_labels")
        changes["num_labels"] = labels
    if config.model.head == "lm" and found.kind == "encoder":
        raise errors.ConfigError(
            f"{config.model.path} is an encoder; objective.name: masked_lm or classification fits it"
        )
    if config.model.head == "mlm" and found.kind == "decoder":
        raise errors.ConfigError(
            f"{config.model.path} is a decoder; objective.name: causal_lm or classification fits it"
        )
    if config.data.max_length > found.max_positions:
        raise errors.ConfigError(
            f"data.max_length is {config.data.max_length}, and {config.model.path} has {found.max_positions} positions"
        )
    return dataclasses.replace(found, **changes)


def objective(config: schema.Config, tokenizer: Any) -> Objective:
    """The objective of the config. Raises ConfigError on an option that it does not have."""
    options = dict(config.objective.model_extra or {})
    if config.objective.name == "masked_lm":
        if tokenizer.mask_token_id is None:
            raise errors.ConfigError(f"the tokenizer of {config.model.path} has no mask token, which masked_lm needs")
        options = {
            "mask_token_id": tokenizer.mask_token_id,
            "special_token_ids": tuple(tokenizer.all_special_ids),
            **options,
        }
    make = OBJECTIVES[config.objective.name]
    known = [k for k in make.__kwdefaults__ or {}]  # type: ignore[attr-defined]
    for key in options:
        if key not in known:
            raise errors.ConfigError(f"objective.{key}: unknown option. {errors.did_you_mean(key, known)}")
    return make(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def load(p: Parts) -> Loaded:
    """The checkpoint on the mesh, a fresh head drawn from the seed, and the digest of what was read."""
    shapes = jax.eval_shape(p.model.init, jax.random.key(0))
    places = paths.flatten(sharding.params_shardings(p.mesh, sharding.RULES, p.model.axes, shapes))
    params, report = hf.load(
        p.folder,
        p.model_config,
        head=p.config.model.head or "lm",
        cuts=p.method.cuts(p.model_config.num_layers),
        param_dtype=jax.numpy.dtype(p.config.model.param_dtype),
        shardings=places.get,
        key=jax.random.fold_in(jax.random.key(p.config.seed), 7),
    )
    fresh = list(report.fresh)
    read = paths.unflatten({k: x for k, x in paths.flatten(params).items() if k not in fresh})
    return Loaded(params, adapter.Base(p.name, digest.digest(read)), fresh)
