"""Conversations: the assistant's turns and nothing else are in the loss, whatever the template."""

import numpy as np
import pytest
import toys

from tunejax.core import errors
from tunejax.data import bad, chat, corpus, options

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = CHATML.replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}",
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def chatml(template=CHATML):
    tokenizer = toys.characters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def load(turns, tokenizer, **opts):
    return corpus.load([{"messages": turns}], tokenizer, options.Options(**opts))


def runs(tokenizer, example):
    """The texts of the runs of targets in the loss."""
    at = np.flatnonzero(example.loss_weights)
    parts = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
    return [tokenizer.decode(example.targets[p]) for p in parts]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_assistant_turns_with_their_end(template):
    tokenizer = chatml(template)
    made = load(TURNS, tokenizer)
    (example,) = made.store
    assert runs(tokenizer, example) == ["Hello!<|im_end|>", "4<|im_end|>"]
    assert [*example.tokens, example.targets[-1]] == tokenizer.apply_chat_template(TURNS, return_dict=False)
    assert made.report.ended == 1


def test_marked_templates_agree_with_transformers():
    tokenizer = chatml(MARKED)
    made = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    (example,) = load(TURNS, tokenizer).store
    assert example.loss_weights.tolist() == made["assistant_masks"][1:]


@pytest.mark.parametrize("name", ["stories260k", "gpt2_tokenizer"])
def test_real_tokenizers_take_the_default_template(assets, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / name)
    assert tokenizer.chat_template is None
    (example,) = load(TURNS, tokenizer).store
    assert tokenizer.chat_template == chat.DEFAULT
    expected = [f" Hello!{tokenizer.eos_token}", f" 4{tokenizer.eos_token}"]
    assert [r.lstrip() for r in runs(tokenizer, example)] == [e.lstrip() for e in expected]
    whole = tokenizer.decode([*example.tokens, example.targets[-1]])
    assert whole.startswith(f"{tokenizer.bos_token}")
    prompt = tokenizer.apply_chat_template(TURNS[:2], add_generation_prompt=True, return_dict=False)
    assert example.tokens[: len(prompt)].tolist() == prompt, "training sees what generation starts from"


def test_everything_in_the_loss():
    tokenizer = chatml()
    (example,) = load(TURNS, tokenizer, assistant_only_loss=False).store
    assert example.loss_weights.all()
    (example,) = load(TURNS[:2], tokenizer, assistant_only_loss=False).store
    assert example.loss_weights.all()


def test_an_end_is_appended_where_the_template_has_none():
    tokenizer = toys.characters(
        chat_template="{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    (example,) = load(TURNS, tokenizer).store
    assert runs(tokenizer, example) == ["Hello!\n", "4\n</s>"]
    (example,) = load(TURNS, tokenizer, append_eos=False).store
    assert runs(tokenizer, example) == ["Hello!\n", "4\n"]


UNSTABLE = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'][:1] }}")


def test_unstable_templates_are_refused():
    with pytest.raises(errors.DataError, match=r"rows:1: the chat template renders messages\[:3\] in another way"):
        load(TURNS, chatml(UNSTABLE))
    assert len(load(TURNS, chatml(UNSTABLE), assistant_only_loss=False)) == 1
    raising = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        errors.DataError, match="rows:1: the chat template refuses these messages: roles must alternate"
    ):
        load(TURNS, chatml(raising))


def test_tools_and_calls():
    template = "{{ tools | length if tools else 0 }}" + CHATML.replace(
        "m['content']", "(m.content or m.tool_calls[0].name)"
    )
    calls = [TURNS[1], {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]
    tokenizer = chatml(template)
    made = corpus.load([{"messages": calls, "tools": [{"name": "add"}]}], tokenizer)
    assert runs(tokenizer, made.store[0]) == ["add<|im_end|>"]
    assert tokenizer.decode(made.store[0].tokens).startswith("1<|im_start|>")


def test_a_chat_that_begins_with_the_assistant():
    """The header and what the template says by itself are not the assistant's."""
    greeting = [{"role": "assistant", "content": " Good day"}, *TURNS[1:3]]
    for template in (CHATML, MARKED, "You help.\n" + CHATML):
        tokenizer = chatml(template)
        assert runs(tokenizer, load(greeting, tokenizer).store[0]) == [" Good day<|im_end|>", "Hello!<|im_end|>"]


def test_the_token_that_closes_a_turn():
    tokenizer = chatml()
    assert chat.ending(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.ending(toys.characters()) is None
    assert chat.ending(toys.characters(chat_template=chat.DEFAULT)) == 2
    assert chat.ending(chatml("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")) is None
    assert chat.ending(chatml("{{ raise_exception('no') }}")) is None


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"mesages": TURNS}, bad.MISSING, r"missing key 'messages'; found mesages\. Did you mean 'mesages'"),
        ({"messages": "Hi"}, bad.TYPE, "wrong type in 'messages': expected a list, found text 'Hi'"),
        ({"messages": []}, bad.EMPTY, "empty 'messages'"),
        ({"messages": ["Hi"]}, bad.TYPE, r"messages\[0\]: wrong type: expected an object"),
        ({"messages": [{"from": "human", "value": "Hi"}]}, bad.MISSING, r"missing key 'role'.*'from' and 'value' are"),
        ({"messages": [{"role": "asistant", "content": "Hi"}]}, bad.TYPE, r"'asistant'\. Did you mean 'assistant'"),
        ({"messages": [*TURNS, {"role": "user"}]}, bad.MISSING, r"messages\[5\]: missing key 'content'; found role"),
        ({"messages": [{"role": "user", "content": 3}]}, bad.TYPE, "in 'content': expected text, found number"),
        ({"messages": [{"role": "assistant", "content": " "}]}, bad.EMPTY, "empty 'content' of the assistant"),
        ({"messages": TURNS[:2]}, bad.NO_LOSS, "no turn of the role 'assistant'"),
    ],
)  # fmt: skip
def test_bad_conversations(tmp_path, row, reason, message):
    path = toys.write(tmp_path / "x.jsonl", [{"messages": TURNS}, row])
    opts = {"format": "messages"}
    with pytest.raises(errors.DataError, match=rf"x\.jsonl:2: .*{message}"):
        corpus.load(path, chatml(), options.Options(**opts))
    made = corpus.load(path, chatml(), options.Options(on_bad_row="skip", **opts))
    assert (len(made), made.report.skipped) == (1, {reason: 1})


def test_a_call_needs_a_template_that_has_calls():
    turns = [*TURNS[:2], {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]
    with pytest.raises(errors.DataError, match="rows:1: a turn without 'content', which needs a chat template"):
        load(turns, toys.characters())
