"""SGLang behind the Engine contract: its lives, the groups that it samples and the versions that it gets.

    generate  -->  Generation (seats, requests)  -->  held back until the versions it is of have passed their check
    load_weights  -->  Loading (file, swap, check)  -->  live

Two tasks run beside: `_supervise` gives SGLang one life after another, `Watch` reads its state and tries it when it
stands still. What fails in a life condemns it; nothing SGLang does takes the rollout server down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from protocol.completions import Completion
from protocol.errors import ConfigError
from protocol.identity import tokenizer_digest
from protocol.logs import event
from protocol.signals import Signal
from protocol.versions import Version
from protocol.waits import Waits
from rollout_server.config import ServerConfig
from rollout_server.engines.base import (
    EngineFailure,
    EngineInfo,
    EngineStatus,
    GenerationRequest,
    LoadReport,
    StagedWeights,
)
from rollout_server.engines.choice import SGLANG_FLOOR, version_numbers
from rollout_server.engines.device import has_amx, resolve_device, resolve_dtype
from rollout_server.engines.sglang.adapters import Adapters
from rollout_server.engines.sglang.admission import Admission, Limit
from rollout_server.engines.sglang.generation import Generation, check_request
from rollout_server.engines.sglang.host import ChildHost, Host, StartFailed, UrlHost
from rollout_server.engines.sglang.life import Life
from rollout_server.engines.sglang.loading import Loading
from rollout_server.engines.sglang.meter import Meter
from rollout_server.engines.sglang.restarts import HOPELESS, Restarts
from rollout_server.engines.sglang.schema import read_schema
from rollout_server.engines.sglang.sparse import SparseLoads
from rollout_server.engines.sglang.watch import Watch
from rollout_server.engines.text import load_tokenizer

log = logging.getLogger(__name__)


class SGLangEngine:
    """`Engine` on SGLang. See base.py for the contract.

    Args:
        config: of the server: model, room, how SGLang is run.
        waits: where waiting for SGLang is shown.
        clock: monotonic seconds.
    """

    def __init__(self, config: ServerConfig, waits: Waits, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._waits = waits
        self._clock = clock
        self._mode = config.weight_update_mode
        self._meter = Meter(config.room, clock)
        self._lost = Signal()
        self._began = Signal()
        self._life: Life | None = None
        self._live: Version | None = None
        self._generations: dict[str, Generation] = {}
        self._tokens_reported = 0
        self._watch = Watch(self._meter, clock, probe_s=config.engine_probe_s)
        self._restarts = 0
        self._pauses = Restarts()
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        """What Hello says of this engine."""
        return self._info

    @property
    def live(self) -> Version | None:
        """The newest version that passed its check; SGLang may sample with a newer one that is being checked."""
        return self._live

    @property
    def lost(self) -> Signal:
        """Notified when SGLang's life ended."""
        return self._lost

    def status(self) -> EngineStatus:
        """Counters and gauges; tokens of samples under way are as of the last poll."""
        self._meter.settle()
        life, meter = self._life, self._meter
        tokens = meter.tokens_finished
        held = sum(generation.tokens for generation in self._generations.values())
        if life is not None and life.admission.running:
            tokens = max(tokens, int(life.tokens_before + life.decoded))
            held += tokens - meter.tokens_finished
        self._tokens_reported = max(self._tokens_reported, tokens)
        return EngineStatus(
            samples_running=0 if life is None else life.admission.running,
            samples_waiting=0 if life is None else life.admission.waiting,
            tokens_generated=self._tokens_reported,
            tokens_held=held,
            prompt_tokens=meter.prompt_tokens,
            cached_prompt_tokens=meter.cached_prompt_tokens,
            kv_usage=self._watch.kv_usage,
            restarts=self._restarts,
            busy_s=meter.busy_s,
            paused_s=meter.paused_s,
            occupancy_s=meter.occupancy_s,
        )

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """Sample the group; return it when every version that sampled it has passed its check.

        Raises:
            SamplesWithheld: a version that sampled it has not.
            EngineFailure: the request does not fit the model, no weights are live, or SGLang failed.
        """
        life = self._life
        if self._closed:
            raise EngineFailure("the engine is closed")
        if life is None or self._live is None:
            raise EngineFailure(f"group {request.group_id}: no weights are live yet: load_weights first")
        in_place = self._mode == "in_place" and life.adapters is None
        generation = Generation(
            request,
            life,
            self._meter,
            limit=check_request(request, vocab_size=self._info.vocab_size, max_length=self._max_length),
            keeps_cache=in_place,
            overlaps=in_place and not life.info.disable_overlap_schedule,
        )
        self._generations[request.group_id] = generation
        try:
            return await life.run(generation.run_checked())
        finally:
            if self._generations.get(request.group_id) is generation:
                del self._generations[request.group_id]

    def abort(self, group_id: str) -> None:
        """End the group's samples now."""
        if group_id in self._generations and not self._closed:
            self._tasks.create_task(self._generations[group_id].abort(), name=f"abort {group_id}")

    async def load_weights(self, weights: StagedWeights) -> LoadReport:
        """Check the file, swap it in, check what SGLang then holds. Waits for SGLang where it restarts.

        Raises:
            EngineFailure: the file does not fit (the old version still serves), or the swap or a check failed (SGLang
                restarts, `live` is None).
            ConfigError: it is an adapter to another base model.
        """
        dtypes = await asyncio.to_thread(self._versions.check_file, weights)
        async with self._loading:
            while not self._closed and self._life is None:
                await self._waits.wait(self._began.wait(), name="engine start", owner="sglang", deadline_s=None)
            life = self._life
            if self._closed or life is None:
                raise EngineFailure("the engine is closed")
            return await life.run(self._versions.load(life, weights, dtypes))

    def _went_live(self, life: Life, version: Version) -> None:
        """Let samples of a version go that has passed its check."""
        if life.condemned.done():  # and `live` is None: it must stay so
            raise life.reason()
        self._live = version
        life.has_passed(version)

    async def __aenter__(self) -> Self:
        """Read the model's schema, bring SGLang up.

        Raises:
            ConfigError: the model, SGLang or its arguments do not work; with the end of SGLang's log.
        """
        self._loading = asyncio.Lock()
        async with contextlib.AsyncExitStack() as stack:
            self._host = await asyncio.to_thread(self._prepare)
            stack.push_async_callback(self._host.close)
            try:
                self._life = await self._begin()
            except EngineFailure as failure:
                raise ConfigError(str(failure)) from failure
            stack.push_async_callback(self._life.close)
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            self._loops = [
                self._tasks.create_task(self._supervise(self._life), name="engine"),
                self._tasks.create_task(self._watch.run(lambda: self._life), name="engine watch"),
            ]
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop; what is outstanding ends with EngineFailure."""
        self._closed = True
        self._began.notify()
        for loop in self._loops:
            loop.cancel()
        try:
            if self._life is not None:
                self._life.condemn(EngineFailure("the engine was closed"))
            await self._versions.close()
        finally:
            await self._stack.aclose()

    def _prepare(self) -> Host:
        """Everything that takes time and no event loop: imports, the model's schema, its tokenizer."""
        config = self._config
        model = Path(config.model)
        self._schema = read_schema(model)
        self._max_length = min(config.max_model_length, self._schema.max_positions or config.max_model_length)
        self._versions = Loading(
            config, self._schema, max_length=self._max_length, meter=self._meter, waits=self._waits,
            clock=self._clock, went_live=self._went_live,
        )  # fmt: skip
        self._tokenizer_digest = tokenizer_digest(load_tokenizer(model).get_vocab())
        if config.engine_url:
            return UrlHost(config, self._schema, max_length=self._max_length)
        device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, device)
        return ChildHost(config, self._schema, device=device, dtype=dtype, has_amx=has_amx())

    async def _begin(self) -> Life:
        """Bring SGLang up for one life.

        Raises:
            StartFailed: it did not come up, or is too old.
        """
        client = await self._waits.wait(self._host.start(), name="engine start", owner="sglang", deadline_s=None)
        try:
            info, loads = await client.info(), await client.loads()
            if version_numbers(info.version) < SGLANG_FLOOR:
                raise StartFailed(
                    f"SGLang {info.version} is too old: its scheduler dies when weights are swapped under running"
                    f" samples; {'.'.join(map(str, SGLANG_FLOOR))} is the oldest that works, 0.5.23 is tested"
                )
        except BaseException:
            await client.close()
            await self._host.stop()
            raise
        self._versions.begin(info)
        self._info = EngineInfo(
            engine="sglang",
            room=self._config.room,
            vocab_size=self._schema.vocab_size,
            model_digest=self._schema.digest,
            tokenizer_digest=self._tokenizer_digest,
            reproducible=info.enable_deterministic_inference,
            canaries=True,
            full_weights=not self._config.max_lora_rank,
            max_lora_rank=self._config.max_lora_rank,
            max_length=self._max_length,
        )
        capacity = sum(load.max_total_num_tokens for load in loads)
        event(log, "engine_up", url=client.url, version=info.version, kv_tokens=capacity, room=self._config.room)
        life = Life(
            client=client,
            info=info,
            admission=Admission(Limit(self._config.room)),
            tokens_before=self._meter.tokens_finished - sum(load.tokens_decoded for load in loads),
        )
        if self._config.max_lora_rank:
            life.adapters = Adapters(client, life.keep)
        else:
            life.sparse = SparseLoads(client, info)
        return life

    async def _supervise(self, life: Life) -> None:
        """Give SGLang one life after another.

        consumes: the life's end      waits for: the host, or whoever condemns it
        produces: the next life       after `lost` has been notified
        """
        try:
            while True:
                begun_s = self._clock()
                died = self._host.died()
                ends: list[asyncio.Future[Any]] = [life.condemned, died]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if died.done():
                    life.condemn(EngineFailure(f"SGLang died: {died.result()}"))
                pause_s = self._pause_after(life.condemned.result(), served=life.served)
                event(
                    log, "engine_lost", level=logging.ERROR, reason=life.condemned.result(), live=self._live,
                    lived_s=self._clock() - begun_s, restart_in_s=pause_s,
                )  # fmt: skip
                self._life = self._live = None
                self._restarts += 1
                self._meter.runs(0)
                self._lost.notify()
                await life.close()
                await self._host.stop()
                life = self._life = await self._begin_again(pause_s)
                self._began.notify()
        finally:
            await life.close()

    async def _begin_again(self, pause_s: float) -> Life:
        """Try to bring SGLang up until it is."""
        while True:
            await asyncio.sleep(pause_s)
            try:
                return await self._begin()
            except (EngineFailure, ConfigError) as failure:
                pause_s = self._pause_after(failure, served=False)
                event(log, "engine_start_failed", level=logging.ERROR, reason=failure, restart_in_s=pause_s)

    def _pause_after(self, why: Exception, *, served: bool) -> float:
        """Seconds to wait after a life, or an attempt at one; says so when there seems to be no point in another."""
        pause_s = self._pauses.ended(served=served)
        if self._pauses.in_vain == HOPELESS:
            event(
                log, "engine_hopeless", level=logging.ERROR, lives=HOPELESS, reason=why,
                text="SGLang ends each time before a group comes out: it is tried again with pauses, but what is wrong"
                " must be mended: the reason, or its log, says it",
            )  # fmt: skip
        return pause_s
