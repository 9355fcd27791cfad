"""A recorded run as the source: lengths from its journal, seconds from its metrics, the dial from its configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from learner.journal_records import GroupRecord
from learner.journal_segments import read_journal
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
    rows: list[dict[str, Any]] = [
        row
        for row in JsonlTracker(run_dir / "metrics.jsonl").rows()
        if not row["skipped"] and row["perf/fwd_bwd_s"]  # of a step that was replayed there are no seconds
    ]
    if len(rows) < LEAST_STEPS:
        raise ConfigError(f"{run_dir} has {len(rows)} trained steps: costs need at least {LEAST_STEPS}; train on")
    if missing := [column for column in ("rollout/room", "rollout/tokens") if column not in rows[-1]]:
        raise ConfigError(
            f"{run_dir}: its metrics have no {missing[0]}: an older headway recorded it; record some steps with this"
            " one"
        )
    lengths, reward_s = _journaled(run_dir, config)
    words: dict[str, Any] = {key: config[key] for key in (*DIAL, "heartbeat_s")} | _costs(rows) | {"reward_s": reward_s}
    decoded, notice = _decoding(rows, lengths, words)
    return Recording(lengths, words | decoded, notice)


def _journaled(run_dir: Path, config: dict[str, Any]) -> tuple[LengthTrace, float]:
    """Lengths of the journal's groups in order of their ordinals, and the usual seconds of their rewards."""
    groups: dict[int, Group] = {
        record.group.ordinal: record.group
        for record in read_journal(run_dir / "journal")
        if isinstance(record, GroupRecord) and record.group.purpose is Purpose.TRAIN
    }
    if not groups:
        raise ConfigError(f"{run_dir}/journal has no group left: give the lengths, --trace FILE")
    lengths = [groups[ordinal].completion_lengths for ordinal in sorted(groups)]
    trace = LengthTrace(
        config["seed"], np.maximum(1, np.stack(lengths)).astype(np.int32), {"recorded_groups": float(len(groups))}
    )
    return trace, median(group.reward_s for group in groups.values())


def _costs(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit training; medians of the rest."""
    tokens = np.array([row["step_tokens"] for row in rows], np.float64)
    seconds = [row["step_time"] - row["perf/rollout_wait_s"] - row["perf/weight_sync_s"] for row in rows]
    token_s, step_s = fit_line(tokens, np.array(seconds, np.float64))
    pauses = [row["weights/pause_s"] for row in rows if "weights/pause_s" in row]
    pause_s = median(pauses) if pauses else 0.0
    lives = [row["weights/live_s"] - row["perf/canaries_s"] for row in rows if "weights/live_s" in row]
    trained, filtered = sum(row["step_groups"] for row in rows), rows[-1]["groups/filtered"]
    filtered = max(0, filtered - rows[-1].get("groups/rows_too_long", 0))  # those were never leased
    return {
        "train_token_s": token_s,
        "train_step_s": step_s,
        "pause_s": pause_s,
        "publish_s": max(0.0, median(lives) - pause_s) if lives else 0.0,
        "filtered_share": filtered / (trained + filtered),
    }


def _decoding(rows: list[dict[str, Any]], lengths: LengthTrace, words: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Servers, their room and what a decode step costs there; what could not be told."""
    seen = [number for number, row in enumerate(rows, 1) if row["rollout/observed_s"] and row["rollout/room"]]
    dial = Dial(**{key: words[key] for key in DIAL})
    most = max(LEAST_STEPS, MOST_SAMPLES // (dial.prompts_per_step * dial.num_generations))
    if not seen or seen[0] >= min(most, len(rows)):
        raise ConfigError(
            "no server's heartbeat fell into a step: record a run with longer steps, or a shorter heartbeat_s"
        )
    first, last = seen[0] - 1, min(most, len(rows))  # before it, servers' counters had no beginning
    window = [row for row in rows[first:last] if row["rollout/observed_s"]]
    servers = round(median(row["rollout/servers"] for row in window))
    room = round(median(row["rollout/room"] / row["rollout/servers"] for row in window))
    decoded = _decoded(window, room=room)
    costs = Costs(
        decode_token_s=0.0, occupancy_cost=0.0, train_token_s=words["train_token_s"],
        train_step_s=words["train_step_s"], reward_s=words["reward_s"], pause_s=words["pause_s"],
        publish_s=words["publish_s"],
    )  # fmt: skip

    def simulated(base_s: float, occupancy_cost: float) -> Fullness:
        workload = Workload(
            trace=lengths, costs=replace(costs, decode_token_s=base_s, occupancy_cost=occupancy_cost),
            servers=servers, room=room, filtered_share=words["filtered_share"],
            heartbeat_s=words["heartbeat_s"],
        )  # fmt: skip
        return fullness(workload, dial, first=first, last=last)

    base_s, occupancy_cost, told = fit_decoding(decoded, room=room, simulated=simulated)
    return {
        "servers": servers, "room": room, "decode_token_s": base_s, "occupancy_cost": occupancy_cost,
    }, "" if told else ALWAYS_FULL  # fmt: skip


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
