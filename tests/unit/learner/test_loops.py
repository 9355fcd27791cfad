"""The shipped loops on fakes and a virtual clock: what happens, in which order, and what a cancellation leaves."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from learner.batch import Batch, StepResult
from learner.fleet import Health
from learner.journal_records import StepRecord
from learner.ledger import End, State
from learner.loops import (
    accept_loop,
    batch_loop,
    evaluate_loop,
    handle,
    lease_loop,
    measure_canaries,
    receive_loop,
    stock_loop,
    train_loop,
)
from learner.tuning.virtual_time import run_virtual
from protocol.errors import MalformedMessage, RunStopped, StalenessViolation, VersionMismatch
from protocol.messages import (
    Ack,
    AckStatus,
    Drain,
    Fault,
    Goodbye,
    Lease,
    Ping,
    Pong,
    Purpose,
    Refused,
    Return,
    ServerStatus,
    WeightsFailed,
    WeightsLive,
    Welcome,
)
from protocol.signals import Signal
from protocol.versions import PROTOCOL_VERSION, Version
from protocol.waits import Waits
from tests.learners import (
    Desk,
    FakeCompute,
    FakePublisher,
    FakeRecorder,
    FakeTrainer,
    answer,
    make_desk,
    make_hello,
)

NAN = StepResult(finite=False, reason="loss is nan")
EQUAL = (1.0, 1.0, 1.0, 1.0)


@dataclass
class Stage:
    """A desk and the loops' other partners."""

    desk: Desk
    compute: FakeCompute
    trainer: FakeTrainer
    publisher: FakePublisher
    recorder: FakeRecorder
    waits: Waits
    story: list[str]
    batches: asyncio.Queue[Batch] = field(default_factory=lambda: asyncio.Queue(1))
    requests: asyncio.Queue[tuple[int, bool]] = field(default_factory=asyncio.Queue)

    async def train(self) -> None:
        await train_loop(
            self.batches, self.trainer, self.compute, self.publisher, self.desk.coordinator, self.desk.journal,
            self.recorder, self.waits,
        )  # type: ignore[arg-type]  # fmt: skip

    async def form_batches(self) -> None:
        await batch_loop(self.desk.coordinator, self.desk.buffer, self.batches, self.waits)

    async def evaluate(self) -> None:
        await evaluate_loop(
            self.requests, self.desk.coordinator, self.publisher, self.recorder, self.waits  # type: ignore[arg-type]
        )  # fmt: skip

    async def answer_all(self, rewards: Sequence[float] | None = None) -> None:
        """Lease all that is possible to the one server, and let its answers arrive."""
        self.desk.pump()
        for lease in self.desk.leases():
            self.desk.receive(answer(lease) if rewards is None else answer(lease, rewards=rewards))
        while not self.desk.arrivals.queue.empty():
            await self.desk.arrivals.accept_next()

    @contextlib.asynccontextmanager
    async def running(self, *loops: Callable[[], Awaitable[None]]):
        """Run endless loops beside the block."""
        tasks = [asyncio.ensure_future(loop()) for loop in loops]
        yield
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results), results


def on_stage(
    scenario: Callable[[Stage], Awaitable[None]], *, seconds: dict[str, float] | None = None, **options: Any
) -> None:
    """Run a scenario under virtual time, with one server of plenty of room."""

    async def main() -> None:
        desk, story = make_desk(**options), []
        desk.journal.story = story
        stage = Stage(
            desk=desk,
            compute=FakeCompute(**seconds or {}),
            trainer=FakeTrainer(story),
            publisher=FakePublisher(story),
            recorder=FakeRecorder(story),
            waits=Waits(asyncio.get_running_loop().time),
            story=story,
        )
        desk.join("north", room=1000)
        await scenario(stage)

    run_virtual(main())


# train_loop


def test_steps_train_in_order_and_each_is_journaled_before_the_weights_change():
    async def scenario(stage):
        await stage.answer_all()
        async with stage.running(stage.form_batches):
            await stage.train()
        assert stage.story == [
            line
            for step in (1, 2, 3)
            for line in (
                f"forward_backward {step}",
                "wait_previous",
                f"journal step {step}",
                f"optimizer_step {step}",
                f"publish 1.{step}",
                f"record step {step}",
                *(("save", "saved") if step == 3 else ()),
                f"evaluation due {step}?",
            )
        ]
        assert [[g.ordinal for g in batch.groups] for batch in stage.trainer.batches] == [[0, 1], [2, 3], [4, 5]]
        assert [batch.staleness for batch in stage.trainer.batches] == [[0, 0], [1, 1], [2, 2]]
        ledger = stage.desk.ledger
        assert (ledger.ends[End.TRAINED], ledger.policy_version, ledger.unaccounted) == (6, 3, 0)
        assert stage.desk.coordinator.rows == {}
        steps = [record for record in stage.desk.journal.records if isinstance(record, StepRecord)]
        assert [(step.step, step.ordinals, step.learning_rate) for step in steps] == [
            (1, (0, 1), 1e-3), (2, (2, 3), 1e-3), (3, (4, 5), 1e-3)
        ]  # fmt: skip

    on_stage(scenario, max_steps=3)


def test_i4_a_batch_too_old_is_never_trained():
    async def scenario(stage):
        await stage.answer_all()
        stage.desk.ledger.entries[1].floor = -3  # no transition can do this
        async with stage.running(stage.form_batches):
            with pytest.raises(StalenessViolation, match="I4: group 1 has staleness 3, max_staleness is 2"):
                await stage.train()
        assert stage.story == []
        assert stage.desk.ledger.ends[End.TRAINED] == 0

    on_stage(scenario)


def test_the_weights_change_only_after_the_previous_snapshot():
    async def scenario(stage):
        await stage.answer_all()
        stage.publisher.gate.clear()
        async with stage.running(stage.form_batches):
            training = asyncio.ensure_future(stage.train())
            await asyncio.sleep(100)
            assert stage.story == ["forward_backward 1", "wait_previous"], "the next batch trains meanwhile"
            stage.publisher.gate.set()
            await training

    on_stage(scenario, max_steps=1)


def test_a_step_that_is_not_finite_is_skipped_and_its_slots_are_free_at_once():
    async def scenario(stage):
        await stage.answer_all()
        stage.trainer.results = [NAN]
        async with stage.running(stage.form_batches):
            await stage.train()
        assert stage.story[:4] == ["forward_backward 1", "record skipped 1", "forward_backward 1", "wait_previous"]
        ledger = stage.desk.ledger
        assert (ledger.ends[End.SKIPPED], ledger.ends[End.TRAINED], ledger.policy_version) == (2, 2, 1)
        assert ledger.unaccounted == 0
        assert stage.recorder.steps[0][1].reason == "loss is nan"
        assert "step 1 skipped: loss is nan" in stage.desk.coordinator.notices
        assert stage.desk.journal.ends() == [(0, "skipped"), (1, "skipped")], "with the next step's record"
        assert ledger.slots_in_use == 4, "two buffered, two trained and not live yet"

    on_stage(scenario, max_steps=1)


@pytest.mark.parametrize(
    ("checkpoint", "named"),
    [("runs/x/checkpoints/step-000050", "runs/x/checkpoints/step-000050"), (None, "none: no step has been saved yet")],
)
def test_max_skipped_steps_in_a_row_stop_the_run_naming_the_checkpoint(checkpoint, named):
    async def scenario(stage):
        stage.recorder.checkpoint = checkpoint
        await stage.answer_all()
        stage.trainer.results = [NAN, NAN]
        async with stage.running(stage.form_batches):
            with pytest.raises(
                RunStopped, match=rf"^2 steps in a row could not be trained, .*: loss is nan\. .* is {named}\."
            ):
                await stage.train()
        assert stage.desk.ledger.ends[End.SKIPPED] == 4

    on_stage(scenario, max_skipped_steps=2)


def test_a_good_step_ends_the_row_of_skipped_ones():
    async def scenario(stage):
        good = StepResult(finite=True, loss_tokens=1)
        stage.trainer.results = [NAN, good, NAN, good]

        async def answer_for_ever():
            while True:
                await stage.answer_all()
                stage.desk.ledger.live(stage.desk.ledger.policy_version)
                stage.desk.fleet.went_live(b"north", Version(1, stage.desk.ledger.policy_version))
                await asyncio.sleep(1)

        async with stage.running(stage.form_batches, answer_for_ever):
            await stage.train()
        assert stage.trainer.policy_version == 2

    on_stage(scenario, max_skipped_steps=2, max_steps=2)


def test_a_step_with_nothing_left_is_skipped_without_computing():
    async def scenario(stage):
        async def answer_without_differences():
            while True:
                await stage.answer_all(rewards=EQUAL)
                await asyncio.sleep(1)

        async with stage.running(stage.form_batches, answer_without_differences):
            with pytest.raises(
                RunStopped, match=r"3 steps in a row .*: every group was filtered .* A task that is sol"
            ):
                await stage.train()
        assert stage.story == ["record skipped 1"] * 3
        assert stage.desk.ledger.ends[End.FILTERED] >= 3 * (2 * 2 + 1)
        assert stage.desk.ledger.unaccounted == 0

    on_stage(scenario, max_skipped_steps=3, max_refill_ratio=2)


@pytest.mark.parametrize(("every", "published"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5])])
def test_every_kth_version_and_the_last_are_published(every, published):
    async def scenario(stage):
        await stage.answer_all()
        async with stage.running(stage.form_batches):
            await stage.train()
        assert [line for line in stage.story if "publish" in line] == [f"publish 1.{version}" for version in published]

    on_stage(scenario, max_steps=5, max_staleness=5, reorder_window=1, weight_sync_steps=every)


def test_checkpoints_are_written_every_save_steps_and_at_the_end():
    async def scenario(stage):
        await stage.answer_all()
        async with stage.running(stage.form_batches):
            await stage.train()
        saved = [stage.story[: at + 1].count("save") for at, line in enumerate(stage.story) if line == "saved"]
        after = [stage.story[at - 1] for at, line in enumerate(stage.story) if line == "save"]
        assert (saved, after) == ([1, 2, 3], ["record step 2", "record step 4", "record step 5"])

    on_stage(scenario, max_steps=5, max_staleness=5, save_steps=2)


def test_a_disk_that_refuses_leaves_the_weights_as_they_were():
    async def scenario(stage):
        await stage.answer_all()
        stage.desk.journal.error = OSError(28, "No space left on device")
        async with stage.running(stage.form_batches):
            with pytest.raises(OSError, match="No space left"):
                await stage.train()
        assert (stage.trainer.policy_version, stage.desk.ledger.policy_version) == (0, 0)
        assert "publish" not in " ".join(stage.story)

    on_stage(scenario)


# Cancellation (a signal)


async def cancel(training: asyncio.Future[None]) -> None:
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training


def test_cancelled_while_it_waits_for_a_batch_no_group_is_lost():
    async def scenario(stage):
        training = asyncio.ensure_future(stage.train())
        await asyncio.sleep(1)
        await cancel(training)
        await stage.answer_all()
        async with stage.running(stage.form_batches):
            await stage.train()
        assert stage.desk.ledger.ends[End.TRAINED] == 2

    on_stage(scenario, max_steps=1)


def test_cancelled_during_forward_backward_the_batch_stays_untrained_and_accounted_for():
    async def scenario(stage):
        await stage.answer_all()
        async with stage.running(stage.form_batches):
            training = asyncio.ensure_future(stage.train())
            await asyncio.sleep(5)
            assert stage.compute.begun.is_set()
            await cancel(training)
            assert not stage.compute.begun.is_set(), "the call was waited for"
        ledger = stage.desk.ledger
        assert stage.story == ["forward_backward 1"]
        assert (ledger.policy_version, stage.trainer.policy_version, ledger.unaccounted) == (0, 0, 0)
        assert ledger.entries[0].state is State.BATCHED
        assert [ordinal for ordinal, *_ in ledger.snapshot()["entries"]] == [0, 1, 2, 3, 4, 5], "a checkpoint has it"

    on_stage(scenario, seconds={"forward_backward": 10.0})


def test_cancelled_while_it_waits_for_the_publisher_nothing_is_applied():
    async def scenario(stage):
        await stage.answer_all()
        stage.publisher.gate.clear()
        async with stage.running(stage.form_batches):
            training = asyncio.ensure_future(stage.train())
            await asyncio.sleep(5)
            await cancel(training)
        assert stage.story == ["forward_backward 1", "wait_previous"]
        assert stage.desk.ledger.unaccounted == 0

    on_stage(scenario)


@pytest.mark.parametrize("cancel_at_s", [5, 15])
def test_cancelled_while_a_step_is_applied_it_is_applied_whole(cancel_at_s):
    """At 5 s the journal is being written, at 15 s the optimizer runs."""

    async def scenario(stage):
        await stage.answer_all()
        stage.desk.journal.append_s = 10.0
        async with stage.running(stage.form_batches):
            training = asyncio.ensure_future(stage.train())
            await asyncio.sleep(cancel_at_s)
            await cancel(training)
        assert asyncio.get_running_loop().time() == 20.0
        assert stage.story[-4:] == ["journal step 1", "optimizer_step 1", "publish 1.1", "record step 1"]
        ledger = stage.desk.ledger
        assert (ledger.policy_version, ledger.ends[End.TRAINED], ledger.unaccounted) == (1, 2, 0)
        assert ledger.policy_version == stage.trainer.policy_version

    on_stage(scenario, seconds={"optimizer_step": 10.0})


def test_cancelled_while_it_saves_the_checkpoint_is_finished():
    async def scenario(stage):
        await stage.answer_all()
        stage.recorder.save_s = 10.0
        async with stage.running(stage.form_batches):
            training = asyncio.ensure_future(stage.train())
            await asyncio.sleep(5)
            assert stage.story[-1] == "save"
            await cancel(training)
        assert stage.story[-1] == "saved"

    on_stage(scenario, save_steps=1)


# batch_loop


def test_one_batch_is_ready_ahead_of_training_and_no_more():
    async def scenario(stage):
        await stage.answer_all()
        async with stage.running(stage.form_batches):
            await asyncio.sleep(1)
            assert stage.desk.ledger.batches_formed == 2, "one in the queue, one that waits for its place"
            assert [wait.name for wait in stage.waits.current()] == ["batch place"]
            first = await stage.batches.get()
            assert ([g.ordinal for g in first.groups], first.step) == ([0, 1], 1)
            await asyncio.sleep(1)
            assert stage.desk.ledger.batches_formed == 3

    on_stage(scenario)


def test_a_batch_is_formed_when_its_last_group_arrives():
    async def scenario(stage):
        stage.desk.pump()
        leases = stage.desk.leases()
        async with stage.running(stage.form_batches, lambda: accept_loop(stage.desk.arrivals, stage.waits)):
            for lease in leases[1:]:
                stage.desk.receive(answer(lease))
            await asyncio.sleep(1)
            assert stage.batches.empty()
            assert "groups" in [wait.name for wait in stage.waits.current()]
            stage.desk.receive(answer(leases[0]))
            await asyncio.sleep(1)
            assert [g.ordinal for g in stage.batches.get_nowait().groups] == [0, 1]

    on_stage(scenario)


def test_beyond_the_refill_ratio_a_step_trains_what_it_has():
    async def scenario(stage):
        stage.desk.pump()
        leases = stage.desk.leases()
        assert len(leases) == 2
        async with stage.running(stage.form_batches, lambda: accept_loop(stage.desk.arrivals, stage.waits)):
            stage.desk.receive(answer(leases[0]))
            for _ in range(3):  # more than max_refill_ratio x prompts_per_step
                stage.desk.receive(answer(leases[1], rewards=EQUAL))
                await asyncio.sleep(1)
                stage.desk.pump()
                leases = [leases[0], *stage.desk.leases()]
            assert [g.ordinal for g in stage.batches.get_nowait().groups] == [0]

    on_stage(scenario, max_staleness=0, max_refill_ratio=1)


# lease_loop


def test_leases_follow_what_changes_and_ticks_when_nothing_does():
    async def scenario(stage):
        desk = stage.desk
        desk.coordinator.drop_server(desk.fleet.servers[b"north"], "left", fault=False)
        async with stage.running(
            lambda: stock_loop(desk.coordinator, stage.waits),
            lambda: lease_loop(desk.coordinator, stage.waits, tick_s=1.0),
        ):
            await asyncio.sleep(0.5)
            assert (desk.ledger.slots_in_use, desk.leases()) == (6, [])
            desk.join("south", room=1000)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert len(desk.leases("south")) == 6, "at once, not at the next tick"
            desk.clock.now_s += 5.0
            await asyncio.sleep(1.1)
            assert desk.fleet.servers == {}, "a silent server is found by the tick"

    on_stage(scenario)


def test_a_server_that_returns_a_lease_without_fault_gets_no_other_before_it_reports_a_version():
    """Else the lease would go to and fro as fast as messages travel, while its engine loads."""

    async def scenario(stage):
        desk = stage.desk
        desk.pump()
        leases = desk.leases()
        server = desk.fleet.servers[b"north"]
        reason = "live at None, the lease asks for 1.0"
        handle(desk.coordinator, server, Return(group_id=leases[0].group_id, attempt=1, reason=reason, fault=False))
        desk.pump()
        assert desk.leases() == [], "it serves nothing we know of"
        handle(desk.coordinator, server, WeightsLive(version=Version(1, 0)))
        desk.pump()
        assert [lease.ordinal for lease in desk.leases()] == [leases[0].ordinal]

    on_stage(scenario)


def test_rows_are_made_off_the_event_loop():
    made_in: list[int] = []
    prompts = SimpleNamespace(row=lambda ordinal: made_in.append(threading.get_ident()))

    async def scenario():
        stock: dict[int, None] = {}
        ledger = SimpleNamespace(cursor=7)
        desk = SimpleNamespace(prompts=prompts, stock=stock, changed=Signal(), ledger=ledger, training=True)
        loop = asyncio.create_task(stock_loop(desk, Waits()))
        await asyncio.wait_for(desk.changed.wait(), 10)
        loop.cancel()
        return stock

    assert set(asyncio.run(scenario())) >= {7, 8}
    assert made_in[0] != threading.get_ident()


def test_no_server_for_server_wait_s_ends_the_loop():
    async def scenario(stage):
        stage.desk.coordinator.drop_server(stage.desk.fleet.servers[b"north"], "left", fault=False)
        stage.desk.clock.now_s += 31.0
        with pytest.raises(RunStopped, match="no rollout server"):
            await lease_loop(stage.desk.coordinator, stage.waits, tick_s=1.0)

    on_stage(scenario, server_wait_s=30.0)


# canaries

CANARIES = np.arange(6, dtype=np.int32).reshape(2, 3)


@pytest.mark.parametrize("asked", [True, False])
def test_canaries_are_computed_after_the_weights_change_where_an_engine_asks_for_them(asked):
    async def scenario(stage):
        stage.desk.coordinator.canary_tokens = CANARIES
        stage.desk.join("south", canaries=asked)
        await stage.answer_all()
        async with stage.running(stage.form_batches):
            await asyncio.wait_for(stage.train(), 10)
        about = [line for line in stage.story if line.startswith(("optimizer", "canaries", "publish"))]
        if not asked:
            assert about == ["optimizer_step 1", "publish 1.1"]
            assert stage.publisher.canaries == [None]
            return
        assert about == ["optimizer_step 1", "canaries 1", "publish 1.1"]
        (canaries,) = stage.publisher.canaries
        assert canaries.tokens is CANARIES
        assert canaries.logprobs.tolist() == [[-1.0, -1.0]] * 2

    on_stage(scenario, max_steps=1)


def test_canaries_are_computed_for_versions_that_are_published_only():
    async def scenario(stage):
        desk = stage.desk
        desk.coordinator.canary_tokens = CANARIES
        desk.join("south", canaries=True)
        async with stage.running(stage.form_batches, lambda: accept_loop(desk.arrivals, stage.waits)):
            training = asyncio.ensure_future(stage.train())
            while not training.done():
                await stage.answer_all()
                await asyncio.sleep(0.1)
        assert [line for line in stage.story if line.startswith(("canaries", "publish"))] == [
            "canaries 2", "publish 1.2", "canaries 3", "publish 1.3"
        ]  # fmt: skip

    on_stage(scenario, max_steps=3, weight_sync_steps=2, max_staleness=3)


def test_the_first_version_has_canaries_whoever_is_there():
    async def scenario(stage):
        coordinator = stage.desk.coordinator
        assert await measure_canaries(coordinator, stage.trainer, stage.compute, always=True) is None, "no sequences"
        coordinator.canary_tokens = CANARIES
        assert await measure_canaries(coordinator, stage.trainer, stage.compute) is None
        first = await measure_canaries(coordinator, stage.trainer, stage.compute, always=True)
        assert first is not None
        assert first.logprobs.shape == (2, 2)

    on_stage(scenario)


# receive_loop


def hear(stage: Stage, *messages: object, peer: bytes = b"north"):
    """Let messages arrive and be dealt with."""

    async def listen() -> None:
        for message in messages:
            stage.desk.channel.inbox.put_nowait((peer, message))
        async with stage.running(lambda: receive_loop(stage.desk.coordinator, stage.desk.arrivals)):
            await asyncio.sleep(1)

    return listen()


def test_pings_are_answered_and_their_status_kept():
    async def scenario(stage):
        stage.desk.clock.now_s += 3.0
        assert stage.desk.fleet.health(stage.desk.fleet.servers[b"north"], stage.desk.clock()) is Health.SUSPECT
        status = ServerStatus(samples_running=3)
        await hear(stage, Ping(sent_s=7.5, status=status))
        (pong,) = stage.desk.channel.to(b"north", Pong)
        assert pong.sent_s == 7.5
        server = stage.desk.fleet.servers[b"north"]
        assert (server.status, stage.desk.fleet.health(server, stage.desk.clock())) == (status, Health.HEALTHY)

    on_stage(scenario)


def test_a_hello_is_welcomed_and_whoever_says_none_is_asked_for_it():
    async def scenario(stage):
        await hear(stage, make_hello("south"), peer=b"south")
        assert len(stage.desk.channel.to(b"south", Welcome)) == 1
        await hear(stage, Ping(sent_s=0.0), Return(group_id="x", attempt=1, reason="?"), peer=b"stranger")
        refusals = stage.desk.channel.to(b"stranger", Refused)
        assert [refused.code for refused in refusals] == ["hello_required"] * 2
        assert refusals[0].reason == "say Hello first: this learner does not know the connection"
        stage.desk.channel.gone.add(b"stranger")
        await hear(stage, Ping(sent_s=0.0), peer=b"stranger")

    on_stage(scenario)


def test_a_lease_that_is_returned_goes_to_another():
    async def scenario(stage):
        stage.desk.pump()
        first, second, *_ = stage.desk.leases()
        await hear(
            stage,
            Return(group_id=first.group_id, attempt=1, reason="engine failed"),
            Return(group_id=second.group_id, attempt=1, reason="draining", fault=False),
        )
        entries = stage.desk.ledger.entries
        assert [(entries[s].state, entries[s].faults) for s in (0, 1)] == [(State.PENDING, 1), (State.PENDING, 0)]

    on_stage(scenario)


def test_nobody_can_return_the_lease_of_another():
    async def scenario(stage):
        stage.desk.pump()
        (lease, *_) = stage.desk.leases()
        stage.desk.join("evil", live=None)
        await hear(stage, Return(group_id=lease.group_id, attempt=1, reason="mine now"), peer=b"evil")
        assert stage.desk.ledger.entries[0].state is State.LEASED

    on_stage(scenario)


def test_a_version_that_is_live_frees_slots_and_wakes_the_others():
    async def scenario(stage):
        await stage.answer_all()
        async with stage.running(stage.form_batches):
            await stage.train()
        assert not stage.desk.ledger.can_grant()
        woken = asyncio.ensure_future(stage.desk.coordinator.changed.wait())
        await hear(stage, WeightsLive(version=Version(1, 1)))
        assert woken.done()
        assert stage.desk.ledger.can_grant()
        assert stage.desk.fleet.servers[b"north"].live == Version(1, 1)

    on_stage(scenario, max_steps=1)


@pytest.mark.parametrize("version", [Version(1, 1), Version(1, 40)])
def test_a_version_that_was_never_published_is_refused(version):
    async def scenario(stage):
        await hear(stage, WeightsLive(version=version))
        assert stage.desk.fleet.servers[b"north"].live == Version(1, 0)
        assert f"refused a message of north: live at {version}, which was never published" in (
            stage.desk.coordinator.notices
        )

    on_stage(scenario)


def test_an_orphaned_version_frees_nothing():
    async def scenario(stage):
        await hear(stage, WeightsLive(version=Version(7, 0)))
        assert stage.desk.fleet.servers[b"north"].live == Version(1, 0)

    on_stage(scenario)


def test_what_a_server_could_not_do_is_shown():
    async def scenario(stage):
        await hear(
            stage,
            WeightsFailed(version=Version(1, 3), reason="no room on /dev/shm"),
            Fault(code="malformed", reason="a message that is none"),
        )
        assert list(stage.desk.coordinator.notices) == [
            "north could not take version 1.3: no room on /dev/shm",
            "north: a message that is none",
        ]

    on_stage(scenario)


def test_a_draining_server_gets_nothing_more_and_its_goodbye_is_no_fault():
    async def scenario(stage):
        stage.desk.pump()
        held = len(stage.desk.leases())
        await hear(stage, Drain(reason="SIGTERM"))
        server = stage.desk.fleet.servers[b"north"]
        assert stage.desk.fleet.health(server, stage.desk.clock()) is Health.DRAINING
        assert server.samples == held * 4, "it finishes what it has"
        await hear(stage, Goodbye(reason="SIGTERM"))
        assert stage.desk.fleet.servers == {}
        assert {(e.state, e.faults) for e in stage.desk.ledger.entries.values()} == {(State.PENDING, 0)}
        assert "server north left: SIGTERM" in stage.desk.coordinator.notices

    on_stage(scenario)


def test_what_is_no_message_is_counted_and_the_server_stays():
    async def scenario(stage):
        lease = Lease(
            group_id="0" * 32, ordinal=0, sequence=0, attempt=1, purpose=Purpose.TRAIN, num_generations=1,
            sampling=answer_sampling(stage), seed=1, min_version=Version(1, 0),
            prompt_tokens=stage.desk.coordinator.prompts.row(0).prompt_tokens, row=answer_row(stage),
        )  # fmt: skip
        await hear(
            stage, MalformedMessage("frame 0 is no msgpack"), lease, Ack(group_id="x", attempt=1, status=AckStatus.OK)
        )
        assert stage.desk.coordinator.counters["malformed"] == 3
        assert list(stage.desk.coordinator.notices) == [
            "refused a message of north: frame 0 is no msgpack",
            "refused a message of north: Lease is not for a learner",
            "refused a message of north: Ack is not for a learner",
        ]
        assert b"north" in stage.desk.fleet.servers

    on_stage(scenario)


def answer_sampling(stage: Stage):
    stage.desk.pump()
    return stage.desk.leases()[0].sampling


def answer_row(stage: Stage):
    return stage.desk.channel.to(b"north", Lease)[0].row


def test_another_protocol_version_is_told_which_side_to_update():
    async def scenario(stage):
        await hear(stage, VersionMismatch("the message is of protocol version 9"), peer=b"new")
        (refused,) = stage.desk.channel.to(b"new", Refused)
        assert refused.code == "protocol_version"
        assert refused.reason == (
            f"the message is of protocol version 9; the learner speaks {PROTOCOL_VERSION}: update the older side"
        )

    on_stage(scenario)


# evaluate_loop


def test_a_pinned_evaluation_holds_newer_versions_back_while_it_lasts():
    async def scenario(stage):
        desk = stage.desk
        desk.coordinator.training = False
        stage.requests.put_nowait((0, True))
        async with stage.running(
            stage.evaluate,
            lambda: accept_loop(desk.arrivals, stage.waits),
            lambda: lease_loop(desk.coordinator, stage.waits, tick_s=1.0),
        ):
            await asyncio.sleep(1)
            assert stage.story == ["hold 0"]
            assert "evaluation" in [wait.name for wait in stage.waits.current()]
            for lease in desk.leases():
                desk.receive(answer(lease))
            await asyncio.wait_for(stage.requests.join(), 10)
        assert stage.story == ["hold 0", "release"]
        (evaluation,) = stage.recorder.evaluations
        assert (evaluation.policy_version, evaluation.done, evaluation.result().reward) == (0, True, 0.0)
        assert desk.coordinator.evaluation is None

    on_stage(scenario, eval_rows=3)


def test_evaluations_come_one_after_another():
    async def scenario(stage):
        desk = stage.desk
        desk.coordinator.training = False
        for request in ((0, False), (0, True)):
            stage.requests.put_nowait(request)
        async with stage.running(
            stage.evaluate,
            lambda: accept_loop(desk.arrivals, stage.waits),
            lambda: lease_loop(desk.coordinator, stage.waits, tick_s=1.0),
        ):
            for story in ([], ["hold 0"]):
                await asyncio.sleep(1)
                assert stage.story == story
                for lease in desk.leases():
                    desk.receive(answer(lease))
            await asyncio.wait_for(stage.requests.join(), 10)
        assert [evaluation.pinned for evaluation in stage.recorder.evaluations] == [False, True]

    on_stage(scenario, eval_rows=2)
