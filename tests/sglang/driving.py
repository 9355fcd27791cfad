"""How these tests use the real SGLang: engines attached to the one that runs, weights to load, groups to ask for."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from protocol.messages import Sampling
from protocol.versions import Version
from protocol.waits import Waits
from rollout_server.config import ServerConfig
from rollout_server.engines.base import Canaries, GenerationRequest, StagedWeights
from rollout_server.engines.sglang import SGLangEngine
from tests.changes import change_some
from tests.models import VOCAB_SIZE, build_tiny_model
from tests.sglang_cpu.launch import RunningSGLang

LIMIT_S = 60.0
PROMPT = np.arange(2, 42, dtype=np.int32)


def attach(sglang: RunningSGLang, *, mode: str = "retract", room: int = 16, **chosen: Any) -> SGLangEngine:
    """An engine on the SGLang of the session, to be entered."""
    config = ServerConfig(
        engine="sglang", model=str(sglang.model), room=room, max_model_length=512, engine_url=sglang.url,
        engine_api_key=sglang.api_key, engine_admin_key=sglang.admin_key, weight_update_mode=mode, **chosen,
    )  # fmt: skip
    return SGLangEngine(config, Waits())


def run(case: Coroutine[Any, Any, None], limit_s: float = LIMIT_S) -> None:
    """Run a case under a deadline."""

    async def limited() -> None:
        async with asyncio.timeout(limit_s):
            await case

    asyncio.run(limited())


class Versions:
    """Versions of the tiny model, each with weights of its own, on disk and as models to compare with."""

    def __init__(self, directory: Path, **shape: int) -> None:
        self._directory = directory
        self._shape = shape
        self.models: dict[Version, Any] = {}

    def make(self, number: int, *, canaries: bool = False) -> StagedWeights:
        """Version 1.`number`: weights drawn by that seed."""
        from transformers import AutoModelForCausalLM

        version = Version(1, number)
        folder = self._directory / f"model-{number}"
        if version not in self.models:
            build_tiny_model(folder, seed=number, **self._shape)
            self.models[version] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            save_file(load_file(folder / "model.safetensors"), self._directory / f"{number}.safetensors")
        path = self._directory / f"{number}.safetensors"
        return StagedWeights(
            version=version,
            path=path,
            digest=hashlib.sha256(path.read_bytes()).hexdigest(),
            canaries=make_canaries(self.models[version]) if canaries else None,
        )

    def change(self, number: int, base: StagedWeights, *, share: float = 0.01) -> StagedWeights:
        """Version 1.`number`: that share of every tensor of `base` is other than there."""
        from transformers import AutoModelForCausalLM

        version, folder = Version(1, number), self._directory / f"model-{number}"
        path = self._directory / f"{number}.safetensors"
        tensors, changes = change_some(load_file(base.path), share=share, seed=number)
        save_file(tensors, path)
        shutil.copytree(self._directory / f"model-{base.version.policy_version}", folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        self.models[version] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return StagedWeights(
            version=version,
            path=path,
            digest=hashlib.sha256(path.read_bytes()).hexdigest(),
            canaries=make_canaries(self.models[version]),
            base=base.version,
            changes=changes,
        )


def make_canaries(model: Any, *, rows: int = 5, length: int = 60) -> Canaries:
    """What a learner with that model would send."""
    tokens = np.random.default_rng(7).integers(2, VOCAB_SIZE, (rows, length)).astype(np.int32)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.from_numpy(tokens).long()).logits.float(), -1)
    following = torch.from_numpy(tokens[:, 1:]).long()[..., None]
    return Canaries(tokens=tokens, logprobs=logprobs[:, :-1].gather(-1, following).squeeze(-1).numpy())


def request(
    name: str, *, generations: int = 4, length: int = 40, prompt: np.ndarray = PROMPT, **sampling: float
) -> GenerationRequest:
    """A group that runs to its length: no stop tokens."""
    return GenerationRequest(
        group_id=name,
        prompt_tokens=prompt,
        num_generations=generations,
        sampling=Sampling(max_completion_length=length, stop_token_ids=(), **sampling),  # type: ignore[arg-type]
        seed=1,
    )


def logprobs(model: Any, prompt: np.ndarray, completion: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """[T] of the completion's tokens by one forward over prompt and completion: no cache, no batch."""
    sequence = torch.from_numpy(np.concatenate([prompt, completion])).long()[None]
    with torch.no_grad():
        scores = torch.log_softmax(model(sequence).logits[0].float() / temperature, -1)
    positions = torch.arange(len(prompt) - 1, sequence.shape[1] - 1)
    return scores[positions, sequence[0, len(prompt) :]].numpy()
