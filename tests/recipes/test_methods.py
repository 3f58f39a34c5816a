"""The list of methods is the registry's, and the README has it as it is."""

from pathlib import Path

import pytest

from tunejax.methods import registry
from tunejax.recipes import methods

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(scope="module")
def found():
    return methods.rows()


def test_the_readme_has_the_table(found):
    text = README.read_text(encoding="utf-8")
    start, end = "a test compares them. -->\n", "<!-- the end of the table -->"
    assert text.partition(start)[2].partition(end)[0] == methods.markdown(found)


def test_every_method_has_a_row(found):
    assert [r.name for r in found] == [*registry.NAMES, *methods.VARIANTS]
    assert all(r.trains for r in found)


def test_lora_is_counted_by_hand(found):
    """Rank 8 on the seven kernels of 32 layers: 8 (in + out) each."""
    row = next(r for r in found if r.name == "lora")
    added = 32 * 8 * (4 * (4096 + 4096) + 2 * (4096 + 11008) + (11008 + 4096))
    assert row.share == pytest.approx(added / (6_738_415_616 + added))
    assert row.paper == "2106.09685"
    assert row.peft == "LORA"


MASKED = """
import jax.numpy as jnp

from tunejax.core import method, paths

def masked():
    def init(key, params):
        kernels = paths.select(params, "attention/q/kernel").leaves
        return method.Start(train={p: jnp.zeros(k.shape) for p, k in kernels.items()})
    return method.method("masked", init, lambda params, train, state, ctx: params, density=0.25)
"""


def test_of_a_masked_difference_its_density_is_counted(tmp_path, monkeypatch):
    (tmp_path / "masked.py").write_text(MASKED)
    monkeypatch.setitem(registry.NAMES, "masked", f"{tmp_path / 'masked.py'}:masked")
    row = methods._row("masked")
    assert row.masked
    assert row.share == pytest.approx(0.25 * 32 * 4096**2 / 6_738_415_616)
