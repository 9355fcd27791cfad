"""Which elements a version changes: whether they can be, and how many they are. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from protocol.versions import Version
from rollout_server.engines.base import EngineFailure, Positions, StagedWeights

Changes = Mapping[str, Positions]
NAMES_SHOWN = 3


def changes_to(weights: StagedWeights, live: Version | None) -> Changes | None:
    """What makes `weights` of the version that is live; None where everything must be loaded."""
    return weights.changes if live is not None and weights.base == live else None


def check_changes(file: str, changes: Changes, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check positions against the model, before anything is written to one of them.

    Args:
        file: name of the version's file, for the text of a refusal.
        changes: by published name.
        shapes: of the model's tensors, by published name.

    Raises:
        EngineFailure: a name is not the model's, or positions are not ascending within its tensor; names the first few.
    """
    wrong = [why for name, positions in changes.items() if (why := _wrong(name, positions, shapes.get(name)))]
    if wrong:
        more = f" and {len(wrong) - NAMES_SHOWN} more" if len(wrong) > NAMES_SHOWN else ""
        raise EngineFailure(f"changes of {file} do not fit the model: {'; '.join(wrong[:NAMES_SHOWN])}{more}")


def share_of(changes: Changes, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Return the share of the model's elements that change, 0 to 1."""
    return sum(map(len, changes.values())) / sum(map(math.prod, shapes.values()))


def _wrong(name: str, positions: Positions, shape: tuple[int, ...] | None) -> str:
    """Say what is wrong with a tensor's positions; empty when nothing is."""
    if shape is None:
        return f"{name} is not in the model"
    if positions.dtype != np.int64 or positions.ndim != 1:
        return f"{name} has positions that are {positions.dtype} {list(positions.shape)}, expected int64 [n]"
    if not len(positions):
        return ""
    first, last, size = int(positions[0]), int(positions[-1]), math.prod(shape)
    if (np.diff(positions) <= 0).any():
        return f"{name} has positions that do not ascend"
    if first < 0 or last >= size:
        return f"{name} has positions {first} to {last}, allowed are 0 to {size - 1}"
    return ""
