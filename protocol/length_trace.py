"""Completion lengths in a file: what every run that plays it samples, group for group, whatever else differs.

One line of JSON (the trace's seed, its shape, how it was drawn), then [num_groups, num_generations] int32,
little-endian, row `ordinal` being a group's. The seed is that of the learner that plays it, too: a group is known to
an engine by its seed, which follows from the run's and the ordinal (identity.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from protocol.errors import ConfigError
from protocol.identity import group_seed
from protocol.messages import Int32

FORMAT = "headway lengths 1"


@dataclass(frozen=True, slots=True, eq=False)
class LengthTrace:
    """Lengths by ordinal."""

    seed: int
    """Of the draws, and of the learner that plays the trace."""
    lengths: Int32
    """[num_groups, num_generations] tokens, each at least 1."""
    origin: Mapping[str, float]
    """How they were drawn, for the reader of the file."""

    def by_group_seed(self) -> dict[int, Int32]:
        """Each group's row [num_generations] under the seed that its lease carries."""
        return {group_seed(self.seed, ordinal): row for ordinal, row in enumerate(self.lengths)}


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    seed: int
    num_groups: int
    num_generations: int
    origin: dict[str, float]


def write_length_trace(path: Path, trace: LengthTrace) -> None:
    """Write a trace; the same trace always makes the same bytes."""
    num_groups, num_generations = trace.lengths.shape
    header = _Header(FORMAT, trace.seed, num_groups, num_generations, dict(trace.origin))
    path.write_bytes(msgspec.json.encode(header) + b"\n" + trace.lengths.astype("<i4").tobytes())


def read_length_trace(path: Path) -> LengthTrace:
    """Read a trace back.

    Raises:
        ConfigError: there is no such file, or it is not a whole trace.
    """
    try:
        line, _, data = path.read_bytes().partition(b"\n")
        header = msgspec.json.decode(line, type=_Header)
        lengths = np.frombuffer(data, "<i4").reshape(header.num_groups, header.num_generations)
    except OSError as error:
        raise ConfigError(f"length trace {path}: {error.strerror}: give a file that exists") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(
            f"length trace {path}: {error}: expected one line of JSON, then num_groups x num_generations int32"
        ) from error
    if header.format != FORMAT or not lengths.size or lengths.min() < 1:
        shortest = int(lengths.min()) if lengths.size else "none"
        raise ConfigError(
            f"length trace {path}: format {header.format!r} and shortest length {shortest}: expected {FORMAT!r} and"
            " lengths of at least 1"
        )
    return LengthTrace(header.seed, lengths, header.origin)
