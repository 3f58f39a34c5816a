"""Whole commands with virtual tokens inside the text, and the cloze: beside PyTorch with embeddings spliced by hand."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import tiny
import toys
import worlds

from tunejax import cli
from tunejax.core.model import full_batch
from tunejax.interop import hf
from tunejax.methods import p_tuning
from tunejax.models import build
from tunejax.recipes import artefact, teacher

METHOD = "method={name: p_tuning, length: 3, hidden: 8}"
TEMPLATE = "{virtual:1} a {prompt} {virtual:2} is"
CLOZE = "{virtual:2} {text} w9 {mask} {virtual:1}"
WORDS = {"n": 7, "p": 8}  # of the labels n and p: w0 and w1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of P-tuning, packed, with the template."""
    folder = tmp_path_factory.mktemp("world")
    changes = [METHOD, f"data.template='{TEMPLATE}'", "data.packing=true", "generation.prompts=['what is red dog ?']"]
    assert cli.main(["train", str(worlds.make(folder)), *changes, "train.learning_rate=0.05"]) == 0
    return folder


def spliced(model, ids, rows, first):
    """PyTorch's logits [length, vocab] where ids from ``first`` on are embedded as ``rows``."""
    ids = torch.tensor(ids)
    embedded = model.get_input_embeddings()(torch.where(ids < first, ids, 0))
    embedded[ids >= first] = torch.tensor(np.asarray(rows))[ids[ids >= first] - first]
    return model(inputs_embeds=embedded[None]).logits[0].detach()


def rows_of(tuned):
    return p_tuning.flatten(tuned.train)["embed/table"]["rows"]


def test_training_evaluation_and_generation_splice_as_torch_does(world, capsys):
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert summary["eval_loss"] < summary["before_loss"]
    tuned = artefact.open_run(str(world / "run"))
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(world / "model"), tuned.parts.tokenizer

    def asked(prompt):  # 20 words, so virtual tokens are 20, 21, 22
        text = tokenizer(f"a {prompt}")["input_ids"]
        return [20, *text, 21, 22, tokenizer("is")["input_ids"][0]]

    losses = []
    for row in worlds.ROWS[:4]:
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        ids = asked(row["prompt"]) + answer
        logits = spliced(model, ids[:-1], rows_of(tuned), 20)
        losses.append(torch.nn.functional.cross_entropy(logits[-len(answer) :], torch.tensor(answer)).item())
        np.testing.assert_allclose(_logits(tuned, ids[:-1]), logits, atol=1e-5)
    assert summary["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-5)

    ids, new = asked("what is red dog ?"), []
    while len(new) < 4 and tokenizer.eos_token_id not in new:
        new.append(int(spliced(model, ids + new, rows_of(tuned), 20)[-1].argmax()))
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    assert cli.main(["generate", str(world / "run"), "--prompt", "what is red dog ?"]) == 0
    assert capsys.readouterr().out.strip() == text
    last = json.loads((world / "run" / "samples" / "after.jsonl").read_text().splitlines()[-1])
    assert (last["prompt"], last["generated"].strip()) == ("what is red dog ?", text)


def _logits(tuned, ids):
    model = tuned.parts.model
    hidden, _ = model.hidden(tuned.params, full_batch(jnp.asarray([ids])))
    return model.logits(model.head(tuned.params), hidden)[0]


def test_exact_match_asks_with_the_virtual_tokens_in_their_places(world):
    samples = [json.loads(line) for line in (world / "run" / "samples" / "after.jsonl").read_text().splitlines()]
    tuned = artefact.open_run(str(world / "run"))
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(world / "model"), tuned.parts.tokenizer
    assert len(samples) == 5
    for row, sample in zip(worlds.ROWS[:4], samples[:4], strict=True):
        assert sample["prompt"] == f"a {row['prompt']} is"
        ids, new = [20, *tokenizer(f"a {row['prompt']}")["input_ids"], 21, 22, tokenizer("is")["input_ids"][0]], []
        while len(new) < 4 and tokenizer.eos_token_id not in new:
            new.append(int(spliced(model, ids + new, rows_of(tuned), 20)[-1].argmax()))
        assert sample["generated"] == tokenizer.decode(new, skip_special_tokens=True)


def test_what_does_not_go_with_it_is_told(world, tmp_path, capsys):
    out, config = f"output_dir={tmp_path / 'other'}", str(world / "my.yaml")
    template = f"data.template='{TEMPLATE}'"
    for changes, message in [
        (["method={name: p_tuning, length: 2}"], "places 3 virtual tokens ({virtual:1}, {virtual:2}), and p_tuning"),
        (["method=full"], "and full trains none: expected all of a method's, or no mark"),
        ([METHOD, "distill={teacher: base, on_policy: {}, alpha: 0}"], "distill.on_policy does not go with virtual"),
    ]:
        assert cli.main(["validate", config, template, out, *changes]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["generate", str(world / "run"), "--raw", "--prompt", "a cat"]) == 2
    assert "places 3 virtual tokens; --chat and --raw leave it out" in capsys.readouterr().err
    assert cli.main(["export", str(world / "run"), "--format", "peft", "--output", str(tmp_path / "peft")]) == 2
    assert "places 3 virtual tokens in the text, and --format peft has them before it" in capsys.readouterr().err
    assert cli.main(["preprocess", config, template, METHOD, out, "--rows", "1"]) == 0
    assert "<1 virtual token>" in capsys.readouterr().out


def test_a_teacher_reads_the_rows_without_virtual_tokens():
    batch = {
        "tokens": np.array([[90, 5, 6, 91, 92, 7, 90, 91, 92, 8, 9, 0]]),
        "positions": np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0]]),
        "segment_ids": np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0]]),
    }
    found = teacher.without_virtual({k: jnp.asarray(x) for k, x in batch.items()}, 90)
    real = np.flatnonzero((batch["tokens"][0] < 90) & (batch["segment_ids"][0] > 0))
    assert found["tokens"][0, real].tolist() == [5, 6, 7, 8, 9]
    assert found["positions"][0, real].tolist() == [0, 1, 2, 0, 1]
    assert np.flatnonzero(found["segment_ids"][0]).tolist() == real.tolist()


@pytest.fixture(scope="module")
def clozes(tmp_path_factory):
    """A BERT of three layers, labelled rows, and the words of a config that asks them as a cloze."""
    folder = tmp_path_factory.mktemp("clozes")
    params = build.build(tiny.BERT, head="mlm").init(jax.random.key(0))
    (folder / "model").mkdir()
    hf.save(folder / "model", params, tiny.BERT, head="mlm")
    toys.encoder().save_pretrained(folder / "model")
    rows = [{"text": f"w{i} w{j}", "label": "p" if i > 4 else "n"} for i in (2, 3, 6, 7) for j in (2, 4, 5)]
    worlds.jsonl(folder / "train.jsonl", rows)
    worlds.jsonl(folder / "eval.jsonl", rows[:1] + rows[5:8])
    config = {
        "output_dir": str(folder / "run"), "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "train.jsonl"), "eval_path": str(folder / "eval.jsonl"), "max_length": 16,
                 "template": CLOZE},
        "method": {"name": "p_tuning", "length": 3},
        "objective": {"name": "cloze", "verbalizer": {"n": "w0", "p": "w1"}},
        "train": {"max_steps": 6, "train_batch_size": 8, "learning_rate": 0.05, "report_to": "none", "progress": False},
    }  # fmt: skip
    (folder / "my.yaml").write_text(json.dumps(config))
    return folder


def test_a_cloze_is_scored_as_torch_scores_it(clozes, capsys):
    assert cli.main(["train", str(clozes / "my.yaml")]) == 0
    summary = json.loads((clozes / "run" / "summary.json").read_text())
    assert summary["eval_loss"] < summary["before_loss"]
    assert "eval_perplexity" not in summary
    tuned = artefact.open_run(str(clozes / "run"))
    model = transformers.AutoModelForMaskedLM.from_pretrained(clozes / "model").eval()
    losses, right = [], []
    for line in (clozes / "eval.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = [7 + int(w[1:]) for w in row["text"].split()]
        ids = [4, 31, 32, *text, 16, 6, 33, 5]  # [CLS] v0 v1 text w9 [MASK] v2 [SEP]
        logits = spliced(model, ids, rows_of(tuned), 31)
        np.testing.assert_allclose(_logits(tuned, ids), logits, atol=1e-5)
        at_mask, label = logits[ids.index(6), list(WORDS.values())], list(WORDS).index(row["label"])
        losses.append(-torch.log_softmax(at_mask, -1)[label].item())
        right.append(at_mask.argmax().item() == label)
    assert summary["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert summary["eval_accuracy"] == pytest.approx(np.mean(right))
    capsys.readouterr()
    assert cli.main(["evaluate", str(clozes / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(summary["eval_loss"], abs=1e-6)


def test_verbalizers_that_do_not_fit_are_refused(clozes, capsys):
    out = f"output_dir={clozes / 'other'}"
    for change, message in [
        ("objective.verbalizer={n: w0, p: w1 w2}", "verbalizer.p is 'w1 w2', which the tokenizer reads as w1 w2"),
        ("objective.verbalizer={n: w0, p: zz}", "objective.verbalizer.p is 'zz', which the tokenizer reads as <unk>"),
        ("objective.verbalizer={n: w0, p: w0}", "expected a word of its own for each of two labels"),
        ("objective.verbalizer={n: w0}", "expected a word for each label"),
        ("objective={name: cloze}", "objective.verbalizer is None"),
        ("data.labels=[p, n]", "data.labels are ['p', 'n'], and objective.verbalizer has ['n', 'p']"),
        ("data.template='{text}'", "data.template is '{text}'; a cloze needs one with '{mask}' once"),
        ("data.packing=true", "data.packing does not go with objective.name: cloze"),
        ("objective.word=1", "objective.word: unknown option"),
    ]:  # fmt: skip
        assert cli.main(["validate", str(clozes / "my.yaml"), out, change]) == 2, change
        assert message in capsys.readouterr().err
