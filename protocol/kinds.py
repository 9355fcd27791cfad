"""What fields of messages are made of: array types, and closed sets of values."""

from __future__ import annotations

from enum import IntEnum, StrEnum

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]


class Purpose(StrEnum):
    """Why a group is generated. Eval leases hold no slot and their groups never train."""

    TRAIN = "train"
    EVAL = "eval"


class FinishReason(IntEnum):
    """Why a completion ended; one byte per completion on the wire."""

    STOP = 0
    """The engine sampled a stop token; it is the completion's last token, and it trains."""
    LENGTH = 1
    """max_completion_length was reached (a truncated completion)."""
    ABORT = 2
    """Cut by the server. Never trains."""


class RewardStatus(IntEnum):
    """How one reward function fared on one completion."""

    OK = 0
    TIMEOUT = 1
    ERROR = 2
    UNSCORED = 3
    """The function returned None: it does not apply to this row."""


class AckStatus(StrEnum):
    """What the learner did with a group."""

    OK = "ok"
    """Journaled: on disk (I7), the server may forget it."""
    DUPLICATE = "duplicate"
    STALE = "stale"
    """Sampled by orphaned weights, or too old to be trained inside the bound; its lease is given out again."""
    REFUSED = "refused"
    """Invalid (I6); its lease is given out again."""


class WeightsPath(StrEnum):
    """How a version's bytes came to a server."""

    NONE = "none"
    """They were there: its content is that of the version before."""
    SHARED = "shared"
    """Read out of the learner's own memory, on one host."""
    DENSE = "dense"
    """All of them, over the bulk plane."""
    DELTA = "delta"
    """What differs from a version that was there, over the bulk plane."""
