"""The server's loops against a learner that the test plays: connecting, leases, returns, cancels, reports."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from protocol.codec import encode
from protocol.errors import Refused as RefusedError
from protocol.messages import (
    Ack,
    AckStatus,
    Cancel,
    Drain,
    Fault,
    FinishReason,
    Goodbye,
    Group,
    Hello,
    Ping,
    Pong,
    Refused,
    Return,
    RewardStatus,
    WeightsFailed,
    WeightsLive,
    WeightsReady,
    Welcome,
)
from protocol.parts import PartAssembler
from protocol.testing import Faults
from protocol.versions import PROTOCOL_VERSION, Version
from rollout_server.loops import control_loop, heartbeat_loop
from rollout_server.rewards.base import RewardCall, Scores
from tests.factories import INITIAL, RUN_ID, make_lease, make_sampling
from tests.unit.rollout_server.serving import GROUP_S, FakeLearner, Served, serving
from tests.virtual_time import run_virtual

LIVENESS_S, HEARTBEAT_S = 5.0, 1.0
"""Defaults of Welcome."""

Scenario = Callable[[Served], Awaitable[None]]


def play(tmp_path: Path, scenario: Scenario, **options: Any) -> None:
    """Run a scenario with a server that is not welcomed yet."""

    async def main() -> None:
        async with serving(tmp_path, **options) as served:
            await scenario(served)

    try:
        run_virtual(main())
    except BaseExceptionGroup as group:  # of the server's TaskGroup: what failed in it is what the test is to show
        raise group.exceptions[0] from None


def play_welcomed(tmp_path: Path, scenario: Scenario, **options: Any) -> None:
    """Run a scenario with a server that works for the learner."""

    async def welcomed(served: Served) -> None:
        await served.learner.welcome()
        await taken_in(served)
        await scenario(served)

    play(tmp_path, welcomed, **options)


async def taken_in(served: Served) -> None:
    """Wait until the server has read the Welcome; takes no time."""
    while not served.parts.welcome.session:
        await asyncio.sleep(0)


def now_s() -> float:
    return asyncio.get_running_loop().time()


def ack(group: Group, status: AckStatus = AckStatus.OK, attempt: int | None = None) -> Ack:
    return Ack(group_id=group.group_id, attempt=group.attempt if attempt is None else attempt, status=status)


# --- connecting


def test_hello_introduces_the_server(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        hello = await served.learner.hears(Hello)
        assert hello.session
        assert (hello.server, hello.engine, hello.room, hello.vocab_size) == ("server-0", "scripted", 16, 32)
        assert hello.reward_functions == ("scripted",)
        assert (hello.run_id, hello.incarnation) == ("", 0)
        assert hello.live == INITIAL
        assert (hello.unacked, hello.in_flight) == ((), ())

    play(tmp_path, scenario)


def test_a_welcome_for_another_session_is_not_ours(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        hello = await served.learner.hears(Hello)
        served.learner.send(Welcome(session="another", run_id="another", incarnation=9))
        served.learner.send(Welcome(session=hello.session, run_id=RUN_ID, incarnation=2))
        await served.learner.hears(Ping)
        assert (served.parts.welcome.run_id, served.parts.welcome.incarnation) == (RUN_ID, 2)

    play(tmp_path, scenario)


@pytest.mark.parametrize("code", ["model", "tokenizer", "reward_functions", "protocol_version"])
def test_a_refused_server_ends_and_says_what_the_learner_said(tmp_path: Path, code: str) -> None:
    async def scenario(served: Served) -> None:
        control = asyncio.create_task(control_loop(served.parts))
        await served.learner.hears(Hello)
        served.learner.send(Refused(code=code, reason="give both the same --model"))
        text = rf"the learner at memory refused this server \({code}\): give both the same --model"
        with pytest.raises(RefusedError, match=text):
            await control

    play(tmp_path, scenario, loops=())


def test_a_welcomed_server_can_be_dismissed(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        control = asyncio.create_task(control_loop(served.parts))
        await served.learner.welcome()
        served.learner.send(Refused(code="name_in_use", reason="another server named server-0 has joined"))
        with pytest.raises(RefusedError, match=r"name_in_use.*another server named server-0 has joined"):
            await control

    play(tmp_path, scenario, loops=())


def test_a_learner_of_another_protocol_version_ends_the_server(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        control = asyncio.create_task(control_loop(served.parts))
        await served.learner.hears(Hello)
        answer = Refused(code="protocol_version", reason="", protocol_version=PROTOCOL_VERSION + 1)
        served.learner.send_bytes(*map(bytes, encode(answer)))
        with pytest.raises(RefusedError, match=f"version {PROTOCOL_VERSION + 1}.*update the older side"):
            await control

    play(tmp_path, scenario, loops=())


def test_hello_is_said_again_over_fresh_connections_until_somebody_answers(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        first = await served.learner.hears(Hello)
        peer, begun_s = served.learner.peer, now_s()
        second = await served.learner.hears(Hello)
        assert now_s() == pytest.approx(begun_s + LIVENESS_S)
        assert first.session != second.session
        assert served.learner.peer != peer
        served.learner.send(Welcome(session=second.session, run_id=RUN_ID, incarnation=1))
        await served.learner.hears(Ping)

    play(tmp_path, scenario)


def test_what_is_no_answer_to_hello_is_counted_and_waited_out(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        hello = await served.learner.hears(Hello)
        served.learner.send_bytes(b"garbage")
        served.learner.send(Welcome(session=hello.session, run_id=RUN_ID, incarnation=1))
        status = (await served.learner.hears(Ping)).status
        assert status is not None
        assert status.malformed == 1

    play(tmp_path, scenario)


def test_a_leftover_learner_is_waited_out(tmp_path: Path) -> None:
    """Its incarnation is lower than what this server has seen: the right learner will take its place."""

    async def scenario(served: Served) -> None:
        hello = await served.learner.hears(Hello)
        served.learner.send(Refused(code="incarnation", reason="it has worked for incarnation 3; this is 2"))
        again = await served.learner.welcome(incarnation=3)
        assert again.session != hello.session
        await served.learner.hears(Ping)

    play(tmp_path, scenario)


# --- connecting again


async def one_unacked_one_in_flight(served: Served) -> tuple[Group, str]:
    """Let the server finish group 0 and begin group 1."""
    served.learner.send(make_lease(ordinal=0))
    group = await served.learner.hears(Group)
    lease = make_lease(ordinal=1)
    served.learner.send(lease)
    await asyncio.sleep(0.1)
    return group, lease.group_id


def test_a_learner_that_knows_us_not_hears_hello_with_all_we_hold(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        first = await served.learner.welcome()
        unacked, in_flight = await one_unacked_one_in_flight(served)
        old_peer = served.learner.peer
        served.learner.send(Refused(code="hello_required", reason="say Hello first"))
        hello = await served.learner.hears_next(Hello)
        assert served.learner.peer != old_peer, "a fresh connection"
        assert hello.session != first.session
        assert (hello.run_id, hello.incarnation) == (RUN_ID, 1)
        assert hello.unacked == (unacked.group_id,)
        assert hello.in_flight == (in_flight,)

    play(tmp_path, scenario)


def test_silence_of_the_learner_makes_the_server_connect_again(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        unacked, in_flight = await one_unacked_one_in_flight(served)
        served.learner.send(Pong(sent_s=0.0))
        heard_s = now_s()
        hello = await served.learner.hears(Hello)
        assert now_s() == pytest.approx(heard_s + LIVENESS_S)
        assert hello.unacked == (unacked.group_id, in_flight), "the second one was finished meanwhile"
        assert hello.in_flight == ()

    play_welcomed(tmp_path, scenario)


def test_any_message_keeps_the_connection(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        for _ in range(5):
            await asyncio.sleep(0.9 * LIVENESS_S)
            served.learner.send(Pong(sent_s=0.0))
        await served.learner.hears_nothing_for(0.9 * LIVENESS_S)
        assert sum(isinstance(message, Hello) for message in served.learner.heard) == 1

    play_welcomed(tmp_path, scenario)


def test_what_is_finished_is_sent_again_and_what_is_kept_goes_on(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        unacked, in_flight = await one_unacked_one_in_flight(served)
        served.learner.send(Refused(code="hello_required", reason="say Hello first"))
        await served.learner.welcome(keep=[unacked.group_id, in_flight], incarnation=2)
        again = await served.learner.hears_next(Group)
        assert again.group_id == unacked.group_id
        assert np.array_equal(again.completion_tokens, unacked.completion_tokens)
        other = await served.learner.hears_next(Group)
        assert other.group_id == in_flight
        assert now_s() == pytest.approx(2 * GROUP_S), "it went on through the reconnect"

    play_welcomed(tmp_path, scenario)


def test_what_the_learner_no_longer_wants_is_forgotten_and_aborted(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        await one_unacked_one_in_flight(served)
        assert served.engine.status().samples_running == 4
        served.learner.send(Refused(code="hello_required", reason="say Hello first"))
        await served.learner.welcome(keep=[])
        await served.learner.hears_nothing_for(2 * GROUP_S)
        assert served.engine.status().samples_running == 0
        assert (served.parts.book.in_flight, served.parts.book.unacked) == ({}, {})

    play_welcomed(tmp_path, scenario)


def test_a_hello_that_was_lost_with_its_learner_is_said_to_the_next_one(tmp_path: Path) -> None:
    """The next learner answers heartbeats, so there is no silence that would end the wait for a Welcome."""

    async def scenario(served: Served) -> None:
        served.learner.send(Refused(code="hello_required", reason="say Hello first"))
        lost = await served.learner.hears(Hello)
        await served.learner.hears(Ping)
        served.learner.send(Refused(code="hello_required", reason="say Hello first"))
        begun_s = now_s()
        hello = await served.learner.hears_next(Hello)
        assert hello.session != lost.session
        assert now_s() - begun_s < HEARTBEAT_S

    play_welcomed(tmp_path, scenario)


def test_a_group_finished_while_cut_off_arrives_once_after_it(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        lease = make_lease()
        served.learner.send(lease)
        await asyncio.sleep(GROUP_S / 2)
        served.network.cut("server-0")
        await asyncio.sleep(2 * GROUP_S)
        assert served.network.witness.cut > 0
        assert list(served.parts.book.unacked) == [lease.group_id]
        served.network.heal("server-0")
        hello = await served.learner.welcome(keep=[lease.group_id])
        assert hello.unacked == (lease.group_id,)
        group = await served.learner.hears_next(Group)
        served.learner.send(ack(group))
        await served.learner.hears_nothing_for(1.0)
        assert not served.parts.book.unacked

    play_welcomed(tmp_path, scenario)


def test_another_run_means_other_weights(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.send(Refused(code="hello_required", reason="say Hello first"))
        hello = await served.learner.welcome(run_id="another-run", incarnation=1)
        assert hello.run_id == RUN_ID, "by which the learner knows that our weights are not its own"
        served.learner.send(Refused(code="hello_required", reason="say Hello first"))
        assert (await served.learner.hears(Hello)).run_id == "another-run"

    play_welcomed(tmp_path, scenario)


# --- leases


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
        await served.learner.hears_nothing_for(2 * GROUP_S)
        assert served.engine.status().samples_running == 0
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

    play_welcomed(tmp_path, scenario)


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

    async def score(self, call: RewardCall) -> Scores:
        await asyncio.sleep(self._seconds)
        return Scores(
            values=np.array([[1.0 if status == RewardStatus.OK else np.nan] for status in self._statuses], np.float32),
            statuses=np.array([[status] for status in self._statuses], np.uint8),
            seconds=np.zeros((len(call.completions), 1), np.float32),
            notes=(),
        )


# --- what is no message, and what is not for a server


def test_bytes_that_are_no_message_are_counted_and_told_and_the_server_lives_on(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.send_bytes(b"\xc1 garbage")
        fault = await served.learner.hears_next(Fault)
        assert fault.code == "malformed"
        served.learner.send(make_lease())
        await served.learner.hears(Group)
        status = (await served.learner.hears(Ping)).status
        assert status is not None
        assert status.malformed == 1

    play_welcomed(tmp_path, scenario)


def test_a_message_in_the_wrong_direction_is_told(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.send(Return(group_id="0" * 32, attempt=1, reason="?"))
        fault = await served.learner.hears_next(Fault)
        assert (fault.code, fault.reason) == ("malformed", "Return is not for a rollout server")
        assert served.parts.malformed == 1

    play_welcomed(tmp_path, scenario)


@pytest.mark.parametrize(
    "manifest",
    [
        b"{}",
        b'{"version": [1, 2], "algorithm": "xxh3_128", "file_bytes": -1, "tensors": []}',
        b"not even JSON",
    ],
)
def test_weights_announced_with_a_manifest_that_is_none_are_refused(tmp_path: Path, manifest: bytes) -> None:
    async def scenario(served: Served) -> None:
        ready = WeightsReady(version=Version(1, 2), manifest=np.frombuffer(manifest, np.uint8), addresses=())
        served.learner.send(ready)
        assert (await served.learner.hears_next(Fault)).code == "malformed"
        assert served.parts.malformed == 1
        await served.learner.hears(Ping)

    play_welcomed(tmp_path, scenario)


def test_faults_of_the_learner_and_its_goodbye_are_only_noted(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.send(Fault(code="?", reason="?"), Goodbye(reason="it may come back"))
        hello = await served.learner.hears(Hello)
        assert hello.run_id == RUN_ID
        assert now_s() == pytest.approx(LIVENESS_S), "after the usual silence it looks for the next learner"
        assert not served.parts.stop.is_set()

    play_welcomed(tmp_path, scenario)


# --- the end


def test_when_the_run_is_over_the_server_ends_and_takes_no_more(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.send(Drain(reason="all 10 steps are trained"), make_lease())
        answer = await served.learner.hears_next(Return)
        assert (answer.reason, answer.fault) == ("draining", False)
        assert served.parts.stop.is_set()
        assert served.parts.stop_reason == "the learner ends the run: all 10 steps are trained"

    play_welcomed(tmp_path, scenario)


def test_the_first_reason_to_end_is_the_one_that_is_told(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.parts.end("SIGTERM")
        served.learner.send(Drain(reason="all 10 steps are trained"))
        await served.learner.hears(Ping)
        assert served.parts.stop_reason == "SIGTERM"

    play_welcomed(tmp_path, scenario)


# --- reports and heartbeats


def test_what_became_of_weights_is_told_as_it_happens(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        reports = [
            WeightsFailed(version=Version(1, 1), reason="no room"),
            WeightsLive(version=Version(1, 1), transfer_s=0.1, verify_s=0.1, pause_s=0.1),
        ]
        for report in reports:
            served.parts.weights.reports.put_nowait(report)
        assert (await served.learner.hears_next(WeightsFailed)).reason == "no room"
        assert (await served.learner.hears_next(WeightsLive)).version == Version(1, 1)

    play_welcomed(tmp_path, scenario)


def test_weights_of_a_learner_that_is_gone_are_not_reported_to_the_next_one(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        await served.learner.welcome(incarnation=2)
        await taken_in(served)
        for incarnation in (1, 2):
            version = Version(incarnation, 4)
            served.parts.weights.reports.put_nowait(
                WeightsLive(version=version, transfer_s=0.1, verify_s=0.1, pause_s=0.1)
            )
        assert (await served.learner.hears_next(WeightsLive)).version == Version(2, 4)

    play(tmp_path, scenario)


def test_a_heartbeat_a_second_shows_how_the_server_does(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.send(*[make_lease(ordinal=ordinal, num_generations=8) for ordinal in range(3)])
        begun_s = now_s()
        statuses = []
        for _ in range(3):
            ping = await served.learner.hears(Ping)
            served.learner.send(Pong(sent_s=ping.sent_s))
            statuses.append(ping.status)
        assert now_s() == pytest.approx(begun_s + 3 * HEARTBEAT_S, abs=HEARTBEAT_S)
        busy, later, idle = statuses
        assert busy is not None
        assert (busy.samples_running, busy.samples_waiting, busy.groups_in_flight) == (16, 8, 3)
        assert later is not None
        assert (later.samples_running, later.samples_waiting, later.groups_unacked) == (8, 0, 2)
        assert idle is not None
        assert (idle.groups_in_flight, idle.groups_unacked, idle.groups_finished) == (0, 3, 3)
        assert idle.tokens_generated == 3 * 8 * 8

    play_welcomed(tmp_path, scenario, token_s=1.4 * HEARTBEAT_S / 8)


def test_there_is_no_heartbeat_before_the_welcome(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10 * HEARTBEAT_S):
                await served.learner.hears(Ping)

    play(tmp_path, scenario, loops=(heartbeat_loop,))


@pytest.mark.parametrize("seed", range(5))
def test_every_lease_is_answered_whatever_the_network_loses_and_doubles(tmp_path: Path, seed: int) -> None:
    """A learner that leases again what was not answered gets every group, each under an attempt it asked for."""

    async def scenario(served: Served) -> None:
        served.network.random.seed(seed)
        served.network.faults = Faults(delay_s=0.05, jitter_s=0.1, loss=0.1, duplication=0.1)
        answered = await lease_until_answered(served.learner, num_groups=12)
        assert answered == set(range(12))
        assert served.network.witness.lost > 0
        assert served.network.witness.duplicated > 0

    play(tmp_path, scenario)


async def lease_until_answered(learner: FakeLearner, *, num_groups: int) -> set[int]:
    """Play a simple learner: welcome every Hello, lease what is missing, acknowledge what comes."""
    answered: set[int] = set()
    welcomed, attempt = b"", 0
    while len(answered) < num_groups:
        message = await learner.hears(object)
        if isinstance(message, Hello):
            welcomed = learner.peer
            learner.send(Welcome(session=message.session, run_id=RUN_ID, incarnation=1))
        elif learner.peer != welcomed:
            learner.send(Refused(code="hello_required", reason="say Hello first"))
        elif isinstance(message, Ping):
            attempt += 1
            learner.send(Pong(sent_s=message.sent_s))
            learner.send(*[make_lease(ordinal=o, attempt=attempt) for o in range(num_groups) if o not in answered])
        elif isinstance(message, Group):
            assert message.attempt <= attempt
            assert FinishReason.ABORT not in message.finish_reasons.tolist()
            answered.add(message.ordinal)
            learner.send(ack(message))
    return answered
