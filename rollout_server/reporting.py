"""What a server says of itself: gauges, counters, why its seats are empty, and what it waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol.messages import ServerStatus
from protocol.waits import Waiting, Waits
from rollout_server.seats import EmptyBecause, why_empty

if TYPE_CHECKING:
    from rollout_server.loops import Parts

ORDINARY = ("message", "report", "weights", "engine loss", "the end", "samples")
"""Waits that are the ordinary state of a server with nothing wrong."""


def going_on(waits: Waits) -> list[Waiting]:
    """Waits worth telling of, longest first."""
    return [waiting for waiting in waits.current() if waiting.name not in ORDINARY]


def settle_seats(parts: Parts) -> None:
    """Something happened that may change why seats are empty."""
    engine, book = parts.engine.status(), parts.book
    cause = why_empty(
        live=parts.engine.live is not None, samples_waiting=engine.samples_waiting,
        groups_in_flight=len(book.in_flight), groups_scoring=sum(map(book.wants, parts.scoring)),
    )  # fmt: skip
    parts.seats.settle(wall_s=parts.clock() - parts.started_s, occupancy_s=engine.occupancy_s, cause=cause)


def make_status(parts: Parts) -> ServerStatus:
    """Gauges and counters of this moment."""
    settle_seats(parts)
    engine, empty_s = parts.engine.status(), parts.seats.empty_s
    waiting, now_s = going_on(parts.waits), parts.waits.clock()
    return ServerStatus(
        samples_running=engine.samples_running,
        samples_waiting=engine.samples_waiting,
        groups_in_flight=len(parts.book.in_flight),
        groups_unacked=len(parts.book.unacked),
        groups_finished=parts.book.finished,
        tokens_generated=engine.tokens_generated,
        tokens_held=engine.tokens_held + sum(parts.scoring.values()),
        prompt_tokens=engine.prompt_tokens,
        cached_prompt_tokens=engine.cached_prompt_tokens,
        kv_usage=engine.kv_usage,
        engine_restarts=engine.restarts,
        wall_s=parts.clock() - parts.started_s,
        busy_s=engine.busy_s,
        paused_s=engine.paused_s,
        occupancy_s=engine.occupancy_s,
        idle_lease_s=empty_s[EmptyBecause.LEASE],
        idle_engine_s=empty_s[EmptyBecause.ENGINE],
        idle_rewards_s=empty_s[EmptyBecause.REWARDS],
        idle_weights_s=empty_s[EmptyBecause.WEIGHTS],
        reward_timeouts=parts.reward_timeouts,
        reward_errors=parts.reward_errors,
        malformed=parts.malformed,
        loop_lag_ms=parts.lag.p99_ms(),
        waiting_for=waiting[0].describe(now_s) if waiting else "",
    )
