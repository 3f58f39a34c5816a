"""Safetensors files: headers checked against the file, tensors read lazily, checkpoints written as a stream.

The format (huggingface.co/docs/safetensors): 8 bytes little-endian length of the header, the header in JSON
(name -> dtype, shape, data_offsets from the end of the header), then the bytes of all tensors.
"""

import contextlib
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tunejax.core import errors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(v): k for k, v in DTYPES.items()}
HEADER_LIMIT = 100_000_000


class Stored(NamedTuple):
    """A tensor in a file: where its bytes lie."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def view(self) -> np.ndarray:
        """The tensor, mapped: only the parts that are read are read from disk. Drop it to unmap it."""
        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def open_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name; nothing but headers is read.

    Raises:
      CheckpointError: no safetensors, or every missing, truncated or corrupt file.
    """
    problems: list[str] = []
    found: dict[str, Stored] = {}
    for file in _files(folder, problems):
        try:
            found.update({t.name: t for t in read_header(file)})
        except errors.CheckpointError as e:
            problems.append(str(e))
    if problems:
        raise errors.CheckpointError(f"the checkpoint in {folder} cannot be read:\n  " + "\n  ".join(problems))
    return found


def _files(folder: Path, problems: list[str]) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            problems.append(f"{INDEX} is damaged: {type(e).__name__}: {e}")
            return []
        problems += [f"{n}: named in {INDEX}, and not there" for n in names if not (folder / n).is_file()]
        return [folder / n for n in names if (folder / n).is_file()]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
    if pickled:
        problems.append(
            f"it holds {pickled[0]} but no {SINGLE}. PyTorch's own files are pickles, which can run code when they are "
            "read, so only safetensors are. Convert it where you trust it: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('converted')"
        )
    else:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "nothing"
        problems.append(f"no {SINGLE} and no {INDEX} (found {there})")
    return []


def read_header(file: Path) -> list[Stored]:
    """The tensors that a file's header promises.

    Raises:
      CheckpointError: the header is no header, or the file is shorter (or longer) than it says; it names the tensors.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        first = f.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or not 2 <= length <= HEADER_LIMIT:
            raise errors.CheckpointError(f"{file.name} ({size} bytes) is not a safetensors file")
        text = f.read(length)
    if len(text) < length:
        raise errors.CheckpointError(
            f"{file.name} is truncated: its header should have {length} bytes, and {len(text)} are there"
        )
    start = 8 + length
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = [_stored(file, name, entry, start) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise errors.CheckpointError(f"{file.name}: its header is corrupt: {type(e).__name__}: {e}") from None
    ends = {t.name: t.offset + math.prod(t.shape) * t.dtype.itemsize for t in tensors}
    expected = max(ends.values(), default=start)
    if size < expected:
        cut = [name for name, end in ends.items() if end > size]
        raise errors.CheckpointError(
            f"{file.name} is truncated: expected {expected} bytes, found {size}; {len(cut)} tensors are incomplete, "
            f"such as {cut[0]!r}. Copy or download it again"
        )
    if size > expected:
        raise errors.CheckpointError(f"{file.name} is corrupt: expected {expected} bytes, found {size}")
    return tensors


def _stored(file: Path, name: str, entry: dict[str, Any], start: int) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {entry['dtype']!r}, which is not supported")
    dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(int(n) for n in entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r} of shape {shape} cannot have {end - begin} bytes")
    return Stored(name, file, dtype, shape, start + begin)


class Out(NamedTuple):
    """A tensor to be written; ``make`` is called when its turn comes, so one is in memory at a time."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes ``folder`` when all is written; where that fails, nothing is left.

    Raises:
      ConfigError: ``folder`` is a file, or holds something.
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise errors.ConfigError(f"{folder} exists and is not an empty folder; name a new one")
    half = folder.with_name(f".{folder.name}.{os.getpid()}")
    half.mkdir(parents=True)
    try:
        yield half
        half.replace(folder)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name as one safetensors file."""
    write_file(file, [Out(k, x.dtype, x.shape, functools.partial(np.asarray, x)) for k, x in arrays.items()])


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Writes a mapping as indented JSON with sorted keys."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_folder(folder: Path, tensors: Iterable[Out], max_shard_size: int) -> list[str]:
    """Writes model.safetensors, or shards of at most ``max_shard_size`` bytes and their index; returns the names."""
    shards: list[list[Out]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_size:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return [SINGLE]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard)
    index = {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard)},
        "weight_map": {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, INDEX]


def write_file(file: Path, tensors: list[Out]) -> None:
    """Writes one safetensors file, tensor by tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        header[t.name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor is aligned
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            array = np.ascontiguousarray(t.make(), dtype=t.dtype)
            assert array.shape == t.shape, (t.name, array.shape, t.shape)
            f.write(array.reshape(-1).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())
