"""The numbers of a run: one row per step, and totals that are a fold over the rows.

Pure: no I/O, and every time is passed in (monotonic seconds since the first lease). Because totals come from the rows
alone, a continued run that reads its metrics.jsonl back has the totals of the whole run, not of its last process.
Metric names are TRL's where TRL has one; see `batch_metrics` for rewards, lengths and the three kinds of staleness.

    learner idle    share of the wall time in which the train loop waited, for a batch or for the previous publish
    rollout idle    share of the servers' wall time in which their engine had nothing to decode: neither busy nor
                    paused for a weight swap; averaged over servers by the time each was seen
    seats empty     share of the servers' room that no sample had: 1 - occupancy

The first and the last are split by cause, in columns of seconds (of whole servers) that sum to the whole; seats that
were empty for want of a lease are split once more, by what kept the learner from leasing in that interval (idle.py).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from learner.batch import Batch, StepResult
from learner.batch_metrics import Row, completion_metrics, mean, reward_metrics, staleness_metrics
from learner.idle import EMPTY_SEATS, LearnerWaits, NotLeased, split
from learner.idle_watch import IdleSeconds
from protocol.messages import Group, ServerStatus

ETA_STEPS = 20
"""The time of a step, for the ETA, is the median of so many last ones."""

TIMINGS = {
    "wait_s": "perf/rollout_wait_s",
    "forward_backward_s": "perf/fwd_bwd_s",
    "wait_publish_s": "perf/weight_sync_s",
    "optimizer_s": "perf/optimizer_s",
    "canaries_s": "perf/canaries_s",
    "journal_s": "perf/journal_s",
}
SEAT_COLUMNS: Mapping[str, Callable[[ServerStatus], float]] = {
    "rollout/empty_lease_s": lambda status: status.idle_lease_s,
    "rollout/empty_engine_s": lambda status: status.idle_engine_s,
    "rollout/empty_rewards_s": lambda status: status.idle_rewards_s,
    "rollout/empty_no_weights_s": lambda status: status.idle_weights_s,
}
COUNTS = {"unaccounted": "groups_unaccounted", "slots_in_use": "slots_in_use", "slots_total": "slots_total"}
"""Counts that are no kind of group end or place; all others become groups/{name}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerView:
    """What the learner knows of a server now. Filled by the fleet."""

    name: str
    state: str
    """One word of the fleet: joining, healthy, suspect or draining."""
    policy_version: int | None
    """The version it is live at; None before the first."""
    samples_running: int
    room: int
    """Samples its engine decodes at once."""
    status: ServerStatus | None
    """Its last status; None before the first Ping."""
    connected_s: float
    """Seconds since its Hello."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalPoint:
    """An evaluation result, labelled with the versions that sampled it (one, for the first and the last of a run)."""

    step: int
    """policy_version when it was asked for."""
    reward: float
    """Mean over prompts and generations."""
    oldest: int
    """policy_version"""
    newest: int
    """policy_version"""

    @property
    def label(self) -> str:
        """`v10`, or `v9-11` when weights were swapped during the evaluation."""
        return f"v{self.oldest}" if self.oldest == self.newest else f"v{self.oldest}-{self.newest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """A run in one line; NaN is "no value"."""

    steps: int
    steps_skipped: int
    reward_first: float
    """Mean over the first min(5, steps / 4) steps (at least one)."""
    reward_last: float
    """Same over the last ones."""
    staleness_max: int
    """Of any group's oldest token."""
    staleness_mean: float
    """Over all tokens trained."""
    groups_trained: int
    tokens_trained: int
    """Tokens that had a place in a loss."""
    learner_idle_ratio: float
    rollout_idle_ratio: float
    learner_idle_s: Mapping[LearnerWaits, float]
    """Seconds in which the train loop waited, by cause."""
    empty_s: Mapping[str, float]
    """Seconds of whole servers in which seats were empty, by the causes of EMPTY_SEATS."""
    servers_s: float
    """Seconds of servers, each while it was seen."""
    wall_s: float
    """First lease to last step, without the time in which the learner was down."""


class ServerMeter:
    """What the engines did between two readings, from the differences of their counters."""

    def __init__(self) -> None:
        self._last: dict[str, ServerStatus] = {}

    def read(self, servers: Sequence[ServerView], interval_s: float) -> Row:
        """Reduce over servers, each by its own clock; NaN where none has reported since the last reading.

        `rollout/servers`, `rollout/room` (samples that all of them decode at once) and `rollout/kv_usage` (of the
        fullest cache) are of now; all others are of the time since then.

        A restarted server counts from its start. One that is seen for the first time and is older than the
        interval (it waited for this run) only sets its baseline.
        """
        observed_s = idle_s = paused_s = occupancy_s = tokens_per_s = 0.0
        empty_s = dict.fromkeys(SEAT_COLUMNS, 0.0)
        tokens = prompt_tokens = cached_tokens = restarts = 0
        usages = [server.status.kv_usage for server in servers if server.status is not None]
        kv_usages = [usage for usage in usages if usage > 0]  # 0 is an engine that does not know
        for server in servers:
            if (now := server.status) is None:
                continue
            before = self._last.get(server.name)
            self._last[server.name] = now
            if before is None:
                before = ServerStatus() if now.wall_s <= interval_s else now
            elif now.wall_s < before.wall_s:
                before = ServerStatus()
            wall_s = now.wall_s - before.wall_s
            if wall_s == 0:
                continue
            pause_s = now.paused_s - before.paused_s
            observed_s += wall_s
            idle_s += max(0.0, wall_s - (now.busy_s - before.busy_s) - pause_s)
            paused_s += pause_s
            occupancy_s += now.occupancy_s - before.occupancy_s
            for column, counter in SEAT_COLUMNS.items():
                empty_s[column] += counter(now) - counter(before)
            tokens += now.tokens_generated - before.tokens_generated
            tokens_per_s += (now.tokens_generated - before.tokens_generated) / wall_s
            prompt_tokens += now.prompt_tokens - before.prompt_tokens
            cached_tokens += now.cached_prompt_tokens - before.cached_prompt_tokens
            restarts += now.engine_restarts - before.engine_restarts
        return {
            "rollout/servers": len(servers),
            "rollout/room": sum(server.room for server in servers),
            "rollout/observed_s": observed_s,
            "rollout/idle_ratio": _ratio(idle_s, observed_s),
            "rollout/paused_ratio": _ratio(paused_s, observed_s),
            "rollout/occupancy": _ratio(occupancy_s, observed_s),
            "rollout/generation_tok_s": tokens_per_s if observed_s else math.nan,
            "rollout/tokens": tokens,
            "rollout/cached_prompt_ratio": _ratio(cached_tokens, prompt_tokens),
            "rollout/kv_usage": max(kv_usages, default=math.nan),
            "rollout/engine_restarts": restarts,
            **empty_s,
        }


class RunStats:
    """Makes the row of each step and keeps the totals. One per process, owned by the train loop."""

    def __init__(self) -> None:
        self._meter = ServerMeter()
        self._filtered: list[Group] = []
        self._rewards: list[float] = []
        self._intervals: deque[float] = deque(maxlen=ETA_STEPS)
        self._wall_offset_s = 0.0
        self._wall_s = 0.0
        self._steps_skipped = 0
        self._groups = 0
        self._tokens = 0
        self._staleness_max = 0
        self._hist: list[int] = []
        self._learner_idle_s = 0.0
        self._rollout_idle_s = 0.0
        self._rollout_observed_s = 0.0
        self._idle_s = dict.fromkeys(LearnerWaits, 0.0)
        self._empty_s = dict.fromkeys(EMPTY_SEATS, 0.0)

    def resume(self, rows: Iterable[Row]) -> None:
        """Take over the rows of the run so far (up to the step it continues from), before the first new one."""
        for row in rows:
            self._fold(row)
        self._wall_offset_s = self._wall_s
        self._intervals.clear()

    def begin(self, servers: Sequence[ServerView]) -> None:
        """Set the servers' baselines at the first lease: what they did before it is not this run's."""
        self._meter.read(servers, math.inf)

    def record_filtered(self, group: Group) -> None:
        """Count the rewards and lengths of a group that will not train in the next row.

        Without them `reward` would be that of groups with mixed results only, and hide what the policy learns.
        """
        self._filtered.append(group)

    def take_filtered(self) -> Sequence[Group]:
        """Hand over those counted since the last call."""
        taken, self._filtered = self._filtered, []
        return taken

    def record_step(
        self,
        batch: Batch,
        result: StepResult,
        *,
        filtered: Sequence[Group] = (),
        policy_version: int,
        learning_rate: float,
        timings: Mapping[str, float],
        idle: IdleSeconds,
        step_time_s: float,
        servers: Sequence[ServerView],
        counts: Mapping[str, int],
        wall_s: float,
    ) -> Row:
        """Return the row of a step, trained or (`result` not finite) skipped, and add it to the totals.

        Args:
            batch: what trained.
            result: its metrics go into the row under their own names.
            filtered: since the last step. Rewards and lengths are of these, too.
            policy_version: of the weights after the step.
            learning_rate: that of the step.
            timings: seconds by the keys of TIMINGS.
            idle: why each side stood still since the last row.
            step_time_s: of the whole iteration of the train loop.
            servers: all connected ones.
            counts: the ledger's, by its words, and unaccounted, slots_in_use, slots_total; invariants may add theirs.
            wall_s: since this process's first lease.
        """
        wall_s += self._wall_offset_s
        interval_s = wall_s - self._wall_s
        loss_tokens = result.loss_tokens if result.finite else 0
        meter = self._meter.read(servers, interval_s)
        leased_not_s = split(_number(meter, "rollout/empty_lease_s"), idle.leasing)
        groups = [*(train.group for train in batch.groups), *filtered]
        row: Row = {
            "step": batch.step,
            "policy_version": policy_version,
            "skipped": int(not result.finite),
            **reward_metrics(groups),
            **result.metrics,
            **staleness_metrics(batch),
            **completion_metrics(groups),
            "learning_rate": learning_rate,
            "num_tokens": self._tokens + loss_tokens,
            "step_tokens": loss_tokens,
            "step_groups": len(batch.groups) if result.finite else 0,
            "wall_s": wall_s,
            "step_time": step_time_s,
            **{name: timings[key] for key, name in TIMINGS.items()},
            "learner/idle_ratio": _ratio(sum(idle.learner.values()), interval_s),
            "learner/tokens_per_second": _ratio(loss_tokens, interval_s),
            **meter,
            **{f"learner/idle_{cause}_s": idle.learner.get(cause, 0.0) for cause in LearnerWaits},
            **{f"rollout/lease_{cause}_s": leased_not_s.get(cause, 0.0) for cause in NotLeased},
            **{COUNTS.get(key, f"groups/{key}"): count for key, count in counts.items()},
        }
        self._fold(row)
        return row

    @property
    def rewards(self) -> Sequence[float]:
        """Reward of every trained step, oldest first."""
        return self._rewards

    def eta_s(self, total_steps: int) -> float:
        """Estimate the seconds until `total_steps` have trained; NaN before the first step."""
        if not self._intervals:
            return math.nan
        return max(0, total_steps - len(self._rewards)) * statistics.median(self._intervals)

    def totals(self) -> Totals:
        """Reduce everything recorded so far."""
        steps = len(self._rewards)
        edge = max(1, min(5, steps // 4))
        tokens = sum(self._hist)
        return Totals(
            steps=steps,
            steps_skipped=self._steps_skipped,
            reward_first=_finite_mean(self._rewards[:edge]),
            reward_last=_finite_mean(self._rewards[-edge:]),
            staleness_max=self._staleness_max,
            staleness_mean=_ratio(sum(age * count for age, count in enumerate(self._hist)), tokens),
            groups_trained=self._groups,
            tokens_trained=self._tokens,
            learner_idle_ratio=_ratio(self._learner_idle_s, self._wall_s),
            rollout_idle_ratio=_ratio(self._rollout_idle_s, self._rollout_observed_s),
            learner_idle_s=dict(self._idle_s),
            empty_s=dict(self._empty_s),
            servers_s=self._rollout_observed_s,
            wall_s=self._wall_s,
        )

    def _fold(self, row: Row) -> None:
        """Add a row to the totals. Reads only what the row holds: rows of a file count like new ones."""
        interval_s = _number(row, "wall_s") - self._wall_s
        self._wall_s += interval_s
        if interval_s > 0:
            self._learner_idle_s += _number(row, "learner/idle_ratio") * interval_s
        if observed_s := _number(row, "rollout/observed_s"):
            self._rollout_observed_s += observed_s
            self._rollout_idle_s += _number(row, "rollout/idle_ratio") * observed_s
        for cause in LearnerWaits:
            self._idle_s[cause] += _number(row, f"learner/idle_{cause}_s")
        for column in EMPTY_SEATS:
            self._empty_s[column] += _number(row, column)
        if row["skipped"]:
            self._steps_skipped += 1
            return
        self._intervals.append(interval_s)
        self._rewards.append(_number(row, "reward"))
        self._groups += int(_number(row, "step_groups"))
        self._tokens += int(_number(row, "step_tokens"))
        self._staleness_max = max(self._staleness_max, int(_number(row, "staleness/max")))
        hist = row["staleness/hist"]
        assert isinstance(hist, list)
        self._hist += [0] * (len(hist) - len(self._hist))
        for staleness, count in enumerate(hist):
            self._hist[staleness] += count


def _number(row: Row, name: str) -> float:
    value = row[name]
    assert not isinstance(value, list)
    return value


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _finite_mean(values: Sequence[float]) -> float:
    return mean([value for value in values if math.isfinite(value)])
