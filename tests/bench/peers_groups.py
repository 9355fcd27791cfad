"""The model and the groups that every learner of peers.py is timed on, and what sharing a prompt can save at most.

A Qwen3 of 11.5M parameters with a vocabulary of 32,768, random; groups of 16 or 64 completions of lognormal length
(median 100, sigma 0.7, 16 to 512 tokens) on prompts of 64 or 512 tokens. Behavior logprobs lie around those of the
untrained policy, so that some ratios are clipped and most are not. Everything is drawn from fixed seeds: each side, in
its own process, makes the same weights and the same groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learner.batch import Batch

QWEN3: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32_768, "initializer_range": 0.02,
    "max_position_embeddings": 2048,
}  # fmt: skip
MEDIAN_TOKENS, SHORTEST, LONGEST = 100, 16, 512
SEED = 2
"""Of the lengths: their means (121 and 131) and longest (352 and 512) are about what such draws have on average."""
BEHAVIOR_SPREAD = 0.15
"""Standard deviation of the behavior logprobs around log(1/V)."""


@dataclass(frozen=True)
class Shape:
    """One group: G completions on a prompt of so many tokens."""

    num_generations: int
    prompt_length: int
    model: tuple[tuple[str, Any], ...] = tuple(QWEN3.items())
    """What differs from the tiny model of tests/models.py."""

    def lengths(self, *, quick: bool = False) -> list[int]:
        """Completion tokens, ascending: the order in which no side pays for padding it could avoid."""
        import numpy as np

        number = max(2, self.num_generations // 4) if quick else self.num_generations
        drawn = np.random.default_rng(SEED).lognormal(np.log(MEDIAN_TOKENS), 0.7, number)
        return sorted(np.clip(drawn, SHORTEST, LONGEST).astype(int).tolist())


SHAPES = [Shape(g, p) for g in (16, 64) for p in (64, 512)]


def write_model(directory: Path, shape: Shape) -> Path:
    """Write the model and a tokenizer; the same weights every time."""
    from tests.models import build_tiny_model

    return build_tiny_model(directory, **dict(shape.model))


def make_step(shape: Shape, *, quick: bool = False) -> Batch:
    """Make the one group of a step. Its completions differ from the first token on: they share their prompt alone."""
    import numpy as np

    from protocol.completions import Completion
    from protocol.messages import FinishReason
    from tests.factories import INITIAL, make_batch, make_train_group

    random = np.random.default_rng(1)
    vocabulary = dict(shape.model)["vocab_size"]
    lengths = shape.lengths(quick=quick)
    first_tokens = random.permutation(np.arange(2, vocabulary))[: len(lengths)]
    completions = [
        Completion(
            completion_tokens=np.append(first, random.integers(2, vocabulary, length - 1)).astype(np.int32),
            behavior_logprobs=random.normal(-np.log(vocabulary), BEHAVIOR_SPREAD, length).astype(np.float32),
            spans=((INITIAL, length),),
            finish_reason=FinishReason.LENGTH,
        )
        for first, length in zip(first_tokens, lengths, strict=True)
    ]
    group = make_train_group(
        prompt_tokens=random.integers(2, vocabulary, shape.prompt_length).tolist(),
        rewards=random.integers(0, 2, len(lengths)).astype(float).tolist(),
        completions=completions,
    )
    return make_batch(groups=[group])


def flop_ratio(shape: Shape, *, quick: bool = False) -> float:
    """Operations without sharing (and without padding) over those with the prompt forwarded once.

    A token costs 2 per weight of every linear layer, and 4 x heads x head size per token it attends to; backward
    passes cost twice their forward pass everywhere, so the factor 3 cancels.
    """
    model, prompt, lengths = dict(shape.model), shape.prompt_length, shape.lengths(quick=quick)
    head_width = model["head_dim"] * (2 * model["num_attention_heads"] + 2 * model["num_key_value_heads"])
    layer = 2 * model["hidden_size"] * (head_width + 3 * model["intermediate_size"])
    attend = 4 * model["num_attention_heads"] * model["head_dim"]

    def sequence(first: int, last: int) -> float:
        """Layers' cost of the tokens at positions first to last - 1."""
        attended = (last * (last + 1) - first * (first + 1)) / 2
        return float(model["num_hidden_layers"] * ((last - first) * layer + attend * attended))

    head = sum(lengths) * 2 * model["hidden_size"] * model["vocab_size"]
    own = sum(sequence(prompt, prompt + length - 1) for length in lengths)
    return (head + own + len(lengths) * sequence(0, prompt)) / (head + own + sequence(0, prompt))
