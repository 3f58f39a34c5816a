"""What both sides of the comparison share: the shipped config as it is resolved, and the form of a result."""

import argparse
import json
from pathlib import Path
from typing import Any

METHODS = ("full", "lora", "bitfit")
ROOT = Path(__file__).resolve().parent.parent.parent


def arguments() -> argparse.Namespace:
    """The flags that both sides take; TUNEJAX_ASSETS must name the folder with data/sst2, as the configs want."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, help="instead of the config's length")
    parser.add_argument("--folder", type=Path, required=True, help="of one pair: the start that the torch side writes")
    return parser.parse_args()


def overrides(args: argparse.Namespace) -> list[str]:
    """What a run of the comparison changes of the config: seed, folders, and what is written when; nothing that tunes.

    ``--steps`` alone changes the training, for a short trial.
    """
    changed = [
        f"seed={args.seed}",
        f"output_dir={args.folder / 'run'}",
        f"model.path={args.folder / 'start'}",
        "train.logging_steps=1",
        "train.eval_steps=1000000",
        "train.save_steps=1000000",
        "train.report_to=none",
        "train.progress=false",
    ]
    return changed + ([f"train.max_steps={args.steps}"] if args.steps else [])


def config(args: argparse.Namespace) -> Any:
    """The resolved config of the method. Raises SystemExit where it asks for what the torch side does not do."""
    from tunejax.config import load

    c = load.load(ROOT / "configs/sst2" / f"{args.method}.yaml", overrides(args))
    same = {
        "model.dropout is 0": c.model.dropout == 0,
        "model.dtype is float32": c.model.dtype == c.model.param_dtype == "float32",
        "train.optim is adamw": c.train.optim == "adamw",
        "train.min_lr_ratio is 0": c.train.min_lr_ratio == 0,
        "train.gradient_accumulation_steps is 1": c.train.gradient_accumulation_steps == 1,
        "objective has no options": not c.objective.model_extra,
    }
    missed = [rule for rule, holds in same.items() if not holds]
    if missed:
        raise SystemExit(f"configs/sst2/{args.method}.yaml cannot be compared: it must hold that {'; '.join(missed)}")
    return c


def report(side: str, args: argparse.Namespace, steps: list[dict[str, float]], **figures: float) -> None:
    """Prints one JSON line, figures to six decimals (tunejax's are float32). steps: loss and learning_rate of each."""
    curves = {"losses": [round(s["loss"], 7) for s in steps], "rates": [s["learning_rate"] for s in steps]}
    head = {"side": side, "method": args.method, "seed": args.seed, "steps": len(steps)}
    figures = {name: round(x, 6) for name, x in figures.items()}
    print(json.dumps({**head, **figures, **curves}), flush=True)
