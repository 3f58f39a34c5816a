"""SST-2: tunejax against PyTorch transformers and PEFT from one start, over methods and seeds. See README.md.

python benchmarks/sst2_parity/run.py --assets ../shared/assets
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT = 0.005


def main() -> int:
    """Runs both sides a method and seed, prints the table; 1 where tunejax is worse by more than `LIMIT`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared/assets")
    parser.add_argument("--methods", nargs="+", default=["full", "lora", "bitfit"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/sst2_parity.json")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for method in args.methods:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as start:
                for side in ("torch", "tunejax"):
                    results.append(one(side, method, seed, args, start))
                    print(f"{method} seed {seed} {side}: {results[-1]['accuracy']:.4f}", file=sys.stderr, flush=True)
            args.out.write_text(json.dumps(results, indent=1))
    return table(results)


def one(side: str, method: str, seed: int, args: argparse.Namespace, start: str) -> dict:
    """The JSON line of one side's run, in a process of its own."""
    flags = [f"--method={method}", f"--seed={seed}", f"--steps={args.steps}", f"--assets={args.assets.resolve()}"]
    command = [sys.executable, str(HERE / f"side_{side}.py"), *flags, f"--start={start}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results: list[dict]) -> int:
    """Prints accuracies in percent; returns the exit code."""
    bad = 0
    print("| method | PyTorch | tunejax | difference | largest difference of a loss |\n|---|---|---|---|---|")
    for method in dict.fromkeys(r["method"] for r in results):
        sides = {s: [r for r in results if r["method"] == method and r["side"] == s] for s in ("torch", "tunejax")}
        theirs, ours = (statistics.mean(r["accuracy"] for r in sides[s]) for s in ("torch", "tunejax"))
        pairs = zip(sides["torch"], sides["tunejax"], strict=True)
        apart = max(abs(x - y) for a, b in pairs for x, y in zip(a["losses"], b["losses"], strict=True))
        print(f"| {method} | {100 * theirs:.2f} | {100 * ours:.2f} | {100 * (ours - theirs):+.2f} | {apart:.4f} |")
        bad += ours < theirs - LIMIT
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
