"""What it costs to push a version over one link, whole or as its difference, and which of the two is sooner there.

Pure arithmetic on measured speeds. On one host both ends map the same memory, nothing is transferred, and the whole
version always wins; on a slow link the difference does, as long as few elements changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Literal, Self

_LEARNING: Final = 0.3
"""Weight of the newest observation in an exponential mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What the ways to push a version cost, in seconds per unit; learns from pushes that ended.

    The first guesses are of one thread of a busy machine.
    """

    compare_s_per_byte: float = 1 / 3e9
    """Encoding, per byte of the model."""
    encode_s_per_change: float = 45e-9
    """Encoding, besides, per changed element."""
    apply_s_per_change: float = 12e-9
    """Decoding and applying, per changed element."""
    hash_s_per_byte: float = 1 / 6e9
    """Verifying, per byte of the model, at the receiver."""
    value_bytes: float = 0.3
    """Of a part, per changed element, besides what the positions take."""

    def encode_s(self, dense_bytes: int, num_changed: float) -> float:
        """Return the seconds that encoding is expected to take."""
        return dense_bytes * self.compare_s_per_byte + num_changed * self.encode_s_per_change

    def delta_bytes(self, num_elements: int, num_changed: float) -> float:
        """Return the bytes that parts with so many changed elements are expected to have: the positions' entropy."""
        share = num_changed / num_elements if num_elements else 0.0
        if share in (0.0, 1.0):
            return num_changed * self.value_bytes
        bits = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
        return num_elements * bits / 8 + num_changed * self.value_bytes

    def after_encoding(
        self, *, dense_bytes: int, num_elements: int, num_changed: int, delta_bytes: int, s: float
    ) -> Self:
        """Return the costs with what one encoding took.

        Each of the two costs of encoding moves by its share in what was expected: a push with few changes says how
        long comparing takes, and little about the rest.
        """
        expected_s = self.encode_s(dense_bytes, num_changed)
        comparing = dense_bytes * self.compare_s_per_byte / expected_s
        slower = _drift(s / expected_s)
        places = self.delta_bytes(num_elements, num_changed) - num_changed * self.value_bytes
        seen = max(0.0, delta_bytes - places) / max(1, num_changed)
        return replace(
            self,
            compare_s_per_byte=self.compare_s_per_byte * slower**comparing,
            encode_s_per_change=self.encode_s_per_change * slower ** (1 - comparing),
            value_bytes=self.value_bytes + _LEARNING * (seen - self.value_bytes),
        )

    def after_applying(self, *, num_changed: int, s: float) -> Self:
        """Return the costs with what decoding and applying one push's parts took."""
        slower = _drift(s / (max(1, num_changed) * self.apply_s_per_change))
        return replace(self, apply_s_per_change=self.apply_s_per_change * slower)

    def after_hashing(self, *, num_bytes: int, s: float) -> Self:
        """Return the costs with what one verification took."""
        return replace(self, hash_s_per_byte=self.hash_s_per_byte * _drift(s / (num_bytes * self.hash_s_per_byte)))


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """How fast one link brings bytes; infinitely fast where both ends map the same memory."""

    bytes_per_s: float

    def after_transfer(self, num_bytes: int, s: float) -> Self:
        """Return the speed with what one transfer took."""
        if math.isinf(self.bytes_per_s):
            return self
        return replace(self, bytes_per_s=self.bytes_per_s * _drift(num_bytes / s / self.bytes_per_s))


NETWORK: Final = LinkSpeed(125e6)
"""1 Gbit/s: what a link to another host is taken for until it has been seen."""
TELLING_BYTES: Final = 256 << 10
"""Transfers of fewer bytes measure round trips."""


def choose(
    *,
    dense_bytes: int,
    num_elements: int,
    num_changed: float,
    link: LinkSpeed,
    costs: Costs,
    delta_bytes: int | None = None,
) -> Literal["delta", "dense"]:
    """Say which is sooner verified at the other end of the link: the parts of what changed, or all bytes.

    With `num_changed` 0 it says whether a delta could pay at all: if not, there is nothing to estimate.

    Args:
        dense_bytes: Of all tensors.
        num_elements: Of all tensors.
        num_changed: How many differ, counted or estimated.
        link: To the receiver.
        costs: What this learner and its receivers take.
        delta_bytes: Of the parts, where they are encoded already; None: they have yet to be.
    """
    verify_s = dense_bytes * costs.hash_s_per_byte
    dense_s = dense_bytes / link.bytes_per_s + verify_s
    encode_s = costs.encode_s(dense_bytes, num_changed) if delta_bytes is None else 0.0
    wire_bytes = costs.delta_bytes(num_elements, num_changed) if delta_bytes is None else delta_bytes
    apply_s = num_changed * costs.apply_s_per_change
    return "delta" if encode_s + wire_bytes / link.bytes_per_s + apply_s + verify_s < dense_s else "dense"


def _drift(ratio: float) -> float:
    """Return the factor by which a figure moves that was just seen as `ratio` times what it was taken for.

    An exponential mean of the logarithm: twice as slow and twice as fast weigh the same, and one odd push, of which at
    most a factor of 1000 is believed, moves little.
    """
    return math.exp(_LEARNING * math.log(min(max(ratio, 1e-3), 1e3)))
