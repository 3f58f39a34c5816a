"""Tokenizers small enough to work out by hand."""

import json

from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]


def _fast(model, pre, decoder=None, post=None, **names):
    from tokenizers import Tokenizer

    inner = Tokenizer(model)
    inner.pre_tokenizer = pre
    if decoder is not None:
        inner.decoder = decoder
    if post is not None:
        inner.post_processor = post
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def characters(**names):
    """A token a character: id = code + 3 below 128, after <pad> 0, <s> 1, </s> 2. Adds no special tokens."""
    from tokenizers import Regex, decoders, models, pre_tokenizers

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(i): i + 3 for i in range(1, 128)}, "<unk>": 131}
    model = models.WordLevel(vocab, unk_token="<unk>")
    pre = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    defaults = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return _fast(model, pre, decoders.Fuse(), **{**defaults, **names})


def ids(text):
    """The ids of `characters` for plain text."""
    return [ord(c) + 3 for c in text]


def merging():
    """Characters, but "ab" is one token (id 200): a boundary between a and b is lost."""
    from tokenizers import models, pre_tokenizers

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(i): i + 3 for i in range(33, 127)}, "ab": 200}
    vocab = {**vocab, " ": 35}
    return _fast(models.BPE(vocab, [("a", "b")]), pre_tokenizers.Split(" ", "isolated"), eos_token="</s>")


def in_bytes():
    """A token a byte, as GPT-2 writes them: a letter beyond ASCII is several tokens."""
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"</s>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _fast(models.BPE(vocab, []), pre, decoders.ByteLevel(), eos_token="</s>")


def encoder():
    """Words "w0" to "w9" (ids 7 to 16) between [CLS] 4 and [SEP] 5; pairs have token types; [MASK] is 6."""
    from tokenizers import models, pre_tokenizers, processors

    vocab = {w: i for i, w in enumerate([*WORDS, *(f"w{i}" for i in range(10))])}
    post = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 4), ("[SEP]", 5)],
    )
    return _fast(
        models.WordLevel(vocab, unk_token="<unk>"),
        pre_tokenizers.Whitespace(),
        post=post,
        pad_token="<pad>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="<unk>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def write(path, rows):
    """A JSON Lines file of the rows; text stands as it is, bytes too."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)
