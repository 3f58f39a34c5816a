"""LoRA on stories260k: the loss curves of tunejax and PEFT over 100 steps. See README.md.

python benchmarks/stories_parity/run.py --assets ../shared/assets
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT = 0.01


def main() -> int:
    """Runs both sides and prints the largest relative difference; 1 where it passes `LIMIT`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared/assets")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/stories_parity.json")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in ("torch", "tunejax"):
            curves[side] = one(side, args, Path(folder) / "adapter.npz")
    args.out.write_text(json.dumps(curves))
    apart = [abs(a - b) / a for a, b in zip(curves["torch"], curves["tunejax"], strict=True)]
    print("| step | PEFT | tunejax |\n|---|---|---|")
    for i in sorted({0, args.steps // 4, args.steps // 2, args.steps - 1}):
        print(f"| {i + 1} | {curves['torch'][i]:.5f} | {curves['tunejax'][i]:.5f} |")
    print(f"largest relative difference over {args.steps} steps: {100 * max(apart):.4f}% (limit {100 * LIMIT:.0f}%)")
    return int(max(apart) > LIMIT)


def one(side: str, args: argparse.Namespace, adapter: Path) -> list[float]:
    """The losses of one side, in a process of its own."""
    flags = [f"--steps={args.steps}", f"--assets={args.assets.resolve()}", f"--adapter={adapter}"]
    command = [sys.executable, str(HERE / f"side_{side}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])["losses"]


if __name__ == "__main__":
    sys.exit(main())
