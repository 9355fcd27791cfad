"""What a simulated run did: the reduction of its steps, and how it is shown. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One trained step, as the train loop saw it."""

    policy_version: int
    """After it."""
    ended_s: float
    waited_s: float
    """For its batch and for the previous publish."""
    trained_s: float
    tokens: int
    staleness: tuple[int, ...]
    """Of each group, by its oldest token."""
    tokens_by_staleness: Counter[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A run without its warm-up."""

    steps: int
    step_s: float
    """Mean seconds from step to step."""
    trained_tokens_s: float
    learner_idle: float
    """Share of the time in which the train loop waited."""
    rollout_idle: float
    """Share of the seat-seconds that nobody took."""
    rollout_paused: float
    """Share of the time in which a server stood still for new weights (its seats stay taken)."""
    training_s: float
    """Seconds a step of training."""
    generation_s: float
    """Seconds a step that the servers need for the trained tokens with all seats taken, prefills included."""
    staleness_mean: float
    """Over tokens."""
    staleness_group_mean: float
    """Over groups, each by its oldest token."""
    staleness_max: int
    staleness_hist: tuple[int, ...]
    """Tokens at staleness 0, 1, ..."""
    violations: int
    """Groups older than max_staleness: 0, or headway is wrong."""
    unaccounted: int
    """I3 at the end: 0, or headway is wrong."""
    length_ratio: float
    """Mean length of what trained over that of what was leased: 1 where nothing is dropped, but for the run's end."""
    server_share: tuple[float, float]
    """Least and most groups of a server, over an even share."""
    simulated_s: float
    """Virtual seconds of the whole run."""

    @property
    def roofline_s(self) -> float:
        """Seconds a step: the longer of all training and all tokens at full seats."""
        return max(self.training_s, self.generation_s)

    @property
    def roofline(self) -> float:
        """Share of the roofline reached."""
        return self.roofline_s / self.step_s

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"roofline_s": self.roofline_s, "roofline": self.roofline}


def reduce_steps(
    steps: Sequence[Step],
    *,
    since_s: float,
    seat_s: float,
    paused_s: float,
    seats: int,
    servers: int,
    full_seats_s: float,
    max_staleness: int,
    unaccounted: int,
    length_ratio: float,
    groups_by_server: Sequence[int],
) -> Forecast:
    """Reduce the steps after the warm-up.

    Args:
        steps: those after the warm-up.
        since_s: when the last step of the warm-up ended.
        seat_s: seat-seconds taken since then.
        paused_s: server-seconds paused since then.
        seats: of all servers.
        servers: how many.
        full_seats_s: seconds that all servers need for the trained tokens at full seats.
        max_staleness: the bound.
        unaccounted: of the ledger, at the end.
        length_ratio: see Forecast.
        groups_by_server: groups that each server answered.
    """
    elapsed_s = steps[-1].ended_s - since_s
    by_staleness: Counter[int] = Counter()
    for step in steps:
        by_staleness += step.tokens_by_staleness
    ages = [age for step in steps for age in step.staleness]
    tokens = sum(step.tokens for step in steps)
    share = sum(groups_by_server) / servers
    return Forecast(
        steps=len(steps),
        step_s=elapsed_s / len(steps),
        trained_tokens_s=tokens / elapsed_s,
        learner_idle=sum(step.waited_s for step in steps) / elapsed_s,
        rollout_idle=1.0 - seat_s / (seats * elapsed_s),
        rollout_paused=paused_s / (servers * elapsed_s),
        training_s=sum(step.trained_s for step in steps) / len(steps),
        generation_s=full_seats_s / len(steps),
        staleness_mean=sum(age * count for age, count in by_staleness.items()) / tokens,
        staleness_group_mean=sum(ages) / len(ages),
        staleness_max=max(ages),
        staleness_hist=tuple(by_staleness[age] for age in range(max(ages) + 1)),
        violations=sum(age > max_staleness for age in ages),
        unaccounted=unaccounted,
        length_ratio=length_ratio,
        server_share=(min(groups_by_server) / share, max(groups_by_server) / share),
        simulated_s=steps[-1].ended_s,
    )
