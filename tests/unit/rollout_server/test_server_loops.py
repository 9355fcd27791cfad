"""What a server does with leases: groups, returns, cancels, and attempts that overtake each other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest

from protocol.messages import (
    AckStatus,
    Cancel,
    FinishReason,
    Group,
    Ping,
    Return,
    RewardStatus,
)
from protocol.parts import PartAssembler
from protocol.versions import Version
from rollout_server.rewards.base import RewardCall, Scores
from tests.factories import make_lease, make_sampling
from tests.unit.rollout_server.serving import (
    GROUP_S,
    Served,
    ack,
    now_s,
    play_welcomed,
)


def test_a_lease_becomes_a_group_that_is_kept_until_its_ack(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        lease = make_lease(ordinal=3, sequence=7, attempt=2, num_generations=5)
        served.learner.send(lease)
        group = await served.learner.hears_next(Group)
        assert now_s() == pytest.approx(GROUP_S)
        assert (group.group_id, group.ordinal, group.sequence, group.attempt) == (lease.group_id, 3, 7, 2)
        assert group.completion_lengths.tolist() == [8] * 5
        assert group.reward_names == ("scripted",)
        assert set(group.rewards.tolist()) <= {0.0, 1.0}
        assert list(served.parts.book.unacked) == [lease.group_id]
        served.learner.send(ack(group))
        await asyncio.sleep(0.01)
        assert not served.parts.book.unacked

    play_welcomed(tmp_path, scenario)


def test_leases_are_worked_on_side_by_side(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.send(*[make_lease(ordinal=ordinal) for ordinal in range(4)])
        heard = {(await served.learner.hears_next(Group)).ordinal for _ in range(4)}
        assert heard == {0, 1, 2, 3}
        assert now_s() == pytest.approx(GROUP_S)

    play_welcomed(tmp_path, scenario)


def test_the_same_lease_twice_is_one_group_under_its_newest_attempt(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.send(make_lease(attempt=1))
        await asyncio.sleep(GROUP_S / 4)
        served.learner.send(make_lease(attempt=1), make_lease(attempt=2))
        group = await served.learner.hears_next(Group)
        assert group.attempt == 2
        assert now_s() == pytest.approx(GROUP_S)
        await served.learner.hears_nothing_for(2 * GROUP_S)

    play_welcomed(tmp_path, scenario)


@pytest.mark.parametrize("live", [None, Version(1, 3)])
def test_a_lease_for_newer_weights_comes_back_without_fault(tmp_path: Path, live: Version | None) -> None:
    async def scenario(served: Served) -> None:
        lease = make_lease(attempt=2, min_version=Version(1, 4))
        served.learner.send(lease)
        answer = await served.learner.hears_next(Return)
        assert (answer.group_id, answer.attempt, answer.fault) == (lease.group_id, 2, False)
        assert answer.reason == f"live at {live}, the lease asks for {Version(1, 4)}"
        assert served.engine.status().samples_running == 0

    play_welcomed(tmp_path, scenario, live=live)


def test_a_lease_for_the_live_version_or_an_older_one_is_taken(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.send(make_lease(ordinal=0, min_version=Version(1, 3)), make_lease(ordinal=1))
        assert [(await served.learner.hears_next(Group)).ordinal for _ in range(2)] == [0, 1]

    play_welcomed(tmp_path, scenario, live=Version(1, 3))


def test_a_cancelled_group_is_aborted_and_never_answered(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        lease = make_lease()
        served.learner.send(lease)
        await asyncio.sleep(GROUP_S / 4)
        assert served.engine.status().samples_running == 4
        served.learner.send(Cancel(group_id=lease.group_id, attempt=1, reason="answered"))
        await asyncio.sleep(0.01)
        assert served.engine.status().samples_running == 0, "its room is free at once"
        await served.learner.hears_nothing_for(2 * GROUP_S)
        assert (served.parts.book.in_flight, served.parts.book.unacked) == ({}, {})

    play_welcomed(tmp_path, scenario)


def test_a_group_cancelled_while_it_is_scored_is_never_answered(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        lease = make_lease()
        served.learner.send(lease)
        await asyncio.sleep(1.5 * GROUP_S)
        assert served.engine.status().samples_running == 0
        assert list(served.parts.book.in_flight) == [lease.group_id]
        served.learner.send(Cancel(group_id=lease.group_id, attempt=1, reason="answered"))
        await served.learner.hears_nothing_for(3 * GROUP_S)
        assert not served.parts.book.unacked

    play_welcomed(tmp_path, scenario, scorer=FakeScorer(seconds=GROUP_S))


def test_cancelling_a_finished_or_an_unknown_group_is_no_error(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.send(make_lease())
        group = await served.learner.hears_next(Group)
        await served.learner.hears(Ping)  # right behind it
        for group_id in (group.group_id, "0" * 32):
            served.learner.send(Cancel(group_id=group_id, attempt=1, reason="answered"))
        await served.learner.hears(Ping)
        assert not served.parts.book.unacked

    play_welcomed(tmp_path, scenario)


def test_a_group_cancelled_and_leased_again_at_once_is_sampled_anew(tmp_path: Path) -> None:
    """The work of the first lease still winds down when the second one comes: what it leaves is nobody's."""

    async def scenario(served: Served) -> None:
        lease = make_lease(attempt=1)
        served.learner.send(lease)
        await asyncio.sleep(GROUP_S / 4)
        served.learner.send(
            Cancel(group_id=lease.group_id, attempt=1, reason="given to another"), make_lease(attempt=2)
        )
        group = await served.learner.hears_next(Group)
        assert group.attempt == 2
        assert FinishReason.ABORT not in group.finish_reasons.tolist()
        assert now_s() == pytest.approx(GROUP_S / 4 + GROUP_S)
        await served.learner.hears_nothing_for(2 * GROUP_S)
        assert scorer.calls == 1, "what was aborted is not scored"

    scorer = FakeScorer()
    play_welcomed(tmp_path, scenario, scorer=scorer)


def test_a_stale_ack_of_an_earlier_answer_leaves_the_newer_lease_alone(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.send(make_lease(attempt=1))
        group = await served.learner.hears_next(Group)
        served.learner.send(ack(group, AckStatus.STALE), make_lease(attempt=2), ack(group, AckStatus.STALE))
        assert (await served.learner.hears_next(Group)).attempt == 2

    play_welcomed(tmp_path, scenario)


def test_a_failure_of_the_engine_returns_the_lease_as_a_fault(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        lease = make_lease(attempt=1)
        served.learner.send(lease)
        await asyncio.sleep(GROUP_S / 4)
        served.learner.send(make_lease(attempt=2))
        answer = await served.learner.hears_next(Return)
        assert (answer.group_id, answer.attempt, answer.fault) == (lease.group_id, 2, True)
        assert answer.reason == f"group {lease.group_id}: as scripted"
        assert not served.parts.book.in_flight
        served.learner.send(make_lease(attempt=3))
        assert (await served.learner.hears_next(Return)).attempt == 3, "it may be leased to us again"

    play_welcomed(tmp_path, scenario, fail_probability=1.0)


def test_a_row_that_is_none_returns_the_lease_as_a_fault(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        lease = msgspec.structs.replace(make_lease(), row=np.frombuffer(b'{"prompt": 3}', np.uint8))
        served.learner.send(lease)
        answer = await served.learner.hears_next(Return)
        assert answer.fault
        assert f"row of lease {lease.group_id} (ordinal 0)" in answer.reason
        assert not served.parts.book.in_flight

    play_welcomed(tmp_path, scenario)


def test_a_large_group_travels_in_parts(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        sampling = make_sampling(max_completion_length=40_000)
        served.learner.send(make_lease(num_generations=8, sampling=sampling))
        assembler, whole = PartAssembler(), None
        while whole is None:
            part = await served.learner.hears_next(Group)
            assert part.num_parts > 1
            whole = assembler.add(part)
        assert whole.completion_lengths.tolist() == [40_000] * 8

    play_welcomed(tmp_path, scenario, mean_length=40_000, token_s=1e-6)


def test_reward_timeouts_and_errors_are_counted_and_shown(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.send(make_lease(num_generations=4))
        group = await served.learner.hears_next(Group)
        assert group.scored.tolist() == [1, 0, 0, 1]
        status = (await served.learner.hears(Ping)).status
        assert status is not None
        assert (status.reward_timeouts, status.reward_errors) == (1, 1)

    statuses = (RewardStatus.OK, RewardStatus.TIMEOUT, RewardStatus.ERROR, RewardStatus.OK)
    play_welcomed(tmp_path, scenario, scorer=FakeScorer(statuses=statuses))


class FakeScorer:
    """Takes its time and gives statuses as told."""

    names = ("fake",)

    def __init__(self, *, seconds: float = 0.0, statuses: tuple[RewardStatus, ...] = (RewardStatus.OK,) * 4) -> None:
        self._seconds = seconds
        self._statuses = statuses
        self.calls = 0

    async def score(self, call: RewardCall) -> Scores:
        self.calls += 1
        await asyncio.sleep(self._seconds)
        return Scores(
            values=np.array([[1.0 if status == RewardStatus.OK else np.nan] for status in self._statuses], np.float32),
            statuses=np.array([[status] for status in self._statuses], np.uint8),
            seconds=np.zeros((len(call.completions), 1), np.float32),
            notes=(),
        )
