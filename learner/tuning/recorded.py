"""A recorded run as the source: lengths from its journal, seconds from its metrics, the dial from its configuration."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from learner.journal_records import EndRecord, GroupRecord, IncarnationRecord, StepRecord
from learner.journal_segments import read_journal
from learner.ledger import End
from learner.rundir import CONFIG_FILE
from learner.trackers import JsonlTracker
from learner.tuning.fitting import Decoded, Fullness, fit_decoding
from learner.tuning.simulator import fullness
from learner.tuning.workload import Costs, Dial, Workload
from protocol.errors import ConfigError
from protocol.length_trace import LengthTrace
from protocol.messages import Group, Purpose

LEAST_STEPS = 5
"""With fewer steps, costs per token cannot be told from costs per step."""
MOST_SAMPLES = 30_000
"""Of a run's beginning that is simulated to see how full its seats were, and compared with what was recorded of it."""
ALWAYS_FULL = (
    "the run's seats were always equally full, so nothing tells what a decode step of fewer samples takes: it is taken"
    " to be as long. Some steps at another max_staleness would tell; or give --decode-token-s and --occupancy-cost"
)
ALWAYS_EVALUATED = (
    "servers sampled for evaluations in every step, too, which tells too much of what a decode step takes: a larger"
    " eval_steps, or none, would do"
)
NEEDED = ("rollout/room", "rollout/tokens")
"""Columns that a run of an older headway lacks."""
DIAL = ("prompts_per_step", "num_generations", "max_staleness", "reorder_window", "weight_sync_steps")


@dataclass(frozen=True, slots=True)
class Recording:
    """What was found."""

    lengths: LengthTrace
    words: dict[str, Any]
    """Of Forecasting: those that follow from the run."""
    notice: str = ""
    """What could not be told from it."""


def recorded(run_dir: Path) -> Recording:
    """Read a run that has config.json, metrics.jsonl and journal/ in it.

    Raises:
        ConfigError: it is no run directory, or too short a run.
    """
    try:
        config = msgspec.json.decode((run_dir / CONFIG_FILE).read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ConfigError(f"{run_dir}: {error.strerror}: name a directory with config.json in it") from error
    journaled = _journaled(run_dir, config)
    rows = _rows(run_dir, journaled.since)
    words: dict[str, Any] = {key: config[key] for key in (*DIAL, "heartbeat_s")} | _costs(rows)
    words |= {"reward_s": journaled.reward_s, "filtered_share": journaled.filtered_share}
    decoded, notice = _decoding(rows, journaled, words, eval_steps=config["eval_steps"])
    return Recording(journaled.lengths, words | decoded, notice)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Journaled:
    lengths: LengthTrace
    """Of the groups, in order of their ordinals."""
    reward_s: float
    """The usual one."""
    filtered_share: float
    """Of the groups that ended, in what is left of the journal."""
    since: int
    """policy_version from which on the run has had the dial that it has now."""


def _journaled(run_dir: Path, config: dict[str, Any]) -> _Journaled:
    """Read the journal.

    Raises:
        ConfigError: it holds no group.
        JournalError: it is of another version.
    """
    groups: dict[int, Group] = {}
    trained = filtered = since = 0
    turned = False  # to another dial, and not back yet
    for record in read_journal(run_dir / "journal"):
        match record:
            case GroupRecord(group=group) if (
                group.purpose is Purpose.TRAIN and group.num_generations == config["num_generations"]
            ):
                groups[group.ordinal] = group
            case StepRecord():
                trained += len(record.ordinals)
            case EndRecord(end=End.FILTERED) if record.sequence >= 0:  # else it was never leased
                filtered += 1
            case IncarnationRecord() if record.config:
                then = msgspec.json.decode(record.config, type=dict[str, Any])
                if any(then.get(key) != config[key] for key in DIAL):
                    turned = True
                elif turned:
                    since, turned = record.resumed_from, False
    if not groups:
        raise ConfigError(f"{run_dir}/journal has no group left: give the lengths, --trace FILE")
    lengths = np.stack([groups[ordinal].completion_lengths for ordinal in sorted(groups)])
    origin = {"recorded_groups": float(len(groups))}
    return _Journaled(
        lengths=LengthTrace(config["seed"], np.maximum(1, lengths).astype(np.int32), origin),
        reward_s=median(group.reward_s for group in groups.values()),
        filtered_share=filtered / max(1, trained + filtered),
        since=since,
    )


def _rows(run_dir: Path, since: int) -> list[dict[str, Any]]:
    """Read the trained steps from which something follows for the run as it is now.

    Raises:
        ConfigError: too few.
    """
    rows: list[dict[str, Any]] = [row for row in JsonlTracker(run_dir / "metrics.jsonl").rows() if not row["skipped"]]
    whole = [row for row in rows if all(column in row for column in NEEDED)]
    if rows and not whole:
        raise ConfigError(
            f"{run_dir}: its metrics have no {' or no '.join(NEEDED)}: an older headway recorded it; record some steps"
            " with this one"
        )
    rows = [row for row in whole if row["step"] > since and row["perf/fwd_bwd_s"]]  # what was replayed has no seconds
    if len(rows) < LEAST_STEPS:
        after = f" since its dial was changed after step {since}" if since else ""
        raise ConfigError(
            f"{run_dir} has {len(rows)} trained steps{after}: costs need at least {LEAST_STEPS}; train on"
        )
    return rows


def _costs(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit training; medians of the rest. The first of them is left out: a learner's first step warms up."""
    rows = rows[1:]
    tokens = np.array([row["step_tokens"] for row in rows], np.float64)
    seconds = [row["step_time"] - row["perf/rollout_wait_s"] - row["perf/weight_sync_s"] for row in rows]
    token_s, step_s = fit_line(tokens, np.array(seconds, np.float64))
    pauses = [row["weights/pause_s"] for row in rows if "weights/pause_s" in row]
    pause_s = median(pauses) if pauses else 0.0
    lives = [row["weights/live_s"] - row["perf/canaries_s"] for row in rows if "weights/live_s" in row]
    return {
        "train_token_s": token_s,
        "train_step_s": step_s,
        "pause_s": pause_s,
        "publish_s": max(0.0, median(lives) - pause_s) if lives else 0.0,
    }


def _decoding(
    rows: list[dict[str, Any]], journaled: _Journaled, words: dict[str, Any], *, eval_steps: int
) -> tuple[dict[str, Any], str]:
    """Servers, their room and what a decode step costs there; what could not be told."""
    depth = rows[0]["knobs/depth"]
    rows = list(itertools.takewhile(lambda row: row["knobs/depth"] == depth, rows))
    if len(rows) < LEAST_STEPS:
        raise ConfigError(
            f"the depth was moved from {depth:g} after {len(rows)} steps: costs need at least {LEAST_STEPS} at one"
            " depth; record them with staleness_control off"
        )
    seen = {
        int(row["step"]) - journaled.since: row for row in rows if row["rollout/observed_s"] and row["rollout/room"]
    }
    evaluated = {step - journaled.since for step in with_evaluations(rows, eval_steps)}
    dial = Dial(**{key: words[key] for key in DIAL})
    bounds = dial.bounds
    dial = replace(
        dial, max_staleness=int(depth) + bounds.window_steps, reorder_window=bounds.reorder_window
    )  # a knob may have lowered it
    most = max(LEAST_STEPS, MOST_SAMPLES // (dial.prompts_per_step * dial.num_generations))
    # Before the first of them, servers' counters had no beginning.
    first, last = min(seen, default=most), min(most, max(seen, default=0))
    if first >= last:
        raise ConfigError(
            "no server's heartbeat fell into a step: record a run with longer steps, or a shorter heartbeat_s"
        )
    steps = set(range(first, last + 1))
    disturbed = not seen.keys() & (steps - evaluated)
    steps -= set() if disturbed else evaluated
    window = [row for step, row in seen.items() if step in steps]
    servers = round(median(row["rollout/servers"] for row in window))
    room = round(median(row["rollout/room"] / row["rollout/servers"] for row in window))
    decoded = _decoded(window, room=room)
    costs = Costs(
        decode_token_s=0.0, occupancy_cost=0.0, train_token_s=words["train_token_s"],
        train_step_s=words["train_step_s"], reward_s=words["reward_s"], pause_s=words["pause_s"],
        publish_s=words["publish_s"],
    )  # fmt: skip

    def simulated(base_s: float, occupancy_cost: float) -> Fullness:
        """The beginning of this run, had a decode step cost that."""
        workload = Workload(
            trace=journaled.lengths, costs=replace(costs, decode_token_s=base_s, occupancy_cost=occupancy_cost),
            servers=servers, room=room, filtered_share=words["filtered_share"],
            heartbeat_s=words["heartbeat_s"],
        )  # fmt: skip
        return fullness(workload, dial, steps=steps)

    base_s, occupancy_cost, told = fit_decoding(decoded, room=room, simulated=simulated)
    return {
        "servers": servers, "room": room, "decode_token_s": base_s, "occupancy_cost": occupancy_cost,
    }, " ".join(["" if told else ALWAYS_FULL, ALWAYS_EVALUATED if disturbed else ""]).strip()  # fmt: skip


def with_evaluations(rows: list[dict[str, Any]], eval_steps: int) -> set[int]:
    """Find the steps in which servers may have sampled for an evaluation, too: the simulated run has none.

    Tokens count when their group is here; those of an evaluation were sampled since it was due.
    """
    before_after = itertools.pairwise([0, *(row.get("tokens/eval", 0) for row in rows)])
    arrived = [int(row["step"]) for row, (before, after) in zip(rows, before_after, strict=True) if after > before]
    due = [(step - 1) // eval_steps * eval_steps if eval_steps else step - 1 for step in arrived]
    return set().union(*(range(begun + 1, step + 1) for begun, step in zip(due, arrived, strict=True)))


def _decoded(rows: list[dict[str, Any]], *, room: int) -> Decoded:
    """Add up what the servers' engines did."""
    busy_s = seat_s = tokens = 0.0
    for row in rows:
        observed_s = row["rollout/observed_s"]
        busy_s += (1.0 - row["rollout/idle_ratio"] - row["rollout/paused_ratio"]) * observed_s
        seat_s += row["rollout/occupancy"] * room * observed_s
        tokens += row["rollout/tokens"]
    if not (busy_s > 0 and seat_s > 0 and tokens > 0):
        raise ConfigError(
            f"the servers say that they decoded {tokens:.0f} tokens in {busy_s:.3g} s, in {seat_s:.3g} seat-seconds:"
            " nothing can be fitted to that; give --decode-token-s and --occupancy-cost, and no RUN_DIR"
        )
    return Decoded(busy_s=busy_s, seat_s=seat_s, tokens=tokens)


def fit_line(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Fit y = slope x + base by least squares, neither below 0; where x hardly varies, through the origin.

    Returns:
        slope, base: at least one of them above 0.
    """
    if x.std() > 0.02 * x.mean():
        slope, base = np.polyfit(x, y, 1)
        if slope > 0 and base > 0:
            return float(slope), float(base)
        if slope <= 0:
            return 0.0, float(y.mean())
    return float(y.sum() / x.sum()), 0.0
