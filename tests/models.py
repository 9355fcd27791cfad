"""Tiny random Hugging Face models on disk, built in under a second: what tests load instead of a download.

The vocabulary is characters, so every test can read its tokens. Heavy imports sit inside the functions: tests
that need no model do not pay for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

PAD, EOS = "<pad>", "<eos>"
ALPHABET = "\n 0123456789abcdefghijklmnopqrstuvwxyz+-*=|"
VOCAB_SIZE = 2 + len(ALPHABET)
EOS_ID = 1


def encode(text: str) -> list[int]:
    """Token ids of `text` under the character vocabulary, without a tokenizer."""
    return [2 + ALPHABET.index(character) for character in text]


def write_character_tokenizer(directory: Path) -> None:
    """Write tokenizer files that `AutoTokenizer` loads: one token per character, <pad> 0, <eos> 1."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    ).save_pretrained(directory)


def build_tiny_model(
    directory: Path,
    *,
    architecture: Literal["qwen3", "llama"] = "qwen3",
    seed: int = 0,
    tie_word_embeddings: bool = True,
    **overrides: Any,
) -> Path:
    """Write a random fp32 causal language model (d=32, 2 layers, 4 heads, 2 KV heads) with its tokenizer.

    The weights are drawn wide (std 0.2): distributions are far from uniform and the argmax is never a tie.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "initializer_range": 0.2, "tie_word_embeddings": tie_word_embeddings, "dtype": "float32",
        "bos_token_id": None, "eos_token_id": EOS_ID, "pad_token_id": 0,
    }  # fmt: skip
    shape |= overrides
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (
            Qwen3ForCausalLM(Qwen3Config(**shape))
            if architecture == "qwen3"
            else LlamaForCausalLM(LlamaConfig(**shape))
        )
    model.save_pretrained(directory)
    write_character_tokenizer(directory)
    return directory
