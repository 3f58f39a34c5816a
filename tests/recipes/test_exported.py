"""What transformers makes of an export: the run's chats, where its texts end, and batches of several lengths."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.core.model import full_batch
from tunejax.data import chat, completions
from tunejax.interop import hf
from tunejax.recipes import artefact, exported, samples

DOT, EOS, OTHER = 19, 2, 4
CHATS = [{"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
         for r in worlds.ROWS]  # fmt: skip
QUESTION = "what is red cat ?"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run that knows its chats by heart and ends a text before a dot; model and tokenizer lie in two folders.

    The tokenizer has no chat template, and its folder a generation_config.json of another model.
    """
    folder = tmp_path_factory.mktemp("world")
    worlds.make(folder)
    (folder / "words").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(folder / "model" / name, folder / "words" / name)
    (folder / "words" / "generation_config.json").write_text(json.dumps({"eos_token_id": 11, "max_length": 3}))
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": OTHER, "do_sample": False,
                                                                         "max_new_tokens": 6}))  # fmt: skip
    assert worlds.tune(folder, "run", "method=full", "train.max_steps=60", "train.learning_rate=0.02",
                       *of_chats(folder))[0] == 0  # fmt: skip
    return folder


def of_chats(folder):
    """The changes of a config that make it one of chats, which end with a dot."""
    rows = worlds.jsonl(folder / "chats.jsonl", CHATS)
    return [f"data.path={rows}", "data.eval_path=null", "data.max_length=32", f"data.eos_token_id={DOT}",
            f"model.tokenizer={folder / 'words'}"]  # fmt: skip


def test_a_chat_goes_on_and_ends_as_in_the_run(world, capsys):
    out = world / "merged"
    assert cli.main(["export", str(world / "run"), "--output", str(out)]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert (out / "chat_template.jinja").read_text() == tokenizer.chat_template == chat.DEFAULT
    how = json.loads((out / "generation_config.json").read_text())
    assert how == {"eos_token_id": [EOS, OTHER, DOT], "do_sample": False, "max_new_tokens": 6}

    tuned = artefact.open_run(str(world / "run"))
    prompt = samples.formed(tuned.parts, QUESTION, turns=True)
    asked = [{"role": "user", "content": QUESTION}]
    theirs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert theirs["input_ids"][0].tolist() == prompt
    (ours,) = samples.generator(tuned.parts, tuned.params)(*completions.left_padded([prompt], 32))
    assert ours == [tokenizer.convert_tokens_to_ids("yes")]
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        said = model.generate(**theirs)[0, len(prompt) :].tolist()
    assert said == [*ours, DOT]
    capsys.readouterr()
    assert cli.main(["generate", str(world / "run"), "--prompt", QUESTION]) == 0
    assert capsys.readouterr().out.strip() == tokenizer.decode(said[:-1])


def test_a_cut_model_says_the_same(world, tmp_path):
    """Also where held-out rows of another format are named for its scores."""
    half = "method=[full, {name: shrink, keep: {mlp: 0.5}, schedule: one_shot}]"
    assert worlds.tune(world, "masked", half, "train.max_steps=2", *of_chats(world))[0] == 0
    held_out = f"data.eval_path={world / 'eval.jsonl'}"
    command = ["shrink", str(world / "masked"), str(tmp_path / "cut"), "--batch", "1", "--length", "4"]
    assert cli.main([*command, held_out]) == 0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "cut").chat_template == chat.DEFAULT
    how = json.loads((tmp_path / "cut" / "generation_config.json").read_text())
    assert how == {"eos_token_id": [EOS, OTHER, DOT], "do_sample": False, "max_new_tokens": 6}


def test_rows_without_chats_get_no_template(tmp_path):
    config = worlds.make(tmp_path)
    assert worlds.tune(tmp_path, "run", "train.max_steps=1")[0] == 0
    assert cli.main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None
    how = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert how == {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": EOS}
    (tmp_path / "model" / "generation_config.json").write_text("{")
    assert cli.main(["evaluate", str(config)]) == 2


@pytest.mark.parametrize(("family", "pads"), [("llama", True), ("gpt2", False)])
def test_classes_of_rows_of_several_lengths(tmp_path, family, pads):
    config = worlds.make(tmp_path)
    if family == "gpt2":
        hf.save(tmp_path / "model", tiny.model(tiny.GPT2).init(jax.random.key(0)), tiny.GPT2, head="lm")
    file = tmp_path / "model" / "tokenizer_config.json"
    if not pads:
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"}))
    texts = ["red cat", "what is the big blue dog ?"]
    rows = worlds.jsonl(tmp_path / "l.jsonl", [{"text": t, "label": n} for t, n in zip(texts, "ab", strict=True)])
    out = f"output_dir={tmp_path / 'run'}"
    more = [f"data.path={rows}", "data.eval_path=null", "objective.name=classification", "train.max_steps=1"]
    assert cli.main(["train", str(config), out, *more]) == 0
    assert cli.main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.pad_token is not None) == pads
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.pad_token_id == (0 if pads else EOS)
    with torch.no_grad():
        theirs = model(**tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)).logits
    tuned = artefact.open_run(str(tmp_path / "run"))
    ours, params = tuned.parts.model, tuned.params
    for text, found in zip(texts, theirs.numpy(), strict=True):
        batch = full_batch(np.asarray(tokenizer(text)["input_ids"])[None])
        want = ours.logits(ours.head(params), ours.hidden(params, batch)[0])[0, -1]
        np.testing.assert_allclose(found, want, atol=1e-5)


class Ends:
    """A tokenizer that ends rows with its end of a text."""

    pad_token_id, eos_token_id = 2, 2

    def __call__(self, text):
        return {"input_ids": [1, 2]}


def test_no_row_ends_with_its_padding():
    tokenizer = Ends()
    assert exported.padding(tokenizer) is None
    tokenizer.pad_token_id = 0
    assert exported.padding(tokenizer) == 0
