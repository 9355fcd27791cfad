"""Sorting letters: a model of 100,608 parameters, made and warmed up on this machine in seconds, no download.

The prompt is eight letters of a..j and `>`; the completion is the same letters in order, then end of sequence. A
short supervised warm-up leaves the model right about three times in ten when sampled: enough signal for GRPO, and far
from done. One letter is one token.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

LETTERS = "abcdefghij"
LENGTH = 8
SEPARATOR = ">"
PAD, EOS, BOS, UNKNOWN = "<pad>", "<eos>", "<bos>", "<unk>"
VOCABULARY = (PAD, EOS, BOS, UNKNOWN, SEPARATOR, *LETTERS)
NUM_PARAMETERS = 100_608
"""Of the demonstration's shape."""
WARMUP_BATCH = 256
WARMUP_LEARNING_RATE = 2e-3
WARMUP_LOSS = 0.19
"""Mean over tokens at which the warm-up ends. A sampled answer of nine tokens is then right with probability of
about 0.28 (0.26 to 0.31 for four seeds); a fixed number of steps gave 0.34 to 0.78."""
WARMUP_MAX_STEPS = 300
"""About 50 are needed."""
IGNORED_LABEL = -100
"""torch.nn.functional.cross_entropy leaves such positions out."""

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the model; the demonstration's unless others are given."""

    hidden_size: int = 64
    """A multiple of 32: heads are 16 wide, two of them share keys and values."""
    num_layers: int = 2


def prepare(directory: Path, *, seed: int = 0, shape: Shape = Shape()) -> None:
    """Make `directory` a warmed-up Hugging Face model, once; a second call returns at once."""
    if directory.exists():
        return
    from transformers.utils import logging as hf_logging

    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        model = make_model(seed, shape)
        warm_up(model, seed=seed)
        hf_logging.disable_progress_bar()  # for one shard of 0.4 MB
        model.save_pretrained(building)
        make_tokenizer().save_pretrained(building)
        os.replace(building, directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def draw_prompts(count: int, seed: int | str) -> list[str]:
    """Draw letters to sort, the separator not yet appended."""
    generator = random.Random(seed)
    return ["".join(generator.choices(LETTERS, k=LENGTH)) for _ in range(count)]


def split_prompts(*, num_train: int, num_eval: int, seed: int) -> tuple[list[str], list[str]]:
    """Draw disjoint training and evaluation prompts; the evaluation prompts are the same for every seed."""
    evaluation = draw_prompts(num_eval, "evaluation")
    held_out = set(evaluation)
    return [text for text in draw_prompts(num_train, seed) if text not in held_out], evaluation


def rows(prompts: list[str]) -> Iterator[Row]:
    """Yield data rows: the prompt, and the answer that must match to the letter."""
    for letters in prompts:
        yield {"prompt": letters + SEPARATOR, "answer": "".join(sorted(letters))}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter, in a form that AutoTokenizer loads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=BOS, unk_token=UNKNOWN
    )


def make_model(seed: int, shape: Shape = Shape()) -> Qwen3ForCausalLM:
    """Make the untrained model: Qwen3, fp32; width 64 and two layers unless told otherwise."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=shape.hidden_size,
        intermediate_size=3 * shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.hidden_size // 16,
        num_key_value_heads=shape.hidden_size // 32,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        **special,
    )
    model = Qwen3ForCausalLM(config)
    for name, token in special.items():
        setattr(model.generation_config, name, token)
    return model


def warm_up(model: Qwen3ForCausalLM, *, seed: int, max_steps: int = WARMUP_MAX_STEPS) -> list[float]:
    """Teach the task by supervised steps on fresh random samples until the loss is WARMUP_LOSS; return the losses."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=WARMUP_LEARNING_RATE)
    losses: list[float] = []
    model.train()
    for step in range(max_steps):
        tokens, labels = supervised_batch(draw_prompts(WARMUP_BATCH, f"{seed}/{step}"))
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
        )
        losses.append(loss.item())
        if losses[-1] <= WARMUP_LOSS:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def supervised_batch(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode whole examples; return tokens [B, L] and labels [B, L], int64, the prompt's labels ignored."""
    import torch

    index = {token: number for number, token in enumerate(VOCABULARY)}
    ids = [[*(index[letter] for letter in f"{row['prompt']}{row['answer']}"), index[EOS]] for row in rows(prompts)]
    tokens = torch.tensor(ids)
    labels = tokens.clone()
    labels[:, : LENGTH + 1] = IGNORED_LABEL
    return tokens, labels
