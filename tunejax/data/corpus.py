"""Sources to a corpus: read, encode, cut, shift, and keep count of all that happened on the way."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tunejax.core import errors
from tunejax.data import bad, formats, labels, options, rows, templates, virtual
from tunejax.data.example import Example, Store, shifted
from tunejax.data.files import Row

TEMPLATED = ("prompt_completion", "classification")
"""Formats that may have a template."""
CHUNK = 2000
"""Rows tokenised at once; bad rows are raised after each chunk."""


class Source(NamedTuple):
    """One of several sources that are mixed. weight: how often a row of it is drawn in an epoch (1: once)."""

    path: str | Path | Sequence[Mapping[str, Any]]
    weight: float = 1.0


@dataclasses.dataclass
class Report:
    """What became of the rows: the summary of a run, and what `audit` shows.

    truncated: rows cut to max_length; answers_cut: those of them that lost loss-bearing tokens or their end.
    ended: rows whose last loss-bearing token is a special one (a model learns to stop from it).
    merged: rows with a token across the end of the prompt. ``named`` has the first sources of each.
    """

    sources: list[str]
    format: str
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    truncated: int = 0
    answers_cut: int = 0
    ended: int = 0
    merged: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped_samples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    named: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def note(self, what: str, source: str) -> None:
        """Counts one more row of ``what`` (the name of a field) and keeps its source."""
        setattr(self, what, getattr(self, what) + 1)
        kept = self.named.setdefault(what, [])
        if len(kept) < bad.KEPT:
            kept.append(source)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Examples of one or several sources, those of a source together.

    parts: (examples, weight) a source, in order. labels: names of the classes, in classification.
    """

    store: Store
    parts: tuple[tuple[int, float], ...]
    report: Report
    options: options.Options
    labels: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.store)


def load(
    sources: str | Path | Source | Sequence[Any],
    tokenizer: Any,
    opts: options.Options | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    separator: str | None = None,
    max_rows: int | None = None,
) -> Corpus:
    """The corpus of a path, a hub id, rows in memory (a list of dicts), or a list of paths or `Source` to mix.

    Args:
      tokenizer: of `transformers`.
      opts: see `options.Options`.
      columns, split, separator, max_rows: see `rows.read_rows`; max_rows counts a source.

    Raises:
      DataError: no usable row, or bad rows under the policy "error".
      ConfigError: options that do not fit the tokenizer or the format.
    """
    opts = options.Options() if opts is None else opts
    _check_columns(columns or {}, opts)
    rejects = bad.BadRows(opts.on_bad_row)
    mixed = _listed(sources)
    found = [
        rows.read_rows(s.path, rejects, columns=columns, split=split, separator=separator, max_rows=max_rows)
        for s in mixed
    ]
    opts = _resolved(opts, found)
    seen = sum(len(f) for f in found) + sum(rejects.skipped.values())
    report = Report([_name(s.path) for s in mixed], opts.format or "", seen)
    specials, reader = _ends(tokenizer, opts), virtual.reader(tokenizer, opts.inside)
    examples: list[Example] = []
    parts = []
    for source, one in zip(mixed, found, strict=True):
        before = len(examples)
        examples += _examples(one, reader, opts, rejects, report, specials)
        parts.append((len(examples) - before, source.weight))
        if len(examples) == before:
            raise errors.DataError(f"{_name(source.path)}: no usable rows. Skipped: {rejects.describe()}")
    report.skipped, report.skipped_samples = rejects.skipped, rejects.samples
    return Corpus(Store(examples), tuple(parts), report, opts, opts.labels)


def class_names(
    sources: Any,
    opts: options.Options,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    separator: str | None = None,
    max_rows: int | None = None,
) -> tuple[str, ...]:
    """The classes that `load` would find in the same sources, by their labels alone; bad lines are passed over.

    Raises:
      DataError: no rows, or none with labels.
      ConfigError: the classes are in another order than the head's (``opts.known``).
    """
    _check_columns(columns or {}, opts)
    more: dict[str, Any] = {"columns": columns, "split": split, "separator": separator, "max_rows": max_rows}
    found = [rows.read_rows(s.path, bad.BadRows("skip"), **more) for s in _listed(sources)]
    return _resolved(opts, found).labels or ()


def _check_columns(columns: Mapping[str, str], opts: options.Options) -> None:
    known = {*formats.FIELDS, *templates.fields_of(opts.template or "")}
    for ours in columns:
        if ours not in known:
            raise errors.ConfigError(
                f"data.columns names {ours!r}, which no format has (it maps our name to yours: "
                f"{{text: sentence}}). {errors.did_you_mean(ours, known)}"
            )


def _listed(sources: Any) -> list[Source]:
    if isinstance(sources, Source):
        return [sources]
    if isinstance(sources, str | Path) or (sources and isinstance(sources[0], Mapping)):
        return [Source(sources)]
    if not sources:
        raise errors.DataError("no source: expected a path, a hub id, or rows")
    return [s if isinstance(s, Source) else Source(s) for s in sources]


def _name(path: Any) -> str:
    return str(path) if isinstance(path, str | Path) else "rows"


def _resolved(opts: options.Options, found: list[list[Row]]) -> options.Options:
    """With the format and labels filled in from the rows."""
    kinds = {formats.detect(f[0].fields, f[0].source): f[0].source for f in found} if opts.format is None else {}
    if len(kinds) > 1:
        raise errors.DataError(f"sources of different formats: {kinds}. Set data.format, or rename fields")
    new: dict[str, Any] = {}
    if kinds:
        new["format"] = _fitting(next(iter(kinds)), opts)
    kind = new.get("format", opts.format)
    if (kind == "classification") != (opts.objective in options.LABELLED):
        raise errors.ConfigError(
            f"the rows have the format {kind!r}, the objective is {opts.objective!r}: classification goes with "
            f"{' or '.join(options.LABELLED)} (set objective.name, data.format or data.columns)"
        )
    if opts.objective == "masked_lm" and kind != "text":
        raise errors.ConfigError(f"masked_lm takes the format 'text', the rows have {kind!r}")
    if opts.template is not None and kind not in TEMPLATED:
        raise errors.ConfigError(
            f"data.template is set, and the rows have the format {kind!r}, which takes none; expected "
            f"{' or '.join(TEMPLATED)} (set data.format or data.columns, or leave the template out)"
        )
    if opts.truncation == "split" and kind != "text":
        raise errors.ConfigError(f"truncation 'split' is for the format 'text', the rows have {kind!r}")
    if kind == "classification":
        new["labels"] = opts.labels or labels.names([r for f in found for r in f], opts.known)
        labels.check_order(new["labels"], opts.known)
    return dataclasses.replace(opts, **new)


def _fitting(kind: str, opts: options.Options) -> str:
    """Labelled rows are texts too, for an objective on texts."""
    return "text" if kind == "classification" and opts.objective not in options.LABELLED else kind


def _ends(tokenizer: Any, opts: options.Options) -> frozenset[int]:
    added = [i for i, t in tokenizer.added_tokens_decoder.items() if t.special]
    eos = [] if opts.eos_token_id is None else [opts.eos_token_id]
    return frozenset([*tokenizer.all_special_ids, *added, *eos])


def _examples(
    found: list[Row],
    tokenizer: Any,
    opts: options.Options,
    rejects: bad.BadRows,
    report: Report,
    specials: frozenset[int],
) -> Iterator[Example]:
    for at in range(0, len(found), CHUNK):
        for made in formats.encode(found[at : at + CHUNK], tokenizer, opts, rejects):
            for example in finish(made, opts, rejects, report):
                _count(example, report, specials)
                yield example
        rejects.check()


def _count(example: Example, report: Report, specials: frozenset[int]) -> None:
    learned = np.flatnonzero(example.loss_weights)
    report.examples += 1
    report.tokens += len(example.tokens)
    report.loss_tokens += len(learned)
    report.ended += int(example.targets[learned[-1]]) in specials


def finish(made: formats.Encoded, opts: options.Options, rejects: bad.BadRows, report: Report) -> list[Example]:
    """A row's example: cut to max_length by ``opts.truncation``, shifted where targets are the next tokens.

    Empty where the row is bad; several where truncation is "split".
    """
    source, (ids, in_loss) = made.row.source, made[:2]
    if len(ids) > opts.room and opts.truncation != "split":
        if opts.truncation != "end" or (opts.template and made.label is not None):
            message = f"too long: {len(ids)} tokens, expected at most max_length={opts.max_length}"
            if opts.front:
                message += f" less {len(opts.front)} virtual tokens"
            advice = " (data.truncation=end cuts such rows)" if opts.truncation == "error" else ""
            rejects.add(bad.LONG, source, message + advice, skip=opts.truncation == "skip")
            return []
        lost = any(in_loss[opts.room :])
        ids, in_loss = ids[: opts.room], in_loss[: opts.room]
    else:
        lost = False
    if (inside := opts.inside) and tuple(i for i in ids if i in inside) != inside:
        message = f"the template's {len(inside)} virtual tokens are not all left within max_length={opts.max_length}"
        rejects.add(bad.LONG, source, message)
        return []
    example = _example(made, ids, in_loss, opts)
    if not example.loss_weights.any():
        why = " after it was cut to max_length" if lost else ""
        rejects.add(bad.NO_LOSS, source, f"no token in the loss{why}: {len(ids)} tokens, all of them masked")
        return []
    if made.cut or len(ids) < len(made.ids):
        report.note("truncated", source)
    if lost:
        report.note("answers_cut", source)
    if made.merged:
        report.note("merged", source)
    return _split(example, opts.room)


def _example(made: formats.Encoded, ids: list[int], in_loss: list[bool], opts: options.Options) -> Example:
    if opts.objective == "causal_lm":
        return shifted(ids, in_loss, made.row.source, opts.inside)
    tokens, weights = np.asarray(ids, np.int32), np.asarray(in_loss, np.float32)
    targets = tokens if made.label is None else np.where(weights > 0, made.label, 0).astype(np.int32)
    types = None if made.token_types is None else np.asarray(made.token_types[: len(ids)], np.int32)
    return Example(tokens, targets, weights, made.row.source, types)


def _split(example: Example, size: int) -> list[Example]:
    parts = [(i, i + size) for i in range(0, len(example.tokens), size)]
    cut = [
        Example(example.tokens[i:j], example.targets[i:j], example.loss_weights[i:j], example.source) for i, j in parts
    ]
    return [c for c in cut if c.loss_weights.any()] if len(cut) > 1 else [example]
