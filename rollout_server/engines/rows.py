"""The samples being decoded, one row each, as arrays: a decode step costs no Python per row.

Rows [0, count) are in use. Only a sample's beginning and end run code of their own. Everything here is numpy on the
host; the KV cache moves the same rows on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from protocol.completions import Completion
from protocol.identity import sample_seed
from protocol.messages import FinishReason, Float32, Int32, Sampling
from protocol.versions import Version
from rollout_server.engines.base import EngineFailure, GenerationRequest
from rollout_server.engines.counters import Int64
from rollout_server.engines.kv_cache import PromptCache
from rollout_server.engines.marks import VersionMarks
from rollout_server.engines.sampler import SamplingRows

Reply = Callable[[list[Completion] | EngineFailure], None]
NO_TOKEN = -1


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through the decoder."""

    request: GenerationRequest
    reply: Reply
    """Called once, on the decoder's thread."""
    admitted: int = 0
    """Samples that have had a row."""
    prompt: PromptCache | None = None
    """Present from the prefill until the last sample is admitted or the weights change."""
    completions: dict[int, Completion] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """Samples without a row yet."""
        return self.request.num_generations - self.admitted

    def answer(self) -> None:
        """Reply with the completions, all there."""
        self.reply([self.completions[index] for index in range(self.request.num_generations)])


@dataclass(slots=True, eq=False)
class Sample:
    """Whose sample a row decodes."""

    job: Job
    index: int
    marks: VersionMarks


class Rows:
    """State of up to `room` samples, and the tokens they have drawn."""

    def __init__(self, *, room: int, max_length: int) -> None:
        self.room = room
        self.count = 0
        self.samples: list[Sample] = []
        self.tokens: Int64 = np.zeros(room, np.int64)
        """The token drawn last: the next forward's input, not in the KV cache yet."""
        self.lengths: Int64 = np.zeros(room, np.int64)
        """Tokens in the KV cache, so also the position of `tokens`."""
        self.drawn: Int64 = np.zeros(room, np.int64)
        """Tokens drawn so far; the counter of the sample's random numbers."""
        self.seeds: npt.NDArray[np.uint64] = np.zeros(room, np.uint64)
        self.limits: Int64 = np.zeros(room, np.int64)
        """Tokens after which the sample is cut."""
        self.stops: Int64 = np.full((room, 1), NO_TOKEN, np.int64)
        """[room, as many as any row has] stop tokens, filled up with NO_TOKEN."""
        self.sampling = SamplingRows.empty(room)
        self.completion_tokens: Int32 = np.zeros((room, max_length), np.int32)
        self.logprobs: Float32 = np.zeros((room, max_length), np.float32)

    def admit(self, job: Job, count: int, *, limit: int, version: Version) -> None:
        """Give the next `count` samples of a job the rows after the last one."""
        rows = slice(self.count, self.count + count)
        indices = range(job.admitted, job.admitted + count)
        self.samples += [Sample(job, index, VersionMarks(version)) for index in indices]
        self.lengths[rows] = len(job.request.prompt_tokens)
        self.drawn[rows] = 0
        self.seeds[rows] = [sample_seed(job.request.seed, index) for index in indices]
        self.limits[rows] = limit
        self._put_stops(rows, job.request.sampling)
        self.sampling.put(rows, job.request.sampling)
        self.count += count
        job.admitted += count

    def append(self, tokens: Int64, logprobs: Float32) -> tuple[Int64, npt.NDArray[np.bool_]]:
        """Record one drawn token per row.

        Returns:
            The rows that end with it, and which of those end with a stop token (the others hit their limit).
        """
        rows, drawn = np.arange(self.count), self.drawn[: self.count]
        self.completion_tokens[rows, drawn] = tokens
        self.logprobs[rows, drawn] = logprobs
        self.tokens[: self.count] = tokens
        drawn += 1
        stopped = (self.stops[: self.count] == tokens[:, None]).any(axis=1)
        ended = np.flatnonzero(stopped | (drawn >= self.limits[: self.count]))
        return ended, stopped[ended]

    def completion(self, row: int, reason: FinishReason) -> Completion:
        """What the row's sample has drawn, copied."""
        drawn = int(self.drawn[row])
        return Completion(
            completion_tokens=self.completion_tokens[row, :drawn].copy(),
            behavior_logprobs=self.logprobs[row, :drawn].copy(),
            spans=self.samples[row].marks.spans(drawn),
            finish_reason=reason,
        )

    def remove(self, ended: Int64) -> tuple[Int64, Int64]:
        """Drop rows and fill the holes from the end.

        Returns:
            (sources, targets): the rows that moved, for whoever else keeps rows.
        """
        keep = np.ones(self.count, np.bool_)
        keep[ended] = False
        kept = np.flatnonzero(keep)
        self.count = len(kept)
        targets = ended[ended < self.count]
        sources = kept[self.count - len(targets) :]
        for array in self._arrays():
            array[targets] = array[sources]
        self.sampling.move(sources, targets)
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            drawn = self.drawn[target]
            self.completion_tokens[target, :drawn] = self.completion_tokens[source, :drawn]
            self.logprobs[target, :drawn] = self.logprobs[source, :drawn]
            self.samples[target] = self.samples[source]
        del self.samples[self.count :]
        return sources, targets

    def switch(self, version: Version) -> None:
        """Every token from now on is sampled by `version`."""
        for sample, drawn in zip(self.samples, self.drawn[: self.count].tolist(), strict=True):
            sample.marks.switch(version, drawn)

    def clear(self) -> None:
        """Forget all samples."""
        self.count = 0
        self.samples.clear()

    def _arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        return (self.tokens, self.lengths, self.drawn, self.seeds, self.limits, self.stops)

    def _put_stops(self, rows: slice, sampling: Sampling) -> None:
        width = len(sampling.stop_token_ids)
        if width > self.stops.shape[1]:
            wider = np.full((self.room, width), NO_TOKEN, np.int64)
            wider[:, : self.stops.shape[1]] = self.stops
            self.stops = wider
        self.stops[rows] = NO_TOKEN
        self.stops[rows, :width] = sampling.stop_token_ids
