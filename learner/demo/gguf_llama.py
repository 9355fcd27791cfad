"""Convert a llama-architecture GGUF file into a plain Hugging Face directory: numpy only, no model is built.

transformers can read GGUF files, but (5.23) needs accelerate for it, refuses to save what it read, and leaves the
tokenizer without its digit rule. What this converter has to know instead:

- llama.cpp stores the rows of q and k so that rotary pairs are neighbors; Hugging Face rotates halves (`unrotate`);
- a GGUF shape lists the fastest axis first, `dequantize` already returns it the other way round;
- the output head is absent when it is tied to the embedding;
- the pre-tokenizer is only named ("smollm": digits one by one, then the GPT-2 rule), not described.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3
"""GGUF's token type of special tokens."""


def convert(gguf_file: Path, directory: Path) -> None:
    """Write config, generation config, tokenizer and fp32 weights of `gguf_file` into an existing directory.

    fp32, not bf16: a dequantized 4-bit weight is scale x level + offset, with scale and offset in fp16; that has
    more digits than bf16 holds, and the learner's master weights are fp32 anyway.
    """
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    weights: dict[str, npt.NDArray[np.float32]] = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if tensor.name.endswith(".attn_q.weight"):
            values = unrotate(values, heads)
        elif tensor.name.endswith(".attn_k.weight"):
            values = unrotate(values, kv_heads)
        weights[hugging_face_name(tensor.name)] = np.ascontiguousarray(values)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    for name, content in _config_files(fields, tied="lm_head.weight" not in weights):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    _write_tokenizer(fields, directory)


def hugging_face_name(name: str) -> str:
    """Translate a tensor's name: blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight."""
    stem, _, kind = name.rpartition(".")
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def unrotate(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's row order of q and k: within a head, (pair, half) back to (half, pair).

    Args:
        weight: [heads x head_dim, hidden].
        heads: Attention heads, or key-value heads for k.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _config_files(fields: dict[str, Any], *, tied: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    bos, eos = fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    tokens, pad = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.padding_token_id"]
    yield (
        "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": fields["llama.embedding_length"],
            "intermediate_size": fields["llama.feed_forward_length"],
            "num_hidden_layers": fields["llama.block_count"],
            "num_attention_heads": fields["llama.attention.head_count"],
            "num_key_value_heads": fields["llama.attention.head_count_kv"],
            "max_position_embeddings": fields["llama.context_length"],
            "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
            "rope_theta": fields["llama.rope.freq_base"],
            "vocab_size": len(tokens),
            "tie_word_embeddings": tied,
            "torch_dtype": "float32",
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
        },
    )
    yield "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    yield (
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": fields["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "bos_token": tokens[bos],
            "eos_token": tokens[eos],
            "pad_token": tokens[pad],
            "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
            "chat_template": fields["tokenizer.chat_template"],
        },
    )


def _write_tokenizer(fields: dict[str, Any], directory: Path) -> None:
    """Write tokenizer.json: byte-level BPE whose numbers are split into single digits first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
