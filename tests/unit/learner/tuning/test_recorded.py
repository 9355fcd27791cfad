"""A recorded run as the source of a simulation: what is read out of it, and when there is too little."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from learner.__main__ import dispatch
from learner.tuning.recorded import DIAL, recorded
from protocol.errors import ConfigError
from tests.journals import group_record, use

ROOM = 10
CONFIG = {
    "prompts_per_step": 2, "num_generations": 4, "max_staleness": 1, "reorder_window": None, "weight_sync_steps": 1,
    "seed": 3,
}  # fmt: skip


def record_run(path: Path, *, steps: int = 8) -> None:
    """A run of two servers whose decode step takes 0.02 s (1 + b / 10), trained in 1 s and 0.01 s a token."""
    rows = []
    for step in range(steps):
        seats = 4 + step % 5
        rows.append({
            "skipped": 0, "step_tokens": 100 + 20 * step, "perf/fwd_bwd_s": 0.9 + 0.01 * (100 + 20 * step),
            "perf/optimizer_s": 0.1, "rollout/servers": 2, "rollout/room": 2 * ROOM,
            "rollout/observed_s": 2.0, "rollout/idle_ratio": 0.0,
            "rollout/paused_ratio": 0.0, "rollout/occupancy": seats / ROOM,
            "rollout/generation_tok_s": 2 * seats / (0.02 * (1 + seats / ROOM)), "weights/pause_s": 0.05,
        })  # fmt: skip
    (path / "journal").mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    async def write(journal):
        for ordinal in (1, 0):
            await journal.append(group_record(ordinal))

    use(path / "journal", write)


def test_costs_lengths_and_dial_are_those_of_the_run(tmp_path: Path):
    record_run(tmp_path)
    recording = recorded(tmp_path)
    assert {key: recording.words[key] for key in DIAL} == {key: CONFIG[key] for key in DIAL}
    costs = {key: recording.words[key] for key in recording.words if key not in DIAL}
    assert costs == pytest.approx(
        {
            "servers": 2, "room": ROOM, "decode_token_s": 0.02, "occupancy_cost": 1.0, "train_token_s": 0.01,
            "train_step_s": 1.0, "pause_s": 0.05,
        }
    )  # fmt: skip
    expected = [group_record(ordinal).group.completion_lengths for ordinal in (0, 1)]
    assert np.array_equal(recording.lengths.lengths, expected)


def test_a_run_is_simulated_and_flags_take_the_place_of_what_it_was_like(tmp_path, capsys):
    record_run(tmp_path)
    flags = ["--steps", "4", "--warmup-steps", "1", "--as-json"]
    assert dispatch(["simulate", str(tmp_path), *flags]) == 0
    as_it_was = json.loads(capsys.readouterr().out)
    assert dispatch(["simulate", str(tmp_path), *flags, "--train-step-s", "9"]) == 0
    slower = json.loads(capsys.readouterr().out)
    assert slower["step_s"] > as_it_was["step_s"] + 7


def test_a_run_too_short_to_tell_costs_from_is_refused(tmp_path):
    record_run(tmp_path, steps=4)
    with pytest.raises(ConfigError, match="has 4 trained steps: costs need at least 5"):
        recorded(tmp_path)


def test_a_line_that_a_living_run_is_writing_is_left_out(tmp_path):
    record_run(tmp_path)
    whole = recorded(tmp_path).words
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"skipped": 0, "step_tok')
    assert recorded(tmp_path).words == whole


def test_a_run_of_an_older_headway_which_did_not_record_its_seats_is_refused(tmp_path):
    record_run(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"rollout/room"', '"room"'))
    with pytest.raises(ConfigError, match=r"do not say how many seats the servers have \(rollout/room\)"):
        recorded(tmp_path)
