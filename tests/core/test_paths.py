import jax
import numpy as np
import pytest
import tiny

from tunejax.core import errors, paths

TREE = {
    "embed": {"table": np.zeros((5, 4))},
    "layers": {
        "0": {"attention": {s: {"kernel": np.zeros((2, 4, 4)), "bias": None} for s in "qkvo"}},
        "1": {"attention": {s: {"kernel": np.zeros((1, 4, 4)), "bias": None} for s in "qkvo"}},
    },
    "norm": {"scale": np.zeros(4)},
}


def test_flatten_and_unflatten_are_inverse():
    flat = paths.flatten(TREE)
    assert paths.unflatten(flat) == TREE
    assert flat["layers/1/attention/q/bias"] is None
    assert paths.get(TREE, "norm/scale") is TREE["norm"]["scale"]


@pytest.mark.parametrize(
    ("pattern", "path", "yes"),
    [
        ("attention/q/kernel", "layers/0/attention/q/kernel", True),
        ("/attention/q/kernel", "layers/0/attention/q/kernel", False),
        ("attention/{q,v}/kernel", "layers/3/attention/v/kernel", True),
        ("attention/{q,v}/kernel", "layers/3/attention/k/kernel", False),
        ("/norm/*", "norm/scale", True),
        ("/norm/*", "layers/0/mlp/norm/scale", False),
        ("norm/*", "layers/0/mlp/norm/scale", True),
        ("**", "embed/table", True),
        ("layers/**/kernel", "layers/0/mlp/up/kernel", True),
        ("layers/*/kernel", "layers/0/mlp/up/kernel", False),
        ("kernel", "layers/0/mlp/up/kernel", True),
        ("ernel", "layers/0/mlp/up/kernel", False),
        ("q?norm/scale", "layers/0/attention/q_norm/scale", True),
        ("{gate,{up,down}}/kernel", "layers/0/mlp/down/kernel", True),
    ],
)
def test_globs(pattern, path, yes):
    assert paths.matches(pattern, path) is yes


def test_an_unclosed_brace_is_an_error():
    with pytest.raises(errors.TargetError, match="not closed"):
        paths.matches("{q,v/kernel", "q/kernel")


def test_replace_shares_what_it_does_not_touch():
    new = paths.replace(TREE, {"layers/0/attention/q/bias": np.ones((2, 4))})
    assert new["layers"]["0"]["attention"]["q"]["bias"].sum() == 8
    assert TREE["layers"]["0"]["attention"]["q"]["bias"] is None
    assert new["layers"]["1"] is TREE["layers"]["1"]
    with pytest.raises(errors.TargetError, match="norm"):
        paths.replace(TREE, {"norms/scale": 1})


def test_select_counts_takes_away_and_reports():
    chosen = paths.select(TREE, ["attention/*/kernel", "!attention/o/kernel"])
    assert len(chosen.leaves) == 6
    assert "attention/*/kernel: 8 leaves, 144 parameters" in chosen.report()


def test_nothing_matched_lists_the_nearest():
    with pytest.raises(errors.TargetError, match="attention/q/kernel"):
        paths.select(TREE, "attention/qq/kernel")


def test_select_layers():
    last = paths.select(TREE, "attention/q/kernel", layers="-1:").leaves
    assert list(last) == ["layers/1/attention/q/kernel"]
    assert list(paths.select(TREE, "**", layers=2).leaves) == [f"layers/1/attention/{s}/kernel" for s in "qkvo"]
    with pytest.raises(errors.TargetError, match=r"cuts=\(1, 3\)"):
        paths.select(TREE, "attention/q/kernel", layers="1:")


def test_no_pattern_and_nothing_left_are_errors():
    with pytest.raises(errors.TargetError, match="the list of targets is empty"):
        paths.select(TREE, [])
    with pytest.raises(errors.TargetError, match=r"'\*\*', '!\*\*' take away all"):
        paths.select(TREE, ["**", "!**"])


def test_select_empty_slots():
    assert len(paths.select(TREE, "bias", empty=True).leaves) == 8


@pytest.mark.parametrize(
    ("text", "span"), [("-2:", (4, 6)), (":4", (0, 4)), ("3", (3, 4)), (-1, (5, 6)), ("1:3", (1, 3)), ((2, 6), (2, 6)),
     ("1/2:", (3, 6)), (":1/6", (0, 1)), ("1/6:5/6", (1, 5)), ("1/4:3/4", (2, 5)), ("1:1/3", (1, 2))],
)  # fmt: skip
def test_layer_range(text, span):
    assert paths.layer_range(text, 6) == span


@pytest.mark.parametrize("text", ["", "a:", "9:", "4:2", "1:2:3", "6", "1/2", "1/0:", "1/9:1/8", "1.5:"])
def test_layer_range_refuses(text):
    with pytest.raises(errors.ConfigError):
        paths.layer_range(text, 6)


def test_segments_are_in_numeric_order():
    many = {"layers": {str(i): {"w": np.zeros((i + 1, 2))} for i in range(12)}}
    mapped = jax.tree.map(lambda x: x, many)  # sorts the keys as text: "10" before "2"
    assert [s.size for s in paths.segments(mapped)] == list(range(1, 13))


def test_the_model_names_every_bias_slot():
    flat = paths.flatten(tiny.params())
    for path in [p for p in flat if p.endswith("/kernel") and p.startswith("layers/")]:
        assert path.replace("/kernel", "/bias") in flat
