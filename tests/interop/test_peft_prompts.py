"""Prompts and prefixes with modules that train whole beside them, as HF PEFT keeps them: no module is wrapped there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunejax.core import errors
from tunejax.core.method import Context, apply_edits
from tunejax.core.model import full_batch
from tunejax.interop import found as found_lib
from tunejax.interop import hf, peft_read
from tunejax.interop import peft as ours
from tunejax.methods import registry
from tunejax.models import build

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(0, 40, (2, 7)).astype(np.int32)
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
MAKE = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3)),
}
HEADS = {"llama": "lm", "bert": "classification"}
AUTO = {"llama": "AutoModelForCausalLM", "bert": "AutoModelForSequenceClassification"}
OURS = {
    "prompt": ("bert", [{"name": "prompt_tuning", "length": 3}]),
    "prompt and pooler": ("bert", [{"name": "p_tuning", "length": 3}, {"name": "full", "targets": "pooler/*"}]),
    "prompt and norms": ("llama", [{"name": "prompt_tuning", "length": 3}, {"name": "norm_tuning"}]),
    "prefix and norms": ("llama", [{"name": "prefix_tuning", "length": 3}, {"name": "norm_tuning"}]),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of random models by family."""
    torch.manual_seed(0)
    folders = {family: tmp_path_factory.mktemp(family) for family in MAKE}
    for family, folder in folders.items():
        MAKE[family]().save_pretrained(folder)
    return folders


def their_model(family, folder):
    return getattr(transformers, AUTO[family]).from_pretrained(folder).eval()


def their_logits(model):
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    return logits if logits.ndim == 2 else logits[:, -TOKENS.shape[1] :]


def our_logits(config, head, method, params):
    model = build.build(config, head=head, cuts=())
    first = np.tile(np.arange(config.vocab_size, config.vocab_size + method.prompt), (len(TOKENS), 1))
    batch = full_batch(jnp.asarray(np.concatenate([first, TOKENS], axis=1), jnp.int32))
    logits = jax.jit(lambda p: model.logits(model.head(p), model.hidden(p, batch)[0]))(params)
    return np.asarray(logits[:, 0] if head == "classification" else logits[:, method.prompt :])


def read(folder, base, head):
    """Logits of a PEFT folder, read here."""
    config = hf.read_config(base)
    found = peft_read.read(folder, config, head=head)
    method, (params, _) = registry.build(found.specs), hf.load(base, config, head=head)
    start = method.init(jax.random.key(0), params)
    train = found_lib.trained(found, method, start.train, ())
    return our_logits(
        config, head, method, method.bind(apply_edits(params, start.edits), train, start.state, Context())
    )


def written(family, base, specs, folder):
    """Our logits of random values of what these methods train, once the folder is written."""
    head, config = HEADS[family], hf.read_config(base)
    method, (params, _) = registry.build(specs), hf.load(base, config, head=head)
    start, rng = method.init(jax.random.key(0), params), np.random.default_rng(2)
    train = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), start.train)
    edited = apply_edits(params, start.edits)
    mine = our_logits(config, head, method, method.bind(edited, train, start.state, Context()))
    tuned = ours.Tuned(specs, method, edited, train, start.state)
    ours.write(folder, tuned, config, head=head, base_name=str(base))
    return mine


@pytest.mark.parametrize("kind", OURS)
def test_ours_is_written_and_read_back(bases, kind, tmp_path):
    family, specs = OURS[kind]
    base = bases[family]
    mine = written(family, base, specs, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(their_model(family, base), tmp_path / "a").eval()
    np.testing.assert_allclose(their_logits(theirs), mine, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(read(tmp_path / "a", base, HEADS[family]), mine, atol=1e-5, rtol=1e-5)


def test_theirs_with_a_head_is_read(bases, tmp_path):
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    theirs = peft.get_peft_model(their_model("bert", bases["bert"]), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    np.testing.assert_allclose(
        read(tmp_path, bases["bert"], "classification"), their_logits(theirs), atol=1e-5, rtol=1e-5
    )


def test_a_table_that_trains_behind_a_prompt_is_refused(bases, tmp_path):
    """PEFT would leave it out: it looks the text up in the table that it was given."""
    specs = [{"name": "full", "targets": "embed/table"}, {"name": "prompt_tuning", "length": 3}]
    with pytest.raises(errors.ConfigError, match="embed/table trains"):
        written("llama", bases["llama"], specs, tmp_path / "a")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, modules_to_save=["embed_tokens"])
    peft.get_peft_model(their_model("llama", bases["llama"]), config).save_pretrained(tmp_path / "b")
    with pytest.raises(errors.CheckpointError, match="trained"):
        read(tmp_path / "b", bases["llama"], "lm")


def test_a_task_without_prompts_in_peft_is_refused(tmp_path):
    """PEFT computes as if there were no prompt where it knows no task."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path / "base")
    without = their_logits(model)
    settings = peft.PromptTuningConfig(num_virtual_tokens=3, token_dim=16, num_layers=2, num_attention_heads=4)
    prompted = peft.PeftModel(model, settings)  # as `from_pretrained` makes it
    np.testing.assert_array_equal(their_logits(prompted.eval()), without)
    config, spec = hf.read_config(tmp_path / "base"), {"name": "prompt_tuning", "length": 3}
    method, (params, _) = registry.build(spec), hf.load(tmp_path / "base", config, head="mlm")
    tuned = ours.Tuned([spec], method, params, method.init(jax.random.key(0), params).train, {})
    with pytest.raises(errors.ConfigError, match="for CAUSAL_LM, SEQ_CLS only"):
        ours.write(tmp_path / "a", tuned, config, head="mlm", base_name="b")


@pytest.mark.parametrize("name", ["prefix_tuning", "p_tuning_v2"])
def test_a_prefix_without_positions_is_refused(bases, name, tmp_path):
    """Behind PEFT's, the text counts on from its length."""
    config, spec = hf.read_config(bases["llama"]), {"name": name, "length": 3, "positions": False}
    method, (params, _) = registry.build(spec), hf.load(bases["llama"], config, head="lm")
    tuned = ours.Tuned([spec], method, params, method.init(jax.random.key(0), params).train, {})
    with pytest.raises(errors.ConfigError, match=f"{name} with positions: True, and here it is False"):
        ours.write(tmp_path / "a", tuned, config, head="lm", base_name="b")
