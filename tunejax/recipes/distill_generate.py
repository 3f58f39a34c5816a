"""`tunejax distill-generate CONFIG --output FILE`: the config's rows with what its teacher writes instead of an answer.

Training on the file is distillation of whole sequences (Kim and Rush, 2016, arXiv:1606.07947): the student sees text
alone, so it may be of any family and tokenizer. The same command again goes on where a killed one stopped.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tunejax.config import load, locate, schema
from tunejax.core import errors
from tunejax.data import bad, completions, virtual
from tunejax.data import rows as sources
from tunejax.evaluate import exact_match
from tunejax.generate import decode, sampling
from tunejax.recipes import artefact, folder, rows, runtime, samples, teacher
from tunejax.train import progress

SIZE = 32
"""Prompts at a time unless train.eval_batch_size says otherwise."""


class Written(NamedTuple):
    """rows: in the file. unfinished: answers that were cut at generation.max_new_tokens; left out unless asked for."""

    rows: int
    unfinished: int


def main(args: argparse.Namespace) -> None:
    """Writes the file, and says how many rows it has."""
    config = load.load(args.config, args.overrides)
    found = write(config, Path(args.output), count=args.samples, keep_unfinished=args.keep_unfinished)
    print(f"{args.output}: {found.rows} rows")
    if found.unfinished:
        what = "kept" if args.keep_unfinished else "left out (--keep-unfinished keeps them)"
        limit = config.generation.max_new_tokens
        print(f"  {found.unfinished} answers did not end within generation.max_new_tokens={limit}: {what}")


def write(config: schema.Config, output: Path, *, count: int = 1, keep_unfinished: bool = False) -> Written:
    """Writes the rows to ``output`` as JSON Lines, under our names of fields, in order.

    Args:
      count: answers to each prompt; more than one needs generation.temperature.

    Raises:
      ConfigError: no teacher, one that writes no text, rows without prompts, or a file that is there.
    """
    name = _check(config, output, count)
    runtime.begin()
    if jax.process_count() > 1:
        raise errors.ConfigError("tunejax distill-generate runs in one process, with as many devices as it has")
    mesh = [f"mesh.{axis}={size}" for axis, size in config.mesh.model_dump().items()]
    tuned = artefact.open_run(name, mesh) if artefact.is_run(name) else artefact.plain(name, config.model.dtype)
    if not _writes(tuned):
        raise errors.ConfigError(f"distill.teacher {name} writes no text: name a decoder with an lm head")
    train = rows.read(
        rows.answers_only(config), tuned.parts.tokenizer, tuned.parts.model_config.kind, tuned.parts.prompt
    ).train
    assert train is not None
    if train.report.format not in samples.ANSWERED:
        raise errors.ConfigError(
            f"the rows have the format {train.report.format!r}; a teacher answers prompts: "
            f"{' or '.join(samples.ANSWERED)}"
        )
    fields = _fields(config)
    prompts = [(fields[e.source], exact_match.task(e.tokens, e.targets, e.loss_weights, tuned.parts.tokenizer).prompt)
               for e in train.store]  # fmt: skip
    if len(_front(config, tuned)) != len(tuned.parts.front):
        raise errors.ConfigError(
            f"distill.teacher {name} was tuned with data.template {tuned.parts.config.data.template!r}, where its "
            f"virtual tokens stand; this data.template is {config.data.template!r}: expected the same"
        )
    _check_room(config, tuned, max(len(prompt) for _, prompt in prompts))
    half = output.with_name(f".{output.name}.part")
    about = _about(config, name, train.store.digest, count)
    done = _begun(half, about)
    size = config.train.eval_batch_size or SIZE
    batches = -(-len(prompts) // size)
    with (
        half.open("a", encoding="utf-8") as file,
        progress.Progress(len(prompts), done * size, shown=config.train.progress, what="distill-generate") as bar,
    ):
        for at in range(done, batches):
            some = prompts[at * size : (at + 1) * size]
            said = list(_answers(config, tuned, some, prompts, size, at, count))
            file.write(json.dumps(said, ensure_ascii=False) + "\n")
            file.flush()
            bar.step(at * size + len(some))
    lines: list[Any] = folder.read_rows(half)[1:]
    found = [pair for batch in lines for pair in batch]
    kept = [row for row, finished in found if finished or keep_unfinished]
    folder.write_rows(output, kept)
    half.unlink()
    return Written(len(kept), sum(not finished for _, finished in found))


def _check(config: schema.Config, output: Path, count: int) -> str:
    """The teacher's name."""
    section = config.distill
    if section is None or section.teacher is None or section.teacher == "base":
        raise errors.ConfigError("distill-generate needs distill.teacher: a run, a model folder or a hub id")
    if config.objective.name != "causal_lm":
        raise errors.ConfigError(f"distill-generate goes with objective.name: causal_lm, not {config.objective.name}")
    if count < 1 or (count > 1 and config.generation.temperature == 0):
        raise errors.ConfigError(
            f"--samples is {count}; expected 1 or more, and generation.temperature above 0 for more than one"
        )
    if output.exists():
        raise errors.ConfigError(f"{output} is there already: name another file")
    return teacher.place(section.teacher)


def _writes(tuned: artefact.Tuned) -> bool:
    return samples.generates(tuned.parts) and tuned.parts.model.cache is not None


def _check_room(config: schema.Config, tuned: artefact.Tuned, longest: int) -> None:
    g, parts = config.generation, tuned.parts
    taken = len(_front(config, tuned)) + parts.method.prefix + longest
    if taken + g.max_new_tokens > parts.model_config.max_positions:
        raise errors.ConfigError(
            f"the longest prompt and generation.max_new_tokens={g.max_new_tokens} are {taken + g.max_new_tokens} "
            f"tokens; the teacher has {parts.model_config.max_positions} positions"
        )


def _front(config: schema.Config, tuned: artefact.Tuned) -> tuple[int, ...]:
    """The teacher's virtual tokens that stand before every prompt, in the template of the rows."""
    return virtual.front(config.data.template, tuned.parts.prompt)


def _fields(config: schema.Config) -> dict[str, dict[str, Any]]:
    """The rows as they stand in the files, by source."""
    d, rejects = config.data, bad.BadRows(config.data.on_bad_row)
    found = (
        sources.read_rows(locate.locate(s.path), rejects, columns=d.columns, split=d.split, separator=d.separator,
                          max_rows=d.max_rows)
        for s in d.path
    )  # fmt: skip
    return {row.source: row.fields for some in found for row in some}


def _about(config: schema.Config, name: str, data: str, count: int) -> dict[str, Any]:
    """What the answers depend on."""
    return {
        "teacher": name,
        "data": data,
        "seed": config.seed,
        "samples": count,
        "size": config.train.eval_batch_size or SIZE,
        "generation": config.generation.model_dump(exclude={"prompts", "num_samples"}),
    }


def _begun(half: Path, about: dict[str, Any]) -> int:
    """How many batches an earlier command wrote of the same; anything else is given up, and a half line cut off."""
    half.parent.mkdir(parents=True, exist_ok=True)
    lines = folder.read_rows(half) if half.is_file() else []
    if not lines or lines[0] != about:
        lines = [about]
    folder.write_rows(half, lines)
    return len(lines) - 1


def _answers(
    config: schema.Config, tuned: artefact.Tuned, some: list[Any], all_: list[Any], size: int, at: int, count: int
) -> Iterator[tuple[dict[str, Any], bool]]:
    """(row, whether the answer ended) for a batch of (fields, prompt), the answers to a prompt one after another."""
    g, parts = config.generation, tuned.parts
    width = -(-max(len(prompt) for _, prompt in all_) // exact_match.ROUND) * exact_match.ROUND
    how = sampling.Sampling(temperature=g.temperature, top_k=g.top_k, top_p=g.top_p, min_p=g.min_p)
    tokens, mask = completions.left_padded([p for _, p in some] + [[0]] * (size - len(some)), width)
    stops = samples.stop_tokens(parts)
    key = jax.random.fold_in(jax.random.key(config.seed), at)
    new = [
        np.asarray(
            decode.generate(
                parts.model, tuned.params, tokens, mask, max_new_tokens=g.max_new_tokens, sampling=how,
                stop_tokens=stops, key=jax.random.fold_in(key, i),
                prompt=_front(config, tuned),
            )
        )
        for i in range(count)
    ]  # fmt: skip
    for i, (fields, prompt) in enumerate(some):
        for drawn in new:
            text = _text(parts.tokenizer, prompt, completions.until_stop(drawn[i], stops))
            yield answered(fields, text), bool(np.isin(drawn[i], stops).any())


def _text(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """What is said after the prompt, with the space that may stand between."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)


def answered(fields: dict[str, Any], text: str) -> dict[str, Any]:
    """A row with another answer: its completion, or the first turn of the assistant, after which nothing follows."""
    if "messages" not in fields:
        return {**fields, "completion": text}
    turns = fields["messages"]
    first = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return {**fields, "messages": [*turns[:first], {"role": "assistant", "content": text.strip()}]}
