"""What a model says and scores on the held-out rows, before and after a run."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tunejax.config import schema
from tunejax.core import errors
from tunejax.core.method import Context
from tunejax.data import chat, completions, formats, templates, virtual
from tunejax.data.corpus import Corpus
from tunejax.data.options import LABELLED
from tunejax.evaluate import exact_match, scores
from tunejax.interop import hf
from tunejax.recipes import assemble, folder, rows
from tunejax.train import evaluation
from tunejax.train.state import TrainState
from tunejax.train.step import Step

CHATS = "messages"
ANSWERED = ("prompt_completion", CHATS)
"""Formats of rows that have a prompt."""


class Judge(NamedTuple):
    """What is measured, and on what: the same before and after."""

    parts: assemble.Parts
    step: Step
    rows: rows.Rows
    batches: Callable[[], Iterable] | None

    def __call__(self, state: TrainState, base: Any, out: Path, name: str) -> dict[str, float]:
        """Scores; writes them and the samples as ``out/samples/<name>.json`` and ``.jsonl``."""
        found: dict[str, float] = {}
        if self.batches is not None:
            found = evaluation.evaluate(self.step, state, base, self.batches())
            if self.parts.config.objective.name not in LABELLED:
                found = scores.with_perplexity(found)
        params = self.parts.method.bind(base, state.train, state.state, Context())
        said = list(self.answers(params)) if single_process() else []
        if said and wants_match(self.parts.config, self.rows):
            found["exact_match"] = float(np.mean([a.correct for a in said]))
        said += [exact_match.Answer(p, "", a, False) for p, a in self.free(params)]
        if jax.process_index() == 0:
            kept = (
                said if wants_match(self.parts.config, self.rows) else said[: self.parts.config.generation.num_samples]
            )
            folder.write_rows(out / "samples" / f"{name}.jsonl", [a._asdict() for a in kept])
            folder.write_json(out / "samples" / f"{name}.json", found)
        return found

    def answers(self, params: Any) -> Iterable[exact_match.Answer]:
        """What it generates for the held-out prompts."""
        config = self.parts.config
        match = wants_match(config, self.rows)
        limit = config.evaluation.max_rows if match else config.generation.num_samples
        if (
            not limit
            or not generates(self.parts)
            or self.rows.held_out is None
            or (config.generation.prompts and not match)
        ):
            return []
        if self.rows.held_out.report.format not in ANSWERED:
            return []
        tokenizer, asked = self.parts.tokenizer, self._asked(self.rows.held_out)
        examples = [asked.store[i] for i in range(min(limit, len(asked)))]
        stops = stop_tokens(self.parts)
        tasks = [exact_match.task(e.tokens, e.targets, e.loss_weights, tokenizer, stops) for e in examples]
        size = max(1, min(32, len(tasks)))
        return exact_match.answers(generator(self.parts, params), tasks, tokenizer, batch_size=size)

    def _asked(self, held_out: Corpus) -> Corpus:
        """The held-out rows with the answers alone in the loss, which tells prompts from answers."""
        if held_out.options.answers_only:
            return held_out
        config, parts = rows.answers_only(self.parts.config), self.parts
        again = rows.read_held_out(config, parts.tokenizer, parts.model_config.kind, parts.prompt).held_out
        assert again is not None
        return again

    def free(self, params: Any) -> list[tuple[str, str]]:
        """What it generates for the prompts of the config."""
        prompts = self.parts.config.generation.prompts
        if not prompts or not generates(self.parts) or not single_process():
            return []
        tokenizer = self.parts.tokenizer
        ids = [formed(self.parts, p, turns=self.rows.format == CHATS) for p in prompts]
        width = -(-max(map(len, ids)) // exact_match.ROUND) * exact_match.ROUND
        new = generator(self.parts, params)(*completions.left_padded(ids, width))
        return [(p, tokenizer.decode(said, skip_special_tokens=True)) for p, said in zip(prompts, new, strict=True)]


def formed(parts: assemble.Parts, prompt: str, turns: bool = False) -> list[int]:
    """The tokens of a prompt in the form of the run's rows: in their template, if they have one.

    turns: they are chats, and the prompt is a user's turn.

    Raises:
      ConfigError: their template has fields that no prompt fills.
    """
    template = parts.config.data.template
    if turns:
        chat.template_of(parts.tokenizer)
        said = [{"role": "user", "content": prompt}]
        made = parts.tokenizer.apply_chat_template(said, tokenize=True, add_generation_prompt=True, return_dict=True)
        return list(made["input_ids"])
    if not template:
        return unended(parts.tokenizer, prompt)
    others = [name for name in templates.fields_of(template) if name != "prompt"]
    if others:
        raise errors.ConfigError(
            f"data.template has the field {{{others[0]}}}, which a prompt alone does not fill; expected {{prompt}} and "
            "no other. tunejax generate --raw takes the whole text as it is"
        )
    inside = parts.prompt[len(parts.front) :]
    text = templates.filled(template, {"prompt": prompt}.get)
    return unended(virtual.reader(parts.tokenizer, inside), text)


def unended(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that goes on: without those that the tokenizer puts behind every text."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[: len(ids) - formats.closing(tokenizer)]


def check_room(parts: assemble.Parts, prompt: list[int], name: str) -> None:
    """Raises ConfigError where a prompt is empty, or leaves the model no position to write to."""
    if not prompt:
        raise errors.ConfigError(f"{name} is empty: it needs one token at least")
    if room(parts, prompt) < 1:
        taken, limit = taken_before(parts), parts.model_config.max_positions
        beside = f", {taken} of them taken by {parts.method.name}" if taken else ""
        raise errors.ConfigError(f"{name} has {len(prompt)} tokens; the model has {limit} positions{beside}")


def taken_before(parts: assemble.Parts) -> int:
    """Positions that the method takes before the prompt."""
    return len(parts.front) + parts.method.prefix


def room(parts: assemble.Parts, prompt: list[int]) -> int:
    """Positions that are left after the prompt."""
    return parts.model_config.max_positions - taken_before(parts) - len(prompt)


def before(judge: Judge, state: TrainState, base: Any, out: Path) -> dict[str, float]:
    """The scores of the untuned model: measured, or, where the run is resumed, as they were measured then."""
    kept = out / "samples" / "before.json"
    if kept.is_file():
        return folder.read_numbers(kept)
    return judge(state, base, out, "before")


def generator(parts: assemble.Parts, params: Any) -> Callable[[Any, Any], list[list[int]]]:
    """(tokens, attention_mask [batch, length]) -> what is said after each row, by the config's generation section.

    It ends before the first stop token, and where the model has no further position. What is drawn of a row depends on
    the seed, on how often this was called before, and on its place in the batch.
    """
    from tunejax.generate import decode, sampling

    g = parts.config.generation
    how = sampling.Sampling(temperature=g.temperature, top_k=g.top_k, top_p=g.top_p, min_p=g.min_p)

    stops = stop_tokens(parts)
    limit = parts.model_config.max_positions - taken_before(parts)
    calls = itertools.count()

    def generate(tokens: Any, mask: Any) -> list[list[int]]:
        new = decode.generate(
            parts.model,
            params,
            tokens,
            mask,
            max_new_tokens=g.max_new_tokens,
            sampling=how,
            stop_tokens=stops,
            key=jax.random.fold_in(jax.random.key(parts.config.seed), next(calls)),
            prompt=parts.front,
        )
        left = limit - np.asarray(mask).sum(axis=1)
        return [completions.until_stop(row[: max(0, n)], stops) for row, n in zip(np.asarray(new), left, strict=True)]

    return generate


def stop_tokens(parts: assemble.Parts) -> tuple[int, ...]:
    """The ids that end a text: the tokenizer's, the one that ends a turn of its chats, and what the checkpoint names.

    Raises:
      CheckpointError: a file of its folder is damaged.
    """
    own = {parts.tokenizer.eos_token_id, parts.config.data.eos_token_id, chat.ending(parts.tokenizer)}
    found = {*own, *hf.ends(parts.folder)}
    return tuple(sorted(i for i in found if i is not None))


def generates(parts: assemble.Parts) -> bool:
    """Whether it is a model that writes text."""
    return parts.config.model.head == "lm"


def wants_match(config: schema.Config, found: rows.Rows) -> bool:
    """Whether exact match is measured: where the config says so, by default for rows of prompt and completion."""
    if config.evaluation.exact_match is not None:
        return config.evaluation.exact_match
    return found.held_out is not None and found.held_out.report.format == "prompt_completion"


def single_process() -> bool:
    """Generation is not spread over processes yet."""
    return jax.process_count() == 1
