"""Exact match of the embedded model on each kind of row, as a Markdown table.

python experiments/embedded_model/scores.py 50         # rows a kind
"""

import sys

import corpus
import heldout
import jax
import numpy as np
import tokenizer

from tunejax.generate import decode
from tunejax.interop import hf
from tunejax.models import build


def score(generate, bpe, rows: list[corpus.Row]) -> tuple[float, float]:
    """Shares of rows whose whole completion, and whose last word, is right; rows by ``generate`` (tokens, mask)."""
    prompts = [bpe(f"<|user|>{p}<|assistant|>").input_ids for p, _ in rows]
    tokens, mask = np.zeros((2, len(rows), 96), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, -len(ids) :], mask[row, -len(ids) :] = ids, 1
    said = [bpe.decode(x, skip_special_tokens=True) for x in np.asarray(generate(tokens, mask))]
    pairs = [(s, c) for s, (_, c) in zip(said, rows, strict=True)]
    last = [s.split(" ")[-1] == c.split(" ")[-1] for s, c in pairs]
    return float(np.mean([s == c for s, c in pairs])), float(np.mean(last))


def main(number: int) -> None:
    """Print the table."""
    from transformers import AutoTokenizer

    config = hf.read_config(tokenizer.ASSETS)
    params, _ = hf.load(tokenizer.ASSETS, config, head="lm", key=jax.random.key(0))
    model, bpe = build.build(config, head="lm"), AutoTokenizer.from_pretrained(tokenizer.ASSETS)

    def generate(tokens, mask):
        return decode.generate(model, params, tokens, mask, max_new_tokens=64, stop_tokens=(tokenizer.EOS,))

    sets = {name: corpus.evaluation_rows(name, number) for name in corpus.KINDS if name != "story"}
    sets |= {f"{name} (never seen)": heldout.rows(name, number, 1, True) for name in heldout.KINDS}
    print("| kind | whole completion | last word |\n|---|---|---|")
    for name, rows in sets.items():
        # Few kinds have fewer rows than asked for: repeat some, so that one shape is compiled.
        whole, last = score(generate, bpe, (rows * number)[:number])
        print(f"| {name} | {whole:.2f} | {last:.2f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
