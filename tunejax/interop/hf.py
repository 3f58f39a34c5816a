"""Checkpoints in Hugging Face's layout: found, read straight into the wanted type and sharding, and written back."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import errors, operators, paths
from tunejax.core.paths import Params
from tunejax.interop import names, tensors
from tunejax.models import build
from tunejax.models.config import ModelConfig
from tunejax.models.families import registry

GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    TEMPLATE,
)
PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
FRESH_HEADS = ("/head/*", "/pooler/*", "/classifier/*", "/mlm/**")


class LoadReport(NamedTuple):
    """fresh: paths of a head that the checkpoint lacks, drawn from the key. unused: tensors that nothing here took."""

    fresh: list[paths.Path]
    unused: list[str]


def resolve(path_or_id: str | Path) -> Path:
    """The local folder of a checkpoint: a folder as it is, or a hub id's files (no pickles, no code).

    Raises:
      CheckpointError: no such folder or repository, or it cannot be reached.
    """
    text = str(path_or_id)
    local = Path(text).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise errors.CheckpointError(f"{text} is a file; give the folder of the checkpoint: {local.parent}")
    if text.startswith(("/", ".", "~")) or text.count("/") > 1:
        parent = local.parent
        near = errors.did_you_mean(local.name, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""
        raise errors.CheckpointError(f"no checkpoint folder at {text}. {near}".rstrip())
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=list(PATTERNS)))
    except LocalEntryNotFoundError:
        why = "the hub cannot be reached, and it has not been downloaded before"
    except HFValidationError as e:
        why = str(e).split(".")[0]
    except HfHubHTTPError as e:
        why = str(e).strip().splitlines()[0]
    except OSError as e:
        why = f"the hub cannot be reached ({type(e).__name__})"
    raise errors.CheckpointError(f"{text!r} is no local folder, and as a Hugging Face id it cannot be had: {why}")


def read_config(folder: str | Path) -> ModelConfig:
    """The model that a folder's config.json describes. Raises CheckpointError: none, damaged, or an unknown family."""
    file = Path(folder) / "config.json"
    raw = _read_json(file)
    if raw is None:
        raise errors.CheckpointError(f"{folder} has no config.json, so it is no checkpoint in Hugging Face's layout")
    if "model_type" not in raw:
        raise errors.CheckpointError(f"{file} has no model_type. {errors.did_you_mean('model_type', raw)}")
    try:
        return registry.get(raw["model_type"]).read_config(raw)
    except KeyError as e:
        raise errors.CheckpointError(f"{file} lacks {e.args[0]!r}, which a {raw['model_type']} has") from None
    except errors.CheckpointError as e:
        raise errors.CheckpointError(f"{file}: {e}") from None


def generation_config(folder: str | Path) -> dict[str, Any]:
    """What a folder's generation_config.json says; nothing where there is none. Raises CheckpointError: damaged."""
    return _read_json(Path(folder) / GENERATION) or {}


def ends(folder: str | Path) -> list[int]:
    """The ids that end a text by generation_config.json, or, where there is none, by config.json, as in `transformers`.

    Raises:
      CheckpointError: a file is damaged.
    """
    files = (_read_json(Path(folder) / name) for name in (GENERATION, "config.json"))
    named = next((f for f in files if f is not None), {}).get("eos_token_id")
    return named if isinstance(named, list) else [] if named is None else [named]


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise errors.CheckpointError(f"{file} is not JSON: {e}") from None
    if not isinstance(raw, dict):
        raise errors.CheckpointError(f"{file} holds a {type(raw).__name__}, not an object")
    return raw


def trained_classes(folder: str | Path, config: ModelConfig) -> int:
    """Outputs of the classification head that a checkpoint holds, as its files' headers say; 0 where it holds none.

    Raises:
      CheckpointError: as `tensors.open_folder`.
    """
    family, stored = registry.get(config.family), tensors.open_folder(Path(folder))
    head = [t for t in family.tensors(config, "classification") if any(paths.matches(h, t.ours) for h in FRESH_HEADS)]
    found = [x for t in head if (x := names.find(t.theirs, family, stored)) is not None]
    # A classifier without the pooler below it was trained on something else: on single tokens, say.
    return found[-1].shape[0] if found and len(found) == len(head) else 0


def load(
    folder: str | Path,
    config: ModelConfig,
    *,
    head: str,
    cuts: tuple[int, ...] = (),
    param_dtype: Any = jnp.float32,
    shardings: Callable[[paths.Path], jax.sharding.Sharding | None] | None = None,
    key: Any = None,
    layers: tuple[int, ...] | None = None,
) -> tuple[Params, LoadReport]:
    """The parameters of a checkpoint, stacked, in ``param_dtype``, each where its sharding wants it.

    One leaf is in host memory at a time; of a sharded leaf, only the parts that this process holds are read.

    Args:
      folder: a local checkpoint (see `resolve`).
      config: of `read_config`, perhaps with another number of labels; of layers, where ``layers`` names which.
      head, cuts: as in `models.build`.
      shardings: of each path; None for the default device.
      key: draws a head that the checkpoint lacks.

    Raises:
      CheckpointError: every missing tensor and wrong shape, naming tensor and file.
    """
    folder = Path(folder)
    model = build.build(config, head=head, cuts=cuts, param_dtype=param_dtype)
    key = jax.random.key(0) if key is None else key
    shapes = paths.flatten(jax.eval_shape(model.init, key))
    stored = tensors.open_folder(folder)
    plan = names.plan(registry.get(config.family), config, head, shapes, stored, layers)
    fresh = [p for p in plan.absent if any(paths.matches(h, p) for h in FRESH_HEADS)]
    problems = plan.problems + [plan.absent[p] for p in plan.absent if p not in fresh]
    if problems:
        shown = "\n  ".join(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise errors.CheckpointError(
            f"the checkpoint in {folder} does not fit {config.family} with head {head!r}:\n  {shown}"
        )
    place = shardings or (lambda path: None)
    flat: dict[paths.Path, Any] = dict.fromkeys(shapes)
    for path, sources in plan.sources.items():
        flat[path] = _assemble(shapes[path], sources, place(path))
    flat.update(_draw(model.init, fresh, place, key))
    return paths.unflatten(flat), LoadReport(fresh, plan.unused)


def _assemble(like: Any, sources: list[names.Source], sharding: jax.sharding.Sharding | None) -> jax.Array:
    """One leaf from its tensors (one a layer, or one alone)."""

    def read(index: Any) -> np.ndarray:
        spans = [range(*s.indices(n)) for s, n in zip(index, like.shape, strict=True)]
        out = np.empty([len(s) for s in spans], like.dtype)
        if len(sources[0].shape) == len(like.shape):
            out[...] = sources[0].read(index)
            return out
        for row, layer in enumerate(spans[0]):
            out[row] = sources[layer].read(index[1:])
        return out

    if sharding is None:
        return jax.device_put(read(tuple(slice(None) for _ in like.shape)))  # jnp.asarray compiles a program a shape
    return jax.make_array_from_callback(like.shape, sharding, read)


def _draw(
    init: Callable[[Any], Params], fresh: list[paths.Path], place: Callable[..., Any], key: Any
) -> dict[str, Any]:
    """Fresh values of these paths only: what else ``init`` makes is dead code in the compiled program."""
    if not fresh:
        return {}

    def some(key: Any) -> dict[str, jax.Array]:
        flat = paths.flatten(init(key))
        return {p: flat[p] for p in fresh}

    drawn = jax.jit(some)(key)
    return {p: x if place(p) is None else jax.device_put(x, place(p)) for p, x in drawn.items()}


def save(
    folder: str | Path,
    params: Params,
    config: ModelConfig,
    *,
    head: str,
    dtype: Any = None,
    tokenizer_from: str | Path | None = None,
    texts: Mapping[str, str] | None = None,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Writes a checkpoint that `transformers` loads: all of it, or (a failure) nothing.

    Args:
      folder: made if need be; a checkpoint already in it is replaced.
      params: plain arrays (after ``method.merge``), cut into segments in any way.
      config, head: what the parameters are of.
      dtype: of what is written; by default each tensor keeps its own.
      tokenizer_from: a checkpoint whose tokenizer files are copied.
      texts: further files, by name; they stand over what is copied.
      max_shard_size: bytes; beyond it, several files and an index.

    Raises:
      CheckpointError: operators, holes, or values that the family's format has no place for.
    """
    folder = Path(folder)
    flat = paths.flatten(params)
    stuck = [p for p, x in flat.items() if operators.is_operator(x)]
    if stuck:
        raise errors.CheckpointError(
            f"{stuck[0]} holds {type(flat[stuck[0]]).__name__}; merge the method before saving"
        )
    family = registry.get(config.family)
    raw = family.write_config(names.with_biases(config, params), head)
    out = names.outputs(family, family.read_config(raw), config, head, params, dtype)
    raw["dtype" if "dtype" in raw else "torch_dtype"] = out[0].dtype.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        written = tensors.write_folder(half, out, max_shard_size)
        written += _copy(Path(tokenizer_from), half) if tokenizer_from is not None else []
        for name, text in (texts or {}).items():
            (half / name).write_text(text, encoding="utf-8")
        written += [name for name in texts or {} if name not in written]
        (half / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        _publish(half, folder, [*written, "config.json"])
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _copy(source: Path, target: Path) -> list[str]:
    there = [n for n in TOKENIZER_FILES if (source / n).is_file()]
    for name in there:
        shutil.copyfile(source / name, target / name)
    return there


def _publish(half: Path, folder: Path, written: list[str]) -> None:
    """Renames the finished files into place; config.json goes last, and weights of an earlier save go away."""
    half.chmod(0o755)
    if not folder.exists():
        half.rename(folder)
        return
    stale = [p for p in folder.glob("model*.safetensors") if p.name not in written]
    stale += [folder / tensors.INDEX] if tensors.INDEX not in written else []
    for name in written:
        os.replace(half / name, folder / name)
    for file in stale:
        file.unlink(missing_ok=True)


def tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a local folder, by `transformers`; it runs no code of the checkpoint.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise errors.CheckpointError(f"{folder} has no tokenizer (looked for {', '.join(TOKENIZER_FILES[:3])}, ...)")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:
        first = (str(e).strip().splitlines() or [""])[0]
        raise errors.CheckpointError(f"the tokenizer in {folder} cannot be read: {type(e).__name__}: {first}") from e
