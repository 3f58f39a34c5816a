"""Prefixes, LoRA, gates and unions of them in AdapterHub's folders: both ways, with the same logits.

Without the library: the listing of what it writes, and its formulas in numpy.
"""

import jax
import numpy as np
import pytest
import tiny
from hub_pair import (
    HEADS,
    LISTING,
    TOKENS,
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
from tunejax.core.model import full_batch
from tunejax.interop import adapter_folders, hf, hub_slots
from tunejax.interop import found as found_lib
from tunejax.models import build

PREFIX = {"prefix_length": 3, "bottleneck_size": 5}
UNIPELT = {"prefix_tuning": PREFIX, "adapter": {"reduction_factor": 4}, "lora": {"r": 2, "alpha": 3}}
THEIRS = {
    "prefix": ("prefix_tuning", {**PREFIX, "non_linearity": "relu"}),
    "flat prefix": ("prefix_tuning_flat", {"prefix_length": 4}),
    "prefix in some layers": ("prefix_tuning", {**PREFIX, "leave_out": [1]}),
    "gated prefix": ("prefix_tuning", {**PREFIX, "use_gating": True}),
    "lora": ("lora", {"r": 2, "alpha": 3, "attn_matrices": ["k", "q"], "leave_out": [0]}),
    "gated lora": ("lora", {"r": 2, "alpha": 3, "use_gating": True}),
    "gated seq_bn": ("seq_bn", {"reduction_factor": 4, "use_gating": True, "mh_adapter": True}),
    "gated double_seq_bn": ("double_seq_bn", {"reduction_factor": 4, "use_gating": True}),
    "gated par_bn": ("par_bn", {"reduction_factor": 4, "use_gating": True}),
    "gated compacter": ("compacter", {"reduction_factor": 4, "phm_dim": 2, "use_gating": True}),
    "mam": ("mam", {"prefix_tuning": PREFIX, "adapter": {"reduction_factor": 4}}),
    "unipelt": ("unipelt", UNIPELT),
    "unipelt in some layers": ("unipelt", {k: {**v, "leave_out": [0]} for k, v in UNIPELT.items()}),
}
CASES = [(kind, name) for kind in ("bert", "llama") for name in THEIRS]
CASES += [("gpt2", name) for name in ("flat prefix", "lora", "gated lora", "mam", "unipelt")] + [("mistral", "unipelt")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_theirs_is_read(hub, bases, kind, name, tmp_path):
    config, overrides = THEIRS[name]
    out, base, head = tmp_path / "there", bases(kind), HEADS[kind]
    theirs = hub("write", base=base, config=config, overrides=overrides, out=out)
    shape = hf.read_config(base)
    _, method, params, train = read(out, shape, head, lambda cuts: loaded(base, head, cuts))
    mine = our_logits(shape, head, method.cuts(shape.num_layers), bound(method, params, train))
    np.testing.assert_allclose(mine, theirs["logits"], atol=1e-5, rtol=1e-5)
    assert np.abs(mine - our_logits(shape, head, (), loaded(base, head))).max() > 1e-2


LORA = {"name": "lora", "rank": 2, "alpha": 3.0, "targets": "attention/{q,v}/kernel"}
FLAT = {"name": "prefix_tuning", "length": 3, "positions": False}
ROW = {"name": "gated", "per": "row"}
SUM = {"name": "pfeiffer", "width": 4, "reads": "sum", "scale": 0.5}
OURS = {
    "prefix": [FLAT],
    "prefix with its MLP": [{**FLAT, "project": True, "hidden": 5}],
    "p_tuning_v2": [{"name": "p_tuning_v2", "length": 3, "positions": False, "layers": ":2"}],
    "prefixes": [{**FLAT, "layers": ":1"}, {**FLAT, "layers": "2:"}],
    "lora": [{**LORA, "rslora": True}],
    "lora_plus": [{**LORA, "name": "lora_plus", "targets": "attention/{q,k,v}/kernel", "layers": "1:"}],
    "gated lora": [{**ROW, "method": LORA}],
    "gated prefix": [{**ROW, "method": FLAT}],
    "gated sums": [{**ROW, "method": SUM}],
    "gated branches": [{**ROW, "method": {"name": "houlsby", "width": 4}, "reads": "output"}],
    "gated residual": [{**ROW, "method": {"name": "parallel_adapter", "width": 4, "reads": "residual"}}],
    "gated compacter": [{**ROW, "method": {"name": "compacter", "width": 4, "phm_dim": 2}, "reads": "output"}],
    "mam": [{"name": "mam", "length": 3, "hidden": 5, "width": 4, "positions": False, "reads": "residual"}],
    "unipelt": [{"name": "unipelt", "length": 3, "rank": 2, "width": 4, "positions": False, "per": "row"}],
    "unipelt of sums": [{"name": "unipelt", "length": 2, "rank": 3, "width": 2, "positions": False, "per": "row",
                         "adapter_reads": "sum", "layers": "1:"}],
    "three kinds and the head": [{**ROW, "method": LORA}, SUM, FLAT, {"name": "full", "targets": "HEAD"}],
}  # fmt: skip


def specs_of(name, kind):
    head = "/classifier/*" if kind == "bert" else "/head/kernel"
    return [{**s, "targets": head} if s.get("targets") == "HEAD" else s for s in OURS[name]]


HERE = [(kind, name) for kind in ("bert", "llama") for name in OURS]
HERE += [("gpt2", name) for name in ("prefix with its MLP", "lora_plus", "gated lora", "mam", "unipelt")]


@pytest.mark.parametrize(("kind", "name"), HERE)
def test_ours_is_read_there(hub, bases, kind, name, tmp_path):
    base, head, out = bases(kind), HEADS[kind], tmp_path / "here"
    shape = hf.read_config(base)
    method, params, train = written(specs_of(name, kind), shape, head, lambda cuts: loaded(base, head, cuts), out)
    mine = our_logits(shape, head, method.cuts(shape.num_layers), bound(method, params, train))
    theirs = hub("read", base=base, folder=out)
    assert not [k for k in theirs["missing_keys"] if ".pool." not in k]  # other names of the same tensors
    assert not theirs["unexpected_keys"]
    np.testing.assert_allclose(theirs["logits"], mine, atol=1e-5, rtol=1e-5)
    assert np.abs(mine - our_logits(shape, head, (), loaded(base, head))).max() > 1e-2


SPECS = {
    "lora": {"name": "lora", "rank": 2, "alpha": 8.0, "targets": "attention/{q,v}/kernel"},
    "prefix_tuning_flat": [{**FLAT, "layers": ":1"}, {**FLAT, "layers": "2:"}],
    "mam": {"name": "mam", "length": 3, "hidden": 5, "reduction_factor": 4, "positions": False, "reads": "residual"},
    "unipelt": {"name": "unipelt", "length": 3, "rank": 2, "reduction_factor": 4, "positions": False, "per": "row",
                "adapter_reads": "sum"},
}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in LISTING if case.split()[1] in SPECS])
def test_what_is_written_is_what_the_library_writes(case, tmp_path):
    specs = SPECS[case.split()[1]]
    check_listing(case, specs if isinstance(specs, list) else [specs], tmp_path / "out")


@pytest.mark.parametrize(("kind", "name"), HERE)
def test_what_is_written_is_read_back(kind, name, tmp_path):
    config, head, load = tiny_of(kind)
    method, params, train = written(specs_of(name, kind), config, head, load, tmp_path / "out")
    _, again, fresh, back = read(tmp_path / "out", config, head, load)
    one = our_logits(config, head, method.cuts(config.num_layers), bound(method, params, train))
    two = our_logits(config, head, again.cuts(config.num_layers), bound(again, fresh, back))
    np.testing.assert_allclose(one, two, atol=1e-5, rtol=1e-5)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + tiny.BERT.norm_eps) * p["scale"] + p["bias"]


def attention(x, p, pair, heads):
    """BERT's of x [batch, length, embed], with keys and values [batch, n, embed] before those of the text."""
    q, k, v = (x @ p[n]["kernel"] + p[n]["bias"] for n in ("q", "k", "v"))
    k, v = (np.concatenate(both, 1) for both in zip(pair, (k, v), strict=True))
    q, k, v = (y.reshape(*y.shape[:2], heads, -1).swapaxes(1, 2) for y in (q, k, v))
    out = softmax(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])) @ v
    return out.swapaxes(1, 2).reshape(x.shape) @ p["o"]["kernel"] + p["o"]["bias"]


def test_a_prefix_without_positions_behind_a_gate_of_rows_by_hand(tmp_path):
    """The first block of BERT in numpy, from the tensors of the folder: positions from 0, the library's gate."""
    config, head, load = tiny_of("bert")
    method, params, train = written([{**ROW, "method": FLAT}], config, head, load, tmp_path / "out")
    host = jax.tree.map(np.asarray, params)
    tensors = safetensors.load_file(tmp_path / "out" / hub_slots.WEIGHTS)
    found = tensors["bert.prefix_tuning.prefix_tunings.tunejax.self_prefix.control_trans"]
    pairs = found.reshape(3, config.num_layers, 2, config.embed_dim)[:, 0]
    gate = "bert.encoder.layer.0.attention.self.prefix_tuning.prefix_gates.tunejax."
    table = host["embed"]["table"][np.asarray(TOKENS)]
    x = table + host["positions"]["table"][: TOKENS.shape[1]] + host["types"]["table"][0]
    x = norm(x, host["embed_norm"])
    p = jax.tree.map(lambda leaf: leaf[0], host["layers"]["0"]["attention"])
    weight = sigmoid(x @ tensors[gate + "weight"].T + tensors[gate + "bias"]).mean(1)[..., None]
    expected = attention(x, p, (weight * pairs[:, 0], weight * pairs[:, 1]), config.num_heads)
    tapped = build.build(config, head=head).hidden(
        bound(method, params, train), full_batch(TOKENS), taps=("attention",)
    )
    np.testing.assert_allclose(tapped[1]["attention"][0], expected, atol=1e-5)


@pytest.fixture
def union(tmp_path):
    """A written folder of UniPELT on the tiny BERT, to be changed."""
    config, head, load = tiny_of("bert")
    written(OURS["unipelt"], config, head, load, tmp_path / "out")
    return tmp_path / "out"


def changed_part(folder, architecture, entries):
    """Changes the entries of one config of the union."""
    config = found_lib.settings(folder)["config"]
    part = next(c for c in config["configs"] if c.get("architecture") == architecture)
    part.update(entries)
    changed(folder, config)


REFUSED = {
    "shared_gating": ("prefix_tuning", {"shared_gating": False}, "shared_gating is False, and can be read as True"),
    "length": ("prefix_tuning", {"prefix_length": 4}, "the prefix has 288 entries; 4 keys and values in 3 layers"),
    "flat": ("prefix_tuning", {"flat": False}, "expected wte.weight"),
    "more layers": ("lora", {"attn_matrices": ["q", "k", "v"]}, "nothing for bert.encoder.layer.0.attention.self.key"),
    "dora": ("lora", {"use_dora": True}, "use_dora is True, and can be read as False only"),
    "other kernels": ("lora", {"output_lora": True}, "output_lora is True"),
    "no gate here": ("lora", {"use_gating": False}, "has 'gate.bias', which no method here knows"),
    "unknown": ("lora", {"half": True}, "half: True is not known"),
    "left over": ("lora", {"leave_out": [0]}, "have no place in this bert model"),
    "norm": (None, {"ln_before": True}, "a norm of the adapter's own"),
    "kind": ("lora", {"architecture": "reft"}, "'reft' of AdapterHub has no exact form"),
    "two": ("lora", {"architecture": None}, "a union of prefix_tuning, bottleneck, bottleneck"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_exact_form_is_refused_by_name(union, case):
    architecture, entries, said = REFUSED[case]
    changed_part(union, architecture, entries)
    with pytest.raises(errors.CheckpointError, match=said):
        adapter_folders.read(union, tiny.BERT, head="classification")


DAMAGED = {
    "prefix_gates.tunejax.bias": "no gate of one output",
    "loras.tunejax.lora_B": "has no 'lora_B'",
    "output.adapters.tunejax.gate.weight": "layer 1, output_adapter, has no gate of one output",
}


@pytest.mark.parametrize("end", DAMAGED)
def test_a_damaged_folder_is_told(union, end):
    file = union / hub_slots.WEIGHTS
    tensors = {k: x for k, x in safetensors.load_file(file).items() if not (".1." in k and k.endswith(end))}
    safetensors.save_file(tensors, file)
    with pytest.raises(errors.CheckpointError, match=DAMAGED[end]):
        adapter_folders.read(union, tiny.BERT, head="classification")


def test_a_prefix_may_stand_in_the_file_once_more_for_each_layer(union):
    """As the library names it, where all that it names was copied."""
    file = union / hub_slots.WEIGHTS
    tensors = safetensors.load_file(file)
    own = "prefix_tuning.prefix_tunings.tunejax.self_prefix.control_trans"
    again = f"bert.encoder.layer.1.attention.self.{own.replace('.', '.pool.', 1)}"
    safetensors.save_file({**tensors, again: tensors[f"bert.{own}"]}, file)
    found = adapter_folders.read(union, tiny.BERT, head="classification").specs
    assert [s["name"] for s in found] == ["gated", "gated", "gated", "full"]


MAM = {"name": "mam", "length": 3, "hidden": 5, "width": 4}
UNWRITABLE = {
    "mam": (MAM, "prefix takes no positions: .* train with positions: false"),
    "mam of the input": ({**MAM, "positions": False}, "only one with reads: residual"),
    "unipelt": ({"name": "unipelt", "width": 4, "positions": False}, "of each token; train with per: row"),
    "positions behind a gate": ({**ROW, "method": {**FLAT, "positions": True}}, "takes no positions"),
    "no form behind a gate": ({**ROW, "method": {"name": "miss", "rank": 2}}, "no form for miss"),
    "gate of the output": ({**ROW, "method": LORA, "reads": "output"}, "reads the kernel's input"),
    "gate of the input": ({**ROW, "method": {"name": "pfeiffer", "width": 4}}, "reads what its adapter does"),
    "gate beside the MLP": ({**ROW, "method": {"name": "parallel_adapter", "width": 4}, "reads": "output"},
                            "parallel_adapter reads: residual"),
    "other kernels": ({**LORA, "targets": "mlp/up/kernel"}, "beside the kernels of attention"),
    "ranks": ([{**LORA, "layers": ":1"}, {**LORA, "rank": 3, "alpha": 4.5, "layers": "1:"}], "one rank in a folder"),
    "scales": ([{**LORA, "layers": ":1"}, {**LORA, "alpha": 1.0, "layers": "1:"}], "one scale in a folder"),
    "two at a kernel": ([LORA, LORA], "two are at layers/0/attention/q/kernel"),
    "matrices": ([{**LORA, "layers": ":1"}, {**LORA, "targets": "attention/q/kernel", "layers": "1:"}],
                 "one choice of matrices"),
    "lengths": ([{**FLAT, "layers": ":1"}, {**FLAT, "length": 2, "layers": "1:"}], "one length of a prefix"),
    "half gated": ([{**FLAT, "layers": ":1"}, {**ROW, "method": {**FLAT, "layers": "1:"}}], "one kind of gate"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written_is_refused(case, tmp_path):
    check_refused(*UNWRITABLE[case], tmp_path)


def test_a_form_that_cannot_be_is_told(tmp_path):
    """By a method of one's own, whose module says why."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from tunejax.core import portable\nfrom tunejax.methods import adapter\n"
        "ADAPTERHUB = portable.NoForm('it is secret')\ndef mine():\n    return adapter.pfeiffer(width=3)\n"
    )
    config, head, load = tiny_of("llama")
    with pytest.raises(errors.ConfigError, match="it is secret"):
        written([{"name": f"{file}:mine"}], config, head, load, tmp_path / "out")
