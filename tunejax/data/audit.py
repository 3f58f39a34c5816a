"""What a model will see: tokens of sample rows with what is learned and where rows are cut, and totals over all."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from tunejax.data import packing
from tunejax.data.corpus import Corpus
from tunejax.data.example import Example
from tunejax.data.pipeline import Loader

BINS = 10


class TokenView(NamedTuple):
    """A token as text. in_loss: predicting it counts. special: of the tokenizer's special tokens. end: it is the
    end-of-sequence token. label: what its position predicts, in classification."""

    id: int
    text: str
    in_loss: bool
    special: bool = False
    end: bool = False
    label: str | None = None


class RowView(NamedTuple):
    """A row of a batch: its segments, one an example, between which packing cuts, and padding after them."""

    sources: tuple[str, ...]
    segments: tuple[tuple[TokenView, ...], ...]
    padding: int = 0


def example_view(example: Example, tokenizer: Any, corpus: Corpus) -> tuple[TokenView, ...]:
    """The tokens of an example; with next-token targets the last target comes as a token of its own."""
    ids, flags = example.tokens.tolist(), (example.loss_weights > 0).tolist()
    labels: list[str | None] = [None] * len(ids)
    if corpus.options.objective == "causal_lm":
        ids, flags, labels = [*ids, int(example.targets[-1])], [False, *flags], [None, *labels]
    elif corpus.labels:
        labels = [corpus.labels[t] if f else None for t, f in zip(example.targets.tolist(), flags, strict=True)]
    eos = tokenizer.eos_token_id if corpus.options.eos_token_id is None else corpus.options.eos_token_id
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    out: list[TokenView] = []
    inside = corpus.options.inside
    for soft, run in groupby(zip(ids, flags, labels, strict=True), lambda token: token[0] in inside):
        some, learned, names = zip(*run, strict=True)
        if soft:
            out.append(virtual_view(some, any(learned), next(filter(None, names), None)))
            continue
        texts = token_texts(tokenizer, list(some))
        out += [
            TokenView(i, t, f, i in special, i == eos, n)
            for i, t, f, n in zip(some, texts, learned, names, strict=True)
        ]
    return tuple(out)


def virtual_view(ids: Sequence[int], in_loss: bool = False, label: str | None = None) -> TokenView:
    """Virtual tokens that follow each other, as one."""
    return TokenView(
        ids[0], f"<{len(ids)} virtual token{'s' if len(ids) > 1 else ''}>", in_loss, special=True, label=label
    )


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Each id as the text that it stands for, spaces included."""
    names = tokenizer.convert_ids_to_tokens(ids)
    return [n.replace("▁", " ") if n and "▁" in n else tokenizer.decode([i]) for i, n in zip(ids, names, strict=True)]


def sample_rows(loader: Loader, tokenizer: Any, count: int = 5) -> list[RowView]:
    """The first rows of the loader's first batches, as they are packed and padded. No state changes."""
    out: list[RowView] = []
    prompt = loader.plan.settings.prompt
    before = [virtual_view(prompt)] if prompt else []
    step = 0
    while len(out) < count and step < (loader.num_steps or count):
        epoch, bins = loader.plan.batch(step)
        length = loader.length(step)
        for pieces in bins[: count - len(out)]:
            examples = [_piece(loader, p, epoch) for p in pieces]
            out.append(
                RowView(
                    tuple(e.source for e in examples),
                    tuple((*before, *example_view(e, tokenizer, loader.plan.corpus)) for e in examples),
                    length - loader.plan.settings.size(pieces),
                )
            )
        step += 1
    return out


def _piece(loader: Loader, piece: packing.Piece, epoch: int) -> Example:
    e, part = loader.example(piece.example, epoch), slice(piece.start, piece.stop)
    types = None if e.token_types is None else e.token_types[part]
    return Example(e.tokens[part], e.targets[part], e.loss_weights[part], e.source, types)


def totals(corpus: Corpus, loader: Loader | None = None) -> dict[str, Any]:
    """JSON-able counts: the corpus's report, shares, a histogram of lengths, and how full the rows of an epoch are."""
    report, lengths = corpus.report, corpus.store.lengths
    out = report.to_dict()
    out["loss_share"] = report.loss_tokens / max(report.tokens, 1)
    out["ended_share"] = report.ended / max(report.examples, 1)
    out["lengths"] = {
        "mean": float(lengths.mean()),
        "longest": int(lengths.max(initial=0)),
        "histogram": histogram(lengths),
    }
    if corpus.labels:
        found = np.bincount(corpus.store.targets[corpus.store.loss_weights > 0], minlength=len(corpus.labels))
        out["labels"] = {name: int(n) for name, n in zip(corpus.labels, found, strict=True)}
    if loader is not None:
        batches = loader.plan.batches(0)
        positions = sum(loader.length(s) for s in range(batches)) * loader.plan.settings.batch_size
        out["batches"] = batches
        out["filled_share"] = sum(map(loader.plan.settings.size, loader.plan.rows(0))) / positions
    return out


def histogram(lengths: np.ndarray) -> list[list[int]]:
    """[from, to, how many] in at most `BINS` equal ranges of whole numbers, ends included."""
    width = max(-(-int(lengths.max(initial=1)) // BINS), 1)
    counts = np.bincount((np.maximum(lengths, 1) - 1) // width)
    return [[i * width + 1, (i + 1) * width, int(n)] for i, n in enumerate(counts)]


def warnings(found: Mapping[str, Any]) -> list[str]:
    """Sentences on what in the `totals` commonly makes a bad model."""
    named, n = found["named"], found["examples"]
    out = []
    if found["answers_cut"]:
        where = ", ".join(named["answers_cut"])
        out.append(
            f"{found['answers_cut']} of {n} rows lose the end of what they teach at max_length ({where}): a model "
            "tuned on them learns not to stop. Raise data.max_length, or leave such rows out"
        )
    if found["ended_share"] < 1 and found["format"] in ("prompt_completion", "messages"):
        missing = n - found["ended"]
        out.append(f"{missing} of {n} rows do not end with an end-of-sequence token in the loss")
    if found["merged"]:
        where = ", ".join(named["merged"])
        out.append(
            f"{found['merged']} of {n} rows have a token that reaches from the prompt into the completion ({where}): "
            "end prompts without a space, and begin completions with one"
        )
    return out


def render_totals(found: Mapping[str, Any]) -> str:
    """The totals as lines of text, warnings last."""
    lines = [
        f"sources    {', '.join(found['sources'])}",
        f"format     {found['format']}",
        f"rows       {found['rows']} read, {found['examples']} examples",
        f"skipped    {', '.join(f'{n} {reason}' for reason, n in found['skipped'].items()) or 'none'}",
        f"tokens     {found['tokens']} ({found['lengths']['mean']:.1f} a row, longest {found['lengths']['longest']})",
        f"in loss    {found['loss_tokens']} tokens ({found['loss_share']:.1%})",
        f"ended      {found['ended']} rows ({found['ended_share']:.1%}) learn to stop",
        f"truncated  {found['truncated']} rows, of which {found['answers_cut']} lose the end of what they teach",
    ]
    if "labels" in found:
        lines.append("labels     " + ", ".join(f"{k}: {n}" for k, n in found["labels"].items()))
    if "batches" in found:
        lines.append(f"batches    {found['batches']} an epoch, {found['filled_share']:.1%} of positions filled")
    lines += ["lengths", *_bars(found["lengths"]["histogram"])]
    lines += [f"sample     {s}" for kept in found["skipped_samples"].values() for s in kept]
    return "\n".join([*lines, *(f"warning: {w}" for w in warnings(found))])


def _bars(histogram: list[list[int]]) -> Iterator[str]:
    most = max((n for *_, n in histogram), default=1) or 1
    for low, high, n in histogram:
        yield f"  {low:>6} to {high:<6} {n:>8} {'#' * round(30 * n / most)}"


def render_text(row: RowView) -> str:
    """A row without colour: what is in the loss stands in [[ ]], "|cut|" between packed examples."""
    parts = []
    for segment in row.segments:
        text, open_ = "", False
        for token in segment:
            if token.in_loss != open_:
                text, open_ = text + ("[[" if token.in_loss else "]]"), token.in_loss
            text += token.text + (f" -> {token.label}" if token.label else "")
        parts.append(text + ("]]" if open_ else ""))
    tail = f" |{row.padding} padding|" if row.padding else ""
    return f"{', '.join(row.sources)}\n" + " |cut| ".join(parts) + tail


def render_rich(row: RowView) -> Any:
    """A row as a `rich.text.Text`: in the loss green, the end-of-sequence token in it bold and reversed, the rest dim,
    cuts magenta. Special tokens are underlined."""
    from rich.text import Text

    out = Text(", ".join(row.sources) + "\n", style="bold")
    for i, segment in enumerate(row.segments):
        if i:
            out.append(" ┃cut┃ ", style="not bold magenta")
        for token in segment:
            style = "not bold green" if token.in_loss else "not bold dim"
            if token.end and token.in_loss:
                style = "bold reverse green"
            out.append(token.text, style=style + (" underline" if token.special else ""))
            if token.label:
                out.append(f" -> {token.label} ", style="bold reverse green")
    if row.padding:
        out.append(f" ┃{row.padding} padding┃", style="not bold dim magenta")
    return out


LEGEND = "green: in the loss; reversed: the end token in the loss; dim: seen, not learned; underlined: special; ┃cut┃"
