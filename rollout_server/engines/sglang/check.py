"""Whether an engine holds the weights it says it holds: the gate that every new version passes. Pure.

Two looks at the same thing from different sides. The checksum is of the bytes as the engine holds them: it must change
when the weights do, stay when they do not, and be the same in every engine of the same kind; so yesterday's weights are
caught, however little a step has moved them. The canaries are what the weights say: sequences scored by learner and
engine, whose logprobs must agree as well as they did at first; so swapped, zeroed or missing tensors are caught.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protocol.messages import Float32

TOLERANCE = 3.0
"""A version may differ from the learner by so many times what the first one did."""
NOISE = 1e-5
"""Mean difference in nats that fp32 arithmetic in another order makes; nothing below it is judged."""
FIRST_LIMIT = 0.2
"""Of the first version, which sets the measure: bfloat16 makes 0.01 to 0.02, a wrong tensor more than 1."""


class WeightsSuspect(Exception):
    """The engine does not hold the version it was given. The text says what gives it away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """How engine and learner differ over the canary tokens, d = learner's - engine's logprob."""

    kl: float
    """Mean of exp(d) - 1 - d: the k3 estimator (Schulman 2020, http://joschu.net/blog/kl-approx.html)."""
    mean: float
    """Mean of |d|, in nats."""


def compare(learner: Float32, engine: Float32) -> Mismatch:
    """Compare logprobs of the same tokens, of any equal shape. NaN on either side stays."""
    difference = learner.astype(np.float64) - engine
    with np.errstate(over="ignore"):
        return Mismatch(kl=float(np.mean(np.expm1(difference) - difference)), mean=float(np.mean(np.abs(difference))))


class Gate:
    """Judges one version after the other of one engine. It forgets nothing when the engine restarts.

    Args:
        kind: engines of one kind hold the same weights as the same bytes; no colon.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._first_mean: float | None = None
        self._last: tuple[str, str] | None = None
        """(content digest, checksum) of the last version that passed."""

    def check_bytes(self, digest: str, checksum: str, others: Sequence[str], *, exact: bool) -> str:
        """Judge the bytes the engine holds.

        Args:
            digest: of the version's content.
            checksum: what the engine says of its own.
            others: `kind:checksum` of other engines.
            exact: whether the engine keeps the weights in the dtype they come in. A cast may round a step away.

        Returns:
            `kind:checksum`.

        Raises:
            WeightsSuspect: they are not those of the version.
        """
        named = f"{self.kind}:{checksum}"
        if self._last is not None:
            last_digest, last_checksum = self._last
            if exact and digest != last_digest and checksum == last_checksum:
                raise WeightsSuspect(f"its checksum is still {checksum[:16]}, though the weights differ from the last")
            if digest == last_digest and checksum != last_checksum:
                raise WeightsSuspect(
                    f"its checksum is {checksum[:16]} where the same weights had {last_checksum[:16]} before"
                )
        for other in others:
            if other.partition(":")[0] == self.kind and other != named:
                raise WeightsSuspect(
                    f"its checksum is {checksum[:16]}, another engine of its kind has {other.partition(':')[2][:16]}"
                )
        return named

    def check_canaries(self, mismatch: Mismatch) -> None:
        """Judge what the weights say.

        Raises:
            WeightsSuspect: engine and learner differ more than they did at first.
        """
        limit = FIRST_LIMIT if self._first_mean is None else max(TOLERANCE * self._first_mean, NOISE)
        if not mismatch.mean <= limit:  # also when it is NaN
            measured = "" if self._first_mean is None else f" ({TOLERANCE:g} x {self._first_mean:.2g}, the first one's)"
            raise WeightsSuspect(
                f"its logprobs differ from the learner's by {mismatch.mean:.3g} nats a token on the canaries; allowed"
                f" are {limit:.3g}{measured}"
            )

    def passed(self, digest: str, checksum: str, mismatch: Mismatch | None) -> None:
        """Both looks were good: the next version is measured by this one."""
        self._last = (digest, checksum)
        self.measured(mismatch)

    def measured(self, mismatch: Mismatch | None) -> None:
        """Take the first mismatch for the measure of the others."""
        if mismatch is not None and self._first_mean is None:
            self._first_mean = mismatch.mean
