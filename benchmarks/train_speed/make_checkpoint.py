"""Writes the checkpoint that every contender starts from: a Llama of `common`'s shape with random weights."""

import sys

import common


def main() -> None:
    """Writes it to the folder named on the command line."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=common.VOCAB,
        hidden_size=common.WIDTH,
        intermediate_size=common.MLP,
        num_hidden_layers=common.LAYERS,
        num_attention_heads=common.HEADS,
        num_key_value_heads=common.HEADS,
        max_position_embeddings=common.LENGTH,
        tie_word_embeddings=True,
        use_cache=False,
    )
    LlamaForCausalLM(config).save_pretrained(sys.argv[1])


if __name__ == "__main__":
    main()
