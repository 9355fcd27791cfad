"""What tests need to drive engines on the fake SGLang: configurations, weights, and the fake's own controls."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from protocol.completions import Completion
from protocol.messages import Sampling
from protocol.versions import Version
from protocol.waits import Waits
from rollout_server.config import ServerConfig
from rollout_server.engines.base import Canaries, GenerationRequest, StagedWeights
from rollout_server.engines.sglang import SGLangEngine
from rollout_server.engines.sglang.host import free_port
from rollout_server.engines.sglang.sparse import LOADER
from tests.fake_sglang.sglang.weights import logprob

PATH = Path(__file__).parent
"""For PYTHONPATH."""
V0, V1, V2, V3 = (Version(1, number) for number in range(4))
API_KEY, ADMIN_KEY = "the api key", "the admin key"
ROOM = 8


def run(case: Coroutine[Any, Any, None], limit_s: float = 30.0) -> None:
    async def limited() -> None:
        async with asyncio.timeout(limit_s):
            await case
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks were left: {left}"

    asyncio.run(limited())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@dataclass
class Fake:
    """The controls of a fake at a port; it may restart behind it."""

    port: int

    async def tell(self, **faults: Any) -> dict[str, Any]:
        """POST /fake; an empty answer when it dies of it."""
        content = json.dumps(faults).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(f"POST /fake HTTP/1.1\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
            head = await reader.readuntil(b"\r\n\r\n")
            answer: dict[str, Any] = json.loads(
                await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split()[0]))
            )
            return answer
        except (asyncio.IncompleteReadError, ConnectionError):
            return {}
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while not condition(told := await self.tell()):
            await asyncio.sleep(0.001)
        return told

    async def until_held(self, path: str) -> None:
        """Until a call of `path` is kept waiting by the fault `hold`."""
        await self.until(lambda told: told["held"].get(path, 0) > 0)


def make_config(model: Path, **changes: Any) -> ServerConfig:
    fields: dict[str, Any] = {
        "model": str(model), "engine": "sglang", "device": "cpu", "dtype": "float32", "room": ROOM,
        "max_model_length": 256, "engine_start_s": 20.0,
    }  # fmt: skip
    return ServerConfig(**{**fields, **changes})


@contextlib.asynccontextmanager
async def child_engine(model: Path, **changes: Any) -> AsyncIterator[tuple[SGLangEngine, Fake]]:
    """An engine that runs the fake as its child. PYTHONPATH must lead to it: fixture `fake_path`."""
    port = free_port(0)
    sglang = {"port": port, **changes.pop("sglang", {})}
    async with SGLangEngine(make_config(model, sglang=sglang, **changes), Waits()) as engine:
        yield engine, Fake(port)


@contextlib.contextmanager
def running_fake(
    model: Path, port: int, *, api_key: str = API_KEY, admin_key: str = ADMIN_KEY, max_lora_rank: int = 0, **faults: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A fake that somebody else runs."""
    flags = {
        "model-path": model, "host": "127.0.0.1", "port": port, "dtype": "float32", "device": "cpu",
        "context-length": 256, "max-running-requests": ROOM, "max-total-tokens": 4096, "api-key": api_key,
        "admin-api-key": admin_key, "max-lora-rank": max_lora_rank,
    }  # fmt: skip
    words = [word for name, value in flags.items() if value for word in (f"--{name}", str(value))]
    words += [] if max_lora_rank else ["--custom-weight-loader", LOADER]
    words += ["--enable-lora"] * bool(max_lora_rank)
    environment = {**os.environ, "PYTHONPATH": str(PATH), "FAKE_SGLANG": json.dumps(faults)}
    command = [sys.executable, "-m", "sglang.launch_server", *words]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            Path(f"/dev/shm/sglang_fake_{process.pid}").unlink(missing_ok=True)


def make_weights(
    model: Path, directory: Path, version: Version, *, content: int | None = None, canaries: bool = True
) -> StagedWeights:
    """The model's weights with one number changed, by version unless `content` says otherwise."""
    number = hash(version) % 1000 if content is None else content
    file = directory / f"{version}.safetensors"
    file.write_bytes((model / "model.safetensors").read_bytes()[:-4] + struct.pack("<f", number))
    return StagedWeights(
        version=version,
        path=file,
        digest=content_of(file),
        canaries=make_canaries(content_of(file)) if canaries else None,
    )


def content_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make_canaries(content: str) -> Canaries:
    """Canaries whose logprobs are those of the weights `content`."""
    tokens = np.arange(2, 14, dtype=np.int32).reshape(2, 6)
    logprobs = [[logprob(content, content, token) for token in row[1:]] for row in tokens.tolist()]
    return Canaries(tokens=tokens, logprobs=np.array(logprobs, np.float32))


def request(
    group: str = "g", *, generations: int = 4, length: int = 12, prompt: int = 5, stops: tuple[int, ...] = ()
) -> GenerationRequest:
    return GenerationRequest(
        group_id=group,
        prompt_tokens=np.arange(2, 2 + prompt, dtype=np.int32) % 40,
        num_generations=generations,
        sampling=Sampling(max_completion_length=length, stop_token_ids=stops),
        seed=7,
    )


def is_pure(
    completion: Completion, weights: StagedWeights, *, first: int = 0, end: int | None = None, prompt: str = ""
) -> bool:
    """Whether all logprobs of tokens [first, end) are of those weights, with the prompt computed under `prompt`.

    Args:
        completion: of the fake.
        weights: that sampled it.
        first: token.
        end: token; the completion's unless given.
        prompt: content digest; the weights' own unless given.
    """
    content = content_of(weights.path)
    expected = [
        logprob(content, prompt or content, token) for token in completion.completion_tokens[first:end].tolist()
    ]
    return bool(np.allclose(completion.behavior_logprobs[first:end], expected, atol=1e-6))
