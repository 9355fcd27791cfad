"""The fake's scheduler: samples, steps, pauses, updates. Everything happens on one event loop."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang import Faults
from sglang.few import digest, obey, read_order
from sglang.weights import INITIAL, adapted, content_of, draw, logprob

Sampled = tuple[int, float]


@dataclass(eq=False)
class Sample:
    body: dict[str, Any]
    ended: asyncio.Future[dict[str, Any]]
    """meta_info's finish_reason."""
    prefix: str = ""
    """Weights of the prompt's keys and values."""
    cached: int = 0
    retractions: int = 0
    tokens: list[Sampled] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    pending: Sampled | None = None
    """Sampled before an in_place pause, not counted yet."""

    @property
    def params(self) -> dict[str, Any]:
        return self.body["sampling_params"]

    @property
    def prompt(self) -> list[int]:
        return self.body["input_ids"]

    @property
    def held(self) -> int:
        return len(self.prompt) + len(self.tokens)


class Scheduler:
    def __init__(
        self, model: Path, *, vocab_size: int, room: int, max_tokens: int, overlap: bool, faults: Faults
    ) -> None:
        self.content, self.label = content_of(model), INITIAL
        self._held = bytearray()
        """Bytes of the file that it has loaded."""
        self._in_session = False
        self._vocab_size, self._room, self._max_tokens, self._faults = vocab_size, room, max_tokens, faults
        self._overlap = overlap
        self.running: list[Sample] = []
        self.waiting: deque[Sample] = deque()
        self.adapters: dict[str, str] = {}
        """Name -> what the weights are with it."""
        self._cache: dict[tuple[str, ...], str] = {}
        self._paused = ""
        self._moved = asyncio.Condition()
        self._rids = map(str, itertools.count())
        self.steps = self.decoded = self.prefilled = self.retracted = 0
        self.most = 0
        """Samples that it had at once."""

    async def run(self, alive: Callable[[], bool]) -> None:
        """Step while `alive`; then nothing is sampled any more, and nobody is told."""
        while alive():
            await asyncio.sleep(self._faults.token_s)
            if not self._paused and not self._faults.hang:
                self._step()
                async with self._moved:
                    self._moved.notify_all()

    async def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        body.setdefault("rid", next(self._rids))
        async with self._moved:
            await self._moved.wait_for(lambda: not self._paused)
        sample = Sample(body, asyncio.get_running_loop().create_future())
        self.waiting.append(sample)
        self.most = max(self.most, len(self.running) + len(self.waiting))
        return self._answer(sample, await sample.ended)

    def abort(self, rid: str) -> None:
        for sample in [*self.running, *self.waiting]:
            if sample.body["rid"].startswith(rid) and not sample.ended.done():
                sample.ended.set_result({"type": "abort", "message": "Aborted by AbortReq.", "status_code": None})
                self._remove(sample)

    def pause(self, mode: str) -> None:
        self._paused = mode
        if mode == "retract":
            for sample in reversed(self.running):
                self._retract(sample)
        elif self._overlap:
            self._admit()
            for sample in self.running:
                sample.pending = self._sample(sample)

    async def resume(self) -> None:
        self._paused = ""
        async with self._moved:
            self._moved.notify_all()

    async def update(self, body: dict[str, Any]) -> tuple[bool, str]:
        if not self._paused:
            async with self._moved:
                await self._moved.wait_for(lambda: not self.running and not self.waiting)
        if self._faults.fail_update:
            return False, self._faults.fail_update
        directory = Path(body["model_path"])
        self._held = bytearray(next(directory.glob("*.safetensors")).read_bytes())
        self._take(content_of(directory))
        return self._end_update(body)

    async def update_few(self, body: dict[str, Any]) -> tuple[bool, str]:
        """What /update_weights_from_tensor does with our loader. An order that fails is a success for SGLang."""
        if not self._in_session:
            return False, "update_weights_from_tensor must run between begin_weight_update() and end_weight_update()"
        if not self._paused:
            async with self._moved:
                await self._moved.wait_for(lambda: not self.running and not self.waiting)
        (payload,) = body["serialized_named_tensors"]
        order = read_order(payload)
        fault = self._faults.orders.get(order["do"])
        if fault is None:
            answer = obey(order, self._held)
            if order["do"] == "apply":
                self._take(digest(self._held))
        else:
            answer = {"failed": fault}
        if fault != "":
            Path(order["directory"], f"{order['do']}-{os.getpid()}.json").write_text(json.dumps(answer))
        return (True, "Success") if body["weight_version"] is None else self._end_update(body)

    def session(self, opens: bool) -> bool:
        """Begin or end an update in parts."""
        if self._in_session == opens:
            return False
        self._in_session = opens
        return True

    def _take(self, content: str) -> None:
        if self._faults.wrong != "stale":
            self.content = content if not self._faults.wrong else content[::-1]

    def _end_update(self, body: dict[str, Any]) -> tuple[bool, str]:
        self.label = body["weight_version"]
        if body["flush_cache"] and not self.flush():
            return False, "Weights were updated, but the cache was not flushed."
        return True, "Succeeded to update model weights."

    def load_adapter(self, body: dict[str, Any], max_rank: int | None) -> str:
        name, directory = body["lora_name"], Path(body["lora_path"])
        config = json.loads((directory / "adapter_config.json").read_text())
        if not max_rank or config["r"] > max_rank:
            return f"LoRA adapter {name} with rank {config['r']} is incompatible"
        if name in self.adapters:
            return f"{name} is already loaded"
        content = adapted(self.content, content_of(directory))
        if self._faults.wrong:  # another adapter's, or none
            content = self.content if self._faults.wrong == "stale" else content[::-1]
        self.adapters[name] = content
        return ""

    async def unload_adapter(self, name: str) -> None:
        async with self._moved:
            await self._moved.wait_for(
                lambda: all(s.body.get("lora_path") != name for s in (*self.running, *self.waiting))
            )
        del self.adapters[name]

    def _weights_of(self, sample: Sample) -> str:
        name = sample.body.get("lora_path")
        return self.adapters[name] if name else self.content

    def flush(self) -> bool:
        if self.running:
            return False
        self._cache.clear()
        return True

    @property
    def max_tokens(self) -> int:
        return self._faults.max_tokens or self._max_tokens

    @property
    def usage(self) -> float:
        return sum(sample.held for sample in self.running) / self.max_tokens

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._room and self._fits(self.waiting[0]):
            self._begin(self.waiting.popleft())

    def _step(self) -> None:
        while self._faults.lose and self.running:
            self.running.pop()
            self._faults.lose -= 1
        self._admit()
        while len(self.running) > 1 and self.usage > 1:
            self._retract(self.running[-1])
            self.retracted += 1
        for sample in tuple(self.running):
            if self._is_full(sample):
                self._end(sample, {"type": "length", "length": len(sample.tokens)})
                continue
            if self._faults.stop_at and len(sample.tokens) >= self._faults.stop_at:
                continue
            token, value = sample.pending or self._sample(sample)
            sample.pending = None
            self.decoded += bool(sample.tokens)
            sample.tokens.append((token, value))
            sample.labels.append(self._faults.foreign or self.label)
            if not sample.params.get("ignore_eos") and token in sample.params.get("stop_token_ids", ()):
                self._end(sample, {"type": "stop", "matched": token})
            elif self._is_full(sample):
                self._end(sample, {"type": "length", "length": len(sample.tokens)})
        self.steps += 1

    def _begin(self, sample: Sample) -> None:
        key = (sample.body.get("extra_key", ""), sample.body.get("lora_path") or "", *map(str, sample.prompt))
        hit = key in self._cache
        sample.prefix = self._cache.setdefault(key, self._weights_of(sample))
        sample.cached = len(sample.prompt) - 1 if hit else 0
        self.prefilled += len(sample.prompt) - sample.cached
        self.running.append(sample)

    def _fits(self, sample: Sample) -> bool:
        return not self.running or sum(s.held for s in self.running) + sample.held < self.max_tokens

    def _is_full(self, sample: Sample) -> bool:
        return len(sample.tokens) >= sample.params["max_new_tokens"]

    def _sample(self, sample: Sample) -> Sampled:
        content = self._weights_of(sample)
        token = draw(content, sample.body["rid"], len(sample.tokens), self._vocab_size)
        return token, logprob(content, sample.prefix, token)

    def _retract(self, sample: Sample) -> None:
        self.running.remove(sample)
        self.waiting.appendleft(sample)
        sample.retractions += 1

    def _end(self, sample: Sample, finish: dict[str, Any]) -> None:
        sample.ended.done() or sample.ended.set_result(finish)
        self._remove(sample)

    def _remove(self, sample: Sample) -> None:
        for samples in (self.running, self.waiting):
            if sample in samples:
                samples.remove(sample)

    def _answer(self, sample: Sample, finish: dict[str, Any]) -> dict[str, Any]:
        spans: list[dict[str, Any]] = []
        for index, label in enumerate(sample.labels):
            if not spans or spans[-1]["version"] != label:
                spans.append({"version": label, "start": index, "end": index})
            spans[-1]["end"] = index + 1
        meta: dict[str, Any] = {
            "id": sample.body["rid"], "finish_reason": finish, "prompt_tokens": len(sample.prompt),
            "cached_tokens": sample.cached, "num_retractions": sample.retractions, "weight_versions": spans,
        }  # fmt: skip
        if sample.body.get("return_logprob"):
            meta["output_token_logprobs"] = [(value, token, None) for token, value in sample.tokens]
            if sample.body.get("logprob_start_len") == 0:
                values = [logprob(self._weights_of(sample), sample.prefix, token) for token in sample.prompt]
                meta["input_token_logprobs"] = [
                    (value if i else None, token, None)
                    for i, (value, token) in enumerate(zip(values, sample.prompt, strict=True))
                ]
        return {"output_ids": [token for token, _ in sample.tokens], "meta_info": meta}
