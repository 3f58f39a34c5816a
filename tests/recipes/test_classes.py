"""Whole commands on labelled rows: classes have the numbers of the checkpoint's head, as PyTorch scores them."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import toys
import worlds

from tunejax import cli

NAMES = ["pos", "neg", "mid"]
TEXTS = [f"w{i} w{j}" for i in range(10) for j in (0, 3, 5, 8)]


def judge(folder, names):
    """A BERT of PyTorch with a classifier for these names."""
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, initializer_range=1.0, id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    toys.encoder().save_pretrained(folder)
    return model


def logits(model, texts=TEXTS):
    return model(torch.tensor([toys.encoder()(t)["input_ids"] for t in texts])).logits.detach()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The judge, rows that it is right about but for some of each fourth, and the judge without its head: base."""
    folder = tmp_path_factory.mktemp("classes")
    model = judge(folder / "judge", NAMES)
    model.bert.save_pretrained(folder / "base")
    toys.encoder().save_pretrained(folder / "base")
    said = [NAMES[i] for i in logits(model).argmax(-1).tolist()]
    said = [n if i % 4 else NAMES[i // 4 % 3] for i, n in enumerate(said)]
    rows = [{"text": t, "label": n} for t, n in zip(TEXTS, said, strict=True)]
    assert {r["label"] for r in rows} == set(NAMES)
    worlds.jsonl(folder / "train.jsonl", rows)
    worlds.jsonl(folder / "eval.jsonl", rows)
    worlds.jsonl(folder / "two.jsonl", [r for r in rows if r["label"] != "neg"])
    config = {
        "output_dir": str(folder / "run"), "model": {"path": str(folder / "judge")},
        "data": {"path": str(folder / "train.jsonl"), "eval_path": str(folder / "eval.jsonl"), "max_length": 16},
        "method": "bitfit", "objective": {"name": "classification"},
        "train": {"max_steps": 1, "train_batch_size": 8, "report_to": "none", "progress": False},
    }  # fmt: skip
    (folder / "my.yaml").write_text(json.dumps(config))
    return folder


def evaluate(world, capsys, *changes):
    """The scores of a config, or None where it is refused, and what was said."""
    capsys.readouterr()
    code = cli.main(["evaluate", str(world / "my.yaml"), *changes])
    out, err = capsys.readouterr()
    return (json.loads(out) if code == 0 else None), err


def train(world, name, *changes):
    """The summary of a run, or None where it is refused."""
    code = cli.main(["train", str(world / "my.yaml"), f"output_dir={world / name}", *changes])
    return json.loads((world / name / "summary.json").read_text()) if code == 0 else None


def by_torch(folder, file):
    """(loss, accuracy) of the rows of a file by transformers, with the names of its config.json."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    x = logits(model, [r["text"] for r in rows])
    labels = torch.tensor([model.config.label2id[r["label"]] for r in rows])
    return torch.nn.functional.cross_entropy(x, labels).item(), (x.argmax(-1) == labels).float().mean().item()


@pytest.mark.parametrize("file", ["eval", "two"])
def test_a_heads_own_names_number_the_classes(world, capsys, file):
    path = world / f"{file}.jsonl"
    loss, accuracy = by_torch(world / "judge", path)
    found, _ = evaluate(world, capsys, f"data.eval_path={path}")
    assert (found["loss"], found["accuracy"]) == (pytest.approx(loss, rel=1e-4), pytest.approx(accuracy))
    alone, _ = evaluate(world, capsys, f"data.eval_path={path}", f"data.path={world / 'gone.jsonl'}")
    assert alone == found
    summary = train(world, f"own_{file}", f"data.path={path}", f"data.eval_path={path}")
    assert summary["before_accuracy"] == found["accuracy"]
    info = json.loads((world / f"own_{file}" / "adapter" / "adapter.json").read_text())
    assert (info["labels"], info["num_labels"]) == (NAMES, 3)


def test_numbers_are_the_outputs_of_a_head_without_names(world, capsys):
    model = judge(world / "nameless", [f"LABEL_{i}" for i in range(3)])
    said = logits(model).argmax(-1).tolist()
    rows = [{"text": t, "label": i} for t, i in zip(TEXTS, said, strict=True) if i != 1]
    path = worlds.jsonl(world / "numbers.jsonl", rows)
    changes = [f"model.path={world / 'nameless'}", f"data.path={path}", f"data.eval_path={path}"]
    found, _ = evaluate(world, capsys, *changes)
    assert (found["accuracy"], found["rows"]) == (1.0, len(rows))


def test_labels_in_another_order_than_the_heads_are_refused(world, capsys):
    change = "data.labels=[mid, neg, pos]"
    said = "head was trained on [pos, neg, mid]: 'mid' has another number there; set data.labels=[pos, neg, mid]"
    assert train(world, "none", change) is None
    assert said in capsys.readouterr().err
    assert not (world / "none").exists()
    found, err = evaluate(world, capsys, change)
    assert found is None
    assert said in err
    assert cli.main(["validate", str(world / "my.yaml"), change]) == 2
    assert evaluate(world, capsys, "data.labels=[pos, neg, mid]")[0] == evaluate(world, capsys)[0]


def test_a_fresh_heads_classes_are_those_of_the_training_rows(world, capsys):
    """Three of them, also where only two are held out; as the run itself scores its base."""
    changes = [f"model.path={world / 'base'}", f"data.eval_path={world / 'two.jsonl'}"]
    found, _ = evaluate(world, capsys, *changes)
    summary = train(world, "fresh", *changes)
    assert (summary["before_loss"], summary["before_accuracy"]) == (found["loss"], found["accuracy"])
    info = json.loads((world / "fresh" / "adapter" / "adapter.json").read_text())
    assert info["labels"] == sorted(NAMES)
    alone, _ = evaluate(world, capsys, *changes, f"data.path={world / 'gone.jsonl'}")
    assert alone["loss"] != found["loss"]  # of two outputs


def test_an_exported_classifier_is_evaluated_as_the_run(world, capsys):
    changes = [f"model.path={world / 'base'}", "train.learning_rate=0.05", "train.max_steps=4"]
    summary = train(world, "exported", *changes)
    assert cli.main(["export", str(world / "exported"), "--output", str(world / "exported_hf")]) == 0
    here = [f"model.path={world / 'exported_hf'}", f"data.path={world / 'gone.jsonl'}"]
    found, _ = evaluate(world, capsys, *here)
    assert found["loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert found["accuracy"] == summary["eval_accuracy"]
    found, _ = evaluate(world, capsys, *here, f"data.eval_path={world / 'two.jsonl'}")
    loss, accuracy = by_torch(world / "exported_hf", world / "two.jsonl")
    assert (found["loss"], found["accuracy"]) == (pytest.approx(loss, rel=1e-4), pytest.approx(accuracy))


def test_more_or_fewer_labels_than_outputs_are_told(world, capsys):
    """An adapter of another library does not name its classes."""
    lora = "method={name: lora, rank: 2, targets: 'attention/{q,v}/kernel'}"
    train(world, "lora", lora, f"model.path={world / 'base'}")
    assert cli.main(["export", str(world / "lora"), "--format", "peft", "--output", str(world / "peft")]) == 0
    worlds.jsonl(world / "four.jsonl", [{"text": "w1", "label": x} for x in (*NAMES, "new")])
    for file, labels in (("two", "2 labels, mid, pos,"), ("four", "4 labels, mid, neg, new, pos,")):
        command = ["evaluate", str(world / "peft"), f"data.eval_path={world / file}.jsonl", "data.max_length=16"]
        assert cli.main(command) == 2
        assert f"the rows have {labels} and the classification head" in capsys.readouterr().err
    assert cli.main([*command, f"data.eval_path={world / 'two.jsonl'}", f"data.labels={sorted(NAMES)}"]) == 0
    two = json.loads(capsys.readouterr().out)
    assert cli.main(["evaluate", str(world / "lora"), f"data.eval_path={world / 'two.jsonl'}"]) == 0
    assert two["loss"] == pytest.approx(json.loads(capsys.readouterr().out)["loss"], rel=1e-5)
