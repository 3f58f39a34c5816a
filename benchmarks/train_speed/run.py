"""Training speed, memory and start-up of tunejax, PyTorch (eager, compiled) and Tunix. See README.md.

    python benchmarks/train_speed/run.py --tunix-python TUNIX_VENV/bin/python

Every measurement is a process of its own; a round runs each contender once, in an order that turns, and every
figure is divided by eager PyTorch's of the same round. Medians over rounds, with the smallest and largest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FIGURES = {"tokens_per_s": "tokens/s", "peak_mb": "peak memory", "first_step_s": "start to first step"}
REFERENCE = "torch_eager"


def main() -> None:
    """Runs the rounds, writing after each one, and prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=sys.executable, help="interpreter with tunejax's dependencies")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch, transformers, peft")
    parser.add_argument("--tunix-python", help="interpreter with google-tunix; left out without it")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it starts slowly)")
    parser.add_argument("--modes", nargs="+", default=["lora", "full"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/train_speed.json")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict] = []
    folder = str(args.out.parent / "train_speed_model")
    subprocess.run([args.torch_python, str(HERE / "make_checkpoint.py"), folder], check=True)
    for mode in args.modes:
        for turn in range(args.rounds):
            every = contenders(args, folder)
            for name in [*list(every)[turn % len(every) :], *list(every)[: turn % len(every)]]:
                results.append(one(every[name], mode, turn, args.steps))
                shown = {k: results[-1][k] for k in ("name", "mode", *FIGURES)}
                print(f"round {turn}: {shown}", file=sys.stderr, flush=True)
                args.out.write_text(json.dumps(results, indent=1))
    for mode in args.modes:
        print(table(results, mode))


def contenders(args: argparse.Namespace, folder: str) -> dict[str, list[str]]:
    """Command line of each contender by name; ``folder`` holds the model."""
    out = {
        "tunejax": [args.python, str(HERE / "bench_tunejax.py")],
        REFERENCE: [args.torch_python, str(HERE / "bench_torch.py")],
    }
    if not args.no_compile:
        out["torch_compiled"] = [args.torch_python, str(HERE / "bench_torch.py"), "--compile"]
    if args.tunix_python:
        out["tunix"] = [args.tunix_python, str(HERE / "bench_tunix.py")]
    return {name: [*command, "--model", folder] for name, command in out.items()}


def one(command: list[str], mode: str, turn: int, steps: int) -> dict:
    """The JSON line of one measurement, with the round and the machine's load before it."""
    load = os.getloadavg()[0]
    began = time.time()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    # No contender may begin with programs compiled by an earlier round.
    for name in ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        env.pop(name, None)
    env["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    flags = ["--mode", mode, "--steps", str(steps)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return {"round": turn, "load": round(load, 2), "wall_s": round(time.time() - began, 1)} | json.loads(
        done.stdout.splitlines()[-1]
    )


def table(results: list[dict], mode: str) -> str:
    """Markdown: for each contender the absolute median and the ratio to eager PyTorch, median (smallest to largest)."""
    rows = [r for r in results if r["mode"] == mode]
    base = {r["round"]: r for r in rows if r["name"] == REFERENCE}
    head = "| " + " | ".join([mode, *(f"{v} | ratio" for v in FIGURES.values())]) + " |"
    lines = [head, "|" + "---|" * (1 + 2 * len(FIGURES))]
    for name in dict.fromkeys(r["name"] for r in rows):
        own = [r for r in rows if r["name"] == name]
        cells = [name]
        for key in FIGURES:
            ratios = [r[key] / base[r["round"]][key] for r in own if r["round"] in base]
            cells.append(f"{statistics.median(r[key] for r in own):.4g}")
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
