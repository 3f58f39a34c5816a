"""Adapter folders of AdapterHub's library, both ways, with the same logits; and without the library, what it writes.

Prefixes, LoRA, gates and unions of these are in `test_adapterhub_unions`.
"""

import json

import jax
import numpy as np
import pytest
import tiny
from hub_pair import (
    HEADS,
    LISTING,
    bound,
    changed,
    check_listing,
    check_refused,
    loaded,
    our_logits,
    read,
    tiny_of,
    written,
)
from safetensors import numpy as safetensors

from tunejax.core import errors
from tunejax.interop import adapter_folders, hf, hub_config, hub_slots
from tunejax.interop import found as found_lib
from tunejax.methods import registry

THEIRS = {
    "double_seq_bn": ("double_seq_bn", {}),
    "seq_bn": ("seq_bn", {}),
    "par_bn": ("par_bn", {}),
    "trained scale": ("scaled_par_bn", {"mh_adapter": True, "non_linearity": "gelu_new"}),
    "scale of each entry": ("seq_bn", {"scaling": "channel", "mh_adapter": True}),
    "some layers": ("seq_bn", {"leave_out": [1], "scaling": 0.5}),
    "widths by layer": ("double_seq_bn", {"reduction_factor": {"0": 8, "default": 3}, "non_linearity": "tanh"}),
    "compacter": ("compacter", {"phm_dim": 2}),
    "compacter++": ("compacter++", {"phm_rank": 2, "leave_out": [0], "is_parallel": True}),
}
CASES = [(kind, name) for kind in ("bert", "llama") for name in THEIRS] + [("gpt2", "seq_bn"), ("mistral", "compacter"),
         ("mlm", "double_seq_bn")]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_theirs_is_read(hub, bases, kind, name, tmp_path):
    config, overrides = THEIRS[name]
    out, base, head = tmp_path / "there", bases(kind), HEADS[kind]
    theirs = hub("write", base=base, config=config, overrides={"reduction_factor": 4, **overrides}, out=out)
    assert (adapter_folders.base_of(out), adapter_folders.head_of(out, "decoder")) == (str(base), head)
    shape = hf.read_config(base)
    found, method, params, train = read(out, shape, head, lambda cuts: loaded(base, head, cuts))
    mine = our_logits(shape, head, method.cuts(shape.num_layers), bound(method, params, train))
    np.testing.assert_allclose(mine, theirs["logits"], atol=1e-5, rtol=1e-5)
    assert np.abs(mine - our_logits(shape, head, (), loaded(base, head))).max() > 1e-2
    assert found.num_labels == (3 if kind == "bert" else None)


OURS = {
    "houlsby": {"name": "houlsby", "width": 5, "activation": "gelu", "scale": 0.5},
    "houlsby of sums": {"name": "houlsby", "width": 4, "reads": "sum"},
    "pfeiffer": {"name": "pfeiffer", "width": 4, "activation": "silu"},
    "pfeiffer of sums": {"name": "pfeiffer", "width": 3, "reads": "sum", "activation": "gelu_tanh"},
    "pfeiffer of the residual": {"name": "pfeiffer", "reads": "residual", "targets": "attention/o/kernel", "width": 2},
    "last layers": [{"name": "pfeiffer", "width": 4, "drop_first": 1}],
    "widths": [{"name": "pfeiffer", "width": 4, "layers": ":1"}, {"name": "pfeiffer", "width": 7, "layers": "2:"}],
    "compacter": {"name": "compacter", "width": 4, "phm_dim": 4, "activation": "tanh"},
    "compacter of sums": {"name": "compacter", "width": 4, "phm_dim": 2, "rank": 2, "reads": "sum"},
    "parallel": {"name": "parallel_adapter", "width": 4, "reads": "residual"},
    "parallel with the head": [{"name": "parallel_adapter", "width": 5, "reads": "residual", "activation": "tanh"},
                               {"name": "full", "targets": "HEAD"}],
    "parallel of the input": {"name": "parallel_adapter", "width": 4, "scale": 2.0},
}  # fmt: skip


def specs_of(name, kind):
    listed = OURS[name] if isinstance(OURS[name], list) else [OURS[name]]
    head = "/classifier/*" if kind == "bert" else "/head/kernel"
    return [{**s, "targets": head} if s.get("targets") == "HEAD" else s for s in listed]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ("bert", "llama") for name in OURS
                                            if (kind, name) != ("llama", "parallel of the input")])  # fmt: skip
def test_ours_is_read_there(hub, bases, kind, name, tmp_path):
    base, head, out = bases(kind), HEADS[kind], tmp_path / "here"
    shape = hf.read_config(base)
    method, params, train = written(specs_of(name, kind), shape, head, lambda cuts: loaded(base, head, cuts), out)
    mine = our_logits(shape, head, method.cuts(shape.num_layers), bound(method, params, train))
    theirs = hub("read", base=base, folder=out)
    assert not theirs["missing_keys"]
    assert not theirs["unexpected_keys"]
    np.testing.assert_allclose(theirs["logits"], mine, atol=1e-5, rtol=1e-5)
    assert np.abs(mine - our_logits(shape, head, (), loaded(base, head))).max() > 1e-2


SPECS = {
    "double_seq_bn": {"name": "houlsby", "activation": "silu"},
    "seq_bn": {"name": "pfeiffer", "reads": "sum"},
    "par_bn": {"name": "parallel_adapter", "reads": "residual"},
    "compacter": {"name": "compacter", "phm_dim": 2},
    "compacter++": {"name": "compacter", "phm_dim": 2, "targets": "mlp/down/kernel", "reads": "sum", "layers": "1:"},
}


@pytest.mark.parametrize("case", [case for case in LISTING if case.split()[1] in SPECS])
def test_what_is_written_is_what_the_library_writes(case, tmp_path):
    check_listing(case, [{**SPECS[case.split()[1]], "reduction_factor": 4}], tmp_path / "out")


BACK = [("bert", name) for name in OURS] + [("llama", "compacter of sums"), ("gpt2", "widths")]


@pytest.mark.parametrize(("kind", "name"), BACK)
def test_what_is_written_is_read_back(kind, name, tmp_path):
    config, head, load = tiny_of(kind)
    specs = specs_of(name, kind)
    method, _, train = written(specs, config, head, load, tmp_path / "out")
    found, again, _, back = read(tmp_path / "out", config, head, load)
    kept = ("activation", "scale", "reads", "phm_dim", "rank")
    given = registry.resolved(specs[0])[1]
    expected = {k: given[k] for k in kept if k in given}
    if given.get("reads") == "input":  # on BERT the residual, and BERT's own activation
        expected |= {"reads": "residual", "activation": "gelu"}
    elif name.startswith("parallel"):
        expected["activation"] = given["activation"] or "relu"
    assert expected.items() <= found.specs[0].items()
    ours, theirs = by_site(method, train), by_site(again, back)
    assert ours.keys() <= theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, {p: theirs[p] for p in ours}, ours)


def by_site(method, train):
    """Arrays by path, whatever parts a chain has."""
    return {p: x for part in (train.values() if method.parts else [train]) for p, x in part.items()}


def test_a_parallel_adapter_of_the_input_is_the_same_function(tmp_path):
    """In a block whose norms come last, the MLP's input is what its output is added to."""
    config, head, load = tiny_of("bert")
    spec = {"name": "parallel_adapter", "width": 4}
    method, params, train = written([spec], config, head, load, tmp_path / "out")
    _, again, params, back = read(tmp_path / "out", config, head, load)
    m = tiny.model(config, head)
    one, two = (tiny.outputs(m, bound(how, params, x)) for how, x in ((method, train), (again, back)))
    np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    """A written folder on the tiny BERT, to be changed."""
    config, head, load = tiny_of("bert")
    written([{"name": "pfeiffer", "width": 4, "reads": "sum"}], config, head, load, tmp_path / "out")
    return tmp_path / "out"


REFUSED = {
    "original_ln_after": ({"original_ln_after": False}, "original_ln_after: False"),
    "residual_before_ln": ({"residual_before_ln": "post_add"}, "residual_before_ln: 'post_add'"),
    "residual": ({"residual_before_ln": False}, "no exact form on a bert"),
    "ln_before": ({"ln_before": True}, "ln_before: True is a norm of the adapter's own"),
    "use_gating": ({"use_gating": True}, "no gate of one output"),
    "inv_adapter": ({"inv_adapter": "nice"}, "inv_adapter: 'nice' is adapters of the embeddings"),
    "non_linearity": ({"non_linearity": "leakyrelu"}, "non_linearity 'leakyrelu' is not known here"),
    "scaling": ({"scaling": "learnt"}, "scaling is 'learnt'"),
    "unknown": ({"half": True}, "half: True is not known"),
    "reft": ({"architecture": "reft"}, "'reft' of AdapterHub has no exact form here: it edits chosen positions"),
    "W": ({"phm_layer": True, "shared_W_phm": True}, "shared_W_phm is True, and can be read as False only"),
    "tensors": ({"mh_adapter": True}, "has nothing for bert.encoder.layer.0.attention.output.adapters.tunejax"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_exact_form_is_refused_by_name(folder, case):
    entries, said = REFUSED[case]
    changed(folder, entries)
    with pytest.raises(errors.CheckpointError, match=said):
        adapter_folders.read(folder, tiny.BERT, head="classification")


def test_a_config_that_is_a_name_is_told(folder):
    file = folder / found_lib.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), "config": "pfeiffer"}))
    with pytest.raises(errors.CheckpointError, match="config is 'pfeiffer', expected a mapping"):
        adapter_folders.read(folder, tiny.BERT, head="classification")


def test_a_sum_after_a_sum_without_a_norm_is_one(folder):
    """On a decoder, s + f(s) with s = x + b is what Pfeiffer's is; on an encoder a norm would be missing."""
    found = hub_config.arguments(
        registry.find("pfeiffer")[1].ADAPTERHUB["pfeiffer"],
        {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False, "non_linearity": "gelu",
         "reduction_factor": 16},
        tiny.LLAMA,
        legacy=True,
    )  # fmt: skip
    assert found == {"reads": "sum", "activation": "gelu_tanh", "scale": 1.0}  # folders of no version call it so


def test_a_head_of_the_librarys_own_class_is_read(folder):
    """One layer on the pooler is transformers' classifier under another name; two layers are not."""
    file, weights = folder / hub_slots.HEAD_CONFIG, folder / hub_slots.HEAD_WEIGHTS
    changed(folder, {}, model_class="BertAdapterModel")
    own = {"head_type": "classification", "layers": 1, "use_pooler": True, "bias": True, "num_labels": 3}
    file.write_text(json.dumps({"model_class": "BertAdapterModel", "name": "task", "config": own}))
    tensors = safetensors.load_file(weights)
    safetensors.save_file({k.replace("classifier", "heads.task.1"): x for k, x in tensors.items()}, weights)
    assert adapter_folders.head_of(folder, "encoder") == "classification"
    found = adapter_folders.read(folder, tiny.BERT, head="classification")
    kernel = next(x[""] for some in found.arrays for site, x in some.items() if site.path == "classifier/kernel")
    np.testing.assert_array_equal(kernel, tensors["classifier.weight"].T)
    assert found.num_labels == 3
    file.write_text(json.dumps({"model_class": "BertAdapterModel", "name": "task", "config": own | {"layers": 2}}))
    with pytest.raises(errors.CheckpointError, match=r"'heads.task.1.*one layer on the pooler"):
        adapter_folders.read(folder, tiny.BERT, head="classification")


def test_a_damaged_folder_is_told(folder):
    tensors = safetensors.load_file(folder / hub_slots.WEIGHTS)
    name = "bert.encoder.layer.1.output.adapters.tunejax.adapter_up.bias"
    safetensors.save_file({k: x for k, x in tensors.items() if k != name}, folder / hub_slots.WEIGHTS)
    with pytest.raises(errors.CheckpointError, match=r"layer 1, output_adapter, has no 'adapter_up.bias'"):
        adapter_folders.read(folder, tiny.BERT, head="classification")
    strange = {**tensors, name.replace("layer.1", "layer.9"): tensors[name]}
    safetensors.save_file(strange, folder / hub_slots.WEIGHTS)
    with pytest.raises(errors.CheckpointError, match=r"layer\.9"):
        adapter_folders.read(folder, tiny.BERT, head="classification")
    (folder / hub_slots.WEIGHTS).rename(folder / "pytorch_adapter.bin")
    with pytest.raises(errors.CheckpointError, match="pickles"):
        adapter_folders.read(folder, tiny.BERT, head="classification")


UNWRITABLE = {
    "dora": ({"name": "dora", "rank": 2}, "no form for dora"),
    "norms": ([{"name": "houlsby", "width": 4}, {"name": "norm_tuning"}], "norm/scale, which trains whole"),
    "two kinds": ([{"name": "houlsby", "width": 4, "layers": ":1"}, {"name": "compacter", "width": 4, "layers": "1:"}],
                  "houlsby and compacter of this chain differ"),
    "two at a place": ([{"name": "pfeiffer", "width": 4}, {"name": "pfeiffer", "width": 2}], "two are at"),
    "other kernels": ({"name": "pfeiffer", "targets": "attention/q/kernel"}, "has one at layers/0/attention/q"),
    "other layers": ([{"name": "pfeiffer", "width": 4, "layers": ":1"},
                      {"name": "pfeiffer", "width": 4, "targets": "attention/o/kernel", "layers": "1:"}],
                     "the same layers at both places"),
    "widths": ([{"name": "pfeiffer", "width": 4}, {"name": "pfeiffer", "width": 2, "targets": "attention/o/kernel"}],
               "one width in a layer"),
    "masks": ([{"name": "pfeiffer"}, {"name": "shrink", "keep": {"mlp": 0.5}, "steps": 2}], "no form for shrink"),
    "input": ({"name": "parallel_adapter", "width": 4}, "only one with reads: residual"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written_is_refused(case, tmp_path):
    check_refused(*UNWRITABLE[case], tmp_path)


@pytest.mark.parametrize(
    "spec", [{"name": "pfeiffer", "width": 4}, {"name": "lora", "rank": 2, "targets": "attention/{q,v}/kernel"}]
)
def test_a_family_that_the_library_lacks(spec, tmp_path):
    config, head, load = tiny_of("qwen3")
    with pytest.raises(errors.ConfigError, match="this model is a qwen3"):
        written([spec], config, head, load, tmp_path / "out")


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    config, head, load = tiny_of("bert")
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        written([{"name": "pfeiffer", "width": 4}], config, head, load, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    written([{"name": "pfeiffer", "width": 4}], config, head, load, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(errors.ConfigError, match="not an empty folder"):
        written([{"name": "pfeiffer", "width": 4}], config, head, load, tmp_path / "out")


def test_widths_come_back_from_factors():
    for embed in (16, 24, 768, 1000):
        for width in range(1, 70):
            assert int(embed // hub_config.factor(width, embed)) == width or width > embed


def test_a_method_of_ones_own_has_a_form(tmp_path):
    """A module's ADAPTERHUB is all that is asked."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from tunejax.methods import adapter\n"
        "ADAPTERHUB = adapter.ADAPTERHUB['pfeiffer']\n"
        "def mine(width: int = 3):\n    return adapter.pfeiffer(width=width, activation='tanh')\n"
    )
    config, head, load = tiny_of("llama")
    written([{"name": f"{file}:mine"}], config, head, load, tmp_path / "out")
    found = adapter_folders.read(tmp_path / "out", config, head=head)
    assert [s["name"] for s in found.specs] == ["pfeiffer"]
