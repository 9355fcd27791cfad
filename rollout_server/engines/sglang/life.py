"""One life of SGLang, from its start to its end: what belongs to it dies with it.

A life ends by being condemned, with the reason that everybody who still wants something of it is given. The next life
has a connection, a queue and a limit of its own; what came before cannot leak into it.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from protocol.versions import Version
from rollout_server.engines.base import EngineFailure
from rollout_server.engines.sglang.adapters import Adapters
from rollout_server.engines.sglang.admission import Admission
from rollout_server.engines.sglang.client import Answer, Client, ServerInfo
from rollout_server.engines.sglang.sparse import SparseLoads

T = TypeVar("T")


@dataclass(kw_only=True, eq=False)
class Life:
    """See the module's text."""

    client: Client
    info: ServerInfo
    admission: Admission
    tokens_before: float
    """What SGLang's count of decoded tokens lacks to be a count over all lives."""
    condemned: asyncio.Future[EngineFailure] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when this life is over, with what to tell."""
    sampling: Version | None = None
    """The version that samples now, whether it has been checked or not."""
    adapters: Adapters | None = None
    """Where versions are adapters."""
    sparse: SparseLoads | None = None
    """Where they are all weights: the way in of those, and of the few that differ."""
    checked: Version | None = None
    """The newest version that passed its check: what older ones and it have sampled may leave the server."""
    passed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and replaced, whenever `checked` moves."""
    put_back: int = 0
    """Exchanges of weights that took running samples out: SGLang counts each as a retraction."""
    asked: set[str] = field(default_factory=set)
    """Requests that SGLang has not answered, by id."""
    standing: bool = False
    """While weights are exchanged: nothing is sampled, and that is right."""
    served: bool = False
    """Whether a group has come out of it."""
    decoded: float = 0.0
    """That count, as of the last poll."""
    _kept: set[asyncio.Task[Any]] = field(default_factory=set)
    _rids: Any = field(default_factory=itertools.count)
    _rid_prefix: str = field(default_factory=lambda: secrets.token_hex(4))

    def condemn(self, why: EngineFailure) -> None:
        """End this life. The first reason counts; its class takes a text and nothing else."""
        if not self.condemned.done():
            self.condemned.set_result(why)

    def reason(self) -> EngineFailure:
        """Why this life is over: an exception of its own for everybody who raises it, or their tracebacks mix."""
        why = self.condemned.result()
        return type(why)(str(why))

    async def close(self) -> None:
        """Drop every connection; return when what was kept has failed of it."""
        await self.client.close()
        while self._kept:
            await asyncio.wait(self._kept)

    async def generate(self, body: Mapping[str, Any]) -> Answer:
        """Have a request answered; until then it counts as one that SGLang has."""
        self.asked.add(body["rid"])
        try:
            return await self.client.generate(body)
        finally:
            self.asked.discard(body["rid"])

    def keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do what must be done to its end though nobody waits for it any more; `close` waits for it.

        It ends with the connection at the latest. Await it shielded.
        """
        task = asyncio.get_running_loop().create_task(work)
        self._kept.add(task)
        task.add_done_callback(self._was_kept)
        return task

    def _was_kept(self, task: asyncio.Task[Any]) -> None:
        self._kept.discard(task)
        if not task.cancelled():
            task.exception()  # whoever still waits is given it; else it is nobody's

    def next_rid(self) -> str:
        """Name a request: all as long as each other, so that none begins with another."""
        return f"{self._rid_prefix}{next(self._rids):012x}"

    @property
    def cache_key(self) -> str:
        """Requests share prompts within it only: computed by these weights, in this life.

        A retracted sample keeps the key it came with, and its prompt is computed again by the new weights under it: so
        a version's name alone, loaded once more in another life, would find what is not its own.
        """
        return f"{self._rid_prefix}-{self.sampling}"

    def has_passed(self, version: Version) -> None:
        """Let go what was held back for its sake."""
        self.checked = version
        self.passed.set()
        self.passed = asyncio.Event()

    async def wait_checked(self, version: Version) -> None:
        """Wait until that version has passed its check."""
        while self.checked is None or self.checked < version:
            await self.passed.wait()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, and call it off when this life ends before it.

        Raises:
            EngineFailure: why this life has ended; or what `work` raises.
        """
        task = asyncio.ensure_future(work)
        try:
            ends: list[asyncio.Future[Any]] = [task, self.condemned]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self.reason()
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
