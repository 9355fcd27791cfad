from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from learner.trackers import JsonlTracker, SampleWriter
from protocol.messages import FinishReason, RewardStatus
from protocol.versions import Version
from tests.factories import make_batch, make_train_group


def decode(tokens) -> str:
    return " ".join(str(token) for token in tokens)


def read_samples(directory: Path, step: int) -> list[dict]:
    return [msgspec.json.decode(line) for line in (directory / f"step_{step:06d}.jsonl").read_bytes().splitlines()]


def test_rows_come_back_as_they_were(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log({"step": 1, "reward": 0.5, "staleness/hist": [3, 1]})
    tracker.log({"step": 2, "reward": math.nan, "staleness/hist": []})
    first, second = tracker.rows()
    assert first == {"step": 1, "reward": 0.5, "staleness/hist": [3, 1]}
    assert second["step"] == 2
    assert math.isnan(second["reward"])


def test_no_value_is_null_in_the_file(tmp_path):
    """NaN is no JSON: jq, duckdb and JavaScript refuse a file that has it."""
    path = tmp_path / "metrics.jsonl"
    JsonlTracker(path).log({"reward": math.nan, "loss": math.inf})
    assert path.read_text() == '{"reward":null,"loss":null}\n'


def test_each_row_is_readable_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in range(1, 4):
        tracker.log({"step": step})
        assert path.read_bytes().count(b"\n") == step


def test_no_file_is_no_rows(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.truncate_after(3)
    assert tracker.rows() == []
    assert list(tmp_path.iterdir()) == []


def test_continuing_cuts_the_steps_that_will_train_again(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3, 3, 4):  # 3 was skipped once
        tracker.log({"step": step})
    tracker.truncate_after(3)
    assert [row["step"] for row in tracker.rows()] == [1, 2, 3, 3]
    tracker.log({"step": 4})
    assert [row["step"] for row in tracker.rows()] == [1, 2, 3, 3, 4]


def test_a_torn_last_line_goes_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"step": 1})
    with path.open("ab") as file:
        file.write(b'{"step":2,"rew')
    assert [row["step"] for row in tracker.rows()] == [1]
    tracker.truncate_after(9)
    tracker.log({"step": 2})
    assert [row["step"] for row in tracker.rows()] == [1, 2]


def test_cutting_everything_leaves_an_empty_file(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log({"step": 1})
    tracker.truncate_after(0)
    assert tracker.rows() == []


def test_a_sample_says_what_was_sampled_and_who_judged_it(tmp_path):
    train = make_train_group(
        ordinal=7,
        prompt="2 + 3 =",
        rewards=[1.5, None],
        functions={"math": [1.0, RewardStatus.TIMEOUT], "format": [0.5, RewardStatus.UNSCORED]},
        spans=[[(Version(1, 2), 2), (Version(1, 4), 1)], [(Version(1, 4), 4)]],
        finish_reasons=[FinishReason.STOP, FinishReason.LENGTH],
    )
    SampleWriter(tmp_path / "samples", 8, decode).write(make_batch(step=5, groups=[train]), advantages=[(0.7, 0.0)])
    first, second = read_samples(tmp_path / "samples", 5)
    assert first == {
        "step": 5,
        "ordinal": 7,
        "completion_index": 0,
        "prompt": "2 + 3 =",
        "completion": decode(train.group.completion_tokens[:3]),
        "reward": 1.5,
        "rewards": {"math": {"value": 1.0, "status": "ok"}, "format": {"value": 0.5, "status": "ok"}},
        "step_rewards": None,
        "finish_reason": "stop",
        "num_tokens": 3,
        "versions": [["1.2", 2], ["1.4", 1]],
        "staleness": 2,
        "advantage": pytest.approx(0.7),
    }
    assert second["reward"] is None
    assert second["rewards"]["math"] == {"value": 0.0, "status": "timeout"}
    assert second["finish_reason"] == "length"
    assert second["staleness"] == 0


def test_samples_say_what_each_step_earned(tmp_path):
    steps = np.array([np.nan, 0.5, 0.0, np.nan, np.nan, np.nan, np.nan, 1.0], np.float32)
    train = make_train_group(rewards=[0.5, None, 1.0], lengths=[3, 3, 2], step_rewards=steps)
    SampleWriter(tmp_path, 3, decode).write(make_batch(step=1, groups=[train]))
    assert [row["step_rewards"] for row in read_samples(tmp_path, 1)] == [[[1, 0.5], [2, 0.0]], [], [[1, 1.0]]]


def test_samples_are_spread_over_the_groups(tmp_path):
    groups = [make_train_group(ordinal=i, rewards=[1, 0, 1]) for i in range(3)]
    SampleWriter(tmp_path, 5, decode).write(make_batch(step=1, groups=groups))
    picked = [(row["ordinal"], row["completion_index"]) for row in read_samples(tmp_path, 1)]
    assert picked == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_a_limit_above_what_there_is_writes_everything(tmp_path):
    groups = [make_train_group(ordinal=i, rewards=[1, 0]) for i in range(2)]
    SampleWriter(tmp_path, 1000, decode).write(make_batch(step=1, groups=groups))
    assert len(read_samples(tmp_path, 1)) == 4


def test_no_limit_writes_nothing(tmp_path):
    SampleWriter(tmp_path / "samples", 0, decode).write(make_batch())
    assert not (tmp_path / "samples").exists()


def test_text_of_the_model_stays_inside_its_line(tmp_path):
    hostile = 'line one\nline two\r\x1b[2J\x00 "quoted" \\ end'
    SampleWriter(tmp_path, 1, lambda _: hostile).write(make_batch())
    lines = (tmp_path / "step_000001.jsonl").read_bytes().splitlines()
    assert len(lines) == 1
    assert b"\x1b" not in lines[0]
    assert msgspec.json.decode(lines[0])["completion"] == hostile


def test_an_empty_completion_has_no_staleness(tmp_path):
    train = make_train_group(rewards=[1, 0], spans=[[], []], finish_reasons=[FinishReason.LENGTH] * 2)
    SampleWriter(tmp_path, 2, decode).write(make_batch(groups=[train]))
    assert [row["staleness"] for row in read_samples(tmp_path, 1)] == [None, None]


def test_continuing_removes_the_samples_of_steps_that_will_train_again(tmp_path):
    writer = SampleWriter(tmp_path / "samples", 1, decode)
    writer.truncate_after(0)
    for step in (9, 10, 11):
        writer.write(make_batch(step=step))
    writer.truncate_after(9)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_000009.jsonl"]
