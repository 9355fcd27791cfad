"""Reward functions that servers under test name by file. Loaded in reward workers: imports nothing of the tests."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

HANGS_EVERY = 19
"""One completion of so many hangs its verifier."""


def parity(completion_ids: list[list[int]]) -> list[float]:
    """1 for token ids with an even sum: a fair coin that no policy of one step can predict."""
    return [1.0 - sum(ids) % 2 for ids in completion_ids]


def parity_of_pairs(completion_ids: list[list[int]]) -> list[list[tuple[int, float]]]:
    """A process reward: every two tokens are a step, worth 1 if their sum is even; a last one alone is a step, too."""
    return [
        [(min(end, len(ids) - 1), 1.0 - sum(ids[end - 1 : end + 1]) % 2) for end in range(1, len(ids) + 1, 2)]
        for ids in completion_ids
    ]


def solved(completion_ids: list[list[int]], solved: list[bool]) -> list[float]:
    """1 for every completion of a solved row, parity elsewhere."""
    return [1.0 if done else value for done, value in zip(solved, parity(completion_ids), strict=True)]


def hangs(completion_ids: list[list[int]], witness: list[str]) -> list[float]:
    """Parity, but some completions hang: asleep, or busy and deaf to SIGTERM."""
    for ids, file in zip(completion_ids, witness, strict=True):
        if sum(ids) % HANGS_EVERY == 0:
            with Path(file).open("a", encoding="utf-8") as log:
                log.write(f"{os.getpid()}\n")
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while len(ids) % 2:
                pass
            time.sleep(3600)
    return parity(completion_ids)
