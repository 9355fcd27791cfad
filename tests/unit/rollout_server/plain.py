"""The plain computation that engines are compared to: one forward, no cache, no batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from protocol.completions import Completion
from protocol.messages import Sampling
from protocol.versions import Version
from rollout_server.engines.base import GenerationRequest
from tests.models import EOS_ID, encode

V0, V1 = Version(1, 0), Version(1, 1)
STOPS = (EOS_ID, *encode("xyz"))


def request(
    group: str = "g",
    *,
    prompt: str = "12+34=",
    seed: int = 1,
    generations: int = 3,
    length: int = 30,
    stops: tuple[int, ...] = STOPS,
    **sampling: float,
) -> GenerationRequest:
    return GenerationRequest(
        group_id=group,
        prompt_tokens=np.array(encode(prompt), np.int32),
        num_generations=generations,
        sampling=Sampling(max_completion_length=length, stop_token_ids=stops, **sampling),  # type: ignore[arg-type]
        seed=seed,
    )


def plain_logprobs(model: Any, prompt: np.ndarray, completion: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """[L] by one forward over prompt and completion, no cache."""
    sequence = torch.from_numpy(np.concatenate([prompt, completion])).long()[None]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(sequence).logits[0].float() / temperature, -1)
    steps = torch.arange(len(prompt) - 1, sequence.shape[1] - 1)
    return logprobs[steps, sequence[0, len(prompt) :]].numpy()


def plain_model(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def check_against_plain(model: Any, wanted: GenerationRequest, group: list[Completion]) -> None:
    for completion in group:
        expected = plain_logprobs(
            model, wanted.prompt_tokens, completion.completion_tokens, wanted.sampling.temperature or 1.0
        )
        np.testing.assert_allclose(completion.behavior_logprobs, expected, atol=1e-5)
