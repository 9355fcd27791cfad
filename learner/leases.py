"""How a lease is written: everything a server needs for one group, nothing it has to look up. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from learner.config import LearnerConfig
from learner.ledger import Entry
from learner.prompts import PromptRow
from protocol.identity import group_id, group_seed
from protocol.messages import Lease, Purpose, Sampling
from protocol.versions import Version


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """What a server must fit."""

    run_id: str
    incarnation: int
    vocab_size: int
    model_digest: str
    tokenizer_digest: str
    stop_token_ids: tuple[int, ...]
    lora_rank: int = 0
    """Of the adapter that is published; 0: all weights are."""


def train_lease(
    config: LearnerConfig, identity: RunIdentity, row: PromptRow, entry: Entry, *, min_version: Version
) -> Lease:
    """Ask for the group of a ledger entry."""
    return Lease(
        group_id=group_id(identity.run_id, entry.ordinal),
        ordinal=entry.ordinal,
        sequence=entry.sequence,
        attempt=entry.attempt,
        purpose=Purpose.TRAIN,
        num_generations=config.num_generations,
        sampling=Sampling(
            temperature=config.temperature,
            max_completion_length=config.max_completion_length,
            stop_token_ids=identity.stop_token_ids,
        ),
        seed=group_seed(config.seed, entry.ordinal),
        min_version=min_version,
        prompt_tokens=row.prompt_tokens,
        row=np.frombuffer(row.row_json, np.uint8),
    )


def eval_lease(
    config: LearnerConfig, identity: RunIdentity, row: PromptRow, held_id: str, *, attempt: int, min_version: Version
) -> Lease:
    """Ask for the completions of an evaluation row; the same row is sampled with the same seed every time."""
    return Lease(
        group_id=held_id,
        ordinal=row.ordinal,
        sequence=row.ordinal,
        attempt=attempt,
        purpose=Purpose.EVAL,
        num_generations=config.eval_num_generations,
        sampling=Sampling(
            temperature=config.eval_temperature,
            max_completion_length=config.eval_max_completion_length or config.max_completion_length,
            stop_token_ids=identity.stop_token_ids,
        ),
        seed=group_seed(config.seed, -1 - row.ordinal),
        min_version=min_version,
        prompt_tokens=row.prompt_tokens,
        row=np.frombuffer(row.row_json, np.uint8),
    )


def prompt_text(row: PromptRow) -> str:
    """The prompt as one string, for samples/."""
    return row.prompt if isinstance(row.prompt, str) else msgspec.json.encode(row.prompt).decode()
