"""SGLang's HTTP interface, as far as it is used: typed answers, a deadline on every call but a sample's own.

The calls are those of `sglang/srt/entrypoints/http_server.py`, 0.5.21 to 0.5.23. A call that cannot be made, or that
SGLang refuses, is an EngineFailure with what SGLang said.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import aiohttp
import msgspec

from rollout_server.engines.base import EngineFailure

CALL_S = 30.0
"""Limit of a call that does no work to speak of."""
UPDATE_S = 600.0
"""Limit of loading a version."""
KEEP_ALIVE_S = 2.0
"""SGLang closes connections that were idle for 5 s; ours must not be used just then."""
SHOWN_CHARACTERS = 500

T = TypeVar("T")
PauseMode = Literal["retract", "in_place"]


class Finish(msgspec.Struct):
    """How a sample ended."""

    type: Literal["stop", "length", "abort"]
    matched: int | str | list[int] | None = None
    message: str = ""


class Span(msgspec.Struct):
    """Output tokens [start, end) were counted under that version."""

    version: str
    start: int
    end: int


class Meta(msgspec.Struct):
    """What an answer says besides tokens. Logprobs are (value, token id, text)."""

    finish_reason: Finish
    prompt_tokens: int = 0
    cached_tokens: int = 0
    num_retractions: int = 0
    weight_versions: list[Span] = []
    output_token_logprobs: list[tuple[float | None, int, Any]] = []
    input_token_logprobs: list[tuple[float | None, int, Any]] = []


class Answer(msgspec.Struct):
    """Of /generate, without a tokenizer."""

    output_ids: list[int]
    meta_info: Meta


class Load(msgspec.Struct):
    """One scheduler's state, as it last published it; counters since its start."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_waiting_uncached_tokens: int = 0
    """Of prompts to be computed, also of the one that is computed in pieces: that one neither runs nor waits."""
    max_total_num_tokens: int = 0
    token_usage: float = 0.0
    total_prefill_uncached_tokens: int = 0
    decode_moments: list[float] | None = None
    """(steps, samples summed over the steps, ...)"""

    @property
    def num_held_reqs(self) -> int:
        """Requests that it has, at most."""
        return self.num_running_reqs + self.num_waiting_reqs + (self.num_waiting_uncached_tokens > 0)

    @property
    def tokens_decoded(self) -> float:
        """Tokens sampled since its start, but for the first of every sample; 0 where it does not say."""
        return self.decode_moments[1] if self.decode_moments and len(self.decode_moments) > 1 else 0.0


class ServerInfo(msgspec.Struct, kw_only=True):
    """What SGLang says of its configuration; the fields that matter here."""

    version: str
    model_path: str
    dtype: str
    device: str
    tp_size: int = 1
    dp_size: int = 1
    pp_size: int = 1
    context_length: int | None = None
    """Tokens of prompt and completion, where it was told; else the model's own limit."""
    quantization: str | None = None
    disable_overlap_schedule: bool = False
    enable_deterministic_inference: bool = False
    skip_tokenizer_init: bool = False
    custom_weight_loader: list[str] | None = None
    speculative_algorithm: str | None = None
    enable_lora: bool | None = None
    max_lora_rank: int | None = None


class ModelInfo(msgspec.Struct):
    """What SGLang says of its model; the field that matters here."""

    model_type: str | None = None
    """Of its config.json."""


class Ignored(msgspec.Struct):
    """An answer of which nothing is needed."""


class _Loads(msgspec.Struct):
    loads: list[Load]


class _Outcome(msgspec.Struct):
    success: bool = True
    message: str = ""
    error_message: str = ""
    per_engine_checksum: str = ""


class Client:
    """One SGLang server. Made on the event loop that uses it; `close` fails every call under way.

    Args:
        url: http://HOST:PORT
        api_key: for generation and what reads.
        admin_key: for what changes the engine.
    """

    def __init__(self, url: str, *, api_key: str, admin_key: str) -> None:
        self.url = url
        self._admin = {"Authorization": f"Bearer {admin_key}"}
        self._session = aiohttp.ClientSession(
            url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # How many at once is the admission's business.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=1 << 20,
        )

    async def close(self) -> None:
        """Drop every connection; what waits for an answer fails."""
        await self._session.close()

    async def generate(self, body: Mapping[str, Any], *, deadline_s: float | None = None) -> Answer:
        """Sample one completion (or score its prompt); see answers.py for the body."""
        return await self._call("POST", "/generate", Answer, body, deadline_s=deadline_s)

    async def abort(self, rid: str) -> None:
        """End a request; its answer then comes with what it had. An id that is not known is no error."""
        await self._call("POST", "/abort_request", Ignored, {"rid": rid}, admin=True)

    async def pause(self, mode: PauseMode) -> None:
        """Stop sampling between two steps. retract: give up the keys and values; in_place: keep them."""
        await self._call("POST", "/pause_generation", Ignored, {"mode": mode}, admin=True)

    async def resume(self) -> None:
        """Go on sampling."""
        await self._call("POST", "/continue_generation", Ignored, {"torch_empty_cache": False}, admin=True)

    async def update_weights(self, directory: str, version: str, *, flush_cache: bool) -> None:
        """Load a directory's safetensors files under that version.

        Raises:
            EngineFailure: SGLang says no; what it holds then is anybody's guess.
        """
        body = {
            "model_path": directory, "weight_version": version, "flush_cache": flush_cache,
            "abort_all_requests": False,
        }  # fmt: skip
        outcome = await self._call("POST", "/update_weights_from_disk", _Outcome, body, admin=True, deadline_s=UPDATE_S)
        if not outcome.success:
            raise EngineFailure(f"SGLang could not load weights {version}: {outcome.message}")

    async def begin_update(self) -> None:
        """Open an update in parts."""
        await self._call("POST", "/begin_weight_update", Ignored, {}, admin=True)

    async def update_from_tensor(
        self, payloads: Sequence[bytes], loader: str, *, weight_version: str | None = None, flush_cache: bool = False
    ) -> None:
        """Give each tensor-parallel rank a pickled list of named tensors, for a function that SGLang was started with.

        Raises:
            EngineFailure: SGLang says no.
        """
        body = {
            "serialized_named_tensors": [base64.b64encode(payload).decode() for payload in payloads],
            "load_format": loader, "flush_cache": flush_cache, "weight_version": weight_version,
        }  # fmt: skip
        outcome = await self._call(
            "POST", "/update_weights_from_tensor", _Outcome, body, admin=True, deadline_s=UPDATE_S
        )
        if not outcome.success:
            raise EngineFailure(f"SGLang did not take an update in parts: {outcome.message}")

    async def end_update(self) -> None:
        """Close an update in parts."""
        await self._call("POST", "/end_weight_update", Ignored, {}, admin=True)

    async def load_adapter(self, name: str, directory: str) -> None:
        """Read a LoRA adapter from a directory of peft's.

        Raises:
            EngineFailure: SGLang says no; nothing has changed.
        """
        body = {"lora_name": name, "lora_path": directory}
        outcome = await self._call("POST", "/load_lora_adapter", _Outcome, body, admin=True, deadline_s=UPDATE_S)
        if not outcome.success:
            raise EngineFailure(f"SGLang could not load adapter {name}: {outcome.error_message}")

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter that no request uses (it waits for those that do)."""
        await self._call("POST", "/unload_lora_adapter", Ignored, {"lora_name": name}, admin=True)

    async def checksum(self) -> str:
        """Hash every parameter that SGLang holds, fused and sharded as they are."""
        body = {"action": "checksum"}
        outcome = await self._call("POST", "/weights_checker", _Outcome, body, admin=True, deadline_s=UPDATE_S)
        if not outcome.per_engine_checksum:
            raise EngineFailure(f"SGLang has no checksum of its weights: {outcome.message}")
        return outcome.per_engine_checksum

    async def abort_all(self, *, keyless: bool = False) -> None:
        """End every request there is. `keyless` tries it without the admin key, to see whether anybody may."""
        await self._call("POST", "/abort_request", Ignored, {"rid": "", "abort_all": True}, admin=not keyless)

    async def loads(self, *, deadline_s: float = CALL_S) -> list[Load]:
        """Read the state of every scheduler, from shared memory: no scheduler is asked."""
        loads = (await self._call("GET", "/v1/loads", _Loads, None, deadline_s=deadline_s)).loads
        if not loads:
            raise EngineFailure(f"SGLang at {self.url}/v1/loads names no scheduler")
        return loads

    async def info(self) -> ServerInfo:
        """Read the configuration."""
        return await self._call("GET", "/server_info", ServerInfo, None)

    async def model_info(self) -> ModelInfo:
        """Read what kind of model it is."""
        return await self._call("GET", "/model_info", ModelInfo, None)

    async def _call(
        self,
        method: str,
        path: str,
        kind: type[T],
        body: Mapping[str, Any] | None,
        *,
        admin: bool = False,
        deadline_s: float | None = CALL_S,
    ) -> T:
        try:
            async with self._session.request(
                method,
                path,
                data=None if body is None else msgspec.json.encode(body),
                headers={"Content-Type": "application/json", **(self._admin if admin else {})},
                timeout=aiohttp.ClientTimeout(total=deadline_s),
            ) as response:
                content = await response.read()
        except TimeoutError as error:
            raise EngineFailure(f"SGLang at {self.url}{path} did not answer within {deadline_s:g} s") from error
        except (aiohttp.ClientError, RuntimeError) as error:  # RuntimeError: the session was closed meanwhile
            raise Disconnected(f"SGLang at {self.url}{path}: {type(error).__name__}: {error}") from error
        if response.status != 200:
            raise CallRefused(response.status, f"SGLang at {self.url}{path} says {response.status}: {_text(content)}")
        try:
            return kind() if kind is Ignored else msgspec.json.decode(content, type=kind)
        except msgspec.MsgspecError as error:
            raise EngineFailure(f"SGLang at {self.url}{path}: an answer that is none: {error}") from error


class Disconnected(EngineFailure):
    """There is no connection to SGLang, or it broke."""


class CallRefused(EngineFailure):
    """SGLang answered with a status other than 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _text(content: bytes) -> str:
    return content[:SHOWN_CHARACTERS].decode("utf-8", "replace").strip() or "nothing"
