"""Prompt tuning: trained rows before every example (Lester et al., 2021, arXiv:2104.08691).

The rows are the embeddings of virtual tokens (`core.prompts.Extended`), and nothing else trains. The law of identity
at the start does not hold: tokens before a text change what follows, whatever their rows are. Nor can it be merged.
PEFT keeps the rows as ``prompt_embeddings`` [length, embed], untransposed.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, portable, prompts, sites
from tunejax.core import method as methods
from tunejax.core.method import Context, Method

ALIASES = {
    "num_virtual_tokens": "length",
    "prompt_tuning_init": "init",
    "prompt_tuning_init_text": "init_text",
}
"""What PEFT calls it -> what it is here."""

TEXTS = ("init_text",)
"""Arguments that hold text or its token ids: where a tokenizer is at hand, text becomes ids before the call."""

RANGE = 0.5
"""Of the random start, unless told."""

INITS = {"random": "random", "vocab": "vocab", "sample_vocab": "vocab", "text": "text"}
"""Name of a start, PEFT's among them -> name here."""


PEFT = portable.Prompt("PROMPT_TUNING", False, lambda train: train[prompts.TABLE.strip("/")]["rows"])
"""Its form in PEFT."""


def prompt_tuning(
    length: int = 20,
    init: str | None = None,
    init_text: str | list[int] | None = None,
    init_range: float = RANGE,
) -> Method:
    """Trains the rows of virtual tokens, which stand before every example or in its template.

    Args:
      length: how many virtual tokens.
      init: "random": uniform in ±init_range, as in the paper (section 3.2; PEFT draws standard normals instead);
        "vocab": rows of the vocabulary, drawn with replacement; "text": the rows of init_text. By default "text"
        where there is one, else "random".
      init_text: token ids, cut or repeated to ``length``, as in PEFT; or text, where the caller has a tokenizer.
      init_range: of "random".

    Raises:
      ConfigError: length below 1, an unknown start, a text without a start from text and the reverse, a range without
        a random start, an id that the vocabulary does not have.
      TargetError (from init): the model has no embedding table.
    """
    chosen = _chosen(length, init, init_text)
    if chosen != "random" and init_range != RANGE:
        raise errors.ConfigError(f"prompt_tuning: init_range is of init: random, and init is {chosen!r}; leave it out")
    ids = init_text if isinstance(init_text, list) else []

    def new(key: Any, table: Any) -> dict[str, Any]:
        vocab, embed = table.shape
        if chosen == "random":
            return {"rows": jax.random.uniform(key, (length, embed), jnp.float32, -init_range, init_range)}
        if chosen == "text" and max(ids) >= vocab:
            raise errors.ConfigError(f"prompt_tuning: init_text has the id {max(ids)}; the vocabulary has {vocab}")
        at = jnp.resize(jnp.asarray(ids), (length,)) if ids else jax.random.randint(key, (length,), 0, vocab)
        return {"rows": sites.lookup(table, at, jnp.float32)}

    def wrap(table: Any, arrays: dict[str, Any], ctx: Context) -> prompts.Extended:
        return prompts.Extended(table, arrays["rows"])

    axes = {"rows": (None, "out")}
    return methods.per_site("prompt_tuning", prompts.TABLE, new, wrap, axes=axes, kernels=False, prompt=length)


def _chosen(length: int, init: str | None, text: str | list[int] | None) -> str:
    """The start that the arguments name; see `prompt_tuning` for what it raises."""
    if length < 1:
        raise errors.ConfigError(f"prompt_tuning: length is {length}; it must be at least 1")
    given = text is not None
    name = ("text" if given else "random") if init is None else init
    if name.lower() not in INITS:
        raise errors.ConfigError(f"prompt_tuning: init is {init!r}. {errors.did_you_mean(name.lower(), INITS)}")
    chosen = INITS[name.lower()]
    if given != (chosen == "text"):
        raise errors.ConfigError(
            f"prompt_tuning: init is {name!r} and init_text is {'there' if given else 'missing'}; "
            "init_text goes with init: text"
        )
    if isinstance(text, str) or text == []:
        raise errors.ConfigError("prompt_tuning: init_text is text without a tokenizer, or empty; give token ids")
    if text is not None and min(text) < 0:
        raise errors.ConfigError(f"prompt_tuning: init_text has the id {min(text)}; ids are 0 or more")
    return chosen
