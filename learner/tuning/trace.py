"""Length traces: how many tokens each completion of each group draws, made once and used in every mode.

    {"format": "headway lengths 1", "num_groups": 3600, "num_generations": 16, "made": {"seed": 1, ...}}\n
    int32[num_groups, num_generations], little-endian

One line of JSON, then raw numbers: `head -1 FILE` shows what it is, and whatever plays an engine can read it. Groups are
in order of their ordinal, completions of their index; after the last group comes the first again. Pure but for reading
and writing files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from protocol.errors import ConfigError
from protocol.messages import Int32

FORMAT = "headway lengths 1"
P99 = 2.3263478740408408
"""The 99th percentile of a standard normal variable."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Lengths of completions."""

    lengths: Int32
    """[num_groups, num_generations], each at least 1 token."""
    made: dict[str, Any] = field(default_factory=dict)
    """How: the arguments and the seed, or where it was recorded."""

    def group(self, ordinal: int, num_generations: int) -> Int32:
        """Return the lengths of a group, [num_generations].

        Where the trace has fewer completions a group, those are repeated: its tail is then that of the smaller group.
        """
        row_G: Int32 = self.lengths[ordinal % len(self.lengths)]
        return row_G[:num_generations] if num_generations <= row_G.size else np.resize(row_G, num_generations)

    @property
    def mean_length(self) -> float:
        """Tokens of a completion."""
        return float(self.lengths.mean(dtype=np.float64))


def lognormal_trace(
    *,
    num_groups: int,
    num_generations: int,
    median: float,
    p99_over_median: float,
    max_completion_length: int,
    seed: int,
) -> Trace:
    """Draw lengths from a lognormal distribution, cut at max_completion_length as an engine cuts them.

    Args:
        num_groups: rows.
        num_generations: completions of each.
        median: tokens, before the cut.
        p99_over_median: 99th percentile over the median, before the cut; 1 makes all lengths equal.
        max_completion_length: tokens.
        seed: of numpy's PCG64.
    """
    sigma = math.log(p99_over_median) / P99
    normal = np.random.Generator(np.random.PCG64(seed)).standard_normal((num_groups, num_generations))
    lengths = np.clip(np.rint(median * np.exp(sigma * normal)), 1, max_completion_length).astype(np.int32)
    made = {
        "distribution": "lognormal", "median": median, "p99_over_median": p99_over_median,
        "max_completion_length": max_completion_length, "seed": seed,
    }  # fmt: skip
    return Trace(lengths=lengths, made=made)


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace file; the same trace is the same bytes."""
    num_groups, num_generations = trace.lengths.shape
    header = {"format": FORMAT, "num_groups": num_groups, "num_generations": num_generations, "made": trace.made}
    path.write_bytes(msgspec.json.encode(header) + b"\n" + np.ascontiguousarray(trace.lengths, "<i4").tobytes())


def read_trace(path: Path) -> Trace:
    """Read a trace file.

    Raises:
        ConfigError: it is none, or not all of it is there.
    """
    try:
        head, _, body = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise ConfigError(f"trace {path}: {error.strerror}") from error
    try:
        header = msgspec.json.decode(head, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        header = {}
    if header.get("format") != FORMAT:
        raise ConfigError(f'trace {path}: its first line is no {{"format": "{FORMAT}", ...}}; --write-trace makes one')
    shape = (header["num_groups"], header["num_generations"])
    if len(body) != 4 * math.prod(shape):
        raise ConfigError(
            f"trace {path}: {len(body)} bytes of lengths, {shape[0]} groups of {shape[1]} are {4 * math.prod(shape)}"
        )
    lengths = np.frombuffer(body, "<i4").reshape(shape).astype(np.int32)
    if lengths.size == 0 or lengths.min() < 1:
        raise ConfigError(f"trace {path}: every length must be at least 1 token, and there must be one")
    return Trace(lengths=lengths, made=header["made"])
