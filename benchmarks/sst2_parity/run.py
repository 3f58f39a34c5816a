"""SST-2 by the shipped configs: tunejax against PyTorch transformers and PEFT from one start. See ../README.md.

python benchmarks/sst2_parity/run.py --assets ../shared/assets
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT, EARLY = 0.005, 20


def main() -> int:
    """Runs both sides a method and seed, prints the table; 1 where tunejax is worse by more than `LIMIT`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared/assets", help="folder with data/sst2")
    parser.add_argument("--methods", nargs="+", default=["full", "lora", "bitfit"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the configs' length, for a trial")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/sst2_parity.json", help="pairs in it are kept")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.out.read_text()) if args.out.exists() else []
    for method in args.methods:
        for seed in args.seeds:
            if any((r["method"], r["seed"]) == (method, seed) for r in results):
                continue
            with tempfile.TemporaryDirectory() as folder:
                for side in ("torch", "tunejax"):
                    results.append(one(side, method, seed, args, folder))
                    print(progress(results[-1]), file=sys.stderr, flush=True)
            args.out.write_text(json.dumps(results))
    return table(results)


def one(side: str, method: str, seed: int, args: argparse.Namespace, folder: str) -> dict:
    """The JSON line of one side's run, in a process of its own, and the seconds that it took."""
    flags = [f"--method={method}", f"--seed={seed}", f"--folder={folder}"]
    flags += [f"--steps={args.steps}"] if args.steps else []
    command = [sys.executable, str(HERE / f"side_{side}.py"), *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TUNEJAX_ASSETS": str(args.assets.resolve())}
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": round(time.perf_counter() - begun, 1)}


def progress(r: dict) -> str:
    """One line about a run."""
    return (
        f"{r['method']} seed {r['seed']} {r['side']}: {r['steps']} steps, {r['trained']} parameters train, "
        f"accuracy {r['before']:.4f} before, {r['accuracy']:.4f} after, {r['seconds']:.0f} s"
    )


def apart(pairs: list[tuple[dict, dict]], curve: str, steps: int | None = None) -> float:
    """The largest difference of a curve over the first ``steps`` (None: all) of every pair of runs."""
    differences = [abs(x - y) for a, b in pairs for x, y in list(zip(a[curve], b[curve], strict=True))[:steps]]
    return max(differences)


def unequal(theirs: dict, ours: dict) -> list[str]:
    """What must be the same on both sides of a pair and is not."""
    found = [f"{k}: {theirs[k]} and {ours[k]}" for k in ("seed", "steps", "trained", "before") if theirs[k] != ours[k]]
    rates = apart([(theirs, ours)], "rates") if theirs["steps"] == ours["steps"] else 0.0
    return found + ([f"learning rates differ by {rates:.1e}"] if rates > 1e-6 * max(theirs["rates"]) else [])


def spread(values: list[float]) -> str:
    """Mean and standard deviation of accuracies, in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} ± {100 * deviation:.2f}"


def table(results: list[dict]) -> int:
    """Prints accuracies in percent (mean ± standard deviation over seeds); returns the exit code."""
    bad = False
    print(f"| method | PyTorch | tunejax | difference | losses apart: first {EARLY} steps | all steps |")
    print("|---|---|---|---|---|---|")
    for method in dict.fromkeys(r["method"] for r in results):
        theirs, ours = ([r for r in results if (r["method"], r["side"]) == (method, s)] for s in ("torch", "tunejax"))
        pairs = list(zip(theirs, ours, strict=True))
        a, b = ([r["accuracy"] for r in rs] for rs in (theirs, ours))
        gain = statistics.mean(b) - statistics.mean(a)
        early, late = apart(pairs, "losses", EARLY), apart(pairs, "losses")
        print(f"| {method} | {spread(a)} | {spread(b)} | {100 * gain:+.2f} | {early:.1e} | {late:.1e} |")
        for problem in [p for pair in pairs for p in unequal(*pair)]:
            print(f"not the same run: {method}: {problem}", file=sys.stderr)
            bad = True
        bad |= gain < -LIMIT
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
