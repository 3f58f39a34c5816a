"""The sub-network of a finished supernet for a budget: the best mixture of its sizes, found without training.

Mixtures take the size of each dimension by itself. Those within the budget are tried on the held-out rows: the sizes
that the run trained, then some at random, then what evolution makes of the best (Once-for-All: Cai et al., 2020,
arXiv:1908.09791, section 3.4; there a predictor stands for the rows). Where no more mixtures are within the budget than
may be tried, all are. What was tried is kept in the run folder, so a search that was stopped goes on.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tunejax import plots
from tunejax.core import errors, gradual, masked, paths, units
from tunejax.core import method as methods
from tunejax.models import cut
from tunejax.models.config import ModelConfig
from tunejax.recipes import artefact, assemble, folder
from tunejax.recipes import evaluate as evaluation

TRIED = "search.jsonl"
Choice = tuple[int, ...]
"""The size of each dimension, in order."""


class Asked(NamedTuple):
    """What is searched for. by: "parameters" or "flops"; most: the part of them that may be left."""

    by: str
    most: float
    metric: str = "loss"
    evaluations: int = 50
    seed: int = 0
    length: int = 64

    @property
    def higher_wins(self) -> bool:
        """Whether greater quality is better."""
        return self.metric not in ("loss", "nll", "perplexity")


class Space:
    """The mixtures of a supernet's sizes, and the part of the whole network that each leaves."""

    def __init__(self, counts: Mapping[str, Any], params: paths.Params, config: ModelConfig, head: str, asked: Asked):
        self.counts = {name: np.asarray(x).tolist() for name, x in counts.items()}
        self._sizes = cut.sizes(config)
        whole, left = self._cost(params, asked, {}), {}
        # Sizes that keep equally many units of a dimension are one; the first stands for them.
        apart = [sorted({c: x.index(c) for c in x}.values()) for x in self.counts.values()]
        for choice in itertools.product(*apart):
            if cut.fits(config, head, self.kept(choice)):
                left[choice] = self._cost(params, asked, self.kept(choice)) / whole
        self.left: dict[Choice, float] = left

    def within(self, asked: Asked) -> list[Choice]:
        """Those that leave no more than is asked for. Raises ConfigError where there are none."""
        found = [c for c, left in self.left.items() if left <= asked.most]
        if not found:
            raise errors.ConfigError(
                f"--{asked.by} {asked.most}: the smallest mixture leaves {min(self.left.values(), default=1.0):.3f}"
            )
        return found

    def kept(self, choice: Choice) -> dict[str, int]:
        """Units of each dimension."""
        return {name: x[i] for (name, x), i in zip(self.counts.items(), choice, strict=True)}

    def sizes(self, choice: Choice) -> dict[str, int]:
        """As the method's argument ``size`` has it."""
        return dict(zip(self.counts, choice, strict=True))

    def trained(self) -> list[Choice]:
        """The sizes of the run, in which all dimensions go together."""
        found = []
        for i in range(len(next(iter(self.counts.values())))):
            found.append(tuple(x.index(x[i]) for x in self.counts.values()))
        return [c for c in dict.fromkeys(found) if c in self.left]

    def _cost(self, params: paths.Params, asked: Asked, kept: dict[str, int]) -> int:
        if asked.by == "flops":
            return units.flops(params, kept, self._sizes, asked.length)
        return units.parameters(params, kept, self._sizes)


def run(tuned: artefact.Tuned, name: str, asked: Asked) -> tuple[paths.Params, dict[str, Any]]:
    """(parameters with the masks of the best mixture, what the search found) for a finished supernet.

    name: the run folder, where what was tried is kept.

    Raises:
      ConfigError: as `opened`, or a score that is not measured.
    """
    scores, bare = masked.scores(tuned.state), masked.taken_off(tuned.params)
    space = opened(tuned.parts, name, masked.counts(tuned.state), bare, asked)
    tried = Tried(Path(name) / TRIED, tuned, asked, judge(tuned, bare, scores, asked))
    found = search(space, tried, asked)
    best = chosen(space, found, asked)
    front = plots.unbeaten([plots.Point(json.dumps(space.sizes(c)), space.left[c], q) for c, q in found.items()],
                           asked.higher_wins)  # fmt: skip
    return masked.put(bare, masks(scores, space.kept(best))), {
        **asked._asdict(),
        "higher_wins": asked.higher_wins,
        "tried": len(found),
        "sizes": space.sizes(best),
        "left": space.left[best],
        "quality": found[best],
        "points": [[space.left[c], q] for c, q in found.items()],
        "front": [{"sizes": json.loads(p.label), "left": p.cost, "quality": p.quality} for p in front],
    }


def opened(parts: assemble.Parts, name: str, counts: Mapping[str, Any], params: paths.Params, asked: Asked) -> Space:
    """What is searched for a run, ``name``.

    Args:
      counts: `core.masked.counts` of its state.
      params: of its model, without masks; may be shapes.

    Raises:
      ConfigError: no supernet, no rows to evaluate on, or no mixture within the budget.
    """
    if not counts:
        raise errors.ConfigError(
            f"{name} offers no sizes to choose from: its method is {parts.method.name}; --parameters and --flops are "
            "for a supernet"
        )
    if not parts.config.data.eval_path:
        raise errors.ConfigError("no rows to search by: set data.eval_path")
    space = Space(counts, params, parts.model_config, parts.config.model.head or "lm", asked)
    space.within(asked)
    return space


def masks(scores: Mapping[str, Any], kept: Mapping[str, int]) -> dict[str, jax.Array]:
    """Of each dimension, the units that score highest: float32 [rows, units]."""
    return {name: gradual.greatest(jnp.asarray(scores[name]), n).astype(jnp.float32) for name, n in kept.items()}


def search(
    space: Space, evaluate: Callable[[dict[str, int], dict[str, int]], float], asked: Asked
) -> dict[Choice, float]:
    """Quality of each mixture that was tried, in order. evaluate: (sizes, kept units) -> quality.

    The same seed tries the same ones, as long as they come out the same.

    Raises:
      ConfigError: none is within the budget.
    """
    rng = random.Random(asked.seed)
    within = space.within(asked)
    found: dict[Choice, float] = {}

    def look(choice: Choice) -> None:
        if choice not in found:
            found[choice] = evaluate(space.sizes(choice), space.kept(choice))

    for choice in space.trained():
        look(choice)
    order = rng.sample(within, len(within))
    if len({*within, *found}) <= asked.evaluations:
        for choice in within:
            look(choice)
        return found
    while len(found) < asked.evaluations:
        fresh = [c for c in order if c not in found]
        if not fresh:
            break
        early = len(found) < asked.evaluations // 2
        look(fresh[0] if early else _child(rng, space, found, fresh, asked))
    if not any(c in found for c in within):
        look(order[0])
    return found


def _child(rng: random.Random, space: Space, found: dict[Choice, float], fresh: list[Choice], asked: Asked) -> Choice:
    """A mixture not tried yet, made of two of the best quarter; a random one where they make nothing new."""
    ranked = sorted((c for c in found if space.left[c] <= asked.most), key=found.__getitem__, reverse=asked.higher_wins)
    parents, wanted = ranked[: max(2, len(ranked) // 4)], set(fresh)
    genes = [sorted({c[i] for c in space.left}) for i in range(len(space.counts))]
    for _ in range(100 if parents else 0):
        one, two = rng.choice(parents), rng.choice(parents)
        mixed = [rng.choice(pair) for pair in zip(one, two, strict=True)]
        child = tuple(rng.choice(genes[i]) if rng.random() < 1 / len(genes) else x for i, x in enumerate(mixed))
        if child in wanted:
            return child
    return fresh[0]


def chosen(space: Space, found: Mapping[Choice, float], asked: Asked) -> Choice:
    """The best within the budget; of equals, the smallest."""
    sign = -1 if asked.higher_wins else 1
    within = [c for c in found if space.left[c] <= asked.most]
    return min(within, key=lambda c: (sign * found[c], space.left[c]))


class Tried:
    """The score of a mixture, measured once: what a file in the run folder has is not measured again."""

    def __init__(self, file: Path, tuned: artefact.Tuned, asked: Asked, measure: Callable[[dict[str, int]], dict]):
        self._file, self._asked, self._measure = file, asked, measure
        self._rows = folder.read_rows(file) if file.is_file() else []
        config = tuned.parts.config.model_dump(mode="json")
        matters = {k: config[k] for k in ("model", "data", "objective", "train", "seed", "evaluation", "generation")}
        said = json.dumps([matters, tuned.parts.method.name, asked.metric == "exact_match"], sort_keys=True)
        self._of = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()

    def __call__(self, sizes: dict[str, int], kept: dict[str, int]) -> float:
        """The score of a mixture, by what it keeps."""
        known = [r for r in self._rows if r.get("of") == self._of and r["kept"] == kept]
        if known:
            found = known[0]["scores"]
        else:
            found = self._measure(kept)
            self._rows.append({"of": self._of, "sizes": sizes, "kept": kept, "scores": found})
            folder.write_rows(self._file, self._rows)
        if self._asked.metric not in found:
            raise errors.ConfigError(
                f"--metric: {self._asked.metric!r} is not measured. {errors.did_you_mean(self._asked.metric, found)}"
            )
        return float(found[self._asked.metric])


def judge(
    tuned: artefact.Tuned, bare: paths.Params, scores: Mapping[str, Any], asked: Asked
) -> Callable[[dict[str, int]], dict[str, float]]:
    """(kept units) -> scores on data.eval_path. One program serves all mixtures: the masks are its arguments."""
    parts = tuned.parts
    config = parts.config
    says = {"exact_match": asked.metric == "exact_match"}
    quiet = config.generation.model_copy(update={"num_samples": 0, "prompts": []})
    config = config.model_copy(update={"generation": quiet, "evaluation": config.evaluation.model_copy(update=says)})
    masking = methods.method("masks", _nothing, _put)._replace(prompt=parts.method.prompt)
    asks = evaluation.judge(parts._replace(config=config, method=masking))

    def measure(kept: dict[str, int]) -> dict[str, float]:
        return {k: x for k, x in asks(bare, {}, masks(scores, kept)).items() if k != "rows"}

    return measure


def _nothing(key: Any, params: paths.Params) -> methods.Start:
    return methods.Start()


def _put(params: paths.Params, train: Any, masks: Any, ctx: methods.Context) -> paths.Params:
    return masked.put(params, masks)


def table(found: Mapping[str, Any]) -> str:
    """The Pareto front in plain text; the mixture that was chosen is marked."""
    lines = [f"{found['by']:>12}{found['metric']:>14}  size"]
    for point in found["front"]:
        mark = "  <- chosen" if point["sizes"] == found["sizes"] else ""
        said = ", ".join(f"{k}: {v}" for k, v in point["sizes"].items())
        lines.append(f"{point['left']:>12.3f}{folder.number(point['quality']):>14.4f}  {{{said}}}{mark}")
    return "\n".join([*lines, f"{found['tried']} mixtures tried, at most {found['most']} of {found['by']} asked for"])


def picture(found: Mapping[str, Any], path: Path) -> None:
    """All that was tried, and the front, as a PNG."""
    best = {(p["left"], p["quality"]): ", ".join(map(str, p["sizes"].values())) for p in found["front"]}
    points = [plots.Point(best.get((left, quality), ""), left, quality) for left, quality in found["points"]]
    label = f"part of {found['by']} (at a point: sizes of {', '.join(found['sizes'])})"
    plots.pareto(points, path, xlabel=label, ylabel=found["metric"], higher_wins=found["higher_wins"])
