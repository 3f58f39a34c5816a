"""`tunejax generate MODEL|RUN --prompt TEXT`: text as it is drawn."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import jax

from tunejax.core import errors
from tunejax.generate import decode, sampling, stop
from tunejax.recipes import artefact, runtime, samples


def main(args: argparse.Namespace) -> None:
    """Streams what the model writes after each prompt; several prompts one after another."""
    if args.model is None and not args.adapters:
        raise errors.ConfigError("generate needs a model folder, a hub id or a run folder, or --adapters RUN RUN ...")
    if args.adapter_ids is not None and not args.adapters:
        raise errors.ConfigError(
            "--adapter-ids says which of --adapters answers each prompt; give --adapters RUN RUN ..."
        )
    how = settings(args)
    prompts = args.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise errors.ConfigError("no prompt: give --prompt TEXT, or lines on standard input")
    runtime.begin()
    if args.adapters:
        from tunejax.recipes import mixed

        mixed.main(args, how, prompts)
        return
    tuned = artefact.open_run(args.model) if artefact.is_run(args.model) else artefact.plain(args.model, args.dtype)
    if not samples.generates(tuned.parts):
        raise errors.ConfigError(f"{args.model} is tuned for {tuned.parts.config.objective.name}; it writes no text")
    how = filled(how, args, tuned)
    count = args.max_new_tokens or tuned.parts.config.generation.max_new_tokens
    for i, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"> {prompt}")
        for piece in text(
            tuned, ids(tuned, prompt, args), how, count, jax.random.fold_in(jax.random.key(args.seed), i)
        ):
            print(piece, end="", flush=True)
        print()


def settings(args: argparse.Namespace) -> sampling.Sampling:
    """The flags as a `Sampling`; what was not given is filled in later. Raises ConfigError on one out of range."""
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise errors.ConfigError(f"--max-new-tokens is {args.max_new_tokens}; expected 1 or more")
    how = sampling.Sampling(args.temperature or 0.0, args.top_k, args.top_p, args.min_p)
    sampling.check(how)
    return how


def filled(how: sampling.Sampling, args: argparse.Namespace, tuned: artefact.Tuned) -> sampling.Sampling:
    """``how`` with what no flag gave as the run's config has it."""
    names = [n for n in ("temperature", "top_k", "top_p", "min_p") if getattr(args, n) is None]
    how = how._replace(**{n: getattr(tuned.parts.config.generation, n) for n in names})
    sampling.check(how)
    return how


def ids(tuned: artefact.Tuned, prompt: str, args: argparse.Namespace) -> list[int]:
    """The tokens of a prompt, in the form that the run was trained on unless a flag says otherwise.

    Raises:
      ConfigError: it is empty, or longer than the model has positions for, or the run's template has other fields.
    """
    tokenizer, data = tuned.parts.tokenizer, tuned.parts.config.data
    if len(tuned.parts.front) < len(tuned.parts.prompt) and (args.chat or args.raw):
        raise errors.ConfigError(
            f"the run's data.template places {len(tuned.parts.prompt)} virtual tokens; --chat and --raw leave it out"
        )
    turns = args.chat or data.format == samples.CHATS
    found = samples.unended(tokenizer, prompt) if args.raw else samples.formed(tuned.parts, prompt, turns)
    samples.check_room(tuned.parts, found, "the prompt")
    return found


def text(tuned: artefact.Tuned, prompt: list[int], how: sampling.Sampling, count: int, key: Any) -> Iterator[str]:
    """Pieces of the generated text as they become certain."""
    parts = tuned.parts
    stops = samples.stop_tokens(parts)
    shown = stop.TextStream(parts.tokenizer, stop_tokens=stops)
    for row in decode.stream(
        parts.model,
        tuned.params,
        [prompt],
        max_new_tokens=min(count, samples.room(parts, prompt)),
        sampling=how,
        stop_tokens=stops,
        key=key,
        prompt=parts.front,
    ):
        yield shown.push(int(row[0]))
    yield shown.finish()
