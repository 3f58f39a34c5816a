"""From a config to its parts: the same few lines that every recipe begins with."""

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from pydantic import ValidationError, create_model

from tunejax.config import load as configs
from tunejax.config import locate, schema
from tunejax.core import digest, errors, paths
from tunejax.core.method import Method
from tunejax.core.model import Model, key_shape
from tunejax.core.objective import Objective
from tunejax.data import virtual
from tunejax.interop import hf
from tunejax.methods import registry
from tunejax.models import build, cut
from tunejax.models.config import ModelConfig
from tunejax.models.families import common
from tunejax.objectives import causal_lm, classification, cloze, masked_lm
from tunejax.recipes import adapter
from tunejax.train import sharding

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "causal_lm": causal_lm.make,
    "masked_lm": masked_lm.make,
    "classification": classification.make,
    "cloze": cloze.make,
}


class Opened(NamedTuple):
    """What a config names, as far as it can be read without weights.

    known: names of the classes that the checkpoint's own head tells apart; empty where the run loads no such head.
    sources: runs that its method takes from.
    """

    folder: Path
    model_config: ModelConfig
    tokenizer: Any
    method: Method
    known: tuple[str, ...]
    sources: dict[str, adapter.Source]

    @property
    def prompt(self) -> tuple[int, ...]:
        """Ids of the method's virtual tokens."""
        return virtual_ids(self.method, self.model_config)


class Parts(NamedTuple):
    """What a config names, built; no parameters yet.

    name: of the model, as the config gives it; known, sources: of `Opened`.
    """

    config: schema.Config
    name: str
    folder: Path
    model_config: ModelConfig
    tokenizer: Any
    method: Method
    model: Model
    objective: Objective
    mesh: jax.sharding.Mesh
    known: tuple[str, ...]
    sources: dict[str, adapter.Source]

    @property
    def prompt(self) -> tuple[int, ...]:
        """Ids of the method's virtual tokens."""
        return virtual_ids(self.method, self.model_config)

    @property
    def front(self) -> tuple[int, ...]:
        """Those that stand before every example; none where the template places them."""
        return virtual.front(self.config.data.template, self.prompt)


class Loaded(NamedTuple):
    """Parameters of the base. fresh: paths of a head that the checkpoint lacks, drawn from the seed.

    prints: `digest.leaf_digests` of all of them, to check later that nothing changed.
    """

    params: paths.Params
    base: adapter.Base
    fresh: list[str]
    prints: dict[str, str]


def opened(config: schema.Config, method: Method | None = None, specs: Any = None) -> Opened:
    """Reads what the config names: its method's spec, the checkpoint's shape and its tokenizer; no weights.

    Args:
      config: of a run.
      method: instead of the one that the config names.
      specs: its description instead of the config's.
    """
    folder = hf.resolve(locate.model(config.model.path))
    found = hf.read_config(folder)
    tokenizer = hf.tokenizer(locate.locate(config.model.tokenizer) if config.model.tokenizer else folder)
    check_ids(config, found, tokenizer)
    known = known_classes(config, folder, found)
    if config.model.head == "classification":
        found = dataclasses.replace(found, num_labels=len(known))
    shape = model_shape(config, with_layers(config, found), None)
    sources: dict[str, adapter.Source] = {}
    if method is None:
        head = config.model.head or "lm"
        facts = {
            "num_kv_heads": shape.num_kv_heads,
            "kv_head_counts": list(cut.head_counts(shape, head)),
            "writable": cut.writable(shape, head),
        }
        tokenize = lambda text: list(tokenizer(text)["input_ids"])  # noqa: E731
        read = lambda run: adapter.trained(run, sources)  # noqa: E731
        method = registry.build(config.method if specs is None else specs, tokenize, read, facts)
        adapter.check_sources(sources)
        virtual.check(config.data.template, method.prompt, method.name)
    room = found.max_positions - method.prefix
    if config.data.max_length > room:
        fits = room > max(method.prompt, 1)
        advice = f"set data.max_length={room}" if fits else "no text fits behind it; give the method a smaller length"
        raise errors.ConfigError(
            f"data.max_length is {config.data.max_length}, {method.name} takes {method.prefix} positions before it, "
            f"and {config.model.path} has {found.max_positions}: {advice}"
        )
    return Opened(folder, shape, tokenizer, method, known, sources)


def check_ids(config: schema.Config, found: ModelConfig, tokenizer: Any) -> None:
    """Raises ConfigError on an id beyond the model's vocabulary. found: of the checkpoint."""
    size = found.vocab_size
    has = f"{config.model.path} has {size} tokens: 0 to {size - 1}"
    token, last = last_token(tokenizer)
    if last >= size:
        raise errors.ConfigError(f"the tokenizer has {token!r} as {last}, and {has}; it belongs to another model")
    if (config.data.eos_token_id or 0) >= size:
        raise errors.ConfigError(f"data.eos_token_id is {config.data.eos_token_id}, and {has}")


def last_token(tokenizer: Any) -> tuple[str, int]:
    """The token with the largest id, which is not always that of the last of so many: ids may have gaps."""
    return max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))


def known_classes(config: schema.Config, folder: Path, found: ModelConfig) -> tuple[str, ...]:
    """Names of the classes of the head that a run of the config loads; empty where it loads none.

    Args:
      folder, found: of the checkpoint.
    """
    if config.model.head != "classification" or config.model.random_init:
        return ()
    return common.class_names(dataclasses.replace(found, num_labels=hf.trained_classes(folder, found)))


def virtual_ids(method: Method, model_config: ModelConfig) -> tuple[int, ...]:
    """The ids of a method's virtual tokens: those after the vocabulary's."""
    return tuple(range(model_config.vocab_size, model_config.vocab_size + method.prompt))


def parts(config: schema.Config, from_: Opened, *, num_labels: int | None = None, mesh: Any = None) -> Parts:
    """Builds everything but parameters and data. num_labels: as the data has it, where the config does not say."""
    folder, found, tokenizer, method, known, sources = from_
    model_config = model_shape(config, found, num_labels)
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
    check_class_weights(config, classes(config, num_labels))
    name = config.model.path
    return Parts(config, name, folder, model_config, tokenizer, method, model, made, mesh, known, sources)


def with_layers(config: schema.Config, found: ModelConfig) -> ModelConfig:
    """The checkpoint's shape with the layers that the config keeps. Raises ConfigError where it names one too many."""
    kept = config.model.layers
    if kept is None:
        return found
    if kept[-1] >= found.num_layers:
        raise errors.ConfigError(
            f"model.layers names layer {kept[-1]}, and {config.model.path} has {found.num_layers}: "
            f"0 to {found.num_layers - 1}"
        )
    return dataclasses.replace(found, num_layers=len(kept))


def model_shape(config: schema.Config, found: ModelConfig, num_labels: int | None) -> ModelConfig:
    """The checkpoint's shape with what the config changes. Raises ConfigError where they do not fit."""
    changes: dict[str, Any] = {}
    if config.model.dropout is not None:
        changes["dropout"] = config.model.dropout
    if config.model.head == "classification":
        changes["num_labels"] = classes(config, num_labels) or found.num_labels or 2
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


def classes(config: schema.Config, num_labels: int | None) -> int:
    """How many classes are told apart, 0 where nothing says it. num_labels: as the data has it.

    Raises:
      ConfigError: the head has fewer outputs than the data has labels.
    """
    known, wanted = len(config.data.labels or ()) or num_labels or 0, config.model.num_labels
    if wanted is not None and wanted < known:
        raise errors.ConfigError(f"model.num_labels is {wanted}, and the data has {known} labels; expected {known}")
    return wanted or known


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
    if config.objective.name == "cloze":
        options["verbalizer"] = {
            label: word_id(tokenizer, word, label) for label, word in options["verbalizer"].items()
        }
    make = OBJECTIVES[config.objective.name]
    return make(**checked_options(make, options))


def checked_options(make: Callable[..., Objective], given: dict[str, Any]) -> dict[str, Any]:
    """``given`` as the options of an objective. Raises ConfigError on an unknown or ill-typed one."""
    hints, defaults = typing.get_type_hints(make), make.__kwdefaults__ or {}  # type: ignore[attr-defined]
    for key in given:
        if key not in defaults:
            raise errors.ConfigError(f"objective.{key}: unknown option. {errors.did_you_mean(key, defaults)}")
    fields: dict[str, Any] = {key: (hints[key], default) for key, default in defaults.items()}
    try:
        found = create_model("Options", **fields)(**given)
    except ValidationError as e:
        raise errors.ConfigError(configs.problems(e, list(fields), "config", "objective.")) from None
    return {key: getattr(found, key) for key in given}


def check_class_weights(config: schema.Config, count: int) -> None:
    """Raises ConfigError where ``objective.class_weights`` are not one a class. count: of the classes; 0: not known."""
    weights = (config.objective.model_extra or {}).get("class_weights")
    if weights is not None and count and len(weights) != count:
        raise errors.ConfigError(
            f"objective.class_weights has {len(weights)} numbers, and there are {count} labels; expected one for each, "
            "in the order of the labels"
        )


def word_id(tokenizer: Any, word: str, label: str) -> int:
    """The id of a label's word. Raises ConfigError where it is not one token that the tokenizer knows."""
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        found = " ".join(tokenizer.convert_ids_to_tokens(ids)) or "no token"
        raise errors.ConfigError(
            f"objective.verbalizer.{label} is {word!r}, which the tokenizer reads as {found}; expected a word that is "
            "one token of its vocabulary"
        )
    return ids[0]


def shapes(p: Parts) -> paths.Params:
    """The parameters' shapes, which carry shardings; nothing is read."""
    found = jax.eval_shape(p.model.init, key_shape())
    return sharding.abstract(found, sharding.params_shardings(p.mesh, sharding.RULES, p.model.axes, found))


def load(p: Parts) -> Loaded:
    """The checkpoint on the mesh, a fresh head drawn from the seed, and the digest of what was read.

    Raises:
      CheckpointError: a damaged one, or one that a run that the method takes from was not trained on.
    """
    key = jax.random.fold_in(jax.random.key(p.config.seed), 7)
    places = jax.tree.map(lambda x: x.sharding, shapes(p))
    if p.config.model.random_init:
        params, report = jax.jit(p.model.init, out_shardings=places)(key), hf.LoadReport([], [])
    else:
        params, report = hf.load(
            p.folder,
            p.model_config,
            head=p.config.model.head or "lm",
            cuts=p.method.cuts(p.model_config.num_layers),
            param_dtype=jax.numpy.dtype(p.config.model.param_dtype),
            shardings=paths.flatten(places).get,
            key=key,
            layers=None if p.config.model.layers is None else tuple(p.config.model.layers),
        )
    fresh, flat = list(report.fresh), paths.flatten(params)
    read = digest.leaf_digests(paths.unflatten({k: x for k, x in flat.items() if k not in fresh}))
    drawn = digest.leaf_digests(paths.unflatten({k: flat[k] for k in fresh}))
    base = adapter.Base(p.name, digest.of_leaves(read))
    adapter.check_sources({"this run": adapter.Source(base, p.config.model.head), **p.sources})
    return Loaded(params, base, fresh, {**read, **drawn})
