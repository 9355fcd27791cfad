"""How a server finds its learner, and finds it again: Hello, Welcome, Refused, silence."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from protocol.codec import encode
from protocol.errors import Refused as RefusedError
from protocol.messages import (
    Group,
    Hello,
    Ping,
    Pong,
    Refused,
    Welcome,
)
from protocol.versions import PROTOCOL_VERSION
from rollout_server.loops import control_loop
from tests.factories import INITIAL, RUN_ID, make_lease
from tests.unit.rollout_server.serving import (
    GROUP_S,
    HEARTBEAT_S,
    LIVENESS_S,
    Served,
    ack,
    now_s,
    play,
    play_welcomed,
)


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


def test_a_connection_that_breaks_before_the_welcome_is_made_anew_at_once(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        hello = await served.learner.hears(Hello)
        served.learner.send(Refused(code="incarnation", reason="it has worked for incarnation 3; this is 2"))
        await asyncio.sleep(0.01)
        served.network.reset("server-0")
        begun_s = asyncio.get_running_loop().time()
        again = await served.learner.welcome(incarnation=3)
        assert again.session != hello.session
        assert asyncio.get_running_loop().time() - begun_s < 0.1, "not only after liveness_s"

    play(tmp_path, scenario)


def test_a_welcomed_connection_that_breaks_is_made_anew_at_once(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        hello = await served.learner.welcome()
        first = served.learner.peer
        await asyncio.sleep(0.01)
        served.network.reset("server-0")
        begun_s = asyncio.get_running_loop().time()
        again = await served.learner.welcome()
        assert (again.session != hello.session, served.learner.peer != first) == (True, True)
        assert asyncio.get_running_loop().time() - begun_s < 0.1

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
        await asyncio.sleep(0.01)
        assert served.engine.status().samples_running == 0, "its room is free at once"
        await served.learner.hears_nothing_for(2 * GROUP_S)
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


def test_another_run_means_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(served: Served) -> None:
        runs_left: list[str] = []
        monkeypatch.setattr(served.parts.weights, "new_run", lambda: runs_left.append(served.parts.welcome.run_id))
        for run_id in (RUN_ID, "another-run"):
            served.learner.send(Refused(code="hello_required", reason="say Hello first"))
            hello = await served.learner.welcome(run_id=run_id)
            assert hello.run_id == RUN_ID, "by which the learner knows whose weights ours are"
        await served.learner.hears(Ping)
        assert runs_left == [RUN_ID]

    play_welcomed(tmp_path, scenario)
