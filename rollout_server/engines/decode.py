"""Continuous batching at sample level over a Hugging Face causal language model.

    submit -> waiting jobs -> (prompt prefilled once) -> rows -> step, step, ... -> completions

A sample joins as soon as a row is free and leaves with its last token; every step runs on exactly the rows in use.
Synchronous and single-threaded: the engine calls it from the one thread that owns the model. A sample's tokens depend
on the weights, its prompt and its seed alone, up to float noise; the weights may change between any two steps, and the
KV of samples under way is kept then (their later tokens are drawn by the new weights over keys of the old ones).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from protocol.completions import Completion
from protocol.messages import FinishReason
from protocol.versions import Version
from rollout_server.engines.base import EngineFailure, EngineStatus, empty_completion
from rollout_server.engines.counters import Int64, uniforms
from rollout_server.engines.kv_cache import PromptCache, RowCache
from rollout_server.engines.live_weights import Staged, copy_weights, unique_tensors
from rollout_server.engines.rows import Job, Rows
from rollout_server.engines.sampler import sample

PREFILL_TOKENS = 512
PREFILL_PROMPTS = 8
"""Waiting prompts are prefilled together up to these sizes, padding included: a small model's forward costs the same
for one as for eight. One prompt of any length always goes."""


class Decoder:
    """Samples jobs on `model`. See the module's text; every method belongs to one thread, `status` excepted.

    Args:
        model: a causal language model with plain attention over all earlier positions, in eval mode.
        room: rows, that is samples decoded at once.
        max_length: tokens of prompt and completion together.
        clock: monotonic seconds.
    """

    def __init__(
        self, model: Any, *, room: int, max_length: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._model = model
        self._device: torch.device = model.device
        self._tensors = unique_tensors(model)
        self._max_length = max_length
        self._clock = clock
        self._cache = RowCache(room=room, max_length=max_length)
        self._rows = Rows(room=room, max_length=max_length)
        self._waiting: deque[Job] = deque()
        self._jobs: set[Job] = set()
        self._answers: list[Job] = []
        self.live: Version | None = None
        self.prompts_prefilled = 0
        self.samples_given = 0
        """By `submit`."""
        self._samples_waiting = 0
        self._tokens_generated = self._tokens_held = 0
        self._busy_s = self._paused_s = self._occupancy_s = 0.0

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._jobs

    def status(self) -> EngineStatus:
        """Counters and gauges. Safe from any thread: plain numbers, each written by the decoder's thread alone."""
        return EngineStatus(
            samples_running=self._rows.count,
            samples_waiting=self._samples_waiting,
            tokens_generated=self._tokens_generated,
            tokens_held=self._tokens_held,
            busy_s=self._busy_s,
            paused_s=self._paused_s,
            occupancy_s=self._occupancy_s,
        )

    def submit(self, job: Job) -> None:
        """Queue a job behind those waiting, or refuse it at once while no weights are live."""
        if self.live is None:
            job.reply(EngineFailure(f"group {job.request.group_id}: no weights are live yet: load_weights first"))
        else:
            self._jobs.add(job)
            self._waiting.append(job)
            self._samples_waiting += job.waiting
        self.samples_given += job.request.num_generations

    @torch.inference_mode()
    def abort(self, group_id: str) -> None:
        """End the group's samples with what they have."""
        for job in [job for job in self._waiting if job.request.group_id == group_id]:
            self._waiting.remove(job)
            self._samples_waiting -= job.waiting
            for index in range(job.admitted, job.request.num_generations):
                self._finish(job, index, empty_completion())
        mine = [s.job.request.group_id == group_id for s in self._rows.samples]
        if any(mine):
            self._retire(np.flatnonzero(mine), [FinishReason.ABORT] * sum(mine))
        self._answer()

    def fail(self, error: EngineFailure) -> None:
        """Answer every job that is not done with `error`, and start afresh."""
        self._answer()
        jobs, self._jobs = self._jobs, set()
        self._waiting.clear()
        self._samples_waiting = self._tokens_held = 0
        self._rows.clear()
        for job in jobs:
            job.reply(error)

    @torch.inference_mode()
    def load(self, staged: Staged, version: Version) -> float:
        """Swap checked weights in, keeping all samples under way; return the seconds it took."""
        started = self._clock()
        try:
            copy_weights(staged, self._tensors)
        except BaseException:
            self.live = None  # perhaps half of it is copied: nothing may be sampled from that (I5)
            raise
        self._rows.switch(version)
        for job in self._waiting:
            job.prompt = None  # its logits and keys are the old version's
        self.live = version
        pause_s = self._clock() - started
        self._paused_s += pause_s
        self._occupancy_s += pause_s * self._rows.count / self._rows.room
        return pause_s

    @torch.inference_mode()
    def step(self) -> None:
        """Admit what fits, draw one token for every row, and let go of the samples that end."""
        started, decoding, rows = self._clock(), self._rows.count, self._rows
        prompt_logits = self._admit()
        logits = [self._forward(decoding), *prompt_logits] if decoding else prompt_logits
        drawn, logprobs = sample(
            torch.cat(logits) if len(logits) > 1 else logits[0],
            uniforms(rows.seeds[: rows.count], rows.drawn[: rows.count]),
            rows.sampling.head(rows.count),
        )
        running = rows.count
        ended, stopped = rows.append(drawn.cpu().numpy(), logprobs.cpu().numpy())
        self._tokens_generated += running
        self._tokens_held += running
        if len(ended):
            self._retire(ended, [FinishReason.STOP if hit else FinishReason.LENGTH for hit in stopped.tolist()])
        elapsed = self._clock() - started
        self._busy_s += elapsed
        self._occupancy_s += elapsed * running / rows.room
        self._answer()

    def _admit(self) -> list[Tensor]:
        """Fill free rows from the waiting jobs, in order.

        Returns:
            [samples, V] for each job that got rows: the logits of their first token.
        """
        logits: list[Tensor] = []
        assert self.live is not None  # no job is taken without
        while self._waiting and self._rows.count < self._rows.room:
            job = self._waiting[0]
            prompt = job.prompt or self._prefill()
            count = min(job.waiting, self._rows.room - self._rows.count)
            limit = min(job.request.sampling.max_completion_length, self._max_length - prompt.length)
            self._cache.admit(prompt, self._rows.count, count)
            self._rows.admit(job, count, limit=limit, version=self.live)
            self._samples_waiting -= count
            logits.append(prompt.logits.expand(count, -1))
            if not job.waiting:
                self._waiting.popleft()
                job.prompt = None
        return logits

    def _prefill(self) -> PromptCache:
        """Run the first waiting job's prompt through the model, and those behind it that fit; return the first's."""
        jobs: list[Job] = []
        longest = 0
        for job in list(self._waiting)[:PREFILL_PROMPTS]:
            longest = max(longest, len(job.request.prompt_tokens))
            if jobs and (job.prompt is not None or longest * (len(jobs) + 1) > PREFILL_TOKENS):
                break
            jobs.append(job)
        prompts = self._prefill_prompts([job.request.prompt_tokens for job in jobs])
        for job, prompt in zip(jobs, prompts, strict=True):
            job.prompt = prompt
        self.prompts_prefilled += len(jobs)
        return prompts[0]

    def _prefill_prompts(self, prompts: list[Any]) -> list[PromptCache]:
        """One forward over prompts padded on the right: causal attention never looks at what comes later."""
        lengths = [len(prompt) for prompt in prompts]
        padded = np.zeros((len(prompts), max(lengths)), np.int64)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        ends, which_end = np.unique(np.array(lengths) - 1, return_inverse=True)
        cache = DynamicCache()
        output = self._model(
            input_ids=self._to_device(padded),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=self._to_device(ends),  # the last position of any prompt, not of all: [b, ends, V]
        )
        return [
            PromptCache(
                keys=[layer.keys[i, :, :length] for layer in cache.layers],
                values=[layer.values[i, :, :length] for layer in cache.layers],
                logits=output.logits[i, end],
            )
            for i, (length, end) in enumerate(zip(lengths, which_end.tolist(), strict=True))
        ]

    def _forward(self, count: int) -> Tensor:
        """Feed the last token of the first `count` rows; [count, V] logits."""
        lengths = self._rows.lengths[:count]
        positions = self._to_device(lengths)
        output = self._model(
            input_ids=self._to_device(self._rows.tokens[:count])[:, None],
            position_ids=positions[:, None],
            attention_mask=self._cache.begin_step(positions, int(lengths.max()) + 1),
            past_key_values=self._cache,
            use_cache=True,
        )
        lengths += 1
        logits: Tensor = output.logits
        return logits[:, -1]

    def _retire(self, ended: Int64, reasons: list[FinishReason]) -> None:
        for row, reason in zip(ended.tolist(), reasons, strict=True):
            one = self._rows.samples[row]
            self._finish(one.job, one.index, self._rows.completion(row, reason))
        sources, targets = self._rows.remove(ended)
        if len(sources):
            longest = int(self._rows.lengths[targets].max())
            self._cache.move(self._to_device(sources), self._to_device(targets), longest)

    def _finish(self, job: Job, index: int, completion: Completion) -> None:
        job.completions[index] = completion
        if len(job.completions) == job.request.num_generations:
            self._jobs.discard(job)
            self._answers.append(job)

    def _answer(self) -> None:
        """Reply to the jobs that are done, last of all: who hears of it finds rows and counters up to date."""
        for job in self._answers:
            self._tokens_held -= sum(len(completion.completion_tokens) for completion in job.completions.values())
            job.answer()
        self._answers.clear()

    def _to_device(self, array: Int64) -> Tensor:
        """On a CPU a view, elsewhere a copy."""
        return torch.from_numpy(array).to(self._device)
