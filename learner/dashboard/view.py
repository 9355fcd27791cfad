"""Everything a screen shows, as plain frozen data: screens read this, never live objects.

The learner makes a `RunView` twice a second from what it has; the terminal today and a web page later render it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from learner.batch_metrics import Row
from learner.idle import EMPTY_SEATS, LEARNER_WAITS
from learner.stats import EvalPoint, ServerView
from protocol.waits import Waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """The last step. NaN is "no value"."""

    step: int = 0
    reward: float = math.nan
    step_time_s: float = math.nan
    staleness_mean: float = math.nan
    """Over the tokens that trained."""
    staleness_max: int = 0
    """Of the oldest token."""
    staleness_hist: Sequence[int] = ()
    """Tokens at staleness 0, 1, ..."""
    learner_busy: float = math.nan
    """0 to 1"""
    learner_tokens_per_s: float = math.nan
    rollout_busy: float = math.nan
    """0 to 1, mean over servers"""
    rollout_tokens_per_s: float = math.nan
    """Sum over servers."""
    learner_waits_for: str = ""
    """What the train loop waited for most; empty where it did not."""
    seats_empty_for: str = ""
    """Why seats stood empty, most of the time; empty where they did not."""
    generated_per_trained: float = math.nan

    @classmethod
    def of(cls, row: Row) -> Self:
        """Take what a screen needs out of a row of metrics.jsonl."""

        def number(name: str) -> float:
            value = row[name]
            assert not isinstance(value, list)
            return value

        hist = row["staleness/hist"]
        assert isinstance(hist, list)
        return cls(
            step=int(number("step")),
            reward=number("reward"),
            step_time_s=number("step_time"),
            staleness_mean=number("staleness/token_mean"),
            staleness_max=int(number("staleness/max")),
            staleness_hist=hist,
            learner_busy=1.0 - number("learner/idle_ratio"),
            learner_tokens_per_s=number("learner/tokens_per_second"),
            rollout_busy=1.0 - number("rollout/idle_ratio"),
            rollout_tokens_per_s=number("rollout/generation_tok_s"),
            learner_waits_for=_largest(
                {words[0]: number(f"learner/idle_{cause}_s") for cause, words in LEARNER_WAITS.items()}
            ),
            seats_empty_for=_largest({words[0]: number(column) for column, words in EMPTY_SEATS.items()}),
            generated_per_trained=number("cost/generated_per_trained"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """The run at one moment."""

    run_name: str
    address: str
    """Where servers connect."""
    total_steps: int
    max_staleness: int
    slots_total: int
    now_s: float
    """Of the clock that `waits` are on."""
    elapsed_s: float
    """Since the learner started."""
    phase: str = "training"
    """One or two words: starting, evaluating, training, finishing."""
    activity: str = ""
    """What the learner computes now (forward/backward, optimizer, ...); empty when it only waits."""
    last: StepView = StepView()
    rewards: Sequence[float] = ()
    """Of every trained step, oldest first."""
    evals: Sequence[EvalPoint] = ()
    eta_s: float = math.nan
    slots_in_use: int = 0
    in_flight: int = 0
    """Groups leased and not answered."""
    buffered: int = 0
    """Groups finished and not yet in a batch."""
    servers: Sequence[ServerView] = ()
    serverless_s: float = 0.0
    """Seconds since a server was last connected; counts from the start before the first."""
    waits: Sequence[Waiting] = ()
    """Of the learner, longest first."""
    notices: Sequence[str] = ()
    """Newest last."""
    loop_lag_ms: float = 0.0
    """p99 of the learner's event loop (I9)."""


def _largest(seconds: Mapping[str, float]) -> str:
    cause = max(seconds, key=lambda name: seconds[name])
    return cause if seconds[cause] > 0 else ""
