"""What a step gave, as the run recorded it and as a replay finds it, and where the two differ. Pure.

Recorded of a step: its rate and its micro-batches (journal), its metrics (metrics.jsonl), the digest of the weights
after it where they were published (weights/versions.jsonl), and every file of a checkpoint (its manifest). In this
order a difference is looked for, so that the first one said is the nearest to its cause.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

NEAR = 0.01
"""Relative: what is called equal where the bits cannot be (another device)."""
IGNORED = frozenset({"tokens_forwarded", "num_micro_batches"})
"""Metrics that say how the work was cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a step."""

    learning_rate: float
    num_micro_batches: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Those of the trainer."""
    weights: str = ""
    """`version_digest`; empty where nobody computed it."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Digests of a checkpoint's files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first thing of a step that is not the same."""

    step: int
    what: str
    """groups, order, learning rate, gradients, metrics, weights, or state (optimizer, reference, critic)."""
    text: str
    """The two values."""

    def __str__(self) -> str:
        """In a line."""
        return f"step {self.step}: {self.what}: {self.text}"


def difference(step: int, one: Outcome, other: Outcome, *, exact: bool, names: tuple[str, str]) -> Difference | None:
    """Return the first difference of two outcomes; what only one of them has is not compared.

    Args:
        step: which.
        one: of the run.
        other: of a replay, or of another run.
        exact: whether the bits must be the same; else metrics only have to be near, and digests are left alone.
        names: what to call the two.
    """

    def found(what: str, name: str, a: object, b: object) -> Difference:
        return Difference(step=step, what=what, text=f"{name} {a} {names[0]}, {b} {names[1]}".lstrip())

    if one.learning_rate != other.learning_rate:
        return found("learning rate", "", one.learning_rate, other.learning_rate)
    if exact and one.num_micro_batches != other.num_micro_batches:
        return found("micro-batches", "", one.num_micro_batches, other.num_micro_batches)
    ordered = sorted((one.metrics.keys() & other.metrics.keys()) - IGNORED, key=lambda key: (key != "grad_norm", key))
    for name in ordered:
        a, b = one.metrics[name], other.metrics[name]
        if not _same(a, b, exact=exact):
            return found("gradients" if name == "grad_norm" else "metrics", name, a, b)
    if not exact:
        return None
    if one.weights.partition(":")[0] == other.weights.partition(":")[0] and one.weights != other.weights:
        return found("weights", "digest", one.weights, other.weights)
    for name in sorted(one.files.keys() & other.files.keys(), key=lambda name: ("model" not in name, name)):
        if one.files[name] != other.files[name]:
            return found("weights" if "model" in name else "state", name, one.files[name][:12], other.files[name][:12])
    return None


def _same(a: float, b: float, *, exact: bool) -> bool:
    if math.isnan(a) or math.isnan(b):  # null in metrics.jsonl is NaN or an infinity
        return not (math.isfinite(a) or math.isfinite(b))
    return a == b if exact else math.isclose(a, b, rel_tol=NEAR, abs_tol=1e-6)
