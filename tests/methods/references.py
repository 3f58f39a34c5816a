"""Tiny random models of transformers, each with PEFT around a copy and the same weights here."""

import copy
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunejax.core import model as models
from tunejax.interop import hf
from tunejax.models import build

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 40
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
}
HEADS = {"llama": "lm", "bert": "mlm", "bert_classes": "classification"}
TASKS = {"llama": "CAUSAL_LM", "bert": "FEATURE_EXTRACTION", "bert_classes": "SEQ_CLS"}


def plain(kind):
    """A model of transformers with random weights."""
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
        return transformers.LlamaForCausalLM(config).eval()
    config = transformers.BertConfig(**SHAPE, num_labels=3)
    made = transformers.BertForSequenceClassification if kind == "bert_classes" else transformers.BertForMaskedLM
    return made(config).eval()


def load(kind, folder):
    """(transformers' model, our model, our parameters)."""
    theirs = plain(kind)
    theirs.save_pretrained(folder)
    config = hf.read_config(folder)
    params, _ = hf.load(folder, config, head=HEADS[kind])
    return theirs, build.build(config, head=HEADS[kind]), params


def tuned(theirs, config, kind):
    """PEFT around a copy, with random weights in all that trains; in train mode of its encoder, without dropout."""
    config.task_type = TASKS[kind]
    made = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for w in trained(made).values():
            w.copy_(torch.randn_like(w) * 0.3)
    return made


def trained(made):
    """PEFT's parameters by name, without those of a head."""
    return {k: v for k, v in made.named_parameters() if k.startswith("prompt_encoder")}


def rows(batch=2, length=7, seed=0):
    """(tokens, mask) [batch, length], the last row padded on the right."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, length), np.int32)
    mask[-1, length - 3 :] = 0
    return rng.integers(3, VOCAB, (batch, length)).astype(np.int32) * mask, mask


def with_prompt(tokens, mask, count):
    """Our batch of these rows, each after ``count`` virtual tokens."""
    first = np.broadcast_to(np.arange(VOCAB, VOCAB + count, dtype=np.int32), (len(tokens), count))
    tokens, mask = np.concatenate([first, tokens], 1), np.concatenate([np.ones_like(first), mask], 1)
    return models.full_batch(jnp.asarray(tokens), jnp.asarray(mask))


def packed(tokens, mask, count):
    """The same as one packed row: what is real of each row, with a prompt and a segment of its own."""
    batch = {k: [] for k in ("tokens", "positions", "segment_ids")}
    for segment, (row, real) in enumerate(zip(tokens, mask, strict=True), 1):
        ids = [*range(VOCAB, VOCAB + count), *row[real > 0]]
        batch["tokens"] += ids
        batch["positions"] += range(len(ids))
        batch["segment_ids"] += itertools.repeat(segment, len(ids))
    return {k: jnp.asarray(v, jnp.int32)[None] for k, v in batch.items()}


@functools.partial(jax.jit, static_argnums=0)
def _logits(plan, params, batch):
    hidden, head, answer = plan
    return answer(head(params), hidden(params, batch)[0])


def logits(model, params, batch):
    """[batch, length, vocab or labels]."""
    return _logits((model.hidden, model.head, model.logits), params, batch)


def greedy(made, ids, count):
    """PEFT's greedy continuation of one row [1, length]. Without a cache, of whose new name PEFT does not know yet."""
    ids = torch.tensor(ids).long()
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": False}
    return made.generate(input_ids=ids, max_new_tokens=count, **settings)[0, -count:].numpy()
