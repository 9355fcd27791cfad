"""What a run leaves behind step by step: metrics.jsonl and samples/. Files only: numbers come from `stats`.

Both are written for people and for pandas; neither takes part in recovery, so lines are flushed, not synced, and a
line torn by a crash is dropped when the run continues. Steps that a continued run will train again are cut first:
one step has one line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from learner.batch import Batch, TrainGroup
from learner.batch_metrics import Row
from learner.durable import write_atomic
from protocol.completions import Completion, unpack_completions
from protocol.messages import Group, Int32, RewardStatus


class JsonlTracker:
    """metrics.jsonl: one row per line, NaN and infinity as null."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, row: Row) -> None:
        """Append a row.

        Raises:
            OSError: the disk refused.
        """
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")

    def rows(self) -> list[Row]:
        """Read all whole rows back, null as NaN; none when there is no file yet."""
        if not self._path.exists():
            return []
        return [_row(line) for line in _whole_lines(self._path)]

    def truncate_after(self, step: int) -> None:
        """Cut what follows the last line of `step`: the run continues from there. A torn last line goes too."""
        if not self._path.exists():
            return
        kept: list[bytes] = []
        for line in _whole_lines(self._path):
            if msgspec.json.decode(line)["step"] > step:
                break
            kept.append(line)
        write_atomic(self._path, b"".join(kept))


class SampleWriter:
    """samples/step_000010.jsonl: some completions of each step, with everything that judged them."""

    def __init__(self, directory: Path, limit: int, decode: Callable[[Int32], str]) -> None:
        """Args: `limit`: completions per step, 0 is off. `decode`: token ids to text, special tokens included."""
        self._directory = directory
        self._limit = limit
        self._decode = decode

    def write(self, batch: Batch, *, advantages: Sequence[Sequence[float]] | None = None) -> None:
        """Write up to `limit` completions, spread over the groups: the first of each, then the second of each, ...

        Args:
            batch: the step's groups, in order.
            advantages: per group [N], when the trainer kept them.

        Raises:
            OSError: the disk refused.
        """
        if not self._limit:
            return
        rows: list[dict[str, Any]] = []
        for place, train in enumerate(batch.groups):
            num_picked = len(range(place, self._limit, len(batch.groups)))
            advantage_N = None if advantages is None else advantages[place]
            for i, completion in zip(range(num_picked), unpack_completions(train.group), strict=False):
                row = self._row(train, i, completion, batch.step - 1)
                row["advantage"] = None if advantage_N is None else advantage_N[i]
                rows.append(row)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._path(batch.step).write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))

    def truncate_after(self, step: int) -> None:
        """Remove the files of later steps."""
        for path in self._directory.glob("step_*.jsonl"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def _row(self, train: TrainGroup, i: int, completion: Completion, policy_version: int) -> dict[str, Any]:
        group, oldest = train.group, completion.oldest
        return {
            "step": policy_version + 1,
            "ordinal": train.ordinal,
            "completion_index": int(group.completion_index[i]),
            "prompt": train.prompt,
            "completion": self._decode(completion.completion_tokens),
            "reward": float(group.rewards[i]) if group.scored[i] else None,
            "step_rewards": _steps(group, i),
            "rewards": {
                name: {
                    "value": float(group.reward_values[i, f]),
                    "status": RewardStatus(group.reward_statuses[i, f]).name.lower(),
                }
                for f, name in enumerate(group.reward_names)
            },
            "finish_reason": completion.finish_reason.name.lower(),
            "num_tokens": len(completion.completion_tokens),
            "versions": [[str(version), length] for version, length in completion.spans],
            "staleness": None if oldest is None else policy_version - oldest.policy_version,
        }

    def _path(self, step: int) -> Path:
        return self._directory / f"step_{step:06d}.jsonl"


def _steps(group: Group, i: int) -> list[tuple[int, float]] | None:
    """Say with which tokens the steps of a completion end, and what each earned; None where nobody judged steps."""
    if group.step_rewards is None:
        return None
    end = int(group.completion_lengths[: i + 1].sum())
    rewards = group.step_rewards[end - int(group.completion_lengths[i]) : end]
    return [(token, float(rewards[token])) for token in np.flatnonzero(~np.isnan(rewards)).tolist()]


def _whole_lines(path: Path) -> list[bytes]:
    """Lines with their line ends; a last one without is torn and left out."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _row(line: bytes) -> Row:
    return {key: math.nan if value is None else value for key, value in msgspec.json.decode(line).items()}
