"""Bad input of every kind: one clear message, exit code 2, no traceback, and existing files as they were.

Each case names what it breaks (a function of the folder), the command, and words that the message must have.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tunejax import cli

sys.path.insert(0, str(Path(__file__).parent / "recipes"))
import worlds


class Case(NamedTuple):
    """args: after "tunejax"; CONFIG, RUN and DIR stand for paths. said: parts of the message. breaks: of the folder."""

    name: str
    args: list[str]
    said: list[str]
    breaks: object = None


def train(*overrides: str) -> list[str]:
    return ["train", "CONFIG", *overrides]


def rows(*bad):
    return lambda folder: worlds.jsonl(folder / "train.jsonl", [*worlds.ROWS, *bad])


def write(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def model_json(**changes):
    def breaks(folder):
        file = folder / "model" / "config.json"
        raw = {k: v for k, v in {**json.loads(file.read_text()), **changes}.items() if v is not None}
        file.write_text(json.dumps(raw))

    return breaks


def gap(folder):
    """A tokenizer of 19 entries, fewer than the model's 20, whose last one has an id beyond them."""
    file = folder / "model" / "tokenizer.json"
    raw = json.loads(file.read_text())
    words = {word: i for word, i in raw["model"]["vocab"].items() if word != "big"}
    raw["model"]["vocab"] = {**words, ".": 25}
    file.write_text(json.dumps(raw))


def truncated(folder):
    file = folder / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder):
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")


def other_run(folder):
    (folder / "run").mkdir()
    raw = (folder / "my.yaml").read_text().replace("max_steps: 4", "max_steps: 9")
    (folder / "run" / "config.yaml").write_text(raw)


def unfinished(folder):
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text((folder / "my.yaml").read_text())


def several(folder):
    unfinished(folder)
    with (folder / "run" / "config.yaml").open("a") as file:
        file.write("many: [{seed: 0}, {seed: 1}]\n")


def gone(name):
    return lambda folder: (folder / name).unlink()


def without_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).unlink()


def damaged_adapter(folder):
    unfinished(folder)
    (folder / "run" / "adapter").mkdir()
    for name, text in (("adapter.safetensors", ""), ("adapter.json", "{")):
        (folder / "run" / "adapter" / name).write_text(text)


def only_bad(folder):
    worlds.jsonl(folder / "train.jsonl", [row(completion="")])


def row(**changes):
    return {k: v for k, v in {**worlds.ROWS[0], **changes}.items() if v is not None}


def labelled(*labels):
    """Rows of a text and one of the labels; `CLASSES` reads them."""
    return lambda folder: worlds.jsonl(folder / "train.jsonl", [{"text": "red cat", "label": x} for x in labels])


CLASSES = ("objective.name=classification", "data.eval_path=null")

FLAGS = [
    Case("unknown verb", ["trian", "CONFIG"], ["'trian'", "Did you mean 'train'"]),
    Case("no config", ["train"], ["needs a config"]),
    Case("unknown flag", ["train", "CONFIG", "--resume"], ["'--resume'"]),
    Case("a word for a number", ["preprocess", "CONFIG", "--rows", "many"], ["--rows", "many"]),
    Case("negative rows", ["preprocess", "CONFIG", "--rows", "-1"], ["--rows", "0 or more"]),
    Case("export without a folder", ["export", "RUN"], ["--output"]),
    Case("export in an unknown format", ["export", "RUN", "--format", "onnx", "--output", "DIR/x"], ["'onnx'", "hf"]),
    Case("export into a full folder", ["export", "RUN", "--output", "DIR"], ["not an empty folder"]),
    Case("export of no run", ["export", "DIR/rum", "--output", "DIR/x"], ["Did you mean 'run'"], unfinished),
    Case("export of an unfinished run", ["export", "RUN", "--output", "DIR/x"], ["no adapter"], unfinished),
    Case("evaluate a run of several", ["evaluate", "RUN"], ["holds the runs of 2 members", "run/members/0"], several),
    Case("override without =", train("train.max_steps"), ["key=value", "train.max_steps"]),
    Case("override of an unknown key", train("train.max_step=3"), ["Did you mean 'train.max_steps'"]),
    Case("override that is no YAML", train("train.report_to=[a"), ["is not YAML"]),
    Case("evaluate a folder that is no run", ["evaluate", "DIR"], ["no run folder"]),
]

CONFIGS = [
    Case("no such config", ["train", "DIR/mine.yaml"], ["no config file", "Did you mean 'my.yaml'"]),
    Case("config that is no YAML", train(), ["line 1", "is not YAML"], write("my.yaml", "a: [1, 2")),
    Case("config that is a list", train(), ["expected a mapping"], write("my.yaml", "- 1")),
    Case("config that is binary", train(), ["not UTF-8"], write("my.yaml", b"a: \xff\xfe")),
    Case("key given twice", train(), ["given twice: seed"], write("my.yaml", "seed: 1\nseed: 2")),
    Case("keys missing", train(), ["output_dir: required", "data: required"], write("my.yaml", "method: full")),
    Case("wrong type", train("train.max_steps=soon"), ["train.max_steps", "integer", "'soon'"]),
    Case("out of range", train("train.learning_rate=-1"), ["train.learning_rate", "greater than 0"]),
    Case("no finite rate", train("train.learning_rate=.inf"), ["train.learning_rate", "finite"]),
    Case("another tool's key", train("train.fp16=true"), ["model.dtype"]),
    Case("unknown choice", train("data.on_bad_row=ignore"), ["data.on_bad_row", "'error' or 'skip'"]),
    Case("two warm-ups", train("train.warmup_steps=1", "train.warmup_ratio=0.1"), ["not both"]),
    Case("unknown method", train("method.name=loar"), ["'loar'", "Did you mean 'lora'"]),
    Case("unknown argument of a method", train("method.rnak=2"), ["rnak", "Did you mean 'rank'"]),
    Case("wrong type in a method", train("method.rank=two"), ["rank", "'two'"]),
    Case("method file that is not there", train("method={name: 'DIR/mine.py:f'}"), ["no file", "mine.py"]),
    Case(
        "target that matches nothing",
        train("method.targets=attention/qq/kernel"),
        ["matches none", "attention/q/kernel"],
    ),
    Case("unknown optimiser", train("train.optim=adam2"), ["'adam2'", "adamw"]),
    Case(
        "unknown metric of the best model",
        train("train.metric_for_best_model=acuracy"),
        ["train.metric_for_best_model: 'eval_acuracy'", "Did you mean 'eval_accuracy'"],
    ),
    Case(
        "unknown metric, validated",
        ["validate", "CONFIG", "train.metric_for_best_model=acuracy"],
        ["Did you mean 'eval_accuracy'"],
    ),
    Case("unknown schedule", train("train.lr_scheduler_type=cosin"), ["'cosin'", "cosine"]),
    Case("unknown objective", train("objective.name=seq2seq"), ["objective.name", "causal_lm"]),
    Case(
        "unknown option of an objective", train("objective.smoothing=0.1"), ["objective.smoothing", "label_smoothing"]
    ),
    Case(
        "wrong type in an objective", train("objective.label_smoothing=high"), ["objective.label_smoothing", "'high'"]
    ),
    Case(
        "a word for class weights",
        train(*CLASSES, "objective.class_weights=abc"),
        ["objective.class_weights", "'abc'"],
        labelled("a", "b"),
    ),
    Case("objective that does not fit the model", train("objective.name=masked_lm"), ["is a decoder"]),
    Case("mesh that does not fit", train("mesh.tensor=7"), ["mesh", "7"]),
    Case("batch that does not divide", train("train.train_batch_size=7"), ["multiple of"]),
    Case("longer than the model", train("data.max_length=4096"), ["4096", "64 positions"]),
    Case(
        "a prefix and rows", train("method={name: prefix_tuning, length: 50}"), ["50 positions", "data.max_length=14"]
    ),
    Case(
        "prefix longer than the model",
        train("method={name: prefix_tuning, length: 1000}"),
        ["takes 1000 positions", "has 64: no text fits behind it; give the method a smaller length"],
    ),
    Case(
        "a ladder too narrow, validated",
        ["validate", "CONFIG", "method={name: lst, reduction_factor: 8}"],
        ["head_dim"],
    ),
    Case("prompt longer than the model", train(f"generation.prompts=[{'cat ' * 64}]"), ["generation.prompts.0", "64"]),
    Case("prompt that is empty", train("generation.prompts=[cat, '']"), ["generation.prompts.1 is empty"]),
    Case("end token that is none", train("data.eos_token_id=999"), ["data.eos_token_id is 999", "has 20 tokens"]),
    Case("field of a template", train("data.template='{promt} now'"), ["'promt'", "Did you mean 'prompt'"]),
    Case("unset variable in a path", train("data.path=$NO_SUCH_VARIABLE/x.jsonl"), ["NO_SUCH_VARIABLE"]),
    Case("package that is not installed", train("model.path=package:no_such_pkg/model"), ["no_such_pkg"]),
    Case("folder that is a file", train("output_dir=DIR/train.jsonl"), ["is a file"]),
    Case("folder of something else", train("output_dir=DIR/model"), ["not a run folder"]),
    Case("folder of another run", train(), ["another config", "train.max_steps: 9 there, 4 now"], other_run),
]

DATA = [
    Case("no such file", train("data.path=DIR/trian.jsonl"), ["no file", "Did you mean 'train.jsonl'"]),
    Case("no such file, validated", ["validate", "CONFIG", "data.path=DIR/a.jsonl"], ["data.path.0", "no file"]),
    Case("unknown ending", train("data.path=DIR/rows.xlsx"), ["no reader", "xlsx"], write("rows.xlsx", "x")),
    Case("empty file", train(), ["no rows"], write("train.jsonl", "")),
    Case("line that is no JSON", train(), ["train.jsonl:9", "malformed JSON"], rows('{"prompt": ')),
    Case("line that is no object", train(), ["train.jsonl:9"], rows("[1, 2]")),
    Case("missing key", train(), ["train.jsonl:9", "missing key 'completion'"], rows(row(completion=None, answer="x"))),
    Case("wrong type in a row", train(), ["train.jsonl:9", "wrong type in 'prompt'"], rows(row(prompt=3))),
    Case("empty field", train(), ["train.jsonl:9", "empty 'completion'"], rows(row(completion=" "))),
    Case("row too long", train(), ["train.jsonl:9", "too long"], rows(row(prompt="cat " * 40))),
    Case("several bad rows", train(), [":9", ":10"], rows(row(prompt=3), row(completion=""))),
    Case("invalid UTF-8", train(), ["train.jsonl:1", "UTF-8"], write("train.jsonl", b'{"prompt": "\xff"}\n')),
    Case("no format fits", train(), ["no format"], write("train.jsonl", '{"q": "a", "a": "b"}\n')),
    Case("unknown column", train("data.columns={prompt: pormpt}"), ["pormpt", "Did you mean 'prompt'"]),
    Case(
        "template for rows that take none",
        train("data.template='{text} now'"),
        ["data.template", "'text'", "prompt_completion"],
        write("train.jsonl", '{"text": "red cat"}\n'),
    ),
    Case(
        "exact match of texts",
        train("evaluation.exact_match=true", "data.eval_path=DIR/train.jsonl"),
        ["evaluation.exact_match", "'text'", "prompt_completion"],
        write("train.jsonl", '{"text": "red cat"}\n'),
    ),
    Case("only skipped rows", train("data.on_bad_row=skip"), ["no usable rows"], only_bad),
    Case(
        "more labels than outputs",
        train(*CLASSES, "model.num_labels=2"),
        ["model.num_labels is 2", "the data has 3 labels"],
        labelled("a", "b", "c"),
    ),
    Case(
        "fewer class weights than labels",
        train(*CLASSES, "objective.class_weights=[1, 2]"),
        ["objective.class_weights has 2 numbers", "3 labels"],
        labelled("a", "b", "c"),
    ),
    Case("bad held-out rows", train(), ["eval.jsonl:1"], write("eval.jsonl", '{"prompt": "a"}\n')),
    Case("damaged gzip", train("data.path=DIR/x.jsonl.gz"), ["gzip"], write("x.jsonl.gz", b"not gzip")),
]

CHECKPOINTS = [
    Case("no such model", train("model.path=DIR/modell"), ["no checkpoint folder", "Did you mean 'model'"]),
    Case("model that is a file", train("model.path=DIR/model/config.json"), ["is a file"]),
    Case("folder without config.json", train(), ["no config.json"], gone("model/config.json")),
    Case("config.json that is no JSON", train(), ["config.json", "not JSON"], write("model/config.json", "{")),
    Case("unknown family", train(), ["'lama'", "llama"], model_json(model_type="lama")),
    Case("no model_type", train(), ["model_type"], model_json(model_type=None)),
    Case("config.json without a size", train(), ["hidden_size"], model_json(hidden_size=None)),
    Case("wrong shape", train(), ["shape"], model_json(intermediate_size=32)),
    Case("missing tensors", train(), ["is missing", "layers.2"], model_json(num_hidden_layers=3)),
    Case("truncated weights", train(), ["model.safetensors is truncated"], truncated),
    Case("weights that are pickles", train(), ["pickle"], pickled),
    Case("no weights", train(), ["no model.safetensors"], gone("model/model.safetensors")),
    Case("no tokenizer", train(), ["no tokenizer"], without_tokenizer),
    Case("damaged tokenizer", train(), ["tokenizer"], write("model/tokenizer.json", "{}")),
    Case("token beyond the model's", train(), ["tokenizer has '.' as 25", "20 tokens: 0 to 19", "another model"], gap),
    Case("adapter that is damaged", ["evaluate", "RUN"], ["adapter.json is damaged"], damaged_adapter),
]

ALL = [*FLAGS, *CONFIGS, *DATA, *CHECKPOINTS]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which the command would work, made once and copied for each case."""
    folder = tmp_path_factory.mktemp("world")
    worlds.make(folder)
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("case", ALL, ids=[c.name for c in ALL])
def test_bad_input(case, world, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "world"
    copy(world, folder)
    monkeypatch.setenv("TUNEJAX_CACHE", str(tmp_path / "cache"))
    if case.breaks:
        case.breaks(folder)
    before = snapshot(folder)
    code = cli.main([replaced(a, folder) for a in case.args])
    out, err = capsys.readouterr()
    assert code == 2, f"exit code {code}\n{out}\n{err}"
    assert "Traceback" not in err
    for part in case.said:
        assert part in err, f"{part!r} is not in:\n{err}"
    assert err.startswith("tunejax: ")
    assert err.count("tunejax: ") == 1
    assert snapshot(folder) == before


def replaced(text: str, folder: Path) -> str:
    return (
        text.replace("CONFIG", str(folder / "my.yaml")).replace("RUN", str(folder / "run")).replace("DIR", str(folder))
    )


def copy(source: Path, target: Path) -> None:
    """A copy of the folder whose config names itself."""
    for file in source.rglob("*"):
        if file.is_file():
            to = target / file.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(file.read_bytes())
    config = target / "my.yaml"
    config.write_text(config.read_text().replace(str(source), str(target)))


def test_there_are_enough_kinds():
    assert len(ALL) >= 30
    assert len({c.name for c in ALL}) == len(ALL)
