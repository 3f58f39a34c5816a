"""A tiny Llama checkpoint and rows in a folder, for tests of whole commands."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import yaml

from tunejax import cli
from tunejax.interop import hf
from tunejax.models import build
from tunejax.models.config import ModelConfig

WORDS = ["the", "a", "cat", "dog", "sees", "big", "red", "blue", "yes", "no", "one", "two", "what", "is", "?", "."]
SIZES = {
    "embed_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 24,
    "max_positions": 64,
}


def tokenizer_files(folder: Path) -> int:
    """A word-level tokenizer in Hugging Face's layout; returns its size."""
    vocab = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    special = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>"])]  # fmt: skip
    spec = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return len(vocab)


def checkpoint(folder: Path, seed: int = 0, room: int = 0, **sizes: int) -> Path:
    """A Llama of two layers, or of other ``sizes``, with random weights and the tokenizer, and room for more tokens."""
    folder.mkdir(parents=True)
    config = ModelConfig(family="llama", vocab_size=tokenizer_files(folder) + room, **{**SIZES, **sizes})
    params = build.build(config, head="lm").init(jax.random.key(seed))
    hf.save(folder, params, config, head="lm")
    return folder


ROWS = [{"prompt": f"what is {c} {a} ?", "completion": " yes ." if c == "red" else " no ."}
        for c in ("red", "blue") for a in ("cat", "dog", "one", "two")]  # fmt: skip


def jsonl(path: Path, rows: list) -> Path:
    """Rows as JSON Lines; a string is a line as it is."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def classified(folder: Path) -> list[str]:
    """Overrides for a run that tells two labels apart, with a head that the checkpoint lacks."""
    rows = [{"text": f"the {c} cat", "label": c} for c in ("red", "blue")] * 4
    return ["objective.name=classification", f"data.path={jsonl(folder / 'labelled.jsonl', rows)}"]


def make(folder: Path) -> Path:
    """A checkpoint, rows and a config that trains in a moment; returns the config's path."""
    checkpoint(folder / "model")
    jsonl(folder / "train.jsonl", ROWS)
    jsonl(folder / "eval.jsonl", ROWS[:4])
    raw = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "data": {
            "path": str(folder / "train.jsonl"),
            "eval_path": str(folder / "eval.jsonl"),
            "max_length": 16,
            "columns": {},
        },
        "method": {"name": "lora", "rank": 2, "targets": "attention/{q,v}/kernel"},
        "train": {"max_steps": 4, "train_batch_size": 8, "logging_steps": 2, "report_to": "none", "progress": False},
        "generation": {"max_new_tokens": 4},
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(raw))
    return folder / "my.yaml"


def trainer(folder: Path, steps: int) -> Callable[..., int]:
    """A new world's (name, method, overrides) -> the exit code of a short run in ``folder`` / name."""
    path = make(folder)
    always = [f"train.max_steps={steps}", "train.learning_rate=0.05", "data.eval_path=null", "generation.num_samples=0"]

    def one(name: str, method: dict | list, *changes: str) -> int:
        options = [f"output_dir={folder / name}", f"method={json.dumps(method)}", *always, *changes]
        return cli.main(["train", str(path), *options])

    return one


def tune(world: Path, name: str, *changes: str) -> tuple[int, list[dict]]:
    """Trains by the config of `make` into the folder ``name``; (exit code, what its metrics say of training)."""
    out = world / name
    options = [f"output_dir={out}", "generation.num_samples=0", "evaluation.exact_match=false"]
    code = cli.main(["train", str(world / "my.yaml"), *options, *changes])
    file = out / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return code, [row for row in rows if "loss" in row]
