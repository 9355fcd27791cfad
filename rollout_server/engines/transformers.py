"""The embedded default engine: one thread that owns a Hugging Face model and decodes with continuous batching.

Commands (submit, abort, load, close) are functions of the decoder that cross to the thread in a queue and run between
two decode steps; results come back with `loop.call_soon_threadsafe`. Nothing else is shared.

transformers has continuous batching of its own (`ContinuousBatchingManager`). Measured here, 5.23.0 on one CPU thread
with sdpa, logprobs on: 59 steps/s where `generate` makes 535 (100k parameters, 64 rows of 9 + 32 tokens), and 128
tokens/s against 195 (135M bfloat16, 32 rows of 43 + 16). It gives logprobs, forks a prefilled prompt and can pause with
the KV kept. It lacks: a seed per request (one `torch.multinomial` on a global generator, so batch mates change the
tokens), the tokens of a cancelled request (they are dropped), and which version sampled which token.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch
import transformers

from protocol.completions import Completion
from protocol.errors import ConfigError
from protocol.identity import tokenizer_digest
from protocol.signals import Signal
from protocol.versions import Version
from protocol.weights.adapters import MAX_RANK
from rollout_server.engines.base import (
    EngineFailure,
    EngineInfo,
    EngineStatus,
    GenerationRequest,
    LoadReport,
    StagedWeights,
)
from rollout_server.engines.changes import changes_to
from rollout_server.engines.decode import Decoder
from rollout_server.engines.live_weights import digest_of, read_weights, unique_tensors
from rollout_server.engines.merging import AdapterMerger
from rollout_server.engines.rows import Job
from rollout_server.engines.text import first_line, load_tokenizer

log = logging.getLogger(__name__)

T = TypeVar("T")
Command = Callable[[Decoder], None]
Dtype = Literal["auto", "float32", "bfloat16"]


def load_model(path: Path, *, dtype: Dtype, device: str) -> Any:
    """Load a causal language model in eval mode and check that the decoder's cache suits it.

    Raises:
        ConfigError: there is no such model, or its attention does not look at all earlier positions.
    """
    if not path.is_dir():
        raise ConfigError(f"model {path}: no such directory; give one with config.json, safetensors and a tokenizer")
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=_resolve(dtype, target), attn_implementation="sdpa", local_files_only=True
        )
        layers = transformers.DynamicCache(config=model.config).layers
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {path}: cannot be loaded: {first_line(error)}") from error
    kinds = {type(layer).__name__ for layer in layers} - {"DynamicLayer"}
    if kinds or not layers or model._is_stateful:
        found = ", ".join(sorted(kinds)) or "recurrent state"
        raise ConfigError(
            f"model {path}: {type(model).__name__} needs {found}; engine transformers serves models whose every layer"
            " attends to all earlier positions (no sliding window, no recurrent layers)"
        )
    return model.to(target).eval().requires_grad_(False)


class TransformersEngine:
    """`Engine` on a Hugging Face causal language model. See base.py for the contract.

    Args:
        model: directory of the model and its tokenizer.
        room: samples decoded at once.
        max_model_length: tokens of prompt and completion together; the model's own limit counts too.
        dtype: of the served weights; auto is bfloat16 where the hardware has it.
        device: auto is cuda where there is one.
    """

    def __init__(
        self, model: Path | str, *, room: int, max_model_length: int, dtype: Dtype = "auto", device: str = "auto"
    ) -> None:
        self._path = Path(model)
        self._room, self._max_length = room, max_model_length
        self._dtype, self._device = dtype, device
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._samples_asked = 0
        """Counted here; the decoder, on its thread, counts those that it was given."""
        self._closed = False
        self._lost = Signal()

    @property
    def info(self) -> EngineInfo:
        """What Hello says of this engine."""
        return self._info

    @property
    def live(self) -> Version | None:
        """The version that samples the next token."""
        return self._decoder.live

    @property
    def lost(self) -> Signal:
        """Notified when a copy failed half way: what it left must not sample."""
        return self._lost

    def status(self) -> EngineStatus:
        """Counters and gauges. What is on its way to the decoder's thread waits, too."""
        on_their_way = self._samples_asked - self._decoder.samples_given
        status = self._decoder.status()
        return replace(status, samples_waiting=status.samples_waiting + on_their_way)

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """Sample the group. When the caller is cancelled, so is the group.

        Raises:
            EngineFailure: the request does not fit the model, no weights are live, or the decoder failed.
        """
        self._check(request)
        answer: asyncio.Future[list[Completion]] = asyncio.get_running_loop().create_future()
        job = Job(request=request, reply=_replying(answer))
        self._put(lambda decoder: decoder.submit(job))
        self._samples_asked += request.num_generations
        try:
            return await answer
        except asyncio.CancelledError:
            self.abort(request.group_id)
            raise

    def abort(self, group_id: str) -> None:
        """End the group's samples before the next step."""
        self._commands.put(lambda decoder: decoder.abort(group_id))

    async def load_weights(self, weights: StagedWeights) -> LoadReport:
        """Read and check the file beside the decoding, then swap between two steps.

        Raises:
            EngineFailure: the file or its changes cannot be read or do not fit, and the old version still serves; or
                the copy failed, and none does.
            ConfigError: it is an adapter to another base model.
        """
        changes = None
        if weights.adapter is not None:
            staged = await asyncio.to_thread(self._merger.merge, weights.path, weights.adapter)
        else:
            changes = changes_to(weights, self.live)
            staged = await asyncio.to_thread(read_weights, weights.path, self._tensors, weights.mapped, changes)
            self._merger.forget()
        answer: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        reply = _replying(answer)

        def load(decoder: Decoder) -> None:
            if changes is not None and decoder.live != weights.base:  # a load that nobody waited for came before
                live = decoder.live
                reply(EngineFailure(f"weights {weights.version} change {weights.base}, and by now {live} is live"))
                return
            try:
                reply(decoder.load(staged, weights.version))
            except Exception as error:  # the copy failed half way: the caller hears of it, then everyone else
                reply(EngineFailure(f"weights {weights.version} could not be copied: {first_line(error)}"))
                raise

        self._put(load)
        try:
            return LoadReport(pause_s=await answer)
        except EngineFailure:
            self._merger.forget()
            if self.live is None:
                self._lost.notify()
            raise

    async def __aenter__(self) -> Self:
        """Load the model, on the thread that will own it.

        Raises:
            ConfigError: it cannot be loaded or served.
        """
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._thread = threading.Thread(target=self._run, args=(_replying(started),), name="decode", daemon=True)
        self._thread.start()
        try:
            await started
        except asyncio.CancelledError:
            self._commands.put(None)
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the thread; what it still had ends with EngineFailure."""
        self._closed = True
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _check(self, request: GenerationRequest) -> None:
        """Refuse what would disturb the other requests of a batch."""
        prompt, vocab_size = request.prompt_tokens, self._info.vocab_size
        if len(prompt) >= self._max_length:
            raise EngineFailure(
                f"group {request.group_id}: a prompt of {len(prompt)} tokens leaves no room for a completion:"
                f" the model takes {self._max_length} tokens in all (max_model_length)"
            )
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise EngineFailure(
                f"group {request.group_id}: prompt tokens {prompt.min()} to {prompt.max()}: allowed is 0 to"
                f" {vocab_size - 1}, the model's vocabulary"
            )

    def _put(self, command: Command) -> None:
        """Hand a command to the thread; one that is put before the closing None is always run."""
        if self._closed:
            raise EngineFailure("the engine is closed")
        self._commands.put(command)

    def _run(self, started: Callable[[Exception | None], None]) -> None:
        """The decode thread: the only code that touches the model."""
        try:
            self._load()
        except Exception as error:  # noqa: BLE001  # whatever it is, it belongs to whoever entered the engine
            started(error)
            return
        started(None)
        self._serve(self._decoder)

    def _load(self) -> None:
        model = load_model(self._path, dtype=self._dtype, device=self._device)
        if model.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # two processes' threads on the same cores were seen 50x slower than one each
        self._max_length = min(self._max_length, _longest_sequence(model.config) or self._max_length)
        self._tensors = unique_tensors(model)
        served: Dtype = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
        self._merger = AdapterMerger(
            self._path, lambda: unique_tensors(load_model(self._path, dtype=served, device="cpu"))
        )
        self._decoder = Decoder(model, room=self._room, max_length=self._max_length)
        self._info = EngineInfo(
            engine="transformers",
            room=self._room,
            vocab_size=model.get_input_embeddings().weight.shape[0],
            model_digest=digest_of(self._tensors),
            tokenizer_digest=tokenizer_digest(load_tokenizer(self._path).get_vocab()),
            max_lora_rank=MAX_RANK,
            max_length=self._max_length,
        )

    def _serve(self, decoder: Decoder) -> None:
        """Alternate commands and steps until the closing None."""
        while True:
            try:
                if not self._obey(decoder):
                    break
                if not decoder.idle:
                    decoder.step()
            except Exception as error:  # whatever a model can raise: callers must hear of it rather than wait for ever
                log.exception("decoding failed; every request under way fails with it")
                decoder.fail(EngineFailure(f"decoding failed: {type(error).__name__}: {first_line(error)}"))
        decoder.fail(EngineFailure("the engine was closed"))

    def _obey(self, decoder: Decoder) -> bool:
        """Run the queued commands, waiting for one when there is nothing to decode; False on the closing None."""
        while decoder.idle or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command(decoder)
        return True


def _replying(answer: asyncio.Future[T]) -> Callable[[T | Exception], None]:
    """Return the function with which the decode thread answers a future of the event loop."""
    loop = answer.get_loop()

    def settle(result: T | Exception) -> None:
        if answer.done():
            return  # its caller was cancelled meanwhile
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)

    def reply(result: T | Exception) -> None:
        loop.call_soon_threadsafe(settle, result)

    return reply


def _resolve(dtype: Dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def _longest_sequence(config: Any) -> int | None:
    """Positions the model was made for; None where it names no limit."""
    try:
        limit: int = config.get_text_config().max_position_embeddings
    except AttributeError:
        return None
    return limit
