"""Canaries: sequences on which an engine that has swapped its weights must agree with the learner.

Which sequences is a pure function of the data set, so every version of a run is tried on the same ones. They are what
the model is given anyway: the prompts of the run, end to end, cut into pieces of one length. What the learner's model
says of them is `Trainer.canary_logprobs`; both travel with the announcement of a version (messages.WeightsReady).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from learner.prompts import Prompts
from protocol.errors import ConfigError
from protocol.messages import Float32, Int32

PREDICTED_TOKENS = 256
"""At least so many tokens are predicted: the mean of a mismatch over them is steady enough to compare versions."""
MAX_LENGTH = 64
"""Tokens of a sequence, at most: longer ones would cost more and find nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Canaries:
    """Sequences and what the learner's model says of them under one version."""

    tokens: Int32
    """[N, L]"""
    logprobs: Float32
    """[N, L - 1] of tokens[:, 1:], temperature 1."""


def choose_canaries(prompts: Prompts, *, max_length: int) -> Int32:
    """Cut the prompts of the rows 0, 1, 2, ... into canaries; after the last row comes the first again.

    Args:
        prompts: of the run; rows that are too long are passed over.
        max_length: tokens that the engines of the run take at least.

    Returns:
        [N, L] token ids, L = min(64, max_length) but at least 2, N the fewest with N x (L - 1) >= 256.

    Raises:
        ConfigError: no prompt of the data set fits.
    """
    length = max(2, min(MAX_LENGTH, max_length))
    count = -(-PREDICTED_TOKENS // (length - 1))
    pieces: list[Int32] = []
    missing, ordinal = count * length, 0
    while missing > 0:
        row = prompts.row(ordinal % len(prompts))
        if row is not None:
            pieces.append(row.prompt_tokens)
            missing -= len(row.prompt_tokens)
        ordinal += 1
        if ordinal == len(prompts) and not pieces:
            raise ConfigError(f"none of the {ordinal} prompts fits max_prompt_length: raise it")
    return np.concatenate(pieces)[: count * length].astype(np.int32).reshape(count, length)
