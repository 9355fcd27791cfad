"""Work and leases: what a group task makes belongs to the lease it began with, whatever became of the group since."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from learner.tuning.virtual_time import run_virtual
from protocol.loop_lag import LoopLag
from protocol.messages import Ack, AckStatus, Fault, FinishReason, Group, Lease, Ping, Sampling, Welcome
from protocol.testing import MemoryNetwork
from protocol.waits import Waits
from rollout_server.config import ScriptedOptions
from rollout_server.engines.base import StagedWeights
from rollout_server.engines.scripted import ScriptedEngine
from rollout_server.leases import LeaseBook
from rollout_server.loops import Parts, handle, welcomed
from rollout_server.scorers import ScriptedScorer
from rollout_server.weights import WeightsReceiver
from tests.factories import INITIAL, RUN_ID, make_group, make_lease


async def _answers_to(
    lease: Lease, *again: object, token_s: float = 1.0, decode: Callable[[Sequence[int]], str] = lambda tokens: ""
) -> list[Group]:
    """Let a server work on a lease for a while, then hear `again` in one burst; return the groups it sends."""
    network = MemoryNetwork()
    learner, dialer = network.listener(), network.dialer("server")
    weights = SimpleNamespace(welcomed=lambda: None)
    groups: list[Group] = []
    async with ScriptedEngine(ScriptedOptions(token_s=token_s, length_sigma=0.0, mean_length=5), room=4) as engine:
        await engine.load_weights(StagedWeights(version=INITIAL, path=Path()))
        async with asyncio.TaskGroup() as tasks:
            parts = Parts(
                name="server", address="memory", dialer=dialer, engine=engine, scorer=ScriptedScorer(),
                reward_weights=(1.0,), decode=decode, weights=cast("WeightsReceiver", weights),
                tasks=tasks, waits=Waits(), lag=LoopLag(),
            )  # fmt: skip
            parts.welcome = Welcome(session="1", run_id=RUN_ID, incarnation=1)
            handle(parts, lease)
            await asyncio.sleep(2.5 * token_s)
            for message in again:
                welcomed(parts, message) if isinstance(message, Welcome) else handle(parts, message)
    for _ in range(network.witness.sent):
        _, message = await learner.recv()
        assert isinstance(message, Group | Ping)
        if isinstance(message, Group):
            groups.append(message)
    return groups


def test_what_an_abort_leaves_does_not_answer_the_lease_that_follows_it() -> None:
    lease = make_lease()
    another_incarnation = Welcome(session="2", run_id=RUN_ID, incarnation=2, keep=())

    (group,) = run_virtual(_answers_to(lease, another_incarnation, make_lease()))

    assert (group.finish_reasons != FinishReason.ABORT).all()
    assert group.scored.all()


def test_tokens_become_text_on_a_thread_of_their_own() -> None:
    threads: list[int] = []

    def decode(tokens: Sequence[int]) -> str:
        threads.append(threading.get_ident())
        return ""

    asyncio.run(_answers_to(make_lease(), token_s=0.001, decode=decode))

    assert threads
    assert threading.get_ident() not in threads, "64 long completions would hold the loop (I9)"


def test_a_late_ack_does_not_end_work_that_is_under_way() -> None:
    lease = make_lease(attempt=2)
    late = Ack(group_id=lease.group_id, attempt=1, status=AckStatus.DUPLICATE)

    (group,) = run_virtual(_answers_to(lease, late))

    assert group.attempt == 2


def test_work_under_way_answers_the_newest_attempt() -> None:
    book, first, second = LeaseBook(), make_lease(attempt=1), make_lease(attempt=2)

    assert book.accept(first)
    assert not book.accept(second)
    finished = book.finish(first, make_group(attempt=1))

    assert finished is not None
    assert finished.attempt == 2


def test_work_that_was_dropped_has_nothing_to_finish() -> None:
    book, first, second = LeaseBook(), make_lease(attempt=1), make_lease(attempt=2)
    book.accept(first)
    book.drop(first.group_id)
    assert book.accept(second)

    assert book.finish(first, make_group()) is None
    assert book.wants(second)
    assert book.in_flight == {second.group_id: second}


def test_an_engine_that_cuts_completions_says_so_once_a_connection() -> None:
    async def scenario() -> list[Fault]:
        network = MemoryNetwork()
        learner, dialer = network.listener(), network.dialer("server")
        weights = SimpleNamespace(welcomed=lambda: None)
        async with ScriptedEngine(ScriptedOptions(token_s=0.1, mean_length=2), room=8) as engine:
            engine._info = dataclasses.replace(engine.info, max_length=10)
            await engine.load_weights(StagedWeights(version=INITIAL, path=Path()))
            async with asyncio.TaskGroup() as tasks:
                parts = Parts(
                    name="server", address="memory", dialer=dialer, engine=engine, scorer=ScriptedScorer(),
                    reward_weights=(1.0,), decode=lambda tokens: "", weights=cast("WeightsReceiver", weights),
                    tasks=tasks, waits=Waits(), lag=LoopLag(),
                )  # fmt: skip
                welcomed(parts, Welcome(session="1", run_id=RUN_ID, incarnation=1))
                sampling = Sampling(max_completion_length=8, stop_token_ids=(2,))
                for ordinal, prompt in enumerate(([3, 4], [3, 4, 5], [3, 4, 5])):
                    handle(parts, make_lease(ordinal=ordinal, prompt_tokens=prompt, sampling=sampling))
        heard = [await learner.recv() for _ in range(network.witness.sent)]
        return [message for _, message in heard if isinstance(message, Fault)]

    (fault,) = run_virtual(scenario())
    assert fault.code == "max_model_length"
    assert "a prompt of 3 tokens with completions of 8 (max_completion_length) was leased" in fault.reason
