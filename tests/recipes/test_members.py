"""Parts of `many:` by themselves: methods that hold methods, and batches of other lengths side by side."""

import numpy as np
import pytest

from tunejax.config import load
from tunejax.core import errors
from tunejax.methods import registry
from tunejax.recipes import members, settings


def configs(*methods):
    base = {"output_dir": "runs/x", "model": {"path": "here"}, "data": {"path": "rows.jsonl"}}
    return [load.check({**base, "method": m}) for m in methods]


def test_a_method_among_the_arguments_is_compared_by_its_description():
    inner = {"name": "lora", "rank": 2}
    same = [{"name": "gated", "method": inner}, {"name": "gated", "method": {"name": "lora", "r": 2, "alpha": 16.0}}]
    largest, _ = members.plan(configs(*same))
    assert largest == [same[0]]
    with pytest.raises(errors.ConfigError, match="gated with other method"):
        members.plan(configs(same[0], {"name": "gated", "method": {**inner, "rank": 3}}))


def test_batches_of_other_lengths_are_padded_along_their_own():
    """What has more axes, lengths of its own, or none."""

    def loader(length, own):
        tokens = np.ones((2, length), np.int32)
        yield {
            "tokens": tokens,
            "teacher_ids": np.ones((2, length, 3), np.int32),
            "teacher_tokens": np.ones((2, own), np.int32),
            "labels": np.arange(2),
        }

    found = next(members.Together([loader(4, 9), loader(6, 7)]))
    assert {k: x.shape for k, x in found.items()} == {
        "tokens": (2, 2, 6),
        "teacher_ids": (2, 2, 6, 3),
        "teacher_tokens": (2, 2, 9),
        "labels": (2, 2),
    }
    np.testing.assert_array_equal(found["teacher_ids"][0, :, :, 0], [[1, 1, 1, 1, 0, 0]] * 2)
    np.testing.assert_array_equal(found["labels"], [[0, 1]] * 2)


@pytest.mark.parametrize(
    ("spec", "ends"),
    [
        ({"name": "fish", "mask_steps": 6}, "fish ends at update 7"),
        ({"name": "lt_sft", "mask_steps": 6}, "lt_sft ends at update 7"),
        ({"name": "diff_pruning", "mask_steps": 7}, "diff_pruning ends at update 7"),
        ({"name": "adalora", "total_steps": 7}, "adalora ends at update 7"),
        ({"name": "adalora", "total_steps": 9, "final_steps": 3}, "adalora ends at update 7"),
    ],
)
def test_a_run_shorter_than_a_schedule_is_told(spec, ends):
    tuned = registry.build([{"name": "bitfit"}, spec])
    assert ends in settings.cut_short(tuned, 6)
    assert settings.cut_short(tuned, 7) is None
