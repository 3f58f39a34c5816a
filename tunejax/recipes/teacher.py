"""The teacher of a run: another model, a run, or the base itself, put beside the run's objective; or its cache."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tunejax.config import load, locate, schema
from tunejax.core import errors, paths
from tunejax.core.model import Batch, Model, key_shape
from tunejax.core.paths import Params
from tunejax.data import align, teacher_cache
from tunejax.data.collate import Beside
from tunejax.data.corpus import Corpus
from tunejax.generate import sampling
from tunejax.models.config import ModelConfig
from tunejax.models.families import common
from tunejax.objectives import distill, features
from tunejax.recipes import artefact, assemble, comparable, samples
from tunejax.recipes import rows as row_lib
from tunejax.train import on_policy as policy

ITSELF = "base"
ALIKE = ("hidden", "relations", "on_policy")
"""Of the section, what compares position by position."""
OPTIONS = ("alpha", "logits", "temperature", "divergence", "beta", "target_weight")


class Taught(NamedTuple):
    """What a run learns beside its objective. sizes: of the kernels that train beside the method, by name.

    teacher: its model and parameters; None where the base teaches, or a cache. aligned: it reads rows of its own.
    """

    teacher: tuple[Model, Params] | None = None
    aligned: bool = False
    terms: tuple[features.Term, ...] = ()
    sizes: Mapping[str, tuple[int, int]] = {}

    def with_method(self, parts: assemble.Parts) -> assemble.Parts:
        """``parts`` whose method also trains what the terms need."""
        return parts._replace(method=features.beside(parts.method, self.sizes))


def config_of(config: schema.Config) -> schema.Config | None:
    """The config that ``distill.teacher`` names, whose run is the teacher; None where it names something else.

    Raises:
      ConfigError: no such file, a mistake in it, or a config that teaches itself, be it over others.
    """
    first: schema.Config | None = None
    seen, one = [config.output_dir], config
    while one.distill is not None and one.distill.cache is None and _names_config(one.distill.teacher):
        one = load.load(locate.locate(str(one.distill.teacher)))
        if one.output_dir in seen:
            raise errors.ConfigError(f"distill.teacher: the run {one.output_dir} would teach itself")
        seen.append(one.output_dir)
        first = first or one
    return first


def place(text: str) -> str:
    """Where the teacher lies that ``distill.teacher`` names: of a config, its run folder.

    Raises:
      ConfigError: there is no such run yet.
    """
    if not _names_config(text):
        return locate.expanded(text)
    run = load.load(locate.locate(text)).output_dir
    if not artefact.is_run(run):
        raise errors.ConfigError(f"distill.teacher: the run {run} is not there yet: tunejax train {text}")
    return run


def _names_config(text: str | None) -> bool:
    return text is not None and text.endswith((".yaml", ".yml"))


def find(parts: assemble.Parts, read: Beside | None, labels: Sequence[str]) -> Taught:
    """Opens the teacher that ``config.distill`` names, if any, and makes the terms on its features.

    Args:
      read: see `arrays`.
      labels: names of the classes, as the rows have them; empty where there are none.

    Raises:
      ConfigError, CheckpointError: the teacher cannot be opened, lacks a head or a layer that is named, or tells other
        tokens or labels apart.
    """
    section = parts.config.distill
    if section is None or section.cache is not None:
        return Taught()
    found, shape = (None, parts.model_config) if section.teacher == ITSELF else opened(parts, labels, read is not None)
    ours, terms, sizes = parts.model_config, [], {}
    if section.hidden is not None:
        project, options = section.hidden.project, section.hidden.model_dump(exclude={"project"})
        terms.append(features.hidden(ours.num_layers, shape.num_layers, **options))
        if ours.embed_dim != shape.embed_dim if project is None else project:
            sizes = dict.fromkeys(terms[-1].taps, (ours.embed_dim, shape.embed_dim))
    if section.relations is not None:
        terms.append(features.relations(ours.num_layers, shape.num_layers, **section.relations.model_dump()))
    model, params = found or (parts.model, jax.eval_shape(parts.model.init, key_shape()))
    features.check(terms, sizes, parts.model, model, params, parts.mesh.size)
    return Taught(found, read is not None, tuple(terms), sizes)


def beside(parts: assemble.Parts, taught: Taught, base: Params) -> assemble.Parts:
    """``parts`` with the objective that ``config.distill`` asks for; as they are where it asks for none.

    Args:
      parts: of the run.
      taught: see `find`.
      base: what the run holds frozen. As the teacher it costs no memory.

    Raises:
      ConfigError: the base is to teach, and the method leaves none.
    """
    section = parts.config.distill
    if section is None:
        return parts
    options = distill.Options(**{name: getattr(section, name) for name in OPTIONS})
    if section.cache is not None:
        return parts._replace(objective=distill.from_cache(parts.objective, options))
    model, params = taught.teacher or _itself(parts, base)
    model = model if taught.aligned else _blind(model, parts)
    made = distill.make(parts.objective, model, params, options, taught.terms)
    return parts._replace(objective=made)


def arrays(parts: assemble.Parts, rows: Corpus | None) -> Beside | None:
    """What of the teacher the batches hold: its cache, opened for the training rows, or the rows as its tokenizer reads
    them; None where they need nothing.

    Raises:
      ConfigError: the cache is not there, not finished or made for something else; or what rows by another tokenizer do
        not go with.
    """
    section = parts.config.distill
    if section is None or rows is None:
        return None
    if section.cache is None:
        return _aligned(parts, rows)
    return teacher_cache.Cache(
        Path(locate.expanded(section.cache)),
        rows.store,
        vocabulary=vocabulary(parts),
        temperature=section.temperature,
        tokenizer=tokenizer_digest(parts.tokenizer),
        teacher=section.teacher,
    )


def _aligned(parts: assemble.Parts, rows: Corpus) -> align.Aligned | None:
    """The rows by the tokenizer of the teacher, where that is another one and the divergence does not mind."""
    section, data = parts.config.distill, parts.config.data
    assert section is not None
    if section.divergence != "uld" or section.teacher in (None, ITSELF):
        return None
    named = place(str(section.teacher))
    theirs, shape = artefact.reader(named)
    if tokenizer_digest(theirs) == tokenizer_digest(parts.tokenizer):
        return None
    refused = {"data.packing": data.packing, **{f"distill.{n}": getattr(section, n) for n in ALIKE}}
    for name, value in refused.items():
        if value:
            raise errors.ConfigError(
                f"{name} does not go with a teacher of another tokenizer, and {section.teacher} has one"
            )
    room = shape.max_positions - artefact.prefix(named)
    update = {"max_length": room, "truncation": "end", "on_bad_row": "skip", "eval_path": None}
    config = parts.config.model_copy(update={"data": data.model_copy(update={**update, "eos_token_id": None})})
    read = row_lib.read(config, theirs, shape.kind).train
    assert read is not None
    return align.Aligned(rows.store, read.store, parts.tokenizer, theirs)


def on_policy(parts: assemble.Parts, rows: Corpus | None) -> policy.Options | None:
    """How the student writes what it learns from; None where ``config.distill`` does not ask for that.

    Raises:
      ConfigError: rows without prompts, or several processes.
    """
    section = None if parts.config.distill is None else parts.config.distill.on_policy
    if section is None or rows is None:
        return None
    if rows.report.format not in samples.ANSWERED:
        raise errors.ConfigError(
            f"the rows have the format {rows.report.format!r}; distill.on_policy answers prompts: "
            f"{' or '.join(samples.ANSWERED)}"
        )
    if not rows.options.answers_only:
        raise errors.ConfigError(
            "distill.on_policy learns from answers alone: data.completion_only_loss and data.assistant_only_loss must "
            "be true"
        )
    if not samples.single_process():
        raise errors.ConfigError("distill.on_policy runs in one process, with as many devices as it has")
    return policy.Options(
        section.fraction,
        section.max_new_tokens or parts.config.generation.max_new_tokens,
        sampling.Sampling(temperature=section.temperature),
        samples.stop_tokens(parts),
        row_lib.buckets(parts.config),
        parts.tokenizer.pad_token_id or 0,
        parts.front,
        parts.config.seed,
    )


def vocabulary(parts: assemble.Parts) -> int:
    """How many tokens or labels the model tells apart."""
    shape = parts.model_config
    return shape.num_labels if parts.config.model.head == "classification" else shape.vocab_size


def tokenizer_digest(tokenizer: Any) -> str:
    """Hex digest of a tokenizer's vocabulary."""
    text = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _itself(parts: assemble.Parts, base: Params) -> tuple[Model, Params]:
    """The base as a teacher."""
    flat = paths.flatten(base)
    shapes = paths.flatten(jax.eval_shape(parts.model.init, key_shape()))
    holes = [p for p, x in shapes.items() if x is not None and flat.get(p) is None]  # an empty slot is no hole
    if holes:
        raise errors.ConfigError(
            f"distill.teacher is 'base', and {parts.method.name} trains {holes[0]} itself, so no base is left: "
            "use a method that leaves it frozen, or name the model again as distill.teacher"
        )
    return parts.model, base


def _blind(model: Model, parts: assemble.Parts) -> Model:
    """A teacher that does not see the virtual tokens of the student's rows."""
    if not parts.method.prompt:
        return model

    def hidden(params: Params, batch: Batch, **options: Any) -> Any:
        size = parts.model_config.vocab_size  # the student's, from which its virtual tokens count
        return model.hidden(params, without_virtual(batch, size), **options)

    return model._replace(hidden=hidden)


def without_virtual(batch: Batch, vocab_size: int) -> dict[str, Any]:
    """``batch`` with the virtual tokens as padding, and the positions of what is left without them."""
    virtual = batch["tokens"] >= vocab_size
    count = jnp.cumsum(virtual, axis=1)
    before = jax.lax.cummax(jnp.where(batch["positions"] == 0, count - virtual, 0), axis=1)  # in the row, not the text
    return {
        **batch,
        "tokens": jnp.where(virtual, 0, batch["tokens"]),
        "segment_ids": jnp.where(virtual, 0, batch["segment_ids"]),
        "positions": jnp.maximum(batch["positions"] - (count - before), 0),
    }


def opened(
    parts: assemble.Parts, labels: Sequence[str], aligned: bool = False
) -> tuple[tuple[Model, Params], ModelConfig]:
    """A run folder's tuned model, or a checkpoint, with the student's kind of head, on the student's mesh.

    It takes rows without virtual tokens. labels: see `find`. aligned: the rows are its own tokenizer's.

    Raises:
      ConfigError, CheckpointError: see `find`.
    """
    section = parts.config.distill
    assert section is not None
    assert section.teacher is not None
    name, head = place(section.teacher), parts.config.model.head or "lm"
    if artefact.is_run(name):
        tuned = artefact.open_run(name, [f"mesh.{axis}={size}" for axis, size in parts.mesh.shape.items()])
        theirs = tuned.parts.config.model.head or "lm"
        if theirs != head:
            raise errors.ConfigError(f"distill.teacher {name} has the head {theirs!r}; the student's is {head!r}")
        if tuned.parts.prompt:
            raise errors.ConfigError(
                f"distill.teacher {name} was tuned by {tuned.parts.method.name}, and the student's rows do not begin "
                "with its virtual tokens: name a teacher without any"
            )
        model, params, shape, method = tuned.parts.model, tuned.params, tuned.parts.model_config, tuned.parts.method
        known = tuple(tuned.parts.config.data.labels or ())
        found = comparable.Teacher(name, shape, known, method.name, method.prefix)
    else:
        model, params, shape = _checkpoint(parts, name, head)
        found = comparable.Teacher(name, shape, common.labels_of(shape))
    if not aligned:
        comparable.check(parts, labels, found)
    return (model, params), shape


def _checkpoint(parts: assemble.Parts, name: str, head: str) -> tuple[Model, Params, Any]:
    its_own = {"path": name, "tokenizer": None, "layers": None, "random_init": False}
    config = parts.config.model_copy(update={"model": parts.config.model.model_copy(update=its_own)})
    opened = assemble.opened(config, artefact.NOTHING)
    theirs = assemble.parts(config, opened, num_labels=parts.model_config.num_labels, mesh=parts.mesh)
    loaded = assemble.load(theirs)
    if loaded.fresh:
        raise errors.CheckpointError(
            f"distill.teacher {name} has no {loaded.fresh[0]}, so it cannot teach a model with the head {head!r}: "
            "name a run that tuned it"
        )
    return theirs.model, loaded.params, theirs.model_config
