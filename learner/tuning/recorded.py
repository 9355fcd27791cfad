"""A recorded run as the source: lengths from its journal, seconds from its metrics, the dial from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from learner.journal_records import GroupRecord
from learner.journal_segments import read_journal
from learner.rundir import CONFIG_FILE
from learner.trackers import JsonlTracker
from protocol.errors import ConfigError
from protocol.length_trace import LengthTrace
from protocol.messages import Purpose

LEAST_STEPS = 5
"""With fewer steps, costs per token cannot be told from costs per step."""
DIAL = ("prompts_per_step", "num_generations", "max_staleness", "reorder_window", "weight_sync_steps")


@dataclass(frozen=True, slots=True)
class Recording:
    """What was found."""

    lengths: LengthTrace
    words: dict[str, Any]
    """Of SimulateCommand: those that follow from the run."""


def recorded(run_dir: Path) -> Recording:
    """Read a run that has config.json, metrics.jsonl and journal/ in it.

    Raises:
        ConfigError: it is no run directory, or too short a run.
    """
    try:
        config = msgspec.json.decode((run_dir / CONFIG_FILE).read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ConfigError(f"{run_dir}: {error.strerror}: name a directory with config.json in it") from error
    rows: list[dict[str, Any]] = [row for row in JsonlTracker(run_dir / "metrics.jsonl").rows() if not row["skipped"]]
    if len(rows) < LEAST_STEPS:
        raise ConfigError(f"{run_dir} has {len(rows)} trained steps: costs need at least {LEAST_STEPS}; train on")
    if "rollout/room" not in rows[-1]:
        raise ConfigError(
            f"{run_dir}: its metrics do not say how many seats the servers have (rollout/room): an older headway"
            " recorded it; record some steps with this one"
        )
    return Recording(_lengths(run_dir, config), _costs(rows) | {key: config[key] for key in DIAL})


def _lengths(run_dir: Path, config: dict[str, Any]) -> LengthTrace:
    """The journal's groups in order of their ordinals."""
    groups = {
        record.group.ordinal: record.group.completion_lengths
        for record in read_journal(run_dir / "journal")
        if isinstance(record, GroupRecord) and record.group.purpose is Purpose.TRAIN
    }
    if not groups:
        raise ConfigError(f"{run_dir}/journal has no group left: give the lengths, --trace FILE")
    lengths = np.maximum(1, np.stack([groups[ordinal] for ordinal in sorted(groups)])).astype(np.int32)
    return LengthTrace(config["seed"], lengths, {"recorded_groups": float(len(groups))})


def _costs(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit training and decoding; medians of the rest."""
    tokens = np.array([row["step_tokens"] for row in rows], np.float64)
    seconds = np.array([row["perf/fwd_bwd_s"] + row["perf/optimizer_s"] for row in rows], np.float64)
    token_s, step_s = fit_line(tokens, seconds)
    seen = [
        row for row in rows if row["rollout/observed_s"] and row["rollout/generation_tok_s"] and row["rollout/room"]
    ]
    if not seen:
        raise ConfigError(
            "no server's heartbeat fell into a step: record a run with longer steps, or a shorter heartbeat_s"
        )
    servers = max(row["rollout/servers"] for row in seen)
    room = round(median(row["rollout/room"] / row["rollout/servers"] for row in seen))
    share = np.array([row["rollout/occupancy"] for row in seen], np.float64)
    busy = np.array([1 - row["rollout/idle_ratio"] - row["rollout/paused_ratio"] for row in seen], np.float64)
    rate = np.array([row["rollout/generation_tok_s"] for row in seen], np.float64) / servers
    # A server draws b tokens in t(b): t = b / rate, while it is busy.
    slope, base = fit_line(share, share * room * np.maximum(busy, 1e-9) / rate)
    if base == 0.0:  # occupancy hardly varied: nothing tells how a step depends on it
        base, slope = slope * float(share.mean()), 0.0
    pauses = [row["weights/pause_s"] for row in rows if "weights/pause_s" in row]
    return {
        "servers": servers,
        "room": room,
        "decode_token_s": base,
        "occupancy_cost": slope / base,
        "train_token_s": token_s,
        "train_step_s": step_s,
        "pause_s": median(pauses) if pauses else 0.0,
    }


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
