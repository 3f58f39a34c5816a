"""Checkpoints: the train state and where the data stands, written in the background, whole or not at all.

A checkpoint is written into a temporary folder and renamed when it is complete, so a kill at any moment leaves the
one before it as the latest. Arrays carry no trace of the mesh: any other mesh may read them.
"""

import base64
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tunejax.core import errors
from tunejax.train.state import TrainState


class Restored(NamedTuple):
    """state: laid over the present mesh. data: what the data iterator's get_state gave. loop: the loop's own JSON."""

    state: TrainState
    data: Any
    loop: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run, in ``folder/<step>``: the last ``keep`` and the best one."""

    def __init__(self, folder: str | Path, *, keep: int = 2, greater_is_better: bool = False) -> None:
        from orbax import checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        self._ocp = ocp
        self.folder = Path(folder).absolute()
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["best"],
            n=1,
            reverse=not greater_is_better,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        # Not asked of the manager at each save: what is complete on disk may look different to two processes.
        self._begun = set(self._manager.all_steps())

    def latest(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: Any, loop: dict[str, Any], *, best: float | None = None) -> None:
        """Starts to write; returns when the arrays are copied off the devices, so the state may be donated.

        Args:
          state: at the end of a step.
          data: JSON-able or bytes: the data iterator's state when that step's batch had been read.
          loop: JSON-able; kept beside.
          best: the evaluation metric that decides which checkpoint is the best one; None: not evaluated here.
        """
        step = int(state.step)
        if step in self._begun:
            return
        self._begun.add(step)
        note = {"data": gather_json(_encoded(data)), "loop": loop, "layout": layout(state)}
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(_plain(state)), note=self._ocp.args.JsonSave(note)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._manager.save(step, args=args, metrics=None if best is None else {"best": best})

    def restore(self, like: TrainState, step: int | None = None) -> Restored:
        """The checkpoint of ``step`` (by default the last), in the shapes and shardings of ``like``.

        Raises:
          CheckpointError: there is none, it is damaged, or it is of another model or method.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise errors.CheckpointError(f"no checkpoint in {self.folder}")
        note = self._read_note(step)
        _check_layout(note["layout"], layout(like), self.folder / str(step))
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _plain(like))
        args = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(target))
        try:
            found = self._manager.restore(step, args=args)["state"]
        except Exception as e:
            raise self._damaged(step, e) from e
        key = jax.random.wrap_key_data(found["key"], impl=jax.random.key_impl(like.key))
        return Restored(TrainState(**{**found, "key": key}), _decoded(_own(note["data"])), note["loop"])

    def wait(self) -> None:
        """Until everything that was started is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the threads."""
        self._manager.close()

    def _read_note(self, step: int) -> dict[str, Any]:
        args = self._ocp.args.Composite(note=self._ocp.args.JsonRestore())
        try:
            return self._manager.restore(step, args=args)["note"]
        except Exception as e:
            raise self._damaged(step, e) from e

    def _damaged(self, step: int, cause: Exception) -> errors.CheckpointError:
        kept = [s for s in self.steps() if s != step]
        hint = f"delete that folder to resume from step {kept[-1]}" if kept else "start in another folder"
        first = (str(cause).splitlines() or [type(cause).__name__])[0]
        return errors.CheckpointError(f"the checkpoint {self.folder / str(step)} cannot be read ({first}); {hint}")


def _plain(state: TrainState) -> dict[str, Any]:
    """Arrays only: the typed key as its data."""
    return {**state._asdict(), "key": jax.random.key_data(state.key)}


def layout(state: TrainState) -> dict[str, str]:
    """Type and shape of each leaf of what trains, by path: what must agree for a checkpoint to fit."""
    leaves = jax.tree.leaves_with_path((state.train, state.state))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for p, x in leaves}


def _check_layout(found: dict[str, str], wanted: dict[str, str], where: Path) -> None:
    if found == wanted:
        return
    differ = [f"{p}: {found.get(p, 'absent')} there, {wanted.get(p, 'absent')} here" for p in {**found, **wanted}
              if found.get(p) != wanted.get(p)]  # fmt: skip
    shown = "\n  ".join(differ[:5]) + (f"\n  and {len(differ) - 5} more" if len(differ) > 5 else "")
    raise errors.CheckpointError(
        f"the checkpoint {where} is of another model or method; resume with the config that began it, or start in "
        f"another folder. What trains differs:\n  {shown}"
    )


def _encoded(data: Any) -> Any:
    return {"base64": base64.b64encode(data).decode()} if isinstance(data, bytes) else {"json": data}


def _decoded(data: Any) -> Any:
    return base64.b64decode(data["base64"]) if "base64" in data else data["json"]


def gather_json(value: Any) -> list[Any]:
    """``value`` of each process, on every process; all must call it."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(text.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[: int(n)].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def _own(states: list[Any]) -> Any:
    """This process's data state from those of all."""
    if len(states) == jax.process_count():
        return states[jax.process_index()]
    if all(s == states[0] for s in states):
        return states[0]
    raise errors.CheckpointError(
        f"the checkpoint was written by {len(states)} processes, each at its own place in the data; "
        f"resume with as many (there are {jax.process_count()})"
    )
