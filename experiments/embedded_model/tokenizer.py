"""The tokenizer of the embedded model: byte-level BPE of 1,024 entries, learned from the generated text.

python experiments/embedded_model/tokenizer.py         # writes tunejax/assets/tiny/tokenizer*.json
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import corpus

ASSETS = Path(__file__).resolve().parents[2] / "tunejax" / "assets" / "tiny"
SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
PAD, BOS, EOS, USER, ASSISTANT = range(5)
VOCAB_SIZE = 1024

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def text(row: corpus.Row) -> str:
    """A row as the model reads it, without <s> and </s>."""
    prompt, completion = row
    return f"<|user|>{prompt}<|assistant|>{completion}" if prompt else completion


def texts(number: int, seed: int) -> Iterator[str]:
    """The texts of the first ``number`` rows."""
    return ("\n".join(row) for _, row in itertools.islice(corpus.rows(seed), number))


def write(folder: Path = ASSETS, rows: int = 40_000, seed: int = 0) -> None:
    """Learn the merges and write tokenizer.json and tokenizer_config.json as transformers reads them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    # Single digits, so that written-out sums see the columns; words keep the space before them.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(rows, seed), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "additional_special_tokens": ["<|user|>", "<|assistant|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "padding_side": "right",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
