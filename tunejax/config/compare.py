"""What a config of `tunejax compare` says besides the run that all its methods share."""

from typing import Any

from pydantic import Field, ValidationError, model_validator

from tunejax.config import load, schema
from tunejax.core import errors


class CompareSection(schema.Section):
    """Which methods are compared, on how many seeds, by what."""

    methods: dict[str, Any] = Field(
        min_length=1,
        description="label -> a method as in `method`, or sections that differ",
    )
    seeds: list[int] = Field([0], min_length=1)
    metric: str = Field("eval_loss", description="key of summary.json")
    greater_is_better: bool | None = Field(None, description="by default false for a loss, else true")
    target: float | None = Field(None, description="value of the metric; the table says when it was first reached")

    @model_validator(mode="after")
    def _distinct(self) -> "CompareSection":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}: each once")
        bad = [name for name in self.methods if not name or name.startswith(".") or "/" in name]
        if bad:
            raise ValueError(f"the label {bad[0]!r} cannot be the name of a folder")
        return self

    @property
    def higher_wins(self) -> bool:
        """Whether more of the metric is better."""
        if self.greater_is_better is None:
            return not self.metric.endswith(("loss", "perplexity"))
        return self.greater_is_better


def read(path: str, assignments: list[str]) -> tuple[CompareSection, dict[tuple[str, int], schema.Config]]:
    """(section, the whole config of each run by label and seed). ``compare.seeds=[0]`` overrides the section itself.

    Raises:
      ConfigError: every problem of the section; of the first run that has one.
    """
    raw = load.read_file(path)
    if not isinstance(raw.get("compare"), dict):
        raise errors.ConfigError(f"{path} has no section `compare`, which names the methods to compare")
    given = raw.pop("compare")
    for text in (a for a in assignments if a.startswith("compare.")):
        name, _, value = text.removeprefix("compare.").partition("=")
        given[name] = load.parse_yaml(value, f"override {text!r}")
    assignments = [a for a in assignments if not a.startswith("compare.")]
    try:
        section = CompareSection.model_validate(given)
    except ValidationError as e:
        known = [f"compare.{k}" for k in CompareSection.model_fields]
        problems = [load.explain({**p, "loc": ("compare", *p["loc"])}, known) for p in e.errors()]
        raise errors.ConfigError(f"{path}: " + "; ".join(problems)) from None
    out = str(raw.get("output_dir") or "")
    if not out:
        raise errors.ConfigError(f"{path}: output_dir: required, and not given")
    runs = {}
    for label, spec in section.methods.items():
        differs = spec if isinstance(spec, dict) and "method" in spec else {"method": spec}
        for seed in section.seeds:
            whole = _merged(raw, {**differs, "seed": seed})
            whole["evaluation"] = {**(whole.get("evaluation") or {}), "step_memory": True}
            whole = load.override(whole, assignments)
            whole["output_dir"] = f"{whole['output_dir']}/runs/{label}/{seed}"
            runs[label, seed] = load.check(whole, f"{path}: {label}")
    return section, runs


def _merged(raw: dict[str, Any], differs: dict[str, Any]) -> dict[str, Any]:
    """``raw`` with the keys of ``differs``; a section keeps what is not named."""
    out = dict(raw)
    for key, value in differs.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict) and key not in ("method", "objective")
        out[key] = {**out[key], **value} if both else value
    return out
