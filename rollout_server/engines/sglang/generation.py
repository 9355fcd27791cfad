"""One group on its way through SGLang: G single requests that share the prompt's keys and values.

SGLang's own `n = G` would answer when the last sample has ended, take no request ids, and let none be aborted alone.
The prompt is computed once, by a request that samples nothing, when that is worth a request; the G that follow find it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from protocol.completions import Completion
from protocol.identity import sample_seed
from protocol.versions import Version
from rollout_server.engines.base import EngineFailure, GenerationRequest, empty_completion
from rollout_server.engines.sglang.answers import ForeignWeights, prefill_body, sample_body, to_completion, to_spans
from rollout_server.engines.sglang.client import Answer, Disconnected
from rollout_server.engines.sglang.life import Life
from rollout_server.engines.sglang.meter import Meter

WORTH_TOKENS = 512
"""Prompt tokens to be computed again without it, from which on a request of its own for the prompt pays."""
ABORT_AGAIN_S = 1.0
"""An abort may overtake its request; it is said again until the sample has ended."""


class Generation:
    """Samples one request. `run` once; `abort` at any time.

    A seat is given back when SGLang has ended the sample's request, not when nobody wants the sample any more: SGLang
    looks only every few seconds whether its caller has hung up.

    Args:
        request: what to sample.
        life: of SGLang.
        meter: told of what samples took.
        limit: tokens of a completion at most.
        keeps_cache: whether a swap of weights keeps keys and values (in place).
        overlaps: whether a token is under way while weights are exchanged (see answers.backdate).
    """

    def __init__(
        self, request: GenerationRequest, life: Life, meter: Meter, *, limit: int, keeps_cache: bool, overlaps: bool
    ) -> None:
        self._request, self._life, self._meter = request, life, meter
        self._limit, self._keeps_cache, self._overlaps = limit, keeps_cache, overlaps
        self.newest: Version | None = None
        """The newest version that may have sampled a token."""
        self.tokens = 0
        """Of samples that have ended."""
        self._aborted = False
        self._asked: set[str] = set()
        """Request ids."""
        self._open = 1
        """`run` itself, and the seats that are taken."""
        self._ended = asyncio.Event()
        self._prompts: dict[str, asyncio.Event] = {}
        """By cache key: set once the prompt is computed, or will not be."""

    async def run(self) -> list[Completion]:
        """Sample all completions.

        Raises:
            EngineFailure: one of them failed; the others are called off.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                samples = [tasks.create_task(self._sample(index)) for index in range(self._request.num_generations)]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            self._close()
            if self._open:
                self._life.keep(self.abort())
        return [sample.result() for sample in samples]

    async def run_checked(self) -> list[Completion]:
        """See `run`; return when every version that may have sampled a token has passed its check."""
        completions = await self.run()
        if self.newest is not None:
            await self._life.wait_checked(self.newest)
            self._life.served = True
        return completions

    async def abort(self) -> None:
        """End every sample with what it has; returns when they have ended."""
        self._aborted = True
        while self._open:
            self._life.admission.abort(self)
            for rid in tuple(self._asked):
                with contextlib.suppress(EngineFailure):  # said again; the end of SGLang's life ends the samples, too
                    await self._life.client.abort(rid)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), ABORT_AGAIN_S)

    async def _sample(self, index: int) -> Completion:
        """Wait for a seat and ask; once more where the answer is lost or stands on a stale prompt."""
        may_lose = True
        while not self._aborted and await self._life.admission.enter(self):
            self._open += 1
            try:
                completion = await asyncio.shield(self._life.keep(self._ask_seated(index)))
            except Disconnected as failure:
                # One connection may break by itself; when there is no other to be had, SGLang has gone.
                if not (may_lose and await self._is_there()):
                    self._life.condemn(failure)
                    raise
                completion, may_lose = None, False
            except ForeignWeights as failure:
                self._life.condemn(failure)
                raise
            if completion is not None:
                return completion
        return empty_completion()

    async def _ask_seated(self, index: int) -> Completion | None:
        """Ask, and give the seat back."""
        admission = self._life.admission
        self._meter.runs(admission.running)
        try:
            return await self._ask(index)
        finally:
            admission.leave()
            self._meter.runs(admission.running)
            self._close()

    def _close(self) -> None:
        self._open -= 1
        if not self._open:
            self._ended.set()

    async def _ask(self, index: int) -> Completion | None:
        """Sample one completion, with one adapter where versions are adapters; else see `_ask_once`."""
        adapters, version = self._life.adapters, self._life.sampling
        if adapters is None:
            return await self._ask_once(index, {})
        assert version is not None, "no group is taken before a version is live"
        with adapters.using(version) as name:
            return await self._ask_once(index, {"lora_path": name})

    async def _ask_once(self, index: int, under: dict[str, str]) -> Completion | None:
        """Sample one completion. None: it began after a swap in place, on a prompt that was computed before it.

        Args:
            index: of the completion.
            under: what requests say of the adapter; empty without adapters.
        """
        life, request = self._life, self._request
        version, put_back, cache_key = life.sampling, life.put_back, life.cache_key
        await self._compute_prompt(cache_key, under)
        if self._aborted:
            return empty_completion()
        rid = life.next_rid()
        seed = sample_seed(request.seed, index) if life.info.enable_deterministic_inference else None
        answer = await self._answer(
            sample_body(
                request.prompt_tokens, request.sampling, limit=self._limit, rid=rid, cache_key=cache_key, seed=seed
            )
            | under
        )
        completion = to_completion(
            answer,
            stops=request.sampling.stop_token_ids,
            aborted=self._aborted,
            in_flight=version if self._overlaps else None,
            adapter=version if under else None,
        )
        meta = answer.meta_info
        spans = completion.spans if under else to_spans(meta.weight_versions, len(answer.output_ids))
        named = [name for name, _ in spans]
        if self._keeps_cache and meta.cached_tokens and named and named[0] != version:
            return None
        self.newest = max([*named, *([] if self.newest is None else [self.newest])], default=None)
        self.tokens += len(completion.completion_tokens)
        self._meter.finished(
            tokens=len(completion.completion_tokens), prompt=meta.prompt_tokens, cached=meta.cached_tokens
        )
        if life.admission.limit.ended(
            retracted=meta.num_retractions > life.put_back - put_back, running=life.admission.running
        ):
            life.admission.admit()
        return completion

    async def _answer(self, body: Mapping[str, Any]) -> Answer:
        self._asked.add(body["rid"])
        try:
            return await self._life.generate(body)
        finally:
            self._asked.discard(body["rid"])

    async def _is_there(self) -> bool:
        try:
            await self._life.client.info()
        except EngineFailure:
            return False
        return True

    async def _compute_prompt(self, cache_key: str, under: dict[str, str]) -> None:
        """Have the prompt's keys and values computed once for each cache key, if that pays."""
        prompt = self._request.prompt_tokens
        if len(prompt) * (self._request.num_generations - 1) < WORTH_TOKENS:
            return
        if cache_key in self._prompts:
            await self._prompts[cache_key].wait()
            return
        computed = self._prompts[cache_key] = asyncio.Event()
        try:
            await self._answer(prefill_body(prompt, rid=self._life.next_rid(), cache_key=cache_key) | under)
        except BaseException:
            del self._prompts[cache_key]  # this sample may come again, and computes it then
            raise
        finally:
            computed.set()  # also when it is not: whoever waits goes on without


def check_request(request: GenerationRequest, *, vocab_size: int, max_length: int) -> int:
    """Check a request against the model and return how many tokens its completions may have.

    Raises:
        EngineFailure: its prompt is too long, or of another vocabulary.
    """
    prompt = request.prompt_tokens
    if len(prompt) >= max_length:
        raise EngineFailure(
            f"group {request.group_id}: a prompt of {len(prompt)} tokens leaves no room for a completion: the model"
            f" takes {max_length} tokens in all (max_model_length)"
        )
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise EngineFailure(
            f"group {request.group_id}: prompt tokens {prompt.min()} to {prompt.max()}: allowed is 0 to"
            f" {vocab_size - 1}, the model's vocabulary"
        )
    return min(request.sampling.max_completion_length, max_length - len(prompt))
