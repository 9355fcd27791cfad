"""An engine without a model: lengths, delays, failures, tokens and logprobs all come from a seed.

For tests, benchmarks, simulations and dry runs. asyncio only: it lives on the loop's clock, so under a virtual clock it
costs no real time. It wakes when a sample joins or ends, never per token. Its digests are empty: there is no model
that a learner's weights could fail to fit.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Sequence
from statistics import NormalDist
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from protocol.completions import Completion
from protocol.identity import sample_seed
from protocol.length_trace import read_length_trace
from protocol.messages import FinishReason, Int32
from protocol.signals import Signal
from protocol.versions import Version
from protocol.weights.adapters import MAX_RANK
from rollout_server.config import ScriptedOptions
from rollout_server.engines.base import (
    EngineFailure,
    EngineInfo,
    EngineStatus,
    GenerationRequest,
    LoadReport,
    StagedWeights,
)
from rollout_server.engines.counters import UInt64, hash_counter, hash_counters, uniform, uniforms
from rollout_server.engines.marks import Spans
from rollout_server.engines.scripted_batch import Outcome, ScriptedBatch, ScriptedJob

T = TypeVar("T")
LENGTHS, FAILURES, LOAD_FAILURES, TOKENS, LOGPROBS = range(5)
"""What a random number is for; each purpose has a stream of its own."""
LOWEST_LOGPROB = -4.0


class ScriptedEngine:
    """`Engine` that plays a script. See base.py for the contract.

    Lengths are lognormal with median `mean_length`, or those of a trace, cut at max_completion_length; a sample without
    a stop token to end with runs to that cut. Tokens and logprobs depend on the options' seed, the sample's seed, the
    position and the version that samples. A group that fails does so when its first sample ends.

    Args:
        options: the script.
        room: samples decoded at once.

    Raises:
        ConfigError: the options name a trace that cannot be read.
    """

    def __init__(self, options: ScriptedOptions, room: int) -> None:
        self._options = options
        self._trace = read_length_trace(options.lengths).by_group_seed() if options.lengths else None
        self._info = EngineInfo(
            engine="scripted", room=room, vocab_size=options.vocab_size, model_digest="", tokenizer_digest="",
            max_lora_rank=MAX_RANK,
        )  # fmt: skip
        self._lost = Signal()
        self._requests = self._loads = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        """What Hello says of this engine."""
        return self._info

    @property
    def live(self) -> Version | None:
        """The version that samples the next token."""
        return self._batch.live

    @property
    def lost(self) -> Signal:
        """Never notified: a script has no engine that could die."""
        return self._lost

    def status(self) -> EngineStatus:
        """Counters and gauges, up to now."""
        self._settle()
        return self._batch.status()

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """Play the group. When the caller is cancelled, so is the group.

        Raises:
            EngineFailure: the script says so, no weights are live, the trace lacks the group, or the engine closes.
        """
        if self._closed:
            raise EngineFailure("the engine is closed")
        if self.live is None:
            raise EngineFailure(f"group {request.group_id}: no weights are live yet: load_weights first")
        answer: asyncio.Future[Outcome | None] = self._loop.create_future()
        self._batch.submit(self._job(request, answer), self._loop.time())
        self._settle()
        try:
            # An answer that is there already must not let a caller in a loop keep everyone else from running.
            await asyncio.sleep(0)
            outcome = await answer
        except asyncio.CancelledError:
            self.abort(request.group_id)
            raise
        if outcome is None:
            raise EngineFailure(
                f"group {request.group_id}: {'the engine was closed' if self._closed else 'as scripted'}"
            )
        return self._completions(request, [outcome[index] for index in range(request.num_generations)])

    def abort(self, group_id: str) -> None:
        """End the group's samples now."""
        self._batch.abort(group_id, self._loop.time())
        self._settle()

    async def load_weights(self, weights: StagedWeights) -> LoadReport:
        """Stand still for `swap_s`, then go on as the new version. The file is not looked at.

        Raises:
            EngineFailure: the script says so.
        """
        if self._closed:
            raise EngineFailure("the engine is closed")
        self._loads += 1
        if self._chance(LOAD_FAILURES, self._loads) < self._options.fail_load_probability:
            raise EngineFailure(f"weights {weights.version}: load {self._loads} fails, as scripted")
        answer: asyncio.Future[bool] = self._loop.create_future()
        self._batch.load(weights.version, self._options.swap_s, lambda live: _answer(answer, live), self._loop.time())
        self._settle()
        if not await answer:
            raise EngineFailure("the engine was closed")
        return LoadReport(pause_s=self._options.swap_s)

    async def __aenter__(self) -> Self:
        """Start on the running loop's clock."""
        self._loop = asyncio.get_running_loop()
        self._batch = ScriptedBatch(
            room=self._info.room,
            token_s=self._options.token_s,
            occupancy_cost=self._options.occupancy_cost,
            now=self._loop.time(),
        )
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop; what is outstanding ends with EngineFailure."""
        self._closed = True
        self._batch.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _settle(self) -> None:
        """Let due events happen and set the timer for the next one."""
        self._settle_at(self._loop.time())

    def _settle_at(self, due_s: float) -> None:
        """As _settle, at `due_s` if the clock is not yet there.

        uvloop's timers are of whole milliseconds and come up to half of one early: to set one again until the moment is
        really there would be to spin.
        """
        self._batch.advance(max(due_s, self._loop.time()))
        if self._timer is not None:
            self._timer.cancel()
        event_s = self._batch.next_event_s()
        self._timer = None if event_s is None else self._loop.call_at(event_s, self._settle_at, event_s)

    def _job(self, request: GenerationRequest, answer: asyncio.Future[Outcome | None]) -> ScriptedJob:
        """Draw the group's outcome."""
        self._requests += 1
        sampling = request.sampling
        lengths, reasons = [], []
        for drawn in self._lengths(request):
            length = drawn if sampling.stop_token_ids else math.inf
            stops = length <= sampling.max_completion_length
            lengths.append(int(length) if stops else sampling.max_completion_length)
            reasons.append(FinishReason.STOP if stops else FinishReason.LENGTH)

        return ScriptedJob(
            request=request,
            lengths=lengths,
            reasons=reasons,
            fails=self._chance(FAILURES, self._requests) < self._options.fail_probability,
            reply=lambda outcome: _answer(answer, outcome),
        )

    def _lengths(self, request: GenerationRequest) -> list[int]:
        """[G] what each sample of a group would run to."""
        if self._trace is None:
            return [self._length(sample_seed(request.seed, index)) for index in range(request.num_generations)]
        row = self._trace.get(request.seed)
        if row is None or row.size != request.num_generations:
            raise EngineFailure(
                f"group {request.group_id} of {request.num_generations} is not in {self._options.lengths}: the learner"
                " needs its seed and num_generations, and the file as many groups as the run leases"
            )
        return row.tolist()  # type: ignore[no-any-return]  # numpy says Any

    def _length(self, seed: int) -> int:
        """Lognormal with median mean_length and sigma length_sigma, at least one token."""
        deviate = NormalDist().inv_cdf((self._chance(LENGTHS, seed) + 2**-25) / (1 + 2**-24))  # of inside (0, 1)
        return max(1, round(self._options.mean_length * math.exp(self._options.length_sigma * deviate)))

    def _completions(self, request: GenerationRequest, ended: Sequence[tuple[Spans, FinishReason]]) -> list[Completion]:
        """Invent the tokens and logprobs of a group's samples, all at once: sixteen times one would hold the loop."""
        stops = request.sampling.stop_token_ids
        codes_K = np.array([v.incarnation << 32 | v.policy_version for spans, _ in ended for v, _ in spans], np.uint64)
        counts_K = np.array([count for spans, _ in ended for _, count in spans], np.int64)
        spans_N = [len(spans) for spans, _ in ended]
        lengths_N = [sum(count for _, count in spans) for spans, _ in ended]
        seeds_N = [sample_seed(request.seed, index) for index in range(len(ended))]
        token_keys_T, logprob_keys_T = (
            np.repeat(hash_counters(np.repeat(np.array(keys_N, np.uint64), spans_N), codes_K), counts_K)
            for keys_N in ([self._key(purpose, seed) for seed in seeds_N] for purpose in (TOKENS, LOGPROBS))
        )
        ends_N = np.cumsum(lengths_N)
        positions_T = np.arange(token_keys_T.size) - np.repeat(ends_N - lengths_N, lengths_N)
        tokens_T = self._without(stops, hash_counters(token_keys_T, positions_T.astype(np.uint64)))
        logprobs_T = LOWEST_LOGPROB * uniforms(logprob_keys_T, positions_T)
        completions = []
        for (spans, reason), length, end in zip(ended, lengths_N, ends_N.tolist(), strict=True):
            if reason is FinishReason.STOP:
                tokens_T[end - 1] = stops[0]
            completions.append(
                Completion(
                    completion_tokens=tokens_T[end - length : end],
                    behavior_logprobs=logprobs_T[end - length : end],
                    spans=spans,
                    finish_reason=reason,
                )
            )
        return completions

    def _without(self, stops: tuple[int, ...], hashes: UInt64) -> Int32:
        """Map hashes to tokens of the vocabulary that are not stop tokens."""
        excluded = sorted({stop for stop in stops if 0 <= stop < self._options.vocab_size})
        tokens = (hashes % np.uint64(self._options.vocab_size - len(excluded))).astype(np.int32)
        for stop in excluded:  # in rising order: what lies at or above it moves up by one
            tokens += tokens >= stop
        return tokens

    def _chance(self, purpose: int, number: int) -> float:
        """Uniform in [0, 1)."""
        return uniform(self._key(purpose), number)

    def _key(self, *parts: int) -> int:
        """Fold the script's seed, a purpose and further keys into a seed."""
        return functools.reduce(hash_counter, parts, self._options.seed)


def _answer(future: asyncio.Future[T], result: T) -> None:
    if not future.done():  # else its caller was cancelled meanwhile
        future.set_result(result)
