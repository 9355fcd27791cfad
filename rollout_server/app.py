"""The server process: builds the parts in order, runs one TaskGroup, ends in one place.

Order matters: reward workers are spawned first (before any socket or thread exists that they could inherit), then the
engine loads, then sockets open. Shutdown: drain -> Return what is left -> Goodbye -> loops end -> `async with` closes
sockets, engine and workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence

from protocol.channel import check_address, dial
from protocol.logs import configure_logging, event
from protocol.loop_lag import LoopLag, loop_lag_gauge
from protocol.messages import Drain, Goodbye, Return
from protocol.security import PLAIN, Security, load_security
from protocol.tasks import on_signals, run_loop
from protocol.waits import Waits, WaitTimeout
from protocol.weights.staging import default_staging_directory
from rollout_server.config import ServerConfig
from rollout_server.engines import create_engine
from rollout_server.loops import Parts, control_loop, heartbeat_loop, report_loop
from rollout_server.relay import Relay
from rollout_server.scorers import Scorer, ScriptedScorer
from rollout_server.weights import WeightsReceiver

log = logging.getLogger(__name__)


def run(config: ServerConfig) -> int:
    """Serve until the learner ends the run or a signal comes; return the exit code.

    Raises:
        ConfigError: an address, a key file, a model, a reward function is wrong.
        Refused: the learner's run and this server do not fit.
    """
    security = load_security(
        key=config.key, learner_key=config.learner_key, allowed_keys=config.allowed_keys,
        insecure_plaintext=config.insecure_plaintext,
    )  # fmt: skip
    check_address(config.learner, off_host=security.off_host)
    if config.relay:
        check_address(config.relay, off_host=security.off_host)
    configure_logging("server", config.log_file)
    return run_loop(lambda: serve(config, security))


async def serve(config: ServerConfig, security: Security = PLAIN) -> int:
    """Build everything, run the loops, shut down."""
    waits, lag = Waits(), LoopLag()
    async with contextlib.AsyncExitStack() as stack:
        scorer = await stack.enter_async_context(open_scorer(config))
        engine = await stack.enter_async_context(create_engine(config, waits))
        gc.freeze()  # what is loaded stays: a full collection of it would hold the loop for 100 ms (I9)
        dialer = await stack.enter_async_context(dial(config.learner, security))
        relay = stack.enter_context(Relay(config.relay, security)) if config.relay else None
        receiver = WeightsReceiver(
            engine,
            waits,
            learner=config.learner,
            directory=config.staging_dir or default_staging_directory(),
            security=security,
            relay=relay,
        )
        stack.push_async_callback(receiver.close)
        event(
            log, "ready", server=config.server_name, engine=engine.info.engine, room=engine.info.room, pid=os.getpid()
        )
        async with asyncio.TaskGroup() as tasks:
            parts = Parts(
                name=config.server_name,
                address=config.learner,
                dialer=dialer,
                engine=engine,
                scorer=scorer,
                reward_weights=config.weights_of_rewards or (1.0,),
                decode=text_decoder(config),
                weights=receiver,
                tasks=tasks,
                waits=waits,
                lag=lag,
            )
            loops = [
                tasks.create_task(control_loop(parts), name="control_loop"),
                tasks.create_task(receiver.loop(), name="weights_loop"),
                tasks.create_task(receiver.engine_loop(), name="engine_loop"),
                tasks.create_task(report_loop(parts), name="report_loop"),
                tasks.create_task(heartbeat_loop(parts), name="heartbeat_loop"),
                tasks.create_task(loop_lag_gauge(lag), name="loop_lag"),
            ]
            with on_signals(lambda name: stop_on_signal(parts, name), signal.SIGTERM, signal.SIGINT):
                await waits.wait(parts.stop.wait(), name="the end", owner="learner", deadline_s=None)
                await drain(parts, config.drain_s)
            for task in [*loops, *group_tasks()]:
                task.cancel()
    event(log, "ended", reason=parts.stop_reason)
    return 0


def stop_on_signal(parts: Parts, name: str) -> None:
    """First signal: drain. Second: end at once."""
    if parts.stop.is_set():
        raise KeyboardInterrupt
    parts.end(name)


async def drain(parts: Parts, drain_s: float) -> None:
    """Finish what is under way within the limit, return the rest, say Goodbye."""
    event(log, "draining", reason=parts.stop_reason, groups=len(parts.book.in_flight), limit_s=drain_s)
    if parts.welcome.session:
        parts.dialer.send(Drain(reason=parts.stop_reason))
    groups = group_tasks()
    if groups and drain_s > 0:
        with contextlib.suppress(WaitTimeout):
            await parts.waits.wait(asyncio.wait(groups), name="drain", owner="engine", deadline_s=drain_s)
    for lease in list(parts.book.in_flight.values()):
        parts.engine.abort(lease.group_id)
        parts.book.drop(lease.group_id)
        if parts.welcome.session:
            returned = Return(group_id=lease.group_id, attempt=lease.attempt, reason="draining", fault=False)
            parts.dialer.send(returned)
    if parts.welcome.session:
        parts.dialer.send(Goodbye(reason=parts.stop_reason))


def group_tasks() -> list[asyncio.Task[object]]:
    """The tasks that each make one group."""
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("group ")]


@contextlib.asynccontextmanager
async def open_scorer(config: ServerConfig) -> AsyncIterator[Scorer]:
    """Start the reward workers; the scripted engine may do without."""
    if not config.reward_funcs:
        yield ScriptedScorer()
        return
    from rollout_server.rewards.pool import RewardPool

    async with RewardPool(
        config.reward_funcs,
        workers=config.reward_workers,
        timeout_s=config.reward_timeout_s,
        on_timeout=config.reward_on_timeout,
    ) as pool:
        yield pool


def text_decoder(config: ServerConfig) -> Callable[[Sequence[int]], str]:
    """Token ids to text, with the model's tokenizer; the scripted engine has numbers only."""
    if not config.model:
        return lambda tokens: " ".join(map(str, tokens))
    from rollout_server.engines.text import load_decoder

    return load_decoder(config.model)
