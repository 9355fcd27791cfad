"""A recorded run as the source of a simulation: what is read out of it, and when there is too little."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from learner.__main__ import dispatch
from learner.journal_records import IncarnationRecord
from learner.tuning.forecast import Step
from learner.tuning.recorded import DIAL, recorded
from learner.tuning.simulator import Simulation, simulate
from learner.tuning.trace import lognormal_trace
from learner.tuning.workload import Costs, Dial, Workload
from protocol.errors import ConfigError
from tests.journals import end, group_record, use
from tests.journals import step as journaled_step

WORDS = {
    "prompts_per_step": 2,
    "num_generations": 4,
    "max_staleness": 0,
    "reorder_window": None,
    "weight_sync_steps": 1,
}
CONFIG = WORDS | {"seed": 3, "heartbeat_s": 0.5, "eval_steps": 5}
COSTS = Costs(
    decode_token_s=0.02, occupancy_cost=1.0, train_token_s=0.01, train_step_s=1.0, pause_s=0.05, publish_s=0.2,
    reward_s=0.3,
)  # fmt: skip
WORKLOAD = Workload(
    trace=lognormal_trace(
        num_groups=40, num_generations=4, median=20, p99_over_p50=5, max_completion_length=90, seed=3
    ),
    costs=COSTS, servers=2, room=10, heartbeat_s=0.5,
)  # fmt: skip


def record_run(path: Path, *, steps: int = 8, workload: Workload = WORKLOAD, first_step: int = 0, **dial: int) -> None:
    """A run as a learner would have recorded it, played by the simulator; one that is there goes on."""
    rows: list[dict[str, float]] = []
    before = [0.0] * 5
    filtered = 0

    def note(simulation: Simulation, step: Step) -> None:
        """What the metrics say of a step, from what the engines have done so far."""
        nonlocal before, filtered
        for server in simulation.servers:
            server.advance()
        engines, base_s, now_s = [s.engine for s in simulation.servers], COSTS.decode_token_s, step.ended_s
        each_s = base_s * COSTS.occupancy_cost / workload.room
        decode_s = sum(base_s * e.decode_steps + each_s * e.drawn for e in engines)
        now = [
            now_s, decode_s, sum(e.paused_s for e in engines), sum(e.seat_s for e in engines),
            sum(e.drawn for e in engines),
        ]  # fmt: skip
        filtered = simulation.coordinator.ledger.ends["filtered"]
        seconds, busy_s, paused_s, seat_s, drawn = [new - old for new, old in zip(now, before, strict=True)]
        before, observed_s = now, 2 * seconds
        rows.append({
            "step": first_step + step.policy_version, "skipped": 0, "knobs/depth": simulation.bounds.steps_ahead,
            "step_tokens": step.tokens, "step_groups": 2, "step_time": step.waited_s + step.trained_s,
            "perf/fwd_bwd_s": step.trained_s, "perf/rollout_wait_s": step.waited_s, "perf/weight_sync_s": 0.0,
            "perf/canaries_s": 0.1,
            "rollout/servers": 2, "rollout/room": 2 * workload.room, "rollout/observed_s": observed_s,
            "rollout/idle_ratio": 1 - (busy_s + paused_s) / observed_s, "rollout/paused_ratio": paused_s / observed_s,
            "rollout/occupancy": seat_s / workload.room / observed_s, "rollout/tokens": drawn,
            "weights/pause_s": 0.05, "weights/live_s": 0.35,
        })  # fmt: skip

    words = WORDS | dial
    simulate(workload, Dial(**words), steps=steps, warmup_steps=0, each_step=note)
    config = json.dumps(CONFIG | words)
    (path / "journal").mkdir(exist_ok=True)
    (path / "config.json").write_text(config)
    with (path / "metrics.jsonl").open("a") as metrics:
        metrics.write("".join(json.dumps(row) + "\n" for row in rows))

    async def write(journal):
        incarnation = 1 if first_step == 0 else 2
        await journal.append(IncarnationRecord(incarnation=incarnation, resumed_from=first_step, config=config))
        for ordinal in reversed(range(len(workload.trace.lengths))):
            lengths = workload.trace.lengths[ordinal].tolist()
            await journal.append(group_record(ordinal, lengths=lengths, rewards=[0.0] * len(lengths), reward_s=0.3))
        await journal.append(*(journaled_step(number, 0, 1) for number in range(steps)))
        await journal.append(*(end(ordinal) for ordinal in range(filtered)))
        await journal.append(*(msgspec.structs.replace(end(9), sequence=-1) for _ in range(7)))  # rows too long

    use(path / "journal", write)


def test_costs_lengths_and_dial_are_those_of_the_run(tmp_path: Path):
    record_run(tmp_path)
    recording = recorded(tmp_path)
    assert {key: recording.words[key] for key in DIAL} == WORDS
    costs = {key: recording.words[key] for key in recording.words if key not in DIAL}
    assert costs == pytest.approx(
        {
            "servers": 2, "room": 10, "decode_token_s": 0.02, "occupancy_cost": 1.0, "train_token_s": 0.01,
            "train_step_s": 1.0, "pause_s": 0.05, "publish_s": 0.2, "reward_s": 0.3, "filtered_share": 0.0,
            "heartbeat_s": 0.5,
        },
        rel=0.01,
    )  # fmt: skip
    assert np.array_equal(recording.lengths.lengths, WORKLOAD.trace.lengths)
    assert recording.notice == ""


def disturb(path: Path, *, sampled: Sequence[int], arrived: Sequence[int]) -> None:
    """Let the run have sampled for evaluations in some steps, whose groups came in some of them; and warmed up."""
    metrics = path / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[0]["step_time"] += 30.0
    rows[0]["perf/fwd_bwd_s"] += 30.0
    for row in rows:
        row["tokens/eval"] = 5000 * sum(row["step"] >= step for step in arrived)
        if row["step"] in sampled:
            row |= {"rollout/tokens": row["rollout/tokens"] + 5000, "rollout/occupancy": 1.0, "rollout/idle_ratio": 0.0}
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_evaluations_and_the_warming_up_of_the_first_step_are_left_out(tmp_path: Path):
    record_run(tmp_path, steps=12)
    clean = recorded(tmp_path).words
    disturb(tmp_path, sampled=(1, 2, 6, 7, 8), arrived=(1, 2, 8))
    words = recorded(tmp_path).words
    costs = ("train_token_s", "train_step_s", "decode_token_s", "occupancy_cost")
    assert [words[cost] for cost in costs] == pytest.approx([clean[cost] for cost in costs], rel=0.1)


def test_a_run_that_evaluates_in_every_step_is_read_all_the_same_and_it_is_said(tmp_path: Path):
    record_run(tmp_path, steps=8)
    disturb(tmp_path, sampled=range(1, 9), arrived=range(1, 9))
    assert "a larger eval_steps, or none, would do" in recorded(tmp_path).notice


@pytest.mark.parametrize("occupancy_cost", [0.0, 3.0])
def test_what_a_decode_step_costs_is_found_from_how_full_the_seats_were(tmp_path, monkeypatch, occupancy_cost):
    """At max_staleness 2 some seats are empty, too; but nothing says how many in which step."""
    monkeypatch.setattr(sys.modules[__name__], "COSTS", replace(COSTS, occupancy_cost=occupancy_cost))
    record_run(tmp_path, workload=replace(WORKLOAD, costs=COSTS), max_staleness=2)
    words = recorded(tmp_path).words
    assert words["decode_token_s"] == pytest.approx(0.02, rel=0.02)
    assert words["occupancy_cost"] == pytest.approx(occupancy_cost, abs=0.05)


def test_with_seats_that_are_always_full_it_says_what_nothing_tells(tmp_path, capsys):
    equal = np.full((40, 4), 30, np.int32)
    full = replace(WORKLOAD, trace=replace(WORKLOAD.trace, lengths=equal), room=2, costs=replace(COSTS, pause_s=0.0))
    record_run(tmp_path, workload=full, max_staleness=4)
    recording = recorded(tmp_path)
    step_s = 0.02 * 2
    assert recording.words["decode_token_s"] == pytest.approx(step_s, rel=0.05)
    assert recording.words["occupancy_cost"] == 0.0
    assert dispatch(["simulate", str(tmp_path), "--steps", "2", "--warmup-steps", "1"]) == 0
    assert "always equally full" in capsys.readouterr().err


@pytest.mark.parametrize("first_seen", [1, 4])
def test_only_the_beginning_of_a_long_run_is_compared_with_the_simulated_one(tmp_path, monkeypatch, first_seen):
    """Of 30 steps eight are simulated; servers' counters have no beginning before they have reported once."""
    monkeypatch.setattr("learner.tuning.recorded.MOST_SAMPLES", 8 * 8)
    record_run(tmp_path, steps=30, max_staleness=4)
    metrics = tmp_path / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows[: first_seen - 1]:
        row |= {"rollout/observed_s": 0.0, "rollout/idle_ratio": None, "rollout/occupancy": None, "rollout/tokens": 0}
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = recorded(tmp_path).words
    assert words["decode_token_s"] == pytest.approx(0.02, rel=0.02)
    assert words["occupancy_cost"] == pytest.approx(1.0, abs=0.05)


def change_rows(path: Path, changed: Sequence[int], **values: float) -> None:
    metrics = path / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for number in changed:
        rows[number] |= {key.replace("__", "/"): value for key, value in values.items()}
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_server_that_was_there_for_a_step_is_not_counted(tmp_path):
    record_run(tmp_path, steps=12)
    change_rows(tmp_path, [5], rollout__servers=3, rollout__room=30)
    assert recorded(tmp_path).words["servers"] == 2


def test_steps_that_were_replayed_have_no_seconds(tmp_path):
    record_run(tmp_path, steps=12)
    before = recorded(tmp_path).words
    change_rows(tmp_path, [10, 11], step_time=0.001, perf__rollout_wait_s=0.0, perf__fwd_bwd_s=0.0)
    words = recorded(tmp_path).words
    assert words["train_token_s"] == pytest.approx(before["train_token_s"], rel=0.05)
    assert words["train_step_s"] == pytest.approx(before["train_step_s"], rel=0.05)


def test_a_run_that_went_on_with_another_dial_is_taken_from_there(tmp_path, monkeypatch):
    """As the way to a tuned run has it: some steps at one bound, then the knee; here with faster engines, too."""
    with monkeypatch.context() as before:
        before.setattr(sys.modules[__name__], "COSTS", replace(COSTS, decode_token_s=0.05))
        record_run(tmp_path, steps=10, workload=replace(WORKLOAD, costs=COSTS), max_staleness=4)
    record_run(tmp_path, steps=10, first_step=10, max_staleness=0)
    words = recorded(tmp_path).words
    assert words["max_staleness"] == 0
    assert words["decode_token_s"] == pytest.approx(0.02, rel=0.02)
    assert words["occupancy_cost"] == pytest.approx(1.0, abs=0.05)


def test_groups_of_another_size_before_the_dial_was_changed_are_left_out(tmp_path):
    lengths = np.tile(np.concatenate([WORKLOAD.trace.lengths, WORKLOAD.trace.lengths[:, :2]], axis=1), (2, 1))
    larger = replace(WORKLOAD, trace=replace(WORKLOAD.trace, lengths=lengths))
    record_run(tmp_path, steps=6, workload=larger, num_generations=6)
    record_run(tmp_path, steps=10, first_step=6)
    recording = recorded(tmp_path)
    assert np.array_equal(recording.lengths.lengths, WORKLOAD.trace.lengths)
    assert recording.words["decode_token_s"] == pytest.approx(0.02, rel=0.02)


def test_too_few_steps_with_the_dial_that_it_has_now_are_refused(tmp_path):
    record_run(tmp_path, steps=10, max_staleness=4)
    record_run(tmp_path, steps=3, first_step=10, max_staleness=0)
    with pytest.raises(ConfigError, match="has 3 trained steps since its dial was changed after step 10"):
        recorded(tmp_path)


def test_steps_at_a_lower_depth_are_compared_with_such_steps(tmp_path):
    record_run(tmp_path, steps=12, max_staleness=1)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"max_staleness": 1', '"max_staleness": 3'))
    (tmp_path / "journal" / "000001.log").rename(tmp_path / "kept")
    (tmp_path / "journal").rmdir()
    (tmp_path / "journal").mkdir()

    async def write(journal):
        for ordinal in range(40):
            await journal.append(group_record(ordinal, lengths=WORKLOAD.trace.lengths[ordinal].tolist(), reward_s=0.3))

    use(tmp_path / "journal", write)
    words = recorded(tmp_path).words
    assert words["max_staleness"] == 3
    assert words["decode_token_s"] == pytest.approx(0.02, rel=0.02)
    change_rows(tmp_path, range(3, 12), knobs__depth=2)
    with pytest.raises(ConfigError, match="the depth was moved from 1 after 3 steps"):
        recorded(tmp_path)


def test_steps_of_an_older_headway_are_left_out(tmp_path):
    record_run(tmp_path, steps=12)
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    lines[:3] = [line.replace('"rollout/tokens"', '"tokens"') for line in lines[:3]]
    metrics.write_text("\n".join(lines) + "\n")
    assert recorded(tmp_path).words["decode_token_s"] == pytest.approx(0.02, rel=0.03)


def test_an_engine_that_says_nothing_of_its_work_is_refused(tmp_path):
    record_run(tmp_path)
    change_rows(tmp_path, range(8), rollout__occupancy=0.0)
    with pytest.raises(ConfigError, match=r"in 0 seat-seconds: nothing can be fitted to that; give --decode-token-s"):
        recorded(tmp_path)


def test_training_that_takes_equally_long_for_any_tokens_can_be_simulated(tmp_path, capsys):
    record_run(tmp_path)
    for number in range(8):
        change_rows(tmp_path, [number], step_time=20.0 - number, perf__rollout_wait_s=0.0)
    assert dispatch(["simulate", str(tmp_path), "--steps", "2", "--warmup-steps", "1"]) == 0


def test_groups_that_are_filtered_are_leased_anew_as_they_were(tmp_path):
    record_run(tmp_path, workload=replace(WORKLOAD, filtered_share=0.4), max_staleness=2, steps=12)
    share = recorded(tmp_path).words["filtered_share"]
    assert 0.25 < share < 0.55
    assert recorded(tmp_path).words["decode_token_s"] == pytest.approx(0.02, rel=0.03)


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
    with pytest.raises(
        ConfigError, match="its metrics have no rollout/room or no rollout/tokens: an older headway recorded it"
    ):
        recorded(tmp_path)
