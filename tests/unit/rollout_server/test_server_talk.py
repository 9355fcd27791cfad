"""The rest of what a server says and hears: what is no message, the end, reports, heartbeats, a bad network."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from protocol.messages import (
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
    WeightsFailed,
    WeightsLive,
    WeightsReady,
    Welcome,
)
from protocol.testing import Faults
from protocol.versions import Version
from rollout_server.loops import heartbeat_loop
from tests.factories import RUN_ID, make_lease
from tests.unit.rollout_server.serving import (
    HEARTBEAT_S,
    LIVENESS_S,
    FakeLearner,
    Served,
    ack,
    now_s,
    play,
    play_welcomed,
    taken_in,
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
        for beat in (1, 2, 3):  # those with every group come in between
            ping = await served.learner.hears(Ping, lambda _, due_s=begun_s + beat * HEARTBEAT_S: now_s() >= due_s)
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


def test_with_every_group_a_server_says_how_many_samples_it_has_left(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        served.learner.send(*[make_lease(ordinal=ordinal, num_generations=8) for ordinal in range(3)])
        for left in (8, 8, 0):  # of 16 places two groups leave theirs together, and the third takes one's
            await served.learner.hears_next(Group)
            ping = await served.learner.hears(Ping)
            assert ping.status is not None
            assert ping.status.samples_running + ping.status.samples_waiting == left

    play_welcomed(tmp_path, scenario, token_s=0.4 * HEARTBEAT_S / 8)


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
