"""Conversations: which characters of the rendered chat the assistant wrote, and which tokens those are."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from tunejax.core import errors
from tunejax.data import bad
from tunejax.data.files import Row

DEFAULT = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m['role'] | capitalize }}:"
    "{% if m['role'] == 'assistant' %}{% generation %} {{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %} {{ m['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For tokenizers that come without a template: "User: ...", "Assistant: ...</s>", a line each."""

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = ("system", "user", "assistant", "tool", "developer")


class Rendered(NamedTuple):
    """text: the whole chat. spans: [start, end) characters that the assistant wrote.

    closed: the last turn is not the assistant's, or ends with a special token.
    """

    text: str
    spans: list[tuple[int, int]]
    closed: bool


def template_of(tokenizer: Any) -> str:
    """The tokenizer's chat template; one that has none is given `DEFAULT`, so that exports carry it."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT
    found = tokenizer.chat_template
    if isinstance(found, str):
        return found
    if "default" not in found:
        raise errors.ConfigError(f"the tokenizer has the chat templates {', '.join(found)}; expected one or 'default'")
    return found["default"]


def ending(tokenizer: Any) -> int | None:
    """The special token that its template closes an assistant's turn with; None without a template or such a token."""
    said = "?!?"  # part of no special token
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    try:
        text = _apply(tokenizer, turns, None) if tokenizer.chat_template else ""
    except Exception:  # a template is a program: it may refuse such a chat
        return None
    behind = text.rpartition(said)[2].lstrip()
    found = [s for s in _specials(tokenizer) if behind.startswith(s)]
    return tokenizer.convert_tokens_to_ids(max(found, key=len)) if found else None


def render(row: Row, tokenizer: Any, template: str, assistant_only: bool, rejects: bad.BadRows) -> Rendered | None:
    """The chat of a row; None, and told to ``rejects``, where it is no chat or the template refuses it.

    assistant_only: find the assistant's turns; otherwise the span is the whole chat.
    """
    turns = _turns(row, assistant_only, rejects)
    if turns is None:
        return None
    if template == DEFAULT and any(t["content"] is None for t in turns):
        rejects.add(
            bad.TEMPLATE, row.source, "a turn without 'content', which needs a chat template that has tool calls"
        )
        return None
    tools = row.fields.get("tools") or None
    try:
        if not assistant_only:
            text = _apply(tokenizer, turns, tools)
            spans = [(0, len(text))]
        elif _MARKED.search(template):
            text, spans = _marked(tokenizer, template, turns, tools)
        else:
            text, spans = _by_prefix(tokenizer, turns, tools)
    except Unstable as e:
        rejects.add(bad.TEMPLATE, row.source, str(e))
        return None
    except Exception as e:  # a template is a program: it may raise what it likes
        rejects.add(bad.TEMPLATE, row.source, f"the chat template refuses these messages: {e}")
        return None
    specials = _specials(tokenizer)
    trimmed = [(s, _closing_end(text, s, e, specials)) for s, e in spans]
    closed = turns[-1]["role"] != "assistant" or not trimmed or text[: trimmed[-1][1]].endswith(specials)
    return Rendered(text, trimmed, closed)


class Unstable(Exception):
    """The template renders the beginning of a chat in another way once more turns follow."""


def _turns(row: Row, assistant_only: bool, rejects: bad.BadRows) -> list[dict[str, Any]] | None:
    value = row.fields.get("messages")
    if "messages" not in row.fields:
        found = ", ".join(row.fields) or "nothing"
        near = errors.did_you_mean("messages", row.fields)
        rejects.add(bad.MISSING, row.source, f"missing key 'messages'; found {found}. {near}")
        return None
    if not isinstance(value, list):
        rejects.add(bad.TYPE, row.source, f"wrong type in 'messages': expected a list, found {bad.kind(value)}")
        return None
    if not value:
        rejects.add(bad.EMPTY, row.source, "empty 'messages': expected at least one turn")
        return None
    for i, turn in enumerate(value):
        problem = _problem(turn)
        if problem:
            rejects.add(problem[0], row.source, f"messages[{i}]: {problem[1]}")
            return None
    if not assistant_only or any(t["role"] == "assistant" for t in value):
        return [{k: v for k, v in t.items() if v is not None or k == "content"} for t in value]
    rejects.add(bad.NO_LOSS, row.source, "no turn of the role 'assistant', so no token in the loss")
    return None


def _problem(turn: Any) -> tuple[str, str] | None:
    if not isinstance(turn, dict):
        return bad.TYPE, f"wrong type: expected an object with 'role' and 'content', found {bad.kind(turn)}"
    if "role" not in turn:
        near = " 'from' and 'value' are 'role' and 'content' here." if "from" in turn else ""
        return bad.MISSING, f"missing key 'role'; found {', '.join(turn)}.{near}"
    if turn["role"] not in _ROLES:
        return bad.TYPE, f"unknown role {turn['role']!r}. {errors.did_you_mean(str(turn['role']), _ROLES)}"
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        return None
    if "content" not in turn:
        return bad.MISSING, f"missing key 'content'; found {', '.join(turn)}"
    if not isinstance(content, str):
        return bad.TYPE, f"wrong type in 'content': expected text, found {bad.kind(content)}"
    if turn["role"] == "assistant" and not content.strip() and not turn.get("tool_calls"):
        return bad.EMPTY, "empty 'content' of the assistant"
    return None


def _apply(tokenizer: Any, turns: Sequence[dict], tools: Any, prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(list(turns), tools=tools, tokenize=False, add_generation_prompt=prompt)


def _marked(tokenizer: Any, template: str, turns: list[dict], tools: Any) -> tuple[str, list[tuple[int, int]]]:
    """By the template's {% generation %} blocks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    made: Any = render_jinja_template(
        [turns],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    texts, spans = made
    return texts[0], [(start, end) for start, end in spans[0]]


def _by_prefix(tokenizer: Any, turns: list[dict], tools: Any) -> tuple[str, list[tuple[int, int]]]:
    """A turn is what rendering it adds to the rendering of the turns before it with the generation prompt."""
    whole = _apply(tokenizer, turns, tools)
    spans = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _apply(tokenizer, turns[:i], tools, prompt=True) if i else _head(tokenizer, turn, tools)
        after = _apply(tokenizer, turns[: i + 1], tools)
        if not (after.startswith(before) and whole.startswith(after)):
            raise Unstable(
                f"the chat template renders messages[:{i + 1}] in another way once turns follow (or once its "
                "generation prompt is there), so where the assistant's turn begins and ends is unknown. Mark it in "
                "the template by {% generation %} and {% endgeneration %}, keep one assistant turn a row, or set "
                "data.assistant_only_loss=false"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _head(tokenizer: Any, turn: dict, tools: Any) -> str:
    """What the template puts before the content of a first turn. Raises Unstable where that is not to be seen."""
    content = turn.get("content")
    if not content:
        raise Unstable("the chat begins with an assistant's turn that has no content, so where it begins is unknown")
    other = {**turn, "content": "?" if content.strip()[0] != "?" else "!"}
    one, two = (_apply(tokenizer, [t], tools) for t in (turn, other))
    return one[: next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)]


def _specials(tokenizer: Any) -> tuple[str, ...]:
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    return tuple({*tokenizer.all_special_tokens, *added} - {""})


def _closing_end(text: str, start: int, end: int, specials: tuple[str, ...]) -> int:
    """The end of a turn without the white space after its closing special token: no model has to write that."""
    bare = text[start:end].rstrip()
    return start + len(bare) if bare.endswith(specials) else end


def tokens(tokenizer: Any, chats: Sequence[Rendered]) -> list[tuple[list[int], list[bool]]]:
    """(ids, in the loss) of each chat. A token with any of its characters in a span is in the loss.

    Raises:
      ConfigError: the tokenizer does not say which characters a token covers.
    """
    if not chats:
        return []
    if not tokenizer.is_fast:
        raise errors.ConfigError("the messages format needs a tokenizer.json (a fast tokenizer) for its offsets")
    made = tokenizer([c.text for c in chats], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    out = []
    for chat, ids, offsets in zip(chats, made["input_ids"], made["offset_mapping"], strict=True):
        out.append((ids, [any(s < end and e > start for start, end in chat.spans) for s, e in offsets]))
    return out
