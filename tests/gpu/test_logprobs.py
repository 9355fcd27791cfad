"""What the engine says of its own samples, against a Hugging Face forward over the same tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from protocol.completions import Completion
from protocol.messages import Float32, Int32
from protocol.versions import Version
from tests.gpu.figures import Figures
from tests.gpu.rig import Rig, Running

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800), pytest.mark.filterwarnings("default")]
GROUPS = 4
MEAN_LIMIT = {"float32": 1e-4, "bfloat16": 0.05}
"""Of |engine's - forward's| logprob in nats, the forward in the engine's dtype; a wrong tensor makes more than 1."""


def forward_logprobs(
    model: Path, prompt: Int32, completions: list[Completion], *, device: str, dtype: str
) -> list[Float32]:
    """[T] per completion: log softmax of the logits at temperature 1, the softmax in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), local_files_only=True)
    network = network.to(device).eval()
    found: list[Float32] = []
    with torch.inference_mode():
        for completion in completions:
            sampled = torch.tensor(completion.completion_tokens, dtype=torch.int64, device=device)
            tokens = torch.cat([torch.tensor(prompt, dtype=torch.int64, device=device), sampled])
            logits = network(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1]
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            found.append(logprobs.gather(1, sampled[:, None])[:, 0].cpu().numpy())
    return found


def test_logprobs_are_those_of_a_forward(rig: Rig, running: Running, figures: Figures) -> None:
    engine = running.engine

    async def sample() -> list[list[Completion]]:
        await engine.load_weights(rig.weights(Version(1, 0), content="own"))
        return list(await asyncio.gather(*(engine.generate(rig.request(f"logprobs{i}")) for i in range(GROUPS))))

    groups = running.run(sample())
    for dtype in dict.fromkeys([rig.dtype, "float32"]):
        differences = []
        for i, group in enumerate(groups):
            prompt = rig.request(f"logprobs{i}").prompt_tokens
            expected = forward_logprobs(rig.model, prompt, group, device=rig.device, dtype=dtype)
            differences += [c.behavior_logprobs - e for c, e in zip(group, expected, strict=True)]
        d = np.abs(np.concatenate(differences).astype(np.float64))
        note = f"mean of {d.size:,} tokens, worst {d.max():.3g}"
        figures.record(f"|logprob - forward|, engine {rig.dtype}, forward {dtype}", float(d.mean()), "nats", note)
        assert np.isfinite(d).all()
        assert d.mean() < MEAN_LIMIT[rig.dtype]


def test_the_measure_tells_other_weights(rig: Rig, running: Running) -> None:
    """Else the test above would hold for anything."""
    engine = running.engine

    async def sample() -> list[Completion]:
        await engine.load_weights(rig.weights(Version(1, 1), content="other"))
        return await engine.generate(rig.request("other"))

    group = running.run(sample())
    expected = forward_logprobs(
        rig.model, rig.request("other").prompt_tokens, group, device=rig.device, dtype=rig.dtype
    )
    d = np.abs(np.concatenate([c.behavior_logprobs - e for c, e in zip(group, expected, strict=True)]))
    assert d.mean() > 2 * MEAN_LIMIT[rig.dtype]
