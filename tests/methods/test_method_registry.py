import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
import trains

from tunejax.core import errors
from tunejax.core.method import Method
from tunejax.methods import registry

KEY = jax.random.key(0)
USER = """
from __future__ import annotations
from tunejax.core import method
from tunejax.core.method import Method

def mine(size: int, targets: str = "attention/q/kernel") -> Method:
    return method.per_site("mine", targets, lambda k, w: {}, lambda w, a, c: w)

def not_one():
    return 3

def preset(rank: int = 2):
    return [{"name": "lora", "rank": rank}, "bitfit"]

def loop(file: str):
    return [{"name": f"{file}:loop", "file": file}]

def one(file: str):
    return ["bitfit", {"name": f"{file}:behind", "file": file}]

def behind(file: str):
    return [{"name": "gated", "method": {"name": f"{file}:one", "file": file}}]

def less(file: str, n: int = 2):
    return ["bitfit", *([{"name": f"{file}:less", "file": file, "n": n - 1}] if n else [])]

def perhaps(inner: Method | None = None):
    return inner or ["bitfit"]

def hinted(x: method.nothing = 3):
    return ["bitfit"]

def around(inner: Method, size: int = 1):
    return inner._replace(name=f"around_{inner.name}")
"""


@pytest.mark.parametrize("name", registry.NAMES)
def test_every_name_is_there(name):
    factory, _ = registry.find(name)
    assert factory.__name__ == name
    assert factory.__doc__


def test_one_and_a_chain():
    assert isinstance(registry.build("full"), Method)
    assert registry.build({"name": "lora", "rank": 2}).name == "lora"
    both = registry.build([{"name": "lora", "rank": 2, "alpha": 4}, {"name": "full", "targets": "norm/*"}])
    assert both.name == "lora+full"
    assert [p.targets for p in both.parts] == [("/layers/**/kernel",), ("norm/*",)]


def test_pefts_words():
    ours = registry.build({"name": "lora", "rank": 2, "alpha": 3.0, "targets": ["attention/q/kernel"]})
    theirs = registry.build(
        {
            "name": "lora",
            "r": 2,
            "lora_alpha": 3,
            "lora_dropout": 0.0,
            "target_modules": ["q_proj"],
            "use_rslora": False,
        }
    )
    a, b = (m.init(KEY, tiny.params()).train for m in (ours, theirs))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    every = registry.build({"name": "lora", "target_modules": "all-linear"})
    assert len(every.init(KEY, tiny.params()).train) == 7
    some = registry.build({"name": "lora", "target_modules": ["q_proj"], "layers_to_transform": [2, 1]})
    assert some.cuts(3) == (1,)


@pytest.mark.parametrize("name", ["lora", "houlsby", "quantize", "prune", "miss"])
@pytest.mark.parametrize("target", ["mlp/**", "embed/table"])
def test_what_is_no_kernel_is_refused(name, target):
    """A norm's scale has as many axes in a stack as a kernel outside, and a table as many as a kernel."""
    with pytest.raises(errors.TargetError, match=r"needs a kernel, as in mlp/\*\*/kernel"):
        registry.build({"name": name, "targets": target}).init(KEY, tiny.params())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"name": "lorra"}, "Did you mean 'lora'"),
        ({"name": "lora", "rnk": 3}, "rnk: unknown. Did you mean 'rank'"),
        ({"name": "lora", "colour": 3}, "It takes targets, rank"),
        ({"name": "lora", "rank": "eight"}, "rank: expected a valid integer, found 'eight'"),
        ({"name": "lora", "rank": "8"}, "rank: expected a valid integer, found '8'"),
        ({"name": "lora", "rank": 8.5}, "rank: expected"),
        ({"name": "lora", "targets": 3}, "targets: expected a valid string or a valid list, found 3"),
        ({"name": "lora", "rank": 4, "r": 4}, "'rank' and 'r' are words for one argument; give one of them"),
        (
            {"name": "lora", "target_modules": "q_proj", "targets": "x"},
            "'target_modules' and 'targets' are words for one",
        ),
        ({"name": "lora", "rank": -1}, "at least 1"),
        ({"name": "last_k"}, "k: required"),
        ({"name": "lora", "layers_to_transform": [0, 2]}, "[0, 2] is no run of layers"),
        ({"name": "lora", "layers_to_transform": [0, "a"]}, "[0, 'a'] is no run of layers"),
        ({"name": "vera", "seed": 10**23}, "vera: seed is 100000000000000000000000; it must lie in [0, 2^32)"),
        ({"name": "vera", "seed": -1}, "vera: seed is -1"),
        (
            {"name": "houlsby", "reduction_factor": float("nan")},
            "houlsby: reduction_factor is nan; it must be a positive",
        ),
        ({"name": "compacter", "reduction_factor": float("inf")}, "compacter: reduction_factor is inf"),
        ({"name": "lst", "temperature": float("nan")}, "temperature nan; they must be at least 1 and positive"),
        ({"name": "p_tuning", "dropout": 0.1}, "p_tuning: dropout is of encoder: lstm, and encoder is 'mlp'"),
        ({"name": "p_tuning", "lstm_layers": 3}, "p_tuning: lstm_layers is of encoder: lstm"),
        (
            {"name": "prompt_tuning", "init": "vocab", "init_range": 0.1},
            "init_range is of init: random, and init is 'vocab'",
        ),
        ({"name": "prompt_tuning", "init_text": [-1, 2]}, "prompt_tuning: init_text has the id -1"),
        ({"name": "mam", "project": False, "hidden": 77}, "mam: hidden is 77, the inner width of project: true"),
        ({"rank": 3}, "a mapping with a name"),
        ([], "the list is empty"),
        ({"name": "nowhere.py:f"}, "no file nowhere.py"),
        ({"name": "no_such_package:f"}, "could not be imported"),
        ({"name": "tunejax.methods.lora:lorra"}, "Did you mean 'lora'"),
        ({"name": "lora.py"}, "is not known"),
        ({"name": "lora", "learning_rate_scale": 0}, "learning_rate_scale is 0; expected a number above 0"),
        ({"name": "lora", "learning_rate_scale": "0.1"}, "learning_rate_scale is '0.1'"),
    ],
)
def test_mistakes(spec, says):
    with pytest.raises(errors.ConfigError) as caught:
        registry.build(spec)
    assert says in str(caught.value)


def test_each_description_has_a_learning_rate_of_its_own():
    """Adam's first step is the learning rate, whatever the gradient."""
    scaled = [
        {"name": "lora_plus", "rank": 2, "ratio": 4.0, "targets": "attention/q/kernel", "learning_rate_scale": 0.5},
        {"name": "full", "targets": "/norm/scale", "learning_rate_scale": 0.125},
        {"name": "full", "targets": "embed/table"},
        {"name": "mam", "length": 2, "hidden": 4, "width": 2, "learning_rate_scale": 0.25},
    ]
    for specs, wanted in ((scaled[:3], {"b": 2.0, "norm/scale": 0.125, "embed/table": 1.0}), (scaled[3], None)):
        one, s, base, batch = trains.begin(specs, learning_rate=1e-3)
        before = jax.tree.map(np.array, s.train)
        after = one(s, base, {}, batch)[0].train
        moved = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - y).max()) / 1e-3, after, before)
        for where, x in jax.tree.leaves_with_path(moved):
            name = where[-1].key
            if wanted is None:
                assert x == pytest.approx(0.25, rel=1e-3) or x == 0  # what stands before a zero has no gradient yet
            elif name in wanted:
                assert x == pytest.approx(wanted[name], rel=1e-3)


def test_all_problems_at_once():
    with pytest.raises(errors.ConfigError, match=r"(?s)rnk.*dropout.*alpha|rnk.*alpha.*dropout"):
        registry.build({"name": "lora", "rnk": 1, "dropout": "x", "alpha": "y"})


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(USER, encoding="utf-8")
    assert registry.build({"name": f"{file}:mine", "size": 3}).name == "mine"
    with pytest.raises(errors.ConfigError, match="size: required"):
        registry.build({"name": f"{file}:mine"})
    with pytest.raises(errors.ConfigError, match="Did you mean 'mine'"):
        registry.build({"name": f"{file}:mne"})
    assert [m.name for m in registry.build({"name": f"{file}:preset"}).parts] == ["lora", "bitfit"]
    with pytest.raises(errors.ConfigError, match="rank is 0"):
        registry.build({"name": f"{file}:preset", "rank": 0})
    around = {"name": f"{file}:around", "inner": {"name": f"{file}:mine", "size": 3}}
    assert registry.build(around).name == "around_mine"
    assert registry.build({"name": f"{file}:around", "inner": around}).name == "around_around_mine"
    assert registry.build({**around, "inner": "bitfit"}).name == "around_bitfit"
    for wrong, said in ((3, "inner: expected"), ({"name": "lorra"}, "Did you mean 'lora'")):
        with pytest.raises(errors.ConfigError, match=said):
            registry.build({**around, "inner": wrong})
    for name in ("loop", "one", "behind"):
        with pytest.raises(errors.ConfigError, match="names itself"):
            registry.build({"name": f"{file}:{name}", "file": str(file)})
    assert len(registry.build({"name": f"{file}:less", "file": str(file)}).parts) == 3
    assert registry.build(f"{file}:perhaps").name == "bitfit"
    assert registry.build({"name": f"{file}:perhaps", "inner": {"name": "lora", "rank": 2}}).name == "lora"
    assert registry.build({"name": f"{file}:perhaps", "inner": None}).name == "bitfit"
    assert registry.resolved({"name": f"{file}:perhaps", "inner": None})[1] == {"inner": None}
    assert registry.resolved({"name": f"{file}:perhaps", "inner": "bitfit"})[1]["inner"][0][0] == "bitfit"
    with pytest.raises(errors.ConfigError, match=r"inner: expected .*found 3"):
        registry.build({"name": f"{file}:perhaps", "inner": 3})
    assert registry.build({"name": f"{file}:hinted", "x": 3}).name == "bitfit"
    with pytest.raises(errors.ConfigError, match="returned int"):
        registry.build({"name": f"{file}:not_one"})
    file.write_text("import nothing_of_that_name", encoding="utf-8")
    with pytest.raises(errors.ConfigError, match="could not be run: ModuleNotFoundError"):
        registry.build({"name": f"{file}:mine", "size": 3})


def test_a_package():
    assert registry.build({"name": "tunejax.methods.full:last_k", "k": 1}).name == "last_k"


def test_methods_are_imported_when_asked_for():
    code = (
        "import sys; from tunejax.methods import registry; "
        "assert not [n for n in registry.NAMES.values() if n.partition(':')[0] in sys.modules]; "
        "registry.build('bitfit'); assert 'tunejax.methods.lora' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_run_keeps_is_found_behind_a_preset():
    """A preset is several parts of the chain, and one of the list."""
    arrays = {"down": np.ones((1, 2, 4, 3)), "down_bias": np.ones((1, 2, 3)), "up": np.ones((1, 2, 3, 4))}
    state = {"layers/0/mlp/down/kernel": {**arrays, "up_bias": np.ones((1, 2, 4))}}
    fusion = {"name": "adapter_fusion", "adapters": ["gone/a", "gone/b"]}
    none = lambda: pytest.fail("nothing takes from other runs")  # noqa: E731
    assert registry.with_kept([{"name": "mam"}, "bitfit"], none) == [{"name": "mam"}, {"name": "bitfit"}]
    for specs, keys in (
        ([{"name": "mam"}, fusion], ["2:adapter_fusion"]),
        ([fusion, {"name": "mam"}, fusion], ["0:adapter_fusion", "3:adapter_fusion"]),
        ([*[{"name": "mam"}] * 5, fusion], ["10:adapter_fusion"]),
    ):
        kept = [s for s in registry.with_kept(specs, lambda keys=keys: dict.fromkeys(keys, state)) if "adapters" in s]
        assert [len(s["adapters"]) for s in kept] == [2] * len(keys)
        assert all(not isinstance(a, str) for s in kept for a in s["adapters"])
