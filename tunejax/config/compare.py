"""The config of a comparison: that of a run, with a section ``compare`` in place of ``method``.

Each entry of ``compare.methods`` is what ``method`` is in the config of a run, or a mapping with ``method`` and the
sections in which its runs differ: ``{method: {name: lora}, train: {learning_rate: 1e-3}}``. Where an entry learns from
another one's runs, ``{seed}`` stands for its own run's seed: ``distill: {teacher: "runs/x/runs/full/seed_{seed}"}``.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError, field_validator

from tunejax.config import load, schema
from tunejax.core import errors

OWN = ("method", "model", "data", "objective", "distill", "train", "generation", "evaluation", "expected")
"""Keys of a run's config that an entry may give; the others belong to all runs or to the comparison."""

SEEDED = (("distill", "teacher"), ("distill", "cache"), ("model", "path"))
"""Keys whose ``{seed}`` is the run's."""

LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
"""A label is the name of a folder, too."""


class CompareSection(schema.Section):
    """Which methods, how often, and by what they are judged."""

    methods: dict[str, Any] = Field(min_length=1, description="label -> method, or {method, train, ...}; or a list")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="one run of each method for each")
    metric: str = Field(min_length=1, description="quality: a score of the held-out rows, such as eval_accuracy")
    greater_is_better: bool | None = Field(None, description="by default false for loss, nll, perplexity, else true")
    target: float | None = Field(None, description="quality to which the time is told")

    @field_validator("methods", mode="before")
    @classmethod
    def _labelled(cls, value: Any) -> Any:
        if isinstance(value, list):
            names = [v.get("name") if isinstance(v, dict) else v for v in value]
            if not all(isinstance(n, str) for n in names):
                raise ValueError("in a list every method has a name; give a mapping of labels to methods otherwise")
            _once([str(n) for n in names])
            value = dict(zip(names, value, strict=True))
        if isinstance(value, dict):
            bad = [k for k in value if not isinstance(k, str) or not LABEL.fullmatch(k)]
            if bad and isinstance(bad[0], str):
                raise ValueError(f"label {bad[0]!r}: use letters, digits and any of _ . + -")
            if bad:
                raise ValueError(f"label {bad[0]!r} is no text to YAML: put it in quotes, as '{bad[0]}'")
            _once([k.lower() for k in value])
        return value

    @field_validator("seeds")
    @classmethod
    def _different(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value) or min(value) < 0 or max(value) >= schema.MOST_SEEDS:
            raise ValueError(f"seeds are different numbers from 0 on, below {schema.MOST_SEEDS}; found {value}")
        return value

    @field_validator("metric")
    @classmethod
    def _held_out(cls, value: str) -> str:
        return value if value.startswith("eval_") else f"eval_{value}"

    @property
    def higher_wins(self) -> bool:
        """Whether greater quality is better."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not re.search("loss|nll|perplexity", self.metric)

    def reaches(self, value: float) -> bool:
        """Whether ``value`` is as good as the target, or better. Only where there is one."""
        assert self.target is not None
        return value >= self.target if self.higher_wins else value <= self.target


class Run(NamedTuple):
    """One training: of one entry with one seed. config: resolved, with an output_dir of its own."""

    label: str
    seed: int
    config: schema.Config


class Comparison(NamedTuple):
    """A checked comparison. runs: method by method."""

    name: str
    folder: Path
    section: CompareSection
    runs: list[Run]


def load_comparison(path: str | Path, assignments: list[str] | tuple[str, ...] = ()) -> Comparison:
    """The comparison of a file and overrides.

    An override of ``compare.``... changes the comparison, any other one every run, whatever the entries say.

    Raises:
      ConfigError: every problem of the comparison, or of the runs of one entry, with its full key.
    """
    raw = load.read_file(path)
    ours = [a for a in assignments if a.startswith("compare.")]
    theirs = [a for a in assignments if not a.startswith("compare.")]
    if "compare" not in raw:
        raise errors.ConfigError(f"{path} has no section 'compare'; a config of one run is for tunejax train")
    for key in ("method", "seed"):
        if key in raw or any(re.match(rf"{key}[.=]", a) for a in theirs):
            raise errors.ConfigError(f"{path}: {key}: the {key}s of a comparison stand in compare.{key}s")
    if "many" in raw or any(a.startswith("many") for a in theirs):
        raise errors.ConfigError(f"{path}: many: a comparison's runs are one each; name the members in compare.methods")
    section = _section(_overridden(raw["compare"], ours), str(path))
    shared = {k: v for k, v in raw.items() if k != "compare"}
    runs = []
    for label, entry in section.methods.items():
        origin = f"{path}: compare.methods.{label}"
        mixed = load.override(merged(shared, _parts(entry, origin)), theirs)
        for seed in section.seeds:
            checked = load.check(_seeded(mixed, seed), origin)
            out = Path(checked.output_dir) / "runs" / label / f"seed_{seed}"
            runs.append(Run(label, seed, checked.model_copy(update={"seed": seed, "output_dir": str(out)})))
    return Comparison(Path(path).stem, Path(checked.output_dir), section, runs)


def _seeded(raw: dict[str, Any], seed: int) -> dict[str, Any]:
    """``raw`` with the seed in `SEEDED`."""
    out = dict(raw)
    for section, key in SEEDED:
        found = out.get(section)
        if isinstance(found, Mapping) and isinstance(found.get(key), str):
            out[section] = {**found, key: found[key].replace("{seed}", str(seed))}
    return out


def _section(raw: Any, origin: str) -> CompareSection:
    try:
        return CompareSection.model_validate(raw)
    except ValidationError as e:
        known = load.keys(CompareSection)
        raise errors.ConfigError(load.problems(e, known, origin, "compare.")) from None


def _overridden(raw: Any, assignments: list[str]) -> Any:
    known = load.keys(CompareSection)
    inner = [a.removeprefix("compare.") for a in assignments]
    for text in inner:
        name = text.partition("=")[0]
        if name not in known and not name.startswith("methods."):
            raise errors.ConfigError(f"override 'compare.{text}': unknown key. {errors.did_you_mean(name, known)}")
    return load.override(raw, inner, strict=False)


def _parts(entry: Any, origin: str) -> dict[str, Any]:
    """The sections of a run's config that an entry gives."""
    if not isinstance(entry, Mapping) or "method" not in entry:
        return {"method": entry}
    for key in entry:
        if key not in OWN:
            raise errors.ConfigError(f"{origin}.{key}: unknown key. {errors.did_you_mean(str(key), OWN)}")
    return dict(entry)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid on it, mappings within mappings; a method replaces the other whole."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping) and key != "method"
        out[key] = merged(out[key], value) if both else value
    return out


def _once(labels: list[str]) -> None:
    twice = [k for k, n in Counter(labels).items() if n > 1]
    if twice:
        raise ValueError(f"two methods are labelled {', '.join(map(repr, twice))}; labels differ in more than case")
