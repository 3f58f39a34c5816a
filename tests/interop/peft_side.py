"""Small random bases, their logits under HF PEFT and here, and adapter folders between the two: what tests share."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from safetensors import numpy as safetensors

from tunejax.core.method import Context, apply_edits
from tunejax.core.model import full_batch
from tunejax.interop import found as found_lib
from tunejax.interop import hf, peft_read
from tunejax.interop import peft as ours
from tunejax.methods import registry
from tunejax.models import build

TOKENS = np.random.default_rng(0).integers(3, 40, (2, 7)).astype(np.int32)
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 32, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32, "initializer_range": 0.2,
    "pad_token_id": 0,
}  # fmt: skip
QWEN3 = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
BASES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "num_key_value_heads": 2}, "lm"),
    "llama classes": ("LlamaForSequenceClassification", "LlamaConfig", {**SIZES, "num_labels": 3}, "classification"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", QWEN3, "lm"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, "lm"),
    "bert": ("BertForSequenceClassification", "BertConfig", {**SIZES, "num_labels": 3}, "classification"),
    "bert mlm": ("BertForMaskedLM", "BertConfig", SIZES, "mlm"),
}
TASKS = {"lm": "CAUSAL_LM", "classification": "SEQ_CLS", "mlm": None}


def save_base(name, folder):
    """(folder of that random model, its head)."""
    torch.manual_seed(0)
    model, config, sizes, head = BASES[name]
    getattr(transformers, model)(getattr(transformers, config)(**sizes)).save_pretrained(folder)
    return folder, head


def their_model(folder):
    """The base under transformers."""
    model = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, model).from_pretrained(folder).eval()


def their_logits(model):
    """Of `TOKENS`."""
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    return logits if logits.ndim == 2 else logits[:, -TOKENS.shape[1] :]


def their_adapter(base, kind, **entries):
    """An adapter under PEFT whose weights are off their start."""
    folder, head = base
    torch.manual_seed(1)
    config = getattr(peft, kind)(task_type=TASKS[head], **entries)
    model = peft.get_peft_model(their_model(folder), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def change(folder, *removed, **entries):
    """Changes entries of a folder's adapter_config.json."""
    file = folder / ours.CONFIG
    settings = {k: v for k, v in json.loads(file.read_text()).items() if k not in removed}
    file.write_text(json.dumps({**settings, **entries}))


def change_tensors(folder, how):
    """Puts what ``how`` makes of a folder's tensors in their place."""
    file = folder / ours.WEIGHTS
    changed = how(safetensors.load_file(file))
    safetensors.save_file({k: np.array(x, order="C") for k, x in changed.items()}, file)


@functools.cache
def loaded(folder, head, cuts=()):
    """The base here."""
    return hf.load(folder, hf.read_config(folder), head=head, cuts=cuts)[0]


def our_logits(base, method, params):
    """Of `TOKENS`, behind what the method puts before them."""
    folder, head = base
    config = hf.read_config(folder)
    model = build.build(config, head=head, cuts=method.cuts(config.num_layers))
    first = np.tile(np.arange(config.vocab_size, config.vocab_size + method.prompt), (len(TOKENS), 1))
    batch = full_batch(jnp.asarray(np.concatenate([first, TOKENS], axis=1), jnp.int32))
    logits = np.asarray(jax.jit(lambda p: model.logits(model.head(p), model.hidden(p, batch)[0]))(params))
    if head == "classification":
        return logits[:, 0 if config.kind == "encoder" else -1]
    return logits[:, method.prompt :]


def read(folder, base):
    """(logits here, what was found, what `ours.write` takes) of a PEFT folder."""
    config = hf.read_config(base[0])
    found = peft_read.read(folder, config, head=base[1])
    method = registry.build(found.specs)
    cuts = method.cuts(config.num_layers)
    params = loaded(*base, cuts)
    start = jax.jit(lambda p: method.init(jax.random.key(0), p))(params)
    train = found_lib.trained(found, method, start.train, cuts)
    state = found_lib.state_of(found, method, start.state)
    edited = apply_edits(params, start.edits)
    logits = our_logits(base, method, method.bind(edited, train, state, Context()))
    return logits, found, ours.Tuned(found.specs, method, edited, train, state)


def tuned(base, specs):
    """(what `ours.write` takes, its logits here) of a method whose arrays are off their start."""
    config, method = hf.read_config(base[0]), registry.build(specs)
    params = loaded(*base, method.cuts(config.num_layers))
    start = method.init(jax.random.key(0), params)
    rng = np.random.default_rng(1)
    train = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), start.train)
    edited = apply_edits(params, start.edits)
    logits = our_logits(base, method, method.bind(edited, train, start.state, Context()))
    return ours.Tuned(specs, method, edited, train, start.state), logits


def write(folder, base, found):
    """Writes the folder, and gives its logits under PEFT."""
    ours.write(folder, found, hf.read_config(base[0]), head=base[1], base_name=str(base[0]))
    return their_logits(peft.PeftModel.from_pretrained(their_model(base[0]), folder).eval())
