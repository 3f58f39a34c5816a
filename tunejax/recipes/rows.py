"""The rows of a config: read and audited, then the loaders over them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tunejax.config import locate, schema
from tunejax.core import errors
from tunejax.data import audit, collate, labels, options, pipeline
from tunejax.data import corpus as corpora
from tunejax.data.corpus import Corpus
from tunejax.recipes import settings


class Rows(NamedTuple):
    """What training and evaluation read. train: None where only evaluation was asked for."""

    train: Corpus | None
    held_out: Corpus | None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes; empty where there are none."""
        found = self.train if self.train is not None else self.held_out
        return (found.labels if found is not None else None) or ()

    @property
    def format(self) -> str | None:
        """As what the rows were read, also where the config leaves that to them."""
        found = self.train if self.train is not None else self.held_out
        return found.report.format if found is not None else None

    def counts(self) -> dict[str, Any]:
        """What became of the rows, for the summary."""
        held_out: dict[str, Any] = {}
        if self.held_out is not None:
            held_out = {"eval_examples": len(self.held_out), "eval_skipped": self.held_out.report.skipped}
        return {**(self.train.report.to_dict() if self.train is not None else {}), **held_out}

    def line(self) -> str:
        """One line about how many there are."""
        held_out = f"{len(self.held_out)} held out" if self.held_out is not None else "none held out"
        if self.train is None:
            return held_out
        return f"{len(self.train)} examples of {self.train.report.tokens:,} tokens, {held_out}"

    def warnings(self) -> list[str]:
        """Sentences on what in the rows commonly makes a bad model."""
        return audit.warnings(audit.totals(self.train)) if self.train is not None else []


class Loaders(NamedTuple):
    """train: endless. evaluation: makes a fresh pass, or None."""

    train: pipeline.Loader
    evaluation: Callable[[], Iterable] | None


def read(
    config: schema.Config, tokenizer: Any, kind: str, prompt: tuple[int, ...] = (), known: tuple[str, ...] = ()
) -> Rows:
    """Reads the sources of a config.

    Args:
      kind: of the model, "encoder" or "decoder".
      prompt: ids of the method's virtual tokens.
      known: names of the classes of the checkpoint's own head.

    Raises:
      DataError: a bad row, or none; every one that is found is named by file and line.
      ConfigError: the classes are in another order than the head's.
    """
    train = corpora.load(_sources(config), tokenizer, _options(config, kind, prompt, known), **_training(config))
    return Rows(train, _held_out(config, tokenizer, train.options) if config.data.eval_path else None)


def answers_only(config: schema.Config) -> schema.Config:
    """The config with nothing but answers in the loss: prompts end where the loss begins."""
    update = {"completion_only_loss": True, "assistant_only_loss": True}
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def read_held_out(
    config: schema.Config, tokenizer: Any, kind: str, prompt: tuple[int, ...] = (), known: tuple[str, ...] = ()
) -> Rows:
    """Reads data.eval_path alone. Without data.labels the classes are those of the head, or of its own rows."""
    known = () if config.data.labels else known  # a run that has its classes was trained on them, in any order
    return Rows(None, _held_out(config, tokenizer, _options(config, kind, prompt, known)))


def _held_out(config: schema.Config, tokenizer: Any, opts: options.Options) -> Corpus:
    return corpora.load(locate.locate(config.data.eval_path or ""), tokenizer, opts, **_evaluated(config))


def with_labels(config: schema.Config, known: tuple[str, ...]) -> schema.Config:
    """``config`` with ``data.labels`` as a run of it would have them; of other objectives, as it is.

    Where the training rows are not there, the classes are those of data.eval_path.

    Raises:
      DataError, ConfigError: as `read`.
    """
    d = config.data
    if config.objective.name != "classification" or not d.eval_path:
        return config
    if d.labels:
        labels.check_order(d.labels, known)
        return config
    opts = _options(config, "encoder", (), known)  # labels are the same for either kind
    names = _trained_on(config, opts) or corpora.class_names(locate.locate(d.eval_path), opts, **_evaluated(config))
    return config.model_copy(update={"data": d.model_copy(update={"labels": list(names)})})


def _trained_on(config: schema.Config, opts: options.Options) -> tuple[str, ...]:
    """The classes of the training rows; empty where these are not there."""
    try:
        sources = _sources(config)
    except errors.ConfigError:
        return ()
    try:
        return corpora.class_names(sources, opts, **_training(config))
    except errors.DataError:
        if all(Path(str(s.path)).exists() for s in sources):
            raise
        return ()


def _sources(config: schema.Config) -> list[corpora.Source]:
    """Those of data.path, where they lie. Raises ConfigError as `locate.locate`."""
    return [corpora.Source(locate.locate(s.path), s.weight) for s in config.data.path]


def _training(config: schema.Config) -> dict[str, Any]:
    """How the sources of data.path are read."""
    d = config.data
    return {"split": d.split, "max_rows": d.max_rows, "columns": d.columns, "separator": d.separator}


def _evaluated(config: schema.Config) -> dict[str, Any]:
    """How data.eval_path is read."""
    d = config.data
    return {"split": d.eval_split, "max_rows": d.max_eval_rows, "columns": d.columns, "separator": d.separator}


def _options(config: schema.Config, kind: str, prompt: tuple[int, ...], known: tuple[str, ...] = ()) -> options.Options:
    d = config.data
    return options.Options(
        format=d.format,
        objective=config.objective.name,
        max_length=d.max_length,
        truncation=d.truncation,
        append_eos=d.append_eos,
        completion_only_loss=d.completion_only_loss,
        assistant_only_loss=d.assistant_only_loss,
        template=d.template,
        labels=tuple(d.labels) if d.labels else None,
        known=known,
        labelled="first" if kind == "encoder" else "last",
        eos_token_id=d.eos_token_id,
        on_bad_row=d.on_bad_row,
        prompt=prompt,
    )


def loaders(
    config: schema.Config, rows: Rows, sizes: settings.Batches, tokenizer: Any, beside: collate.Beside | None = None
) -> Loaders:
    """Batches for training and evaluation, this process's share of them. beside: further arrays to train on."""
    assert rows.train is not None
    train = pipeline.make_loader(
        rows.train,
        batch_size=sizes.step,
        seed=config.seed,
        shuffle=config.data.shuffle,
        group_by_length=config.data.group_by_length,
        beside=beside,
        **_common(config, tokenizer),
    )
    return Loaders(train, evaluation_batches(config, rows, sizes, tokenizer))


def evaluation_batches(
    config: schema.Config, rows: Rows, sizes: settings.Batches, tokenizer: Any
) -> Callable[[], Iterable] | None:
    """Makes one pass over the held-out rows, in order; None where there are none."""
    held_out = rows.held_out
    if held_out is None:
        return None
    common = _common(config, tokenizer)
    return lambda: pipeline.make_loader(held_out, batch_size=sizes.evaluation, shuffle=False, num_epochs=1, **common)


def buckets(config: schema.Config) -> tuple[int, ...]:
    """The lengths that batches are padded to."""
    return collate.default_buckets(config.data.max_length, config.data.pad_to_multiple_of)


def _common(config: schema.Config, tokenizer: Any) -> dict[str, Any]:
    d = config.data
    return {
        "max_length": d.max_length,
        "buckets": buckets(config),
        "packing": d.packing,
        "pad_id": tokenizer.pad_token_id or 0,
        "shard_index": jax.process_index(),
        "shard_count": jax.process_count(),
    }
