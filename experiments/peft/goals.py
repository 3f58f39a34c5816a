"""Whether Houlsby's adapters train at most 4% of the parameters and end within 0.5 points of full tuning on SST-2.

python experiments/peft/goals.py [runs/compare/sst2/results.json]
"""

import json
import sys
from pathlib import Path

SHARE, POINTS = 0.04, 0.005


def main() -> int:
    """Prints each goal; 1 where one is missed or not measured."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare/sst2/results.json")
    missed = unmet(json.loads(path.read_text(encoding="utf-8")))
    print("\n".join(missed) or "both goals are met")
    return 1 if missed else 0


def unmet(results: dict) -> list[str]:
    """A sentence for each goal that the results miss. results: as of `tunejax compare`."""
    rows = {r["method"]: r for r in results["methods"]}
    few = [n for n in ("houlsby", "full") if rows[n]["finished"] < rows[n]["runs"]]
    if few:
        return [f"{n}: {rows[n]['finished']} of {rows[n]['runs']} runs are finished" for n in few]
    share, apart = rows["houlsby"]["trained_share"], rows["full"]["quality_mean"] - rows["houlsby"]["quality_mean"]
    missed = []
    if share > SHARE:
        missed.append(f"houlsby trains {100 * share:.2f}% of the parameters; the goal is at most {100 * SHARE:g}%")
    if apart > POINTS:
        missed.append(f"houlsby ends {100 * apart:.2f} points below full; the goal is at most {100 * POINTS:g}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
