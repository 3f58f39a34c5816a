"""A tuned model as a checkpoint that `transformers` uses as the run did: the same chats, ends of texts and padding."""

import json
from pathlib import Path
from typing import Any

from tunejax.core import paths
from tunejax.data import chat
from tunejax.interop import hf
from tunejax.models.config import ModelConfig
from tunejax.models.families import common
from tunejax.recipes import artefact, assemble, samples


def save(output: Path, params: paths.Params, config: ModelConfig, tuned: artefact.Tuned, dtype: Any = None) -> None:
    """Writes ``params`` with the tokenizer of a run, and what else the run's texts depend on.

    Args:
      params, config, dtype: as in `hf.save`.
      tuned: the run.

    Raises:
      CheckpointError: as `hf.save`, or a damaged generation_config.json of the base.
    """
    parts, head = tuned.parts, tuned.parts.config.model.head or "lm"
    if head == "classification" and config.kind == "decoder":
        config = common.with_extra(config, pad_token_id=padding(parts.tokenizer))
    source = artefact.tokenizer_folder(parts)
    hf.save(output, params, config, head=head, dtype=dtype, tokenizer_from=source, texts=texts(tuned))


def texts(tuned: artefact.Tuned) -> dict[str, str]:
    """The files that are not the tokenizer's own, by name: how texts are generated, and the template of chats."""
    parts, found = tuned.parts, {}
    how = hf.generation_config(parts.folder)
    if samples.generates(parts):
        how = generation(parts, how)
    if how:
        found[hf.GENERATION] = json.dumps(how, indent=2) + "\n"
    if tuned.row_format == samples.CHATS and chat.template_of(parts.tokenizer) == chat.DEFAULT:
        found[hf.TEMPLATE] = chat.DEFAULT
    return found


def generation(parts: assemble.Parts, base: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json of the base, if it has one, with the stop tokens of the run.

    A new one names the tokenizer's other ids too, for where there is such a file config.json is not asked for them.
    """
    tokenizer, stops = parts.tokenizer, samples.stop_tokens(parts)
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    how = base or {name: i for name, i in ids.items() if i is not None}
    how.pop("_from_model_config", None)  # it says more than config.json
    return {**how, "eos_token_id": list(stops) if len(stops) > 1 else stops[0]} if stops else how


def padding(tokenizer: Any) -> int | None:
    """The id by which `transformers` finds the last token of a row, which it classifies: no row may end with it.

    The tokenizer's, or that of its end of a text; None where the tokenizer itself ends every row with that.
    """
    ends = tokenizer("")["input_ids"][-1:]
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None and i not in ends), None)
