"""`tunejax generate --adapters RUN RUN ...`: prompts of one batch, each answered by an adapter of its own."""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import combine, errors
from tunejax.core.combine import Factors
from tunejax.core.method import Method
from tunejax.data import completions
from tunejax.evaluate import exact_match
from tunejax.generate import decode, mixed, sampling
from tunejax.methods import registry
from tunejax.recipes import artefact, combined, generate, merge, samples


class Served(NamedTuple):
    """Several runs as one model: ``model`` reads what ``chosen`` makes of rows' choices."""

    runs: list[artefact.Tuned]
    model: Any
    adapters: mixed.Adapters

    def chosen(self, ids: Any) -> Any:
        """Parameters of a batch whose row i has the adapter of run ``ids[i]``."""
        return mixed.chosen(self.adapters, ids)


def serve(runs: list[artefact.Tuned]) -> Served:
    """The runs, on one base, as one model. Where what they add are products, sites and ranks may differ.

    Raises:
      ConfigError: runs of methods whose arrays do not stack, or with frozen heads of their own.
    """
    combined.check_heads(runs)
    specs = [combined.specs_of(r.parts.config) for r in runs]
    alike = all(s == specs[0] for s in specs)
    first = runs[0].parts
    if alike:
        edits = [combined.rewritten(r) for r in runs]
        if not all(combined.equal(e, edits[0]) for e in edits):
            raise errors.ConfigError(f"{first.method.name}: each run rewrote the base in its own way; serve them apart")
        method, base = first.method, runs[0].base
        trains, states = [r.train for r in runs], [r.state for r in runs]
    else:
        method, trains = _products(runs, specs)
        base, states = runs[0].loaded.params, [{} for _ in runs]
    return Served(runs, mixed.model_of(first.model, method), mixed.stacked(base, trains, states))


def _products(runs: list[artefact.Tuned], specs: list[list[dict[str, Any]]]) -> tuple[Method, list[Any]]:
    """(the plain method of all their sites and the largest rank, the arrays of each run for it)."""
    found = []
    for run, own in zip(runs, specs, strict=True):
        called = [registry.resolved(s) for s in own]
        if len(own) > 1 or not hasattr(called[0][2], "PRODUCT") or len({artefact.cuts(r.parts) for r in runs}) > 1:
            raise errors.ConfigError(
                f"{', '.join(r.parts.method.name for r in runs)}: rows of one batch may differ in their arrays, and "
                "where each run has one low-rank product, in rank and sites; what else differs needs its own batch"
            )
        _, arguments, module = called[0]
        product, scale = module.PRODUCT, module.PRODUCT.scale(arguments)
        parts = {p: product.factors({**a, **run.state.get(p, {})}) for p, a in run.train.items()}
        found.append({p: Factors(f.a, scale * f.b) for p, f in parts.items()})
    rank = max(f.a.shape[-1] for own in found for f in own.values())
    sites = list(dict.fromkeys(p for own in found for p in own))
    like = {p: next(own[p] for own in found if p in own) for p in sites}
    trains = [{p: combine.widened(own.get(p) or _nothing(like[p]), rank)._asdict() for p in sites} for own in found]
    layers = {"layers": arguments["layers"]} if arguments.get("layers") is not None else {}
    return registry.build({**product.plain(rank), "targets": [f"/{p}" for p in sites], **layers}), trains


def _nothing(like: Factors) -> Factors:
    return Factors(jnp.zeros_like(like.a), jnp.zeros_like(like.b))


def main(args: argparse.Namespace, how: sampling.Sampling, prompts: list[str]) -> None:
    """Prints each prompt with the adapter that answers it, and its text.

    Raises:
      ConfigError: not one adapter for each prompt, or runs that do not go together.
    """
    ids = args.adapter_ids if args.adapter_ids is not None else list(range(len(args.adapters)))
    if len(ids) != len(prompts):
        raise errors.ConfigError(
            f"{len(prompts)} prompts and {len(ids)} adapters for them: give --adapter-ids, a number for each prompt"
        )
    served = serve(merge.opened(args.adapters, [f"model.path={args.model}"] if args.model else None))
    check_alike(served.runs, args)
    how = generate.filled(how, args, served.runs[0])
    for text, which, prompt in zip(texts(served, prompts, ids, how, args), ids, prompts, strict=True):
        print(f"> [{args.adapters[which]}] {prompt}\n{text}")


FLAGS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
"""What a flag says for all rows of a batch; where none does, the runs must have one value."""


def check_alike(runs: list[artefact.Tuned], args: argparse.Namespace) -> None:
    """Raises ConfigError where the runs want to be run in other ways, of which one batch has one."""
    wanted: dict[str, Callable[[artefact.Tuned], Any]] = {"model.dtype": lambda r: r.parts.config.model.dtype}
    for name in FLAGS:
        if getattr(args, name) is None:
            wanted[f"generation.{name}"] = functools.partial(_generation, name)
    wanted["stop tokens"] = lambda r: samples.stop_tokens(r.parts)
    for key, of in wanted.items():
        found = [of(r) for r in runs]
        if any(x != found[0] for x in found):
            flag = key.removeprefix("generation.")
            advice = f"give --{flag.replace('_', '-')}" if flag in FLAGS else "serve them apart"
            values = ", ".join(map(str, found))
            raise errors.ConfigError(f"the runs differ in {key} ({values}), of which a batch has one: {advice}")


def _generation(name: str, run: artefact.Tuned) -> Any:
    return getattr(run.parts.config.generation, name)


def texts(
    served: Served, prompts: list[str], ids: list[int], how: sampling.Sampling, args: argparse.Namespace
) -> Iterator[str]:
    """What adapter ``ids[i]`` writes after prompt i, each prompt in the form that its run was trained on."""
    params = served.chosen(ids)
    first = served.runs[0].parts
    if not samples.generates(first):
        raise errors.ConfigError(f"the runs are tuned for {first.config.objective.name}; they write no text")
    tokens = [generate.ids(served.runs[i], p, args) for i, p in zip(ids, prompts, strict=True)]
    count = args.max_new_tokens or first.config.generation.max_new_tokens
    left = min(samples.room(served.runs[i].parts, t) for i, t in zip(ids, tokens, strict=True))
    tokens = [[*served.runs[i].parts.front, *t] for i, t in zip(ids, tokens, strict=True)]
    width = max(map(len, tokens))
    stops = samples.stop_tokens(first)
    new = decode.generate(
        served.model, params, *exact_match.left_padded(tokens, width), max_new_tokens=min(count, left), sampling=how,
        stop_tokens=stops, key=jax.random.key(args.seed),
    )  # fmt: skip
    for i, row in zip(ids, np.asarray(new), strict=True):
        tokenizer = served.runs[i].parts.tokenizer
        yield tokenizer.decode(completions.until_stop(row, stops), skip_special_tokens=True)
