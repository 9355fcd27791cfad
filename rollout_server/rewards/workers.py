"""Killable worker processes: start them, run one task in one of them under a limit, replace what dies.

pebble owns the processes, the pipes and the limits. What it leaves to us: it gives up as a whole when an idle process
dies; it never answers tasks that are pending when it stops; a process that ends with exit code 0 is noticed by the
limit of its task alone, and no limit is seen to once a thread of pebble's has died, or a process with its lock; it
kills a worker but not what the worker started; and it lets go of its locks before it kills who may yet have to open
them.
This file knows nothing of rewards but the initializer; what a failed task means is decided in pool.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager
from multiprocessing.context import SpawnContext
from multiprocessing.sharedctypes import RawArray
from multiprocessing.synchronize import RLock
from typing import Any, TypeVar

from pebble import CONSTS, ProcessExpired, ProcessFuture, ProcessPool

from protocol.errors import ConfigError
from rollout_server.rewards import worker

CONSTS.term_timeout = 0.2
"""Seconds that pebble gives a worker to obey SIGTERM before SIGKILL. It can talk to none of the others meanwhile."""

OVERDUE_S = 5.0
"""A task that was taken up and is not answered so long after its limit is lost."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class _Spawn(SpawnContext):
    """Starts processes, and keeps the locks they share: a process that opens one no longer kept ends in a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.locks: list[RLock] = []
        """Of the pool there is. pebble lets go of its own while its last processes may be starting."""

    def RLock(self) -> RLock:  # noqa: N802 - the name that pebble calls
        self.locks.append(super().RLock())
        return self.locks[-1]


class WorkerDied(Exception):
    """The process that ran a task is gone; the text says how it ended."""


class Workers:
    """`count` permits to run a task, and one process more than that.

    Every method runs on the event loop's thread: the kernel ends a worker when the thread that started it ends.
    """

    def __init__(self, funcs: Sequence[str], *, count: int, start_s: float) -> None:
        self._funcs = tuple(funcs)
        self._count = count
        self._start_s = start_s
        self._context = _Spawn()
        self._pids = RawArray("i", count)
        """By slot: the process working there (it writes its id itself); 0 when nobody is."""
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(count):
            self._free.put_nowait(slot)
        self._in_flight: set[ProcessFuture[Any]] = set()
        self._changing = asyncio.Lock()
        self._closed = False
        self._ready = self._context.Semaphore(0)
        self._pool = self._new_pool()

    async def start(self) -> None:
        """Start every process and wait until each has loaded the reward functions.

        Raises:
            ConfigError: they cannot be loaded, or not in `start_s` seconds.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._start_s
        try:
            async with asyncio.timeout_at(deadline):
                problem = await asyncio.wrap_future(self._pool.schedule(worker.problem))
            if problem:
                raise ConfigError(problem)
            for _ in range(self._count + 1):
                if not await asyncio.to_thread(self._ready.acquire, True, max(0.0, deadline - loop.time())):
                    raise TimeoutError
        except TimeoutError as error:
            raise ConfigError(
                f"reward workers were not ready after {self._start_s:g} s: importing {', '.join(self._funcs)} hangs"
                " or takes too long"
            ) from error
        except (BrokenProcessPool, ProcessExpired) as error:
            raise ConfigError(f"a reward worker died while importing {', '.join(self._funcs)}") from error

    async def close(self) -> None:
        """Kill every process, busy or not, and what they started. Pending tasks end with WorkerDied."""
        self._closed = True
        self._ready.release()  # `start` may have been cancelled with its thread still waiting for it
        async with self._changing:
            await self._stop_pool()

    @property
    def idle(self) -> int:
        """Permits free right now."""
        return self._free.qsize()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[int]:
        """Hold one of the permits. First come, first served."""
        slot = await self._free.get()
        try:
            yield slot
        finally:
            self._free.put_nowait(slot)

    async def run(self, slot: int, task: Callable[..., T], *arguments: Any, timeout_s: float) -> T:
        """Run `task(slot, *arguments)` in a process; the caller holds `slot`.

        When pebble has given up meanwhile, or lost the task, the processes are started anew and it runs again, once.

        Raises:
            TimeoutError: it took longer than timeout_s; its process is dead.
            WorkerDied: its process died by itself.
        """
        for _ in range(2):
            pool = self._pool
            try:
                result = await self._attempt(pool, slot, task, arguments, timeout_s)
            except ProcessExpired as error:
                self._kill_group(slot)
                raise WorkerDied(f"its process died ({_exit_text(error.exitcode)})") from error
            except TimeoutError:
                self._kill_group(slot)
                raise
            except (BrokenProcessPool, RuntimeError) as error:  # RuntimeError is how pebble refuses new work
                await self._renew(pool, reason=str(error))
            else:
                self._pids[slot] = 0
                return result
        raise WorkerDied("its process died twice, and the pool with it")

    async def _attempt(
        self, pool: ProcessPool, slot: int, task: Callable[..., T], arguments: Sequence[Any], timeout_s: float
    ) -> T:
        loop = asyncio.get_running_loop()
        future: ProcessFuture[T] = pool.schedule(task, args=(slot, *arguments), timeout=timeout_s)
        answer: asyncio.Future[T] = asyncio.wrap_future(future)
        self._in_flight.add(future)
        taken_up, given_up_s = False, loop.time() + timeout_s + self._start_s
        try:
            # pebble's limit counts from when a process took the task up. Ours are for a task that none takes up, and
            # for one whose limit pebble does not see to.
            while not (await asyncio.wait([answer], timeout=timeout_s + OVERDUE_S))[0]:
                if taken_up or loop.time() > given_up_s:
                    raise BrokenProcessPool("a task was lost")
                taken_up = future.running()
            return answer.result()
        finally:
            answer.cancel()  # nobody waits any more: pebble ends the process
            self._in_flight.discard(future)

    async def _renew(self, broken: ProcessPool, *, reason: str) -> None:
        """Replace the pool, unless another task has done so already."""
        async with self._changing:
            if self._closed:
                raise WorkerDied("the workers were closed")
            if self._pool is broken:
                log.warning("event=reward_workers_restarted reason=%s", reason)
                await self._stop_pool()
                self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPool:
        """Make a pool; its processes start with the first task."""
        return ProcessPool(
            max_workers=self._count + 1,
            initializer=worker.start,
            initargs=(self._funcs, self._pids, self._ready),
            context=self._context,
        )

    async def _stop_pool(self) -> None:
        self._pool.stop()
        for slot in range(self._count):  # at once: pebble would allow each that ignores SIGTERM three seconds
            self._kill_group(slot)
        await asyncio.to_thread(self._pool.join)
        self._context.locks.clear()
        for future in tuple(self._in_flight):
            if not future.done():
                future.set_exception(BrokenProcessPool("the workers were stopped"))

    def _kill_group(self, slot: int) -> None:
        """Kill the process of a slot and all it started (a worker leads its own process group)."""
        pid, self._pids[slot] = self._pids[slot], 0
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def _exit_text(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
