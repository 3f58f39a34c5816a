"""How far Houlsby's adapters, LoRA and BitFit end from full tuning on each task, and whether that is near enough.

python experiments/peft/goals.py [runs/compare]
"""

import json
import sys
from pathlib import Path

TASKS = ("sst2", "trec", "cola")
POINTS = {"houlsby": 0.5, "lora": 0.5, "bitfit": 1.5}
"""The most that each may end below full tuning, in hundredths of the task's metric, mean over seeds."""
SHARE = 0.04
"""Of the parameters: what houlsby may train."""


def main() -> int:
    """Prints a line for each goal; 1 where one is missed or not measured."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare")
    said = [(f"{task}: {line}", met) for task in TASKS for line, met in goals(folder / task / "results.json")]
    print("\n".join(f"{'met     ' if met else 'NOT MET '}{line}" for line, met in said))
    return 0 if all(met for _, met in said) else 1


def goals(path: Path) -> list[tuple[str, bool]]:
    """What one task's results say of each goal, and whether it is met. path: as `tunejax compare` writes it."""
    if not path.is_file():
        return [(f"not measured: no {path}", False)]
    return judged(json.loads(path.read_text(encoding="utf-8")))


def judged(results: dict) -> list[tuple[str, bool]]:
    """The same of what the file holds."""
    rows = {r["method"]: r for r in results["methods"]}
    few = {n: f"{n}: {rows[n]['finished']} of {rows[n]['runs']} runs are finished" for n in ("full", *POINTS)}
    few = {n: line for n, line in few.items() if rows[n]["finished"] < rows[n]["runs"]}
    if "full" in few:
        return [(few["full"], False)]
    said = [(few[n], False) if n in few else distance(n, rows, most) for n, most in POINTS.items()]
    share = rows["houlsby"]["trained_share"]
    if "houlsby" not in few:
        said.append((f"houlsby trains {share:.2%} of the parameters (at most {SHARE:.0%})", share <= SHARE))
    return said


def distance(name: str, rows: dict[str, dict], most: float) -> tuple[str, bool]:
    """One method's mean beside full tuning's."""
    apart = 100 * (rows["full"]["quality_mean"] - rows[name]["quality_mean"])
    where = f"{abs(apart):.2f} points {'below' if apart > 0 else 'above'} full"
    return f"{name} ends {where} (at most {most:g} below)", apart <= most


if __name__ == "__main__":
    sys.exit(main())
