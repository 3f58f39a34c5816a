"""Rows to token sequences, one function a format; `corpus` truncates and shifts what they return."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tunejax.core import errors
from tunejax.data import bad, chat, labels, options, templates
from tunejax.data.class_labels import ClassName
from tunejax.data.files import Row

Tokenizer = Any
"""A `transformers` tokenizer."""

FIELDS = ("text", "prompt", "completion", "messages", "tools", "label", "text_pair")
"""The names that a format may read."""

HINTS = (
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("input", "output"),
    ("input", "target"),
)


class Encoded(NamedTuple):
    """A row's token sequence before it is cut and shifted.

    ids: m token ids. in_loss: m booleans: does predicting that token count.
    label: the class, in classification. token_types: m, or None.
    merged: the tokenizer joined the end of the prompt and the start of the completion in one token.
    cut: the tokenizer has cut it to max_length.
    """

    ids: list[int]
    in_loss: list[bool]
    row: Row
    label: int | None = None
    token_types: list[int] | None = None
    merged: bool = False
    cut: bool = False


def detect(fields: Mapping[str, Any], source: str) -> options.Format:
    """The format that a row's field names mean.

    "messages" | "prompt" and "completion" | "text" and "label" | "text", in this order.

    Raises:
      DataError: none, with the column map to write.
    """
    if "messages" in fields:
        return "messages"
    if "prompt" in fields and "completion" in fields:
        return "prompt_completion"
    if "text" in fields:
        return "classification" if "label" in fields else "text"
    pairs = [(p, c) for p, c in HINTS if p in fields and c in fields]
    hint = ""
    if pairs:
        hint = f" Say data.columns={{prompt: {pairs[0][0]}, completion: {pairs[0][1]}}}."
    elif "sentence" in fields:
        hint = " Say data.columns={text: sentence}."
    elif "conversations" in fields:
        hint = " Say data.columns={messages: conversations} if each turn has 'role' and 'content'."
    raise errors.DataError(
        f"{source}: no format has the fields {', '.join(fields) or '(none)'}. Expected: text | prompt, completion | "
        f"messages | text, label.{hint or ' Rename them by data.columns={ours: theirs}.'}"
    )


def encode(rows: Sequence[Row], tokenizer: Tokenizer, opts: options.Options, rejects: bad.BadRows) -> list[Encoded]:
    """The token sequences of the usable rows, in order; the others go to ``rejects``. ``opts.format`` must be set."""
    return _ENCODERS[opts.format or "text"](rows, tokenizer, opts, rejects)


def check_text(row: Row, key: str, rejects: bad.BadRows) -> bool:
    """Whether the field is non-empty text."""
    if key not in row.fields:
        near = errors.did_you_mean(key, row.fields)
        rejects.add(
            bad.MISSING, row.source, f"missing key {key!r}; found {', '.join(row.fields) or 'nothing'}. {near}".strip()
        )
        return False
    value = row.fields[key]
    if not isinstance(value, str):
        rejects.add(bad.TYPE, row.source, f"wrong type in {key!r}: expected text, found {bad.kind(value)}")
        return False
    if not value.strip():
        rejects.add(bad.EMPTY, row.source, f"empty {key!r}: expected text, found {bad.kind(value)}")
        return False
    return True


def eos_id(tokenizer: Tokenizer, opts: options.Options) -> int | None:
    """The id that ends a row, or None where nothing is appended. Raises ConfigError if the tokenizer has none."""
    if not opts.append_eos or opts.objective != "causal_lm":
        return None
    found = tokenizer.eos_token_id if opts.eos_token_id is None else opts.eos_token_id
    if found is None:
        raise errors.ConfigError(
            "the tokenizer has no end-of-sequence token to append: set eos_token in its tokenizer_config.json, "
            "or data.append_eos=false (a model tuned without one does not learn to stop)"
        )
    return found


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, with the special tokens that the tokenizer adds."""
    return tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"] if texts else []


def ended(ids: list[int], eos: int | None) -> list[int]:
    """``ids`` with ``eos`` at the end, once."""
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]


def whole(
    tokenizer: Tokenizer, opts: options.Options, texts: Sequence[str], pairs: Sequence[str] | None = None
) -> list[tuple[list[int], list[int] | None, bool]]:
    """(ids, token types, cut) of each text, special tokens included.

    Where ``truncation`` is "end" the tokenizer itself cuts what is too long, so that its closing token stays.
    """
    if not texts:
        return []
    made = tokenizer(list(texts), pairs if pairs is None else list(pairs), verbose=False)
    types = made.get("token_type_ids") or [None] * len(texts)
    out = [(ids, t, False) for ids, t in zip(made["input_ids"], types, strict=True)]
    for i, (ids, _, _) in enumerate(out):
        if opts.truncation == "end" and len(ids) > opts.room:
            one = tokenizer(texts[i], pairs and pairs[i], truncation=True, max_length=opts.room, verbose=False)
            out[i] = (one["input_ids"], one.get("token_type_ids"), True)
    return out


def text(rows: Sequence[Row], tokenizer: Tokenizer, opts: options.Options, rejects: bad.BadRows) -> list[Encoded]:
    """{"text"}: every token is in the loss, the end-of-sequence token too.

    With the objective "masked_lm", ``in_loss`` says which tokens may be hidden: those that are not special.
    """
    usable = [r for r in rows if check_text(r, "text", rejects)]
    texts = [r.fields["text"] for r in usable]
    if opts.objective == "masked_lm":
        special = set(tokenizer.all_special_ids)
        return [
            Encoded(ids, [i not in special for i in ids], row, token_types=types, cut=cut)
            for row, (ids, types, cut) in zip(usable, whole(tokenizer, opts, texts), strict=True)
        ]
    eos = eos_id(tokenizer, opts)
    sequences = [ended(ids, eos) for ids in tokenize(tokenizer, texts)]
    return [Encoded(ids, [True] * len(ids), row) for row, ids in zip(usable, sequences, strict=True)]


def prompt_completion(
    rows: Sequence[Row], tokenizer: Tokenizer, opts: options.Options, rejects: bad.BadRows
) -> list[Encoded]:
    """{"prompt", "completion"}: the tokens of prompt + completion, as TRL has them; the completion is in the loss.

    The completion begins where the ids of the whole leave those of the prompt alone. Mostly that is the end of the
    prompt. Where a token reaches over the boundary (no space between the two) it is in the loss, so that no part of
    the answer escapes; such rows are ``merged``, since at generation the prompt is cut elsewhere.
    """
    eos = eos_id(tokenizer, opts)
    usable, prompts = [], []
    for row in rows:
        prompt = _rendered(row, "prompt", row.fields, opts.template, rejects)
        if prompt is not None and check_text(row, "completion", rejects):
            usable.append(row)
            prompts.append(prompt)
    alone = tokenize(tokenizer, prompts)
    joined = tokenize(tokenizer, [p + r.fields["completion"] for p, r in zip(prompts, usable, strict=True)])
    after = closing(tokenizer)
    out = []
    for row, before, ids in zip(usable, alone, joined, strict=True):
        same = common_prefix(before, ids)
        # The first token of the text is predicted by nothing, also where virtual tokens stand before it.
        learned = same if opts.completion_only_loss else 1 + common_prefix(ids, opts.inside)
        ids = ended(ids, eos)
        in_loss = [i >= learned for i in range(len(ids))]
        out.append(Encoded(ids, in_loss, row, merged=same < len(before) - after))
    return out


def closing(tokenizer: Tokenizer) -> int:
    """How many special tokens the tokenizer adds after a text."""
    plain, full = (tokenizer("a", add_special_tokens=s, verbose=False)["input_ids"] for s in (False, True))
    starts = range(len(full) - len(plain) + 1)
    return next((len(full) - i - len(plain) for i in starts if full[i : i + len(plain)] == plain), 0)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids a and b begin with in common."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _rendered(row: Row, key: str, fields: Mapping[str, Any], template: str | None, rejects: bad.BadRows) -> str | None:
    """The text of a field, or of a template with ``fields`` in it."""
    if template is None:
        return row.fields[key] if check_text(row, key, rejects) else None
    for name in templates.fields_of(template):
        value = fields.get(name)
        if not isinstance(value, str):
            found = bad.kind(value) if name in fields else ", ".join(row.fields)
            near = "" if name in fields else errors.did_you_mean(name, row.fields)
            rejects.add(bad.MISSING, row.source, f"the template needs text in {name!r}; found {found}. {near}".rstrip())
            return None
    return templates.filled(template, fields.get)


def messages(rows: Sequence[Row], tokenizer: Tokenizer, opts: options.Options, rejects: bad.BadRows) -> list[Encoded]:
    """{"messages": [{"role", "content"}, ...]}, optional "tools": by the tokenizer's chat template; see `chat`.

    The assistant's turns are in the loss with the token that closes each. The end-of-sequence token is appended
    only where the template closes the last turn with no special token.
    """
    eos = eos_id(tokenizer, opts)
    template = chat.template_of(tokenizer)
    usable, rendered = [], []
    for row in rows:
        if (made := chat.render(row, tokenizer, template, opts.assistant_only_loss, rejects)) is not None:
            usable.append(row)
            rendered.append(made)
    out = []
    for row, made, (ids, flags) in zip(usable, rendered, chat.tokens(tokenizer, rendered), strict=True):
        if not opts.assistant_only_loss:
            flags = [True] * len(ids)
        if eos is not None and not made.closed and ids[-1:] != [eos]:
            ids, flags = [*ids, eos], [*flags, True]
        out.append(Encoded(ids, flags, row))
    return out


def classification(
    rows: Sequence[Row], tokenizer: Tokenizer, opts: options.Options, rejects: bad.BadRows
) -> list[Encoded]:
    """{"text", "label"}, optional "text_pair": the label is the target of one position. ``opts.labels`` must be set.

    With a template there is one text, it filled, and where ``truncation`` is "end" its fields lose their ends. With
    the objective "cloze" the labelled position is the template's mask.
    """
    names, cloze = opts.labels or (), opts.objective == "cloze"
    if cloze and tokenizer.mask_token is None:
        raise errors.ConfigError("the tokenizer has no mask token, which a cloze needs")
    gap = {options.MASK: tokenizer.mask_token} if cloze else {}
    paired = opts.template is None and any("text_pair" in r.fields for r in rows)
    usable, numbers, texts = [], [], []
    for row in rows:
        text = _rendered(row, "text", {**row.fields, **gap}, opts.template, rejects)
        if text is None or (paired and not check_text(row, "text_pair", rejects)):
            continue
        if (label := _label(row, names, rejects)) is not None:
            usable.append(row)
            numbers.append(label)
            texts.append(text)
    pairs = [r.fields["text_pair"] for r in usable] if paired else None
    out = []
    made = _in_templates(tokenizer, opts, usable, texts, gap) if opts.template else whole(tokenizer, opts, texts, pairs)
    for row, label, (ids, types, cut) in zip(usable, numbers, made, strict=True):
        masks = [i for i, t in enumerate(ids) if cloze and t == tokenizer.mask_token_id]
        if cloze and len(masks) != 1:
            rejects.add(bad.TEMPLATE, row.source, f"found {len(masks)} mask tokens; expected the template's alone")
            continue
        at = masks[0] if cloze else 0 if opts.labelled == "first" else len(ids) - 1
        out.append(Encoded(ids, [i == at for i in range(len(ids))], row, label, types, cut=cut))
    return out


def _in_templates(
    tokenizer: Tokenizer, opts: options.Options, rows: Sequence[Row], texts: Sequence[str], gap: Mapping[str, str]
) -> list[tuple[list[int], list[int] | None, bool]]:
    """As `whole`, of filled templates, whose own words stay. One that does not fit alone is left too long."""
    out = whole(tokenizer, dataclasses.replace(opts, truncation="error"), texts)
    for i, (ids, _, _) in enumerate(out):
        if opts.truncation == "end" and len(ids) > opts.room:
            fields = {**rows[i].fields, **gap}
            one = templates.shortened(tokenizer, opts.template or "", fields, opts.room, fixed=tuple(gap))
            if one is not None:
                out[i] = (one["input_ids"], one.get("token_type_ids"), True)
    return out


def _label(row: Row, names: Sequence[str], rejects: bad.BadRows) -> int | None:
    value = row.fields.get("label")
    if "label" not in row.fields:
        check_text(row, "label", rejects)
        return None
    if not isinstance(value, str | int):
        rejects.add(bad.TYPE, row.source, f"wrong type in 'label': expected a name or number, found {bad.kind(value)}")
        return None
    if isinstance(value, ClassName) and not value.labelled:
        classes = f"its data set's classes, {', '.join(value.names)}"
        rejects.add(bad.UNLABELLED, row.source, f"no label: {value.number} is the number of none of {classes}")
        return None
    if (found := labels.number(value, names)) is not None:
        return found
    if isinstance(value, str) and not value.strip():
        rejects.add(bad.EMPTY, row.source, f"empty 'label': expected a name or number, found {bad.kind(value)}")
        return None
    rejects.add(bad.LABEL, row.source, f"unknown label {value!r}. {errors.did_you_mean(str(value), names)}")
    return None


_ENCODERS: dict[str, Callable[..., list[Encoded]]] = {
    "text": text,
    "prompt_completion": prompt_completion,
    "messages": messages,
    "classification": classification,
}
