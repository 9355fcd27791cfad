"""What the tests run on: the device, the model, versions of its weights, and an engine that outlives one test."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from protocol.messages import Int32, Sampling
from protocol.versions import Version
from protocol.waits import Waits
from rollout_server.config import ServerConfig
from rollout_server.engines.base import GenerationRequest, StagedWeights
from rollout_server.engines.choice import read_machine

T = TypeVar("T")
MODEL_VARIABLE = "HEADWAY_GPU_MODEL"
DEVICE_VARIABLE = "HEADWAY_GPU_DEVICE"
QWEN3_0_6B: dict[str, Any] = {
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096,
    "dtype": "bfloat16", "initializer_range": 0.06,
}  # fmt: skip
"""Wide random weights: logits spread by about 2, so that rounding shows as it would in a trained model."""
START_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much work the tests do."""

    room: int
    generations: int
    length: int
    rounds: int


SIZES = {
    "cuda": Size(room=128, generations=16, length=256, rounds=5),
    "cpu": Size(room=8, generations=4, length=48, rounds=3),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    device: str
    model: Path
    directory: Path
    """For versions of the weights."""
    vocab_size: int

    @property
    def size(self) -> Size:
        return SIZES[self.device]

    @property
    def dtype(self) -> str:
        return "float32" if self.device == "cpu" else "bfloat16"

    def config(self, **changes: Any) -> ServerConfig:
        """The server's configuration; the model shares the device with the tests' own forward."""
        options: dict[str, Any] = {
            "model": str(self.model), "engine": "sglang", "device": self.device, "dtype": self.dtype,
            "room": self.size.room, "max_model_length": 512, "engine_start_s": START_S,
        }  # fmt: skip
        options["sglang"] = {"mem-fraction-static": 0.1 if self.device == "cpu" else 0.5}
        return ServerConfig(**(options | changes))

    def request(self, group: str, *, generations: int | None = None, length: int | None = None) -> GenerationRequest:
        """A group of a prompt of its own, without stop tokens: every completion has `length` tokens."""
        return GenerationRequest(
            group_id=group,
            prompt_tokens=draw_prompt(group, self.vocab_size),
            num_generations=generations or self.size.generations,
            sampling=Sampling(max_completion_length=length or self.size.length, stop_token_ids=()),
            seed=0,
        )

    def weights(self, version: Version, *, content: str) -> StagedWeights:
        """A version: content `own` are the model's weights, any other name gives others, always the same."""
        path = self.directory / f"{version}.safetensors"
        if not path.exists():
            write_weights(self.model, path, content=content)
        return StagedWeights(version=version, path=path, digest=content)


def missing(device: str) -> str | None:
    """Why the tests cannot run here, or None."""
    if device not in SIZES:
        return f"{DEVICE_VARIABLE}={device}: allowed are cuda and cpu"
    machine = read_machine()
    if device == "cuda" and not machine.has_cuda:
        return f"no CUDA device ({DEVICE_VARIABLE}=cpu tries these tests without, see tests/gpu/README.md)"
    if machine.sglang_version is None:
        return "sglang is not installed in this environment"
    if device == "cpu" and not machine.allows_cpu_sglang:
        return "SGLang's CPU engine is off: run these with .venv-sglang/bin/python (make sglang)"
    return None


def make_rig(directory: Path) -> Rig:
    """Find or build the model."""
    from transformers import AutoConfig

    from tests.models import build_tiny_model

    device = os.environ.get(DEVICE_VARIABLE, "cuda")
    given = os.environ.get(MODEL_VARIABLE)
    if given:
        model = Path(given)
    elif device == "cpu":
        model = build_tiny_model(directory / "model")
    else:
        model = build_tiny_model(directory / "model", **QWEN3_0_6B)
    config = AutoConfig.from_pretrained(model, local_files_only=True).get_text_config()
    return Rig(device=device, model=model, directory=directory, vocab_size=config.vocab_size)


def draw_prompt(name: str, vocab_size: int, length: int = 24) -> Int32:
    """[length] random tokens that follow from the name; the first few ids, often special, are left out."""
    generator = np.random.default_rng(list(name.encode()))
    return generator.integers(5, vocab_size, length, np.int32)


def write_weights(model: Path, path: Path, *, content: str) -> None:
    """Write the model's tensors into one file; unless they are its own, each is moved by a twentieth."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    if content != "own":
        generator = torch.Generator().manual_seed(int.from_bytes(content.encode()[:7]))
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            tensors[name] = (tensor * (1 + 0.05 * noise)).to(tensor.dtype)
    save_file(tensors, path)


class Running:
    """An engine on an event loop in a thread of its own, entered and left by one task, as the server does it."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._up: Future[None] = Future()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="engine")
        self._thread.start()
        self._up.result()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def run(self, work: Coroutine[Any, Any, T], limit_s: float = 300.0) -> T:
        """Run a coroutine where the engine lives; return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(limit_s)

    async def _live(self) -> None:
        from rollout_server.engines.sglang import SGLangEngine

        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with SGLangEngine(self._config, Waits()) as self.engine:
                self._up.set_result(None)
                await self._end.wait()
        except BaseException as error:  # whoever waits for the engine must hear of it
            if self._up.done():
                raise
            self._up.set_exception(error)
