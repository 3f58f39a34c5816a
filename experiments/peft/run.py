"""Methods of tuning beside each other on three tasks: `tunejax compare` for each config, then the goals.

    TUNEJAX_ASSETS=folder python experiments/peft/run.py [--tasks sst2 trec cola] [--limit STEPS] [--only LABEL ...]

The same command again goes on where it was stopped. With ``--limit`` it is a trial of one seed in folders of its own.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TASKS = ("sst2", "trec", "cola")


def main() -> int:
    """0 where every comparison ended well and, of all of them, the goals are met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--limit", type=steps, help="steps of each run, for a trial")
    parser.add_argument("--only", nargs="+", default=[], help="labels of methods")
    args = parser.parse_args()
    codes = [subprocess.run(command(task, args), cwd=ROOT).returncode for task in args.tasks]
    if any(codes) or args.limit or args.only or len(args.tasks) < len(TASKS):
        return max(map(abs, codes))  # negative: the signal that ended it
    return subprocess.run([sys.executable, str(HERE / "goals.py")], cwd=ROOT).returncode


def steps(text: str) -> int:
    """The type of ``--limit``: a run of none would be no trial."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps; expected 1 or more")
    return int(text)


def command(task: str, args: argparse.Namespace) -> list[str]:
    """The command line of one task's comparison."""
    made = [sys.executable, "-m", "tunejax.cli", "compare", f"configs/compare/{task}.yaml"]
    if args.limit:
        made += [f"output_dir=runs/compare_trial/{task}", f"train.max_steps={args.limit}", "compare.seeds=[0]"]
    return made + (["--only", ",".join(args.only)] if args.only else [])


if __name__ == "__main__":
    sys.exit(main())
