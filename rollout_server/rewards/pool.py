"""Scores groups in killable worker processes: nothing a reward function does can stop the run.

    async with RewardPool(["exact_match"], workers=2, timeout_s=10.0, on_timeout=None) as pool:
        scores = await pool.score(call)

Processes are spawned (never forked) and warm before `__aenter__` returns, so enter the pool before sockets open. One
more than `workers` is kept: at most `workers` calls run at once, and the spare takes over while the successor of a
killed one still imports. A function is called once for the whole group. Only when that call hangs or takes its
process down are the completions scored one at a time, so that the culprit alone is marked. The loss is bounded: the
first call takes at most `timeout_s` and the search for culprits at most twice as much, besides waiting for a slot and,
where hangs come faster than successors can import, for a process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import numpy as np

from protocol.errors import ConfigError
from rollout_server.rewards import worker
from rollout_server.rewards.base import RewardCall, Scores
from rollout_server.rewards.columns import Column
from rollout_server.rewards.loading import reward_name
from rollout_server.rewards.workers import WorkerDied, Workers

START_S = 120.0
"""Limit for the workers to start and import their reward functions."""
SEARCH_TIMEOUTS = 2
"""How many times timeout_s the search for culprits may take."""


class RewardPool:
    """F reward functions behind a wall-clock limit.

    Args:
        funcs: specifications of the functions (see loading.py).
        workers: calls that run at once; one more process is kept warm.
        timeout_s: wall-clock limit of one call, in seconds; its process is killed then.
        on_timeout: value of a completion whose own scoring timed out; None for no value.
        start_s: limit for starting, imports included, in seconds.

    Raises:
        ConfigError: no function, or two of one name. On entering: one cannot be loaded.
    """

    def __init__(
        self,
        funcs: Sequence[str],
        *,
        workers: int,
        timeout_s: float,
        on_timeout: float | None,
        start_s: float = START_S,
    ) -> None:
        self.names = tuple(reward_name(spec) for spec in funcs)
        """[F] what Hello lists."""
        _check_names(funcs, self.names)
        self._timeout_s = timeout_s
        self._on_timeout = on_timeout
        self._workers = Workers(funcs, count=workers, start_s=start_s)

    async def __aenter__(self) -> Self:
        """Start every process and wait until all have imported the reward functions."""
        try:
            await self._workers.start()
        except BaseException:
            await self._workers.close()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Kill every worker, busy or not. A `score` still going on ends with status ERROR."""
        await self._workers.close()

    async def score(self, call: RewardCall) -> Scores:
        """Score all completions with all functions. What went wrong is in the statuses and notes, never raised."""
        async with asyncio.TaskGroup() as tasks:
            pending = [tasks.create_task(self._score_with(f, call)) for f in range(len(self.names))]
        columns = [task.result() for task in pending]
        return Scores(
            values=np.array([column.values for column in columns], np.float32).T,
            statuses=np.array([column.statuses for column in columns], np.uint8).T,
            seconds=np.array([column.seconds for column in columns], np.float32).T,
            steps={(n, f): steps for f, column in enumerate(columns) for n, steps in column.steps.items()},
            notes=tuple(f"{name}: {c.note}" for name, c in zip(self.names, columns, strict=True) if c.note),
        )

    async def _score_with(self, function: int, call: RewardCall) -> Column:
        """Score with one function: the whole group at once, or one at a time where that takes a worker down."""
        whole = Column(len(call))
        async with self._workers.slot() as slot:
            if await self._call(slot, function, call, range(len(call)), whole, self._timeout_s) or len(call) == 1:
                return whole
            column = await self._search(slot, function, call)
        column.note = column.note or f"{whole.note}; one at a time, each was fine"
        return column

    async def _search(self, slot: int, function: int, call: RewardCall) -> Column:
        """Score one completion at a time, in this slot and in those free now, for a bounded time."""
        column = Column(len(call))
        todo = iter(range(len(call)))
        deadline = asyncio.get_running_loop().time() + SEARCH_TIMEOUTS * self._timeout_s

        async def helper() -> None:
            async with self._workers.slot() as free:
                await self._drain(free, function, call, todo, column, deadline)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(self._workers.idle, len(call) - 1)):
                tasks.create_task(helper())
            tasks.create_task(self._drain(slot, function, call, todo, column, deadline))
        return column

    async def _drain(
        self, slot: int, function: int, call: RewardCall, todo: Iterator[int], column: Column, deadline: float
    ) -> None:
        """Score completions from the shared `todo` until there are none left, or no time."""
        loop = asyncio.get_running_loop()
        while (left_s := deadline - loop.time()) > 0 and (index := next(todo, None)) is not None:
            await self._call(slot, function, call, [index], column, min(self._timeout_s, left_s))

    async def _call(
        self, slot: int, function: int, call: RewardCall, indices: Sequence[int], column: Column, timeout_s: float
    ) -> bool:
        """Make one call and record its outcome. False: it hung, or took its process down."""
        arguments = call.arguments(indices)
        try:
            result = await self._workers.run(slot, worker.call, function, arguments, timeout_s=timeout_s)
        except TimeoutError:
            column.timed_out(indices, self._on_timeout, timeout_s)
            return False
        except WorkerDied as death:
            column.crashed(indices, str(death))
            return False
        column.record(indices, result)
        return True


def _check_names(funcs: Sequence[str], names: Sequence[str]) -> None:
    if not funcs:
        raise ConfigError("reward_funcs is empty: name at least one reward function, for example exact_match")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"reward_funcs {list(funcs)}: two functions are named {name!r}; names must differ")
