"""What a run leaves behind: one row a step, checkpoints with the ledger of their moment, evaluation results."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from learner.app import make_recorder
from learner.batch import StepResult
from learner.checkpoint import latest_checkpoint
from learner.evaluation import Evaluation
from learner.fleet import Health
from learner.journal_records import IncarnationRecord
from learner.recorder import RECORD_S, Recorder, StepTimer, server_view
from learner.rundir import RunDirectory
from learner.stats import RunStats
from learner.tuning.virtual_time import run_virtual
from protocol.loop_lag import LoopLag
from protocol.messages import Purpose, ServerStatus, WeightsLive
from protocol.versions import Version
from protocol.waits import Waits
from tests.factories import make_batch, make_group
from tests.learners import Clock, Desk, FakeCompute, make_config, make_desk, run


class PrunedJournal:
    """Keeps what it was told may go."""

    def __init__(self) -> None:
        self.finished: list[Callable[[int], bool]] = []

    async def prune(self, finished: Callable[[int], bool]) -> list[Path]:
        self.finished.append(finished)
        return []


@dataclass
class FakeTokenizer:
    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@dataclass
class FakeModel:
    """A trainer as a recorder knows it."""

    policy_version: int = 0
    checkpoint_bytes: int = 0
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)

    def save(self, directory: Path) -> None:
        (directory / "weights.txt").write_text(str(self.policy_version))


@dataclass
class Office:
    desk: Desk
    directory: RunDirectory
    trainer: FakeModel
    journal: PrunedJournal
    recorder: Recorder

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.directory.metrics_path.read_text().splitlines()]

    def save(self) -> None:
        run(self.recorder.save(FakeCompute()))  # type: ignore[arg-type]


@contextmanager
def office(path: Path, *, policy_version: int = 0, **options) -> Iterator[Office]:
    desk = make_desk(policy_version=policy_version, **options)
    config = make_config(output_dir=path, run_name="run", **{k: v for k, v in options.items() if k != "eval_rows"})
    directory = RunDirectory.open(config)
    directory.begin_incarnation()
    try:
        trainer, journal = FakeModel(policy_version), PrunedJournal()
        checkpoint = latest_checkpoint(directory.checkpoints_dir)
        recorder = make_recorder(
            directory, trainer, desk.coordinator, journal, RunStats(), LoopLag(), checkpoint
        )  # type: ignore[arg-type]  # fmt: skip
        yield Office(desk, directory, trainer, journal, recorder)
    finally:
        directory.close()


GOOD = StepResult(finite=True, loss_tokens=24, metrics={"loss": 0.5})


def test_a_timer_adds_up_stages_and_the_whole():
    clock = Clock()
    timer = StepTimer(clock)
    for _ in range(2):
        with timer.measure("wait_s"):
            clock.now_s += 3.0
    with suppress(ValueError), timer.measure("journal_s"):
        clock.now_s += 1.0
        raise ValueError("counted all the same")
    clock.now_s += 0.5
    assert timer.timings == {
        "wait_s": 6.0, "forward_backward_s": 0.0, "wait_publish_s": 0.0, "optimizer_s": 0.0, "canaries_s": 0.0,
        "journal_s": 1.0,
    }  # fmt: skip
    assert timer.elapsed_s == 7.5


def test_a_step_is_one_row_with_the_ledgers_counts(tmp_path):
    with office(tmp_path) as o:
        shown = []
        o.recorder.step_done = shown.append
        o.desk.join("north", room=100)
        o.desk.pump()
        o.desk.coordinator.counters["groups_refused"] = 2
        o.desk.ledger.policy_version = 1
        timer = StepTimer(o.desk.clock)
        o.desk.clock.now_s += 4.0
        o.recorder.step(make_batch(step=1), GOOD, timer, learning_rate=1e-4)
        o.recorder.write_rows()
        (row,) = o.rows()
        assert (row["step"], row["policy_version"], row["skipped"], row["loss"]) == (1, 1, 0, 0.5)
        assert (row["learning_rate"], row["step_time"], row["wall_s"]) == (1e-4, 4.0, 4.0)
        assert (row["groups/leased"], row["groups_unaccounted"], row["slots_in_use"], row["slots_total"]) == (
            6,
            0,
            6,
            6,
        )
        assert (row["groups/groups_refused"], row["rollout/servers"], row["loop_lag_ms"]) == (2, 1, 0.0)
        assert o.recorder.last_row is shown[0]
        (samples,) = o.directory.samples_dir.iterdir()
        first = json.loads(samples.read_text().splitlines()[0])
        assert set(first["completion"]) <= set("0123456789 ")


def test_a_skipped_step_has_a_row_and_no_samples(tmp_path):
    with office(tmp_path) as o:
        bad = StepResult(finite=False, reason="loss is nan")
        o.recorder.step(make_batch(step=1), bad, StepTimer(o.desk.clock), learning_rate=1e-4)
        o.recorder.write_rows()
        (row,) = o.rows()
        assert (row["step"], row["policy_version"], row["skipped"], row["step_groups"]) == (1, 0, 1, 0)
        assert list(o.directory.samples_dir.iterdir()) == []


def test_before_the_first_lease_no_time_has_passed(tmp_path):
    with office(tmp_path) as o:
        o.desk.clock.now_s += 50.0
        o.recorder.step(make_batch(step=1), GOOD, StepTimer(o.desk.clock), learning_rate=1e-4)
        o.recorder.write_rows()
        assert o.rows()[0]["wall_s"] == 0.0


def test_what_servers_did_before_the_first_lease_is_not_this_runs(tmp_path):
    with office(tmp_path) as o:
        server = o.desk.join("north", room=100)
        server.status = ServerStatus(wall_s=1000.0, busy_s=900.0, tokens_generated=10_000)
        o.desk.pump()
        server.status = ServerStatus(wall_s=1010.0, busy_s=905.0, tokens_generated=10_050)
        o.desk.clock.now_s += 10.0
        o.recorder.step(make_batch(step=1), GOOD, StepTimer(o.desk.clock), learning_rate=1e-4)
        o.recorder.write_rows()
        (row,) = o.rows()
        assert (row["rollout/idle_ratio"], row["rollout/generation_tok_s"]) == (0.5, 5.0)


def test_a_checkpoint_holds_the_ledger_and_the_lineage_of_its_moment(tmp_path):
    with office(tmp_path, policy_version=4) as o:
        o.desk.join("north", live=4, room=100)
        o.desk.pump()
        before = o.desk.ledger.snapshot()

        async def save_while_the_run_goes_on() -> None:
            saving = asyncio.ensure_future(o.recorder.save(FakeCompute(save_checkpoint=1.0)))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            o.desk.ledger.lost(3, fault=True)
            o.desk.ledger.filter_unleased()
            await saving

        o.recorder.incarnations = (IncarnationRecord(incarnation=1, resumed_from=0, config="{}"),)
        run_virtual(save_while_the_run_goes_on())
        checkpoint = latest_checkpoint(o.directory.checkpoints_dir)
        assert checkpoint is not None
        assert checkpoint.path == o.recorder.checkpoint
        assert (checkpoint.path / "weights.txt").read_text() == "4"
        state = checkpoint.state
        assert (state.policy_version, state.run_id, state.forks) == (4, o.directory.run_id, ((1, 0),))
        assert dict(state.ledger) == before
        assert state.incarnations == o.recorder.incarnations
        assert state.config_fingerprint == o.directory.config_fingerprint


def test_the_journal_forgets_only_what_no_kept_checkpoint_needs(tmp_path):
    """Of two kept checkpoints the older decides: what it knows to have ended will never be asked for again."""
    with office(tmp_path, save_total_limit=2) as o:
        ledger = o.desk.ledger
        o.desk.join("north", room=100)
        o.desk.pump()
        o.save()
        assert o.journal.finished == [], "an older one may be on disk, of which this process knows nothing"
        first_cursor = ledger.cursor
        for sequence in (0, 1):
            ledger.delivered(sequence, 0)
        ledger.batch([0, 1])
        ledger.trained([0, 1], 1)
        ledger.live(1)
        o.trainer.policy_version = 1
        o.save()
        (finished,) = o.journal.finished
        assert [ordinal for ordinal in range(10) if finished(ordinal)] == [], "the first checkpoint has trained nothing"
        ledger.grant()
        o.trainer.policy_version = ledger.policy_version = 2
        o.save()
        finished = o.journal.finished[1]
        assert [ordinal for ordinal in range(10) if finished(ordinal)] == [0, 1]
        assert not finished(first_cursor), "granted only after the checkpoint that decides"
        assert sorted(path.name for path in o.directory.checkpoints_dir.glob("step-*")) == [
            "step-000001",
            "step-000002",
        ]


def test_with_one_checkpoint_kept_the_newest_decides_at_once(tmp_path):
    with office(tmp_path, save_total_limit=1) as o:
        o.desk.ledger.filter_unleased()
        o.save()
        assert [finished(0) for finished in o.journal.finished] == [True]


@pytest.mark.parametrize(
    ("policy_version", "asked"), [(1, []), (5, [(5, False)]), (7, []), (10, [(10, False)]), (20, [])]
)
def test_evaluations_are_asked_for_every_eval_steps_but_the_last(tmp_path, policy_version, asked):
    with office(tmp_path, eval_rows=2, eval_steps=5, max_steps=20) as o:
        o.recorder.request_evaluation(policy_version)
        assert [o.recorder.requests.get_nowait() for _ in range(o.recorder.requests.qsize())] == asked


def test_an_evaluation_is_left_out_while_the_previous_one_goes_on(tmp_path):
    with office(tmp_path, eval_rows=2, eval_steps=5) as o:
        o.recorder.request_evaluation(5)
        o.recorder.request_evaluation(10)
        assert o.recorder.requests.qsize() == 1
        o.recorder.requests.get_nowait()
        o.desk.coordinator.evaluation = Evaluation(policy_version=5, pinned=False, num_rows=2)
        o.recorder.request_evaluation(15)
        assert o.recorder.requests.empty()


def test_without_rows_or_steps_nothing_is_evaluated(tmp_path):
    with office(tmp_path / "a", eval_steps=5) as o:
        o.recorder.request_evaluation(5)
        assert o.recorder.requests.empty()
    with office(tmp_path / "b", eval_rows=2) as o:
        o.recorder.request_evaluation(5)
        assert o.recorder.requests.empty()


def evaluated(policy_version: int, *rewards: float) -> Evaluation:
    evaluation = Evaluation(policy_version=policy_version, pinned=False, num_rows=len(rewards))
    for row, reward in enumerate(rewards):
        evaluation.dispatched(row)
        group = make_group(
            ordinal=row, purpose=Purpose.EVAL, rewards=(reward,), version=Version(1, policy_version + row)
        )
        evaluation.delivered(row, group)
    return evaluation


def test_results_are_kept_and_those_of_a_lost_branch_are_cut(tmp_path):
    with office(tmp_path) as o:
        for evaluation in (evaluated(0, 1.0, 0.0), evaluated(5), evaluated(10, 1.0)):
            o.recorder.evaluated(evaluation)
        assert [point.label for point in o.recorder.evals] == ["v0-1", "v5", "v10"]
    with office(tmp_path, policy_version=5) as o:
        first, second = o.recorder.evals
        assert (first.step, first.reward, first.oldest, first.newest) == (0, 0.5, 0, 1)
        assert (second.step, math.isnan(second.reward)) == (5, True)


def test_rows_after_the_checkpoint_are_cut_and_the_totals_go_on(tmp_path):
    with office(tmp_path) as o:
        for step in (1, 2, 3):
            o.desk.ledger.policy_version = step
            o.recorder.step(make_batch(step=step), GOOD, StepTimer(o.desk.clock), learning_rate=1e-4)
            o.recorder.write_rows()
    with office(tmp_path, policy_version=2) as o:
        assert [row["step"] for row in o.rows()] == [1, 2]
        o.desk.ledger.policy_version = 3
        o.recorder.step(make_batch(step=3), GOOD, StepTimer(o.desk.clock), learning_rate=1e-4)
        o.recorder.write_rows()
        assert o.rows()[-1]["num_tokens"] == 3 * 24
        assert len(o.recorder.stats.rewards) == 3


def test_published_versions_are_counted_over_restarts(tmp_path):
    with office(tmp_path, policy_version=1) as o:
        o.recorder.published = lambda: 4
        o.save()
    with office(tmp_path, policy_version=1) as o:
        assert o.recorder.checkpoint is not None
        assert o.recorder.weights_published == 4
        o.recorder.published = lambda: 2
        assert o.recorder.weights_published == 6


def test_the_summary_is_of_the_whole_run(tmp_path):
    with office(tmp_path) as o:
        o.desk.ledger.policy_version = 1
        o.recorder.step(make_batch(step=1), GOOD, StepTimer(o.desk.clock), learning_rate=1e-4)
        o.recorder.write_rows()
        o.recorder.evaluated(evaluated(0, 0.0))
        o.recorder.evaluated(evaluated(1, 1.0))
        o.save()
        summary = o.recorder.summary()
        assert (summary.task, summary.model, summary.steps, summary.max_staleness) == ("data.jsonl", "model", 1, 2)
        assert (summary.eval_first, summary.eval_last, summary.groups_unaccounted) == (0.0, 1.0, 0)
        assert summary.checkpoint == str(o.recorder.checkpoint)


def test_a_server_as_it_is_shown():
    desk = make_desk()
    server = desk.join("north", live=0, room=8)
    view = server_view(server, Health.HEALTHY, desk.clock() + 3.0)
    assert (view.name, view.state, view.policy_version, view.room, view.connected_s) == ("north", "healthy", 0, 8, 3.0)
    assert (view.samples_running, view.status) == (0, None)
    server.status = ServerStatus(samples_running=5)
    server.live = None
    view = server_view(server, Health.JOINING, desk.clock())
    assert (view.samples_running, view.policy_version) == (5, None)


def test_a_row_says_what_servers_found_of_the_newest_weights(tmp_path):
    with office(tmp_path) as o:
        server = o.desk.join(live=None)
        o.recorder.step(make_batch(step=1), GOOD, StepTimer(o.desk.clock), learning_rate=1e-4)
        o.recorder.write_rows()
        live = WeightsLive(version=Version(1, 0), pause_s=0.5, check_s=1.5, mismatch_kl=0.25, mismatch=0.125)
        o.desk.coordinator.weights.handle(server, live)
        timer = StepTimer(o.desk.clock)
        with timer.measure("canaries_s"):
            o.desk.clock.now_s += 0.25
        o.recorder.step(make_batch(step=2), GOOD, timer, learning_rate=1e-4)
        o.recorder.write_rows()
    before, after = o.rows()
    assert not {"mismatch_kl", "mismatch_logprob", "weights/pause_s", "weights/check_s"} & before.keys()
    assert (after["mismatch_kl"], after["mismatch_logprob"]) == (0.25, 0.125)
    assert (after["weights/pause_s"], after["weights/check_s"]) == (0.5, 1.5)
    assert (before["perf/canaries_s"], after["perf/canaries_s"]) == (0.0, 0.25)


def lines(o: Office) -> int:
    return len(o.rows()) if o.directory.metrics_path.exists() else 0


def recording(o: Office, scenario: Callable[[], Awaitable[None]]) -> float:
    """Run a scenario beside the record loop, under virtual time; cancel that in the end. Returns the time."""

    async def main() -> float:
        loop = asyncio.get_running_loop()
        recorder = asyncio.create_task(o.recorder.record_loop(Waits(loop.time)))
        await scenario()
        recorder.cancel()
        with suppress(asyncio.CancelledError):
            await recorder
        return loop.time()

    return run_virtual(main())


def make_step(o: Office, step: int) -> None:
    """The optimizer has made a version, which nobody serves yet."""
    o.trainer.policy_version = step
    o.desk.coordinator.weights.made(step)
    o.recorder.step(make_batch(step=step), GOOD, StepTimer(o.desk.clock), learning_rate=1e-4)


def test_a_row_is_written_once_the_weights_of_its_step_are_live(tmp_path):
    with office(tmp_path) as o:
        server = o.desk.join("north", room=100)

        async def scenario() -> None:
            make_step(o, 1)
            await asyncio.sleep(0.25)
            assert lines(o) == 0, "servers come first"
            o.desk.coordinator.weights.handle(server, WeightsLive(version=Version(1, 1), pause_s=0.5))
            await asyncio.sleep(0.01)
            assert [row["weights/pause_s"] for row in o.rows()] == [0.5]

        recording(o, scenario)


def test_a_row_waits_a_second_at_most(tmp_path):
    with office(tmp_path) as o:

        async def scenario() -> None:
            make_step(o, 1)
            await asyncio.sleep(RECORD_S - 0.01)
            assert lines(o) == 0
            await asyncio.sleep(0.02)
            assert lines(o) == 1

        recording(o, scenario)


def test_a_step_that_publishes_nothing_is_written_at_once(tmp_path):
    with office(tmp_path) as o:

        async def scenario() -> None:
            bad = StepResult(finite=False, reason="loss is nan")
            o.recorder.step(make_batch(step=1), bad, StepTimer(o.desk.clock), learning_rate=1e-4)
            await asyncio.sleep(0.01)
            assert lines(o) == 1

        recording(o, scenario)


def test_a_checkpoint_has_the_rows_of_all_steps_before_it(tmp_path):
    with office(tmp_path) as o:
        make_step(o, 1)
        make_step(o, 2)
        o.save()
        assert [row["step"] for row in o.rows()] == [1, 2]


def test_the_rows_of_a_run_that_ends_are_written(tmp_path):
    with office(tmp_path) as o:

        async def scenario() -> None:
            make_step(o, 1)
            await asyncio.sleep(0.01)

        assert recording(o, scenario) < RECORD_S
        assert lines(o) == 1


def test_a_row_says_what_was_so_when_its_step_was_made(tmp_path):
    with office(tmp_path) as o:
        o.desk.join("north", room=100)
        o.desk.pump()
        o.desk.clock.now_s += 4.0
        make_step(o, 1)
        o.desk.clock.now_s += 3.0
        o.desk.coordinator.counters["groups_refused"] = 2
        o.trainer.policy_version = o.desk.ledger.policy_version = 2
        o.recorder.write_rows()
        (row,) = o.rows()
        assert (row["policy_version"], row["wall_s"], row.get("groups/groups_refused", 0)) == (0, 4.0, 0)


def test_after_a_disk_has_refused_a_row_none_follows_and_no_checkpoint(tmp_path):
    with office(tmp_path) as o:
        make_step(o, 1)
        log = o.recorder.tracker.log

        def refuse(row: object) -> None:
            raise OSError("no space left")

        o.recorder.tracker.log = refuse  # type: ignore[method-assign]
        with pytest.raises(OSError, match="no space left"):
            o.recorder.write_rows()
        o.recorder.tracker.log = log  # type: ignore[method-assign]  # there is space again
        make_step(o, 2)
        with pytest.raises(OSError, match="no space left"):
            o.save()
        assert lines(o) == 0
        assert o.recorder.checkpoint is None


def test_groups_that_are_filtered_after_a_step_are_of_the_next_row(tmp_path):
    with office(tmp_path) as o:
        make_step(o, 1)
        o.recorder.stats.record_filtered(make_group(ordinal=7, rewards=[0.0, 0.0, 0.0, 0.0]))
        make_step(o, 2)
        o.recorder.write_rows()
        first, second = (row["reward"] for row in o.rows())
        assert first == 0.5
        assert second < 0.5
